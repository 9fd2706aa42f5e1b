"""What the clients' shards hold, where the server has the private text: in a simulation."""

import json
from itertools import pairwise
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from common.dataset import FederatedDataset
from common.store import write_atomically
from server.preparation import Federation
from server.run_folder import SHARDS

BINS = 5  # of a score that is predicted
UNLABELLED = "unlabelled"


def label_counts(data: FederatedDataset) -> tuple[list[str], NDArray[np.int64]]:
    """Names of the classes, and (clients, classes) private examples of each, held-out ones included.

    Of a score that is predicted: of equal ranges from the least to the greatest score. With several labels an example
    counts for each of its own. Examples without a label are a last class, where there are some.

    Raises:
        ValueError: the private rows are not here but with the clients.
    """
    shards = data.shards
    sizes = np.diff(shards.starts)
    if len(shards.order) != sizes.sum():
        raise ValueError("the private examples are with the clients")
    labels = np.asarray(data.train.labels[shards.order])
    owners = np.repeat(np.arange(len(sizes)), sizes)
    names, classes, unlabelled = _classes(data, labels)
    counts = np.zeros((len(sizes), len(names) + 1), dtype=np.int64)
    for number, members in enumerate((*classes, unlabelled)):
        counts[:, number] = np.bincount(owners[members], minlength=len(sizes))
    if unlabelled.any():
        return [*names, UNLABELLED], counts
    return names, counts[:, :-1]


def _classes(
    data: FederatedDataset, labels: NDArray[np.generic]
) -> tuple[list[str], list[NDArray[np.bool_]], NDArray[np.bool_]]:
    """Names, (n,) who is in each, and (n,) who is in none because nothing is known."""
    task = data.task
    if task.multi_label:
        return list(task.labels), [labels[:, number] == 1 for number in range(len(task.labels))], labels[:, 0] == -1
    if not task.regression:
        return list(task.labels), [labels == number for number in range(len(task.labels))], labels == -1
    scores = np.asarray(labels, dtype=np.float64)
    known = np.isfinite(scores)
    edges = np.histogram_bin_edges(scores[known], BINS)
    place = np.clip(np.searchsorted(edges, scores, side="right") - 1, 0, BINS - 1)
    names = [f"{low:.4g} to {high:.4g}" for low, high in pairwise(edges)]
    return names, [known & (place == number) for number in range(BINS)], ~known


def may_be_told(federation: Federation) -> bool:
    """Whether what a client's shard holds is nobody's secret: a simulation in which nothing is protected."""
    privacy = federation.config.privacy
    return not federation.homes and privacy.unit == "none" and not privacy.secure_aggregation


def write_shards(federation: Federation, run: Path) -> None:
    """Write ``shards.json`` into a run folder, where that may be told: sizes of the shards, by client and class."""
    if may_be_told(federation):
        names, counts = label_counts(federation.data)
        sizes = np.diff(federation.data.shards.starts)  # with several labels an example is in several counts, or none
        found = {"classes": names, "counts": counts.tolist(), "sizes": sizes.tolist()}
        write_atomically(run / SHARDS, (json.dumps(found) + "\n").encode())
