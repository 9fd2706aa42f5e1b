"""Scoring on data that stays on the client: predictions become statistics that can only be added."""

import numpy as np
from numpy.typing import NDArray

from common.corpus import labelled
from common.dataset import Split
from common.metrics import ScoreSpec, scores, tally


def held_out_statistics(
    spec: ScoreSpec, data: Split, rows: NDArray[np.int64], logits: NDArray[np.float32]
) -> tuple[NDArray[np.int64], float | None]:
    """Additive statistics of predictions on a client's labelled held-out rows, and its own headline score.

    Args:
        logits: (len(rows), num_labels).

    Returns:
        The statistics vector (see `common.metrics`), and the score, None where it is undefined.
    """
    labels = np.asarray(data.labels[rows])
    known = labelled(labels)
    statistics = tally(spec, logits[known], labels[known])
    score = scores(spec, statistics)[spec.metrics[0]]
    return statistics, None if np.isnan(score) else float(score)
