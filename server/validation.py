"""Scoring a model on the public validation split, at the server."""

from typing import Any

import numpy as np

from common.corpus import labelled
from common.dataset import FederatedDataset
from common.device import Compute
from common.inference import predict
from common.metrics import scores, tally
from common.progress import Progress


def validate(model: Any, data: FederatedDataset, compute: Compute, progress: Progress) -> dict[str, float]:
    """Scores on each public validation split, and the number of examples of the first as ``n``.

    The first split has the metrics' plain names; a further one adds its own, e.g.
    ``accuracy_mismatched`` for MNLI. Empty when there is no validation split.
    """
    found: dict[str, float] = {}
    for name, split in data.validation.items():
        labels = np.asarray(split.labels)
        rows = np.flatnonzero(labelled(labels))
        with progress.step(f"score {name.replace('_', ' ')}", len(rows)) as step:
            logits = predict(model, split.tokens, rows, compute, step.advance)
        result = scores(data.task.score_spec, tally(data.task.score_spec, logits, labels[rows]))
        if not found:
            found = result
        else:
            found |= {f"{metric}_{name.removeprefix('validation_')}": result[metric] for metric in data.task.metrics}
    return found
