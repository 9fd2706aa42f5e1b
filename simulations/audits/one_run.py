"""What guesses about canaries prove of a mechanism: lower bounds on its epsilon from one run.

Each of m canaries is in by a fair coin of its own. Who sees only what is released guesses of r of them whether they
are in, abstains of the others, and is right v times. One-run auditing (Steinke, Nasr, Jagielski 2023,
https://arxiv.org/abs/2305.08846, Theorem 5.2): were the mechanism (epsilon, delta)-private under adding or removing
one canary, then

    P[right >= v] <= P[B >= v] + 2 m delta max_i P[v > B >= v - i] / i,    B ~ Binomial(r, 1 / (1 + exp(-epsilon)))

The largest epsilon at which that is below 1 - confidence is refuted, and so is all below it. How many guesses are made
must not follow from how many are right: `SHARES` are tried, each at its part of what may go wrong (Bonferroni).

That bound holds for any mechanism and score, and is loose where noise is Gaussian: it cannot exceed about ln(r / 3).
Where scores are normal, as those of a noised sum are, in and out are two normal distributions mu deviations apart,
and epsilon follows from mu (Andrew et al. 2024, https://arxiv.org/abs/2302.03098, section 3; Balle and Wang 2018,
https://arxiv.org/abs/1805.06530, Theorem 8):

    delta(epsilon) = Phi(mu / 2 - epsilon / mu) - exp(epsilon) Phi(-mu / 2 - epsilon / mu)

`gaussian` gives that of the measured mu, and that of its lower confidence limit: tight, and only as good as normality.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats
from scipy.optimize import brentq

from common.errors import InputError
from simulations.audits.attack import EPSILON, Row

SHARES = (1 / 32, 1 / 8, 1 / 2)  # of the canaries, that are guessed
MOST = 60.0  # no epsilon beyond is told apart
LEAST = 16  # canaries of an audit
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Finding:
    """What an audit has found.

    Attributes:
        canaries, guesses, right: m, r and v of the guesses that prove most.
        epsilon: the lower bound, at the confidence asked for.
        gaussian, gaussian_low: epsilon of two normal distributions as far apart as the scores', and its lower bound.
    """

    canaries: int
    guesses: int
    right: int
    epsilon: float
    gaussian: float
    gaussian_low: float


def judge(scores: Floats, inside: NDArray[np.bool_], *, delta: float, confidence: float = 0.95) -> Finding:
    """What scores prove.

    Args:
        scores: (m,) of each canary, larger where it rather is in.
        inside: (m,) whether it is, by a fair coin of its own.

    Raises:
        ValueError: a score is not finite, or there are fewer than two canaries in or out.
    """
    if not np.isfinite(scores).all():
        raise ValueError("a canary's score is not finite")
    if min(inside.sum(), (~inside).sum()) < 2:
        raise ValueError(f"{inside.sum()} of {len(inside)} canaries are in; give more canaries")
    m, level = len(scores), (1.0 - confidence) / len(SHARES)
    best = (-1.0, 0, 0)
    for share in SHARES:
        guesses, right = guess(scores, inside, share)
        best = max(best, (lower_bound(m, guesses, right, delta, 1.0 - level), guesses, right))
    mu, low = distance(scores, inside, confidence)
    return Finding(m, best[1], best[2], best[0], gaussian_epsilon(mu, delta), gaussian_epsilon(low, delta))


def guess(scores: Floats, inside: NDArray[np.bool_], share: float) -> tuple[int, int]:
    """How many guesses are made and how many are right: the highest scores in, as many of the lowest out."""
    each = max(round(len(scores) * share / 2), 1)
    order = np.argsort(scores, kind="stable")
    return 2 * each, int(inside[order[-each:]].sum() + (~inside[order[:each]]).sum())


def p_value(m: int, guesses: int, right: int, epsilon: float, delta: float) -> float:
    """The most that the chance of so many right guesses, or more, can be; see the formula above."""
    if not 0 <= right <= guesses <= m:
        raise ValueError(f"{right} right of {guesses} guesses about {m} canaries")
    if right == 0:
        return 1.0
    honest = 1.0 / (1.0 + math.exp(-epsilon))
    below = stats.binom.pmf(np.arange(right - 1, -1, -1), guesses, honest)  # of v - 1, v - 2, ... 0
    most = float((np.cumsum(below) / np.arange(1, right + 1)).max())
    return min(float(stats.binom.sf(right - 1, guesses, honest)) + 2.0 * m * delta * most, 1.0)


def lower_bound(m: int, guesses: int, right: int, delta: float, confidence: float = 0.95) -> float:
    """The epsilon up to which all are refuted; 0: none is."""

    def spare(epsilon: float) -> float:
        return p_value(m, guesses, right, epsilon, delta) - (1.0 - confidence)

    if spare(0.0) >= 0.0:
        return 0.0
    # with the term of delta it need not rise all the way: the first crossing counts
    high = 0.25
    while high < MOST and spare(high) < 0.0:
        high += 0.25
    return MOST if high >= MOST else float(brentq(spare, high - 0.25, high, xtol=1e-6)) - 1e-6


def distance(scores: Floats, inside: NDArray[np.bool_], confidence: float = 0.95) -> tuple[float, float]:
    """How many deviations the scores in are above those out, and the lower confidence limit of that; not below 0.

    Both are taken to be normal with one deviation, the limit is that of the noncentral t distribution.
    """
    ours, others = scores[inside], scores[~inside]
    a, b = len(ours), len(others)
    pooled = math.sqrt(((a - 1) * ours.var(ddof=1) + (b - 1) * others.var(ddof=1)) / (a + b - 2))
    if pooled == 0.0:
        return (math.inf, math.inf) if ours.mean() > others.mean() else (0.0, 0.0)
    mu, root = float(ours.mean() - others.mean()) / pooled, math.sqrt(a * b / (a + b))
    t = mu * root

    def beyond(mean: float) -> float:
        return float(stats.nct.sf(t, a + b - 2, mean)) - (1.0 - confidence)

    if mu <= 0.0 or beyond(0.0) >= 0.0:
        return max(mu, 0.0), 0.0
    if t > 37.0:  # the noncentral t gives out; there the normal approximation of its mean is as good
        spread = math.sqrt(1.0 + t * t / (2.0 * (a + b - 2)))
        return mu, max(t - float(stats.norm.ppf(confidence)) * spread, 0.0) / root
    return mu, float(brentq(beyond, 0.0, t)) / root


def gaussian_epsilon(mu: float, delta: float) -> float:
    """Epsilon at which two normal distributions of deviation 1, mu apart, are (epsilon, delta)-close."""
    if mu <= 0.0:
        return 0.0
    if math.isinf(mu):
        return math.inf

    def excess(epsilon: float) -> float:
        far = math.exp(epsilon + float(stats.norm.logcdf(-mu / 2.0 - epsilon / mu)))
        return float(stats.norm.cdf(mu / 2.0 - epsilon / mu)) - far - delta

    if excess(0.0) <= 0.0:
        return 0.0
    return float(brentq(excess, 0.0, mu * (mu / 2.0 + 40.0)))


def rows_of(variant: str, found: Finding, claimed: float, *, normal: bool, told: Row) -> Iterator[Row]:
    """What an audit tells of a finding, one row for each of its bounds.

    Args:
        claimed: epsilon; 0: none is, and any bound above is a leak.
        normal: whether noise makes the scores normal, so that the second bound may be believed.
        told: settings that go along.
    """
    bounds = {"any scores": found.epsilon, **({"normal scores": found.gaussian_low} if normal else {})}
    for name, bound in bounds.items():
        yield {
            "variant": f"{variant}, {name}",
            "measure": EPSILON,
            "success": bound,
            "low": bound,
            "chance": claimed,
            "canaries": found.canaries,
            "guesses": found.guesses,
            "right": found.right,
            "estimate": found.gaussian if normal else None,
            **told,
        }


def check_canaries(attack: str, canaries: int) -> None:
    """Raise `InputError` for fewer than can prove anything."""
    if canaries < LEAST:
        raise InputError(f"{attack}.canaries = {canaries}: give at least {LEAST}")
