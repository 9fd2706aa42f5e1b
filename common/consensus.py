"""Federated learning by outputs on public text alone: what a client says of a text, and what all of them say together.

With f_k the student of client k, z_k(x) = f_k(x) its logits on a public text x, and K clients in the round:

    fedmd   v_k = z_k,            consensus = 1/K sum_k v_k
            Li and Wang 2019, https://arxiv.org/abs/1910.03581, Algorithm 1 with c_k = 1/K
    ds-fl   v_k = softmax(z_k),   consensus = softmax((1/K sum_k v_k) / 0.1)
            Itahara et al. 2021, https://arxiv.org/abs/2008.06180, entropy reduction aggregation with their T = 0.1

A student learns from a consensus as from any teacher, by `common.losses.soft_targets`. What it learns from is handed on
as logits: for ds-fl these are (1/K sum_k v_k) / 0.1, whose softmax at temperature 1 is the consensus, and the loss is
the paper's cross-entropy less a constant. For fedmd the temperature is distill.temperature; the paper leaves the
distance open and its code takes the absolute error of logits.

A round t: the clients of the cohort, each from the student that it has on its own disk, *digest* the consensus of round
t - 1 (there is none in round 1), then *revisit* their own text with the usual losses, then say v_k for the public texts
of round t. The server averages, and its own student learns from the consensus too. No weight ever travels. The sums of
v_k are exact (`common.fixed_point`) and every client counts the same.
"""

import numpy as np
from numpy.typing import NDArray

from common.config import Config

SHARP = 0.1  # the temperature of the entropy reduction


def vote(strategy: str, logits: NDArray[np.float32]) -> NDArray[np.float32]:
    """What a client says of some texts, from its student's logits, both (n, num_labels)."""
    if strategy == "fedmd":
        return logits
    shifted = np.exp(logits.astype(np.float64) - logits.max(axis=1, keepdims=True))
    return np.asarray(shifted / shifted.sum(axis=1, keepdims=True), dtype=np.float32)


def consensus(strategy: str, mean: NDArray[np.float64]) -> NDArray[np.float32]:
    """The logits to learn from, from the clients' mean vote, both (n, num_labels)."""
    return np.asarray(mean if strategy == "fedmd" else mean / SHARP, dtype=np.float32)


def temperature(config: Config) -> float:
    """At which a student learns from the consensus."""
    return config.distill.temperature if config.server.strategy == "fedmd" else 1.0
