"""Federated learning by outputs on public text alone: what a client says of a text, and what all of them say together.

With f_k the student of client k, z_k(x) = f_k(x) its logits on a public text x, and K clients in the round:

    fedmd   v_k = z_k,            consensus = 1/K sum_k v_k
            Li and Wang 2019, https://arxiv.org/abs/1910.03581, Algorithm 1 with c_k = 1/K
    ds-fl   v_k = softmax(z_k),   consensus = softmax((1/K sum_k v_k) / 0.1)
            Itahara et al. 2021, https://arxiv.org/abs/2008.06180, entropy reduction aggregation with their T = 0.1

Where an example has any number of classes each class is a question with two answers, p and 1 - p: ds-fl then says
sigmoid(z_k), and the consensus is the same entropy reduction of the two, sigmoid((2 mean - 1) / 0.1).

A student learns from a consensus as from any teacher, by the soft loss of `common.losses`. What it learns from is
handed on as logits: for ds-fl these are what stands in the softmax or the sigmoid above, which at temperature 1 give
the consensus, and the loss is the paper's cross-entropy less a constant. For fedmd the temperature is
distill.temperature; the paper leaves the distance open and its code takes the absolute error of logits.

A round t: the clients of the cohort, each from the student that it has on its own disk, *digest* the consensus of round
t - 1 (there is none in round 1), then *revisit* their own text with the usual losses, then say v_k for the public texts
of round t. The server averages, and its own student learns from the consensus too. No weight ever travels. The sums of
v_k are exact (`common.fixed_point`) and every client counts the same.
"""

import numpy as np
from numpy.typing import NDArray

from common.config import Config

SHARP = 0.1  # the temperature of the entropy reduction


def vote(strategy: str, logits: NDArray[np.float32], *, multi_label: bool = False) -> NDArray[np.float32]:
    """What a client says of some texts, from its student's logits, both (n, num_labels)."""
    if strategy == "fedmd":
        return logits
    exact = logits.astype(np.float64)
    if multi_label:
        return np.asarray(np.exp(-np.logaddexp(0.0, -exact)), dtype=np.float32)
    shifted = np.exp(exact - exact.max(axis=1, keepdims=True))
    return np.asarray(shifted / shifted.sum(axis=1, keepdims=True), dtype=np.float32)


def consensus(strategy: str, mean: NDArray[np.float64], *, multi_label: bool = False) -> NDArray[np.float32]:
    """The logits to learn from, from the clients' mean vote, both (n, num_labels)."""
    if strategy == "fedmd":
        return np.asarray(mean, dtype=np.float32)
    return np.asarray((2.0 * mean - 1.0 if multi_label else mean) / SHARP, dtype=np.float32)


def temperature(config: Config) -> float:
    """At which a student learns from the consensus."""
    return config.distill.temperature if config.server.strategy == "fedmd" else 1.0
