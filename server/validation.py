"""Scoring a model on the public validation split, at the server."""

from collections.abc import Callable
from typing import Any

import numpy as np

from common.corpus import labelled
from common.dataset import FederatedDataset
from common.device import Compute
from common.inference import predict
from common.metrics import scores, tally
from common.progress import Progress, Step


def validate(
    model: Any,
    data: FederatedDataset,
    compute: Compute,
    progress: Progress,
    tick: Callable[[], None] = lambda: None,
) -> dict[str, float]:
    """Scores on each public validation split, and the number of examples of the first as ``n``.

    The first split has the metrics' plain names; a further one adds its own, e.g.
    ``accuracy_mismatched`` for MNLI. Empty when there is no validation split. ``tick`` is called often and may
    raise to stop.
    """
    found: dict[str, float] = {}
    for name, split in data.validation.items():
        labels = np.asarray(split.labels)
        rows = np.flatnonzero(labelled(labels))
        with progress.step(f"score {name.replace('_', ' ')}", len(rows)) as step:

            def advance(amount: int, step: Step = step) -> None:
                tick()
                step.advance(amount)

            logits = predict(model, split.tokens, rows, compute, advance)
        result = scores(data.task.score_spec, tally(data.task.score_spec, logits, labels[rows]))
        if not found:
            found = result
        else:
            found |= {f"{metric}_{name.removeprefix('validation_')}": result[metric] for metric in data.task.metrics}
    return found
