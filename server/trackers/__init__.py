"""Where else a run's lines go when a key of `tracking` asks for it: TensorBoard, MLflow, Weights & Biases.

What a tracker gets is the numbers of metrics.jsonl, line by line, and nothing else of what was learnt or who was there.
"""
