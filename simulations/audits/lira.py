"""LiRA, the likelihood-ratio attack (Carlini et al. 2022, https://arxiv.org/abs/2112.03570, Algorithm 1, section V-B).

With phi = log(p_y / (1 - p_y)) of an example, close to normal over models, and of the references that hold it the mean
m_in, of those that do not m_out:

    online    score = log N(phi; m_in, s_in^2) - log N(phi; m_out, s_out^2)
    offline   score = (phi - m_out) / s_out,  in the order of Pr[N(m_out, s_out^2) <= phi]

A mean is each example's own. So is a deviation with 64 models and more; with fewer it is one for all examples: the root
of the mean variance within an example. Each of K models is the target once, against the K - 1 others.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from simulations.audits.membership import Floats, Membership, mean_where, references, scaled_confidence
from simulations.audits.shadows import Answers

OWN_VARIANCE = 64  # models from which an example's own variance is the better one (section VI-A)
LEAST = 1e-6  # of a deviation: models that all say the same tell nothing


@dataclass(frozen=True)
class Lira(Membership):
    name: ClassVar[str] = "lira"
    paper: ClassVar[str] = "https://arxiv.org/abs/2112.03570"

    def scores(self, answers: Answers) -> Mapping[str, Floats]:
        return lira(scaled_confidence(answers.logits, answers.labels), answers.inside)


def lira(phi: Floats, inside: NDArray[np.bool_]) -> dict[str, Floats]:
    """(K, n) scores of each target, ``online`` and ``offline``.

    Args:
        phi: (K, n) scaled confidences.
        inside: (K, n) which model was trained on which example.
    """
    own = len(phi) >= OWN_VARIANCE
    found = {"online": np.empty(phi.shape), "offline": np.empty(phi.shape)}
    for target, said in enumerate(phi):
        having, lacking = references(inside, target)
        mean_in, mean_out = mean_where(phi, having), mean_where(phi, lacking)
        std_in, std_out = deviation(phi, having, own=own), deviation(phi, lacking, own=own)
        found["online"][target] = log_normal(said, mean_in, std_in) - log_normal(said, mean_out, std_out)
        found["offline"][target] = (said - mean_out) / std_out
    return found


def deviation(values: Floats, chosen: NDArray[np.bool_], *, own: bool) -> Floats:
    """(n,) standard deviation of the chosen models' values (n - 1 below): each example's, or one for all."""
    squares = np.where(chosen, (values - mean_where(values, chosen)) ** 2, 0.0).sum(axis=0)
    free = np.maximum(chosen.sum(axis=0) - 1, 0)
    if own:
        variance = np.where(free > 0, squares / np.maximum(free, 1), np.nan)
    else:
        variance = np.full(len(free), squares.sum() / max(int(free.sum()), 1))
    return np.maximum(np.sqrt(variance), LEAST)


def log_normal(value: Floats, mean: Floats, std: Floats) -> Floats:
    """The logarithm of a normal density, without its constant."""
    return np.asarray(-0.5 * ((value - mean) / std) ** 2 - np.log(std))
