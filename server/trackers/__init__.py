"""Where else a run's lines go when a key of `tracking` asks for it: TensorBoard, MLflow, Weights & Biases.

A tracker gets the numbers of metrics.jsonl, line by line; the two services get the run's name too and, where nothing is
protected, its keys. It gets no text, no weights, and nothing of clients that metrics.jsonl does not say.
"""
