"""How well scores tell members from others, above all where few others are accused.

A membership attack gives each example a score, the higher the likelier it was trained on. An attack that is right
about few examples and knows it is worse for them than one that is a little right about all, so what counts is the
true-positive rate at a small false-positive rate (Carlini et al. 2022, https://arxiv.org/abs/2112.03570, section 3).

    FPR(t) = share of the others with a score of at least t,  TPR(t) = that of the members
    TPR at a = TPR(t) for the smallest t with FPR(t) <= a

No threshold parts examples of one score. A rate's interval is that of Clopper and Pearson (1934): exact for independent
examples at a threshold that was given. Ours is chosen on the others' scores, few of which are above it, so both rates
are uncertain: an attack gets through where the interval of its TPR is above that of its FPR. Scores of several models
for one example are not independent, which makes the intervals a little too narrow.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats

FPRS = (0.01, 0.001)
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Rate:
    """A true-positive rate.

    Attributes:
        asked: the false-positive rate that it may have.
        fpr: the one it has among these examples.
        low, high: 95 % interval of ``tpr``.
        chance: the upper end of that of ``fpr``: the most that an attack that knows nothing can have.
    """

    asked: float
    fpr: float
    tpr: float
    low: float
    high: float
    chance: float


def clopper_pearson(hits: int, trials: int, confidence: float = 0.95) -> tuple[float, float]:
    """The exact interval of a share, from the quantiles of two beta distributions."""
    tail = (1.0 - confidence) / 2
    low = stats.beta.ppf(tail, hits, trials - hits + 1) if hits else 0.0
    high = stats.beta.ppf(1.0 - tail, hits + 1, trials - hits) if hits < trials else 1.0
    return float(low), float(high)


def auc(members: Floats, others: Floats) -> float:
    """The chance that a member scores above another example, a tie counted half (Mann and Whitney 1947)."""
    ranks = stats.rankdata(np.concatenate([members, others]))
    above = ranks[: len(members)].sum() - len(members) * (len(members) + 1) / 2
    return float(above / (len(members) * len(others)))


def roc(members: Floats, others: Floats) -> tuple[Floats, Floats]:
    """(points,) FPR and TPR at each threshold that is a score, from the highest on; it begins at 0, 0."""
    scores = np.concatenate([members, others])
    order = np.argsort(-scores, kind="stable")
    true = np.cumsum(order < len(members))
    false = np.arange(1, len(scores) + 1) - true
    last = np.append(np.diff(scores[order]) != 0, True)  # of each score's examples
    return np.append(0.0, false[last] / len(others)), np.append(0.0, true[last] / len(members))


def tpr_at(members: Floats, others: Floats, asked: float) -> Rate:
    """The true-positive rate at the largest false-positive rate that is at most ``asked``."""
    fpr, tpr = roc(members, others)
    allowed = np.floor(asked * len(others) + 1e-9) / len(others)
    place = int(np.flatnonzero(fpr <= allowed + 1e-12)[-1])
    low, high = clopper_pearson(round(tpr[place] * len(members)), len(members))
    chance = clopper_pearson(round(fpr[place] * len(others)), len(others))[1]
    return Rate(asked, float(fpr[place]), float(tpr[place]), low, high, chance)
