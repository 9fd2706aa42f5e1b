"""RMIA, the robust attack (Zarifzadeh et al. 2024, https://arxiv.org/abs/2312.03262, equations 2 to 5).

How many examples z of the population, that nobody was trained on, does x beat?

    score(x) = share of z with  [p(x | target) / p(x)] / [p(z | target) / p(z)] >= gamma

p(x | model) is the probability of x's own class. p(x) is its mean over the references: online the mean of those that
hold x and those that do not, one half each; offline, where no reference holds x, ((1 + a) p_out(x) + 1 - a) / 2. No
reference holds a z; online its p(z) is the mean of all, offline it is corrected as that of x.

gamma is 1: with few classes a probability cannot grow much, and a larger one would leave no example that beats any.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from simulations.audits.membership import Floats, Membership, log_confidence, mean_where, references
from simulations.audits.shadows import Answers


@dataclass(frozen=True)
class Rmia(Membership):
    """See `Membership`.

    Attributes:
        gamma: by what factor x must beat z.
        offline_a: a of the offline correction, 0 to 1; the less, the more a model gains by holding an example.
    """

    name: ClassVar[str] = "rmia"
    paper: ClassVar[str] = "https://arxiv.org/abs/2312.03262"
    gamma: float = 1.0
    offline_a: float = 0.3

    def scores(self, answers: Answers) -> Mapping[str, Floats]:
        p = np.exp(log_confidence(answers.logits, answers.labels))
        population = np.exp(log_confidence(answers.population, answers.population_labels))
        return rmia(p, answers.inside, population, self.gamma, self.offline_a)


def rmia(p: Floats, inside: NDArray[np.bool_], population: Floats, gamma: float, offline_a: float) -> dict[str, Floats]:
    """(K, n) scores of each target, ``online`` and ``offline``.

    Args:
        p: (K, n) probabilities of the examples' own classes.
        inside: (K, n) which model was trained on which example.
        population: (K, m) probabilities of the population's.
    """
    found = {"online": np.empty(p.shape), "offline": np.empty(p.shape)}
    for target in range(len(p)):
        having, lacking = references(inside, target)
        mean_out, mean_z = mean_where(p, lacking), np.delete(population, target, axis=0).mean(axis=0)
        usual = {
            "online": ((mean_where(p, having) + mean_out) / 2, mean_z),
            "offline": tuple(((1 + offline_a) * mean + 1 - offline_a) / 2 for mean in (mean_out, mean_z)),
        }
        for variant, (of_x, of_z) in usual.items():
            found[variant][target] = beaten(p[target] / of_x, population[target] / of_z, gamma)
    return found


def beaten(ratio: Floats, others: Floats, gamma: float) -> Floats:
    """(n,) share of the others that each ratio is ``gamma`` times or more; NaN for NaN."""
    share = np.searchsorted(np.sort(others), ratio / gamma, side="right") / len(others)
    return np.where(np.isfinite(ratio), share, np.nan)
