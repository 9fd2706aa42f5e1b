"""The final student as the mean of the last rounds' students.

Cohorts with skewed labels pull the weights to and fro from round to round; their mean over the last rounds lies
between (Polyak and Juditsky 1992, https://doi.org/10.1137/0330046; for networks Izmailov et al. 2018,
https://arxiv.org/abs/1803.05407). Rounds go on from the weights themselves: only the last round ends in the mean. A run
that goes on with more rounds than before goes on from what its last round would have been without, and has another last
k: the mean is then over those of them that came after.
"""

import numpy as np
from numpy.typing import NDArray

from common.config import Config

Weights = dict[str, NDArray[np.float32]]
Memory = dict[str, NDArray[np.float64]]
SUM, SINCE, WITHOUT = "sum-of-last/", "summed-since", "without-mean/"


def mean_of_last(config: Config, number: int, weights: Weights, memory: Memory) -> Weights:
    """The weights that round ``number`` ends with: in the last round the mean over `server.average-rounds` rounds.

    Args:
        memory: the server's between rounds, where the sum so far is kept: float64 under ``sum-of-last/NAME``, and the
            round it began in; from the last round on what that would have ended with, under ``without-mean/NAME``.
    """
    first = config.rounds - config.server.average_rounds + 1
    since = int(memory.pop(SINCE, np.zeros(1))[0])
    before = {name: memory.pop(SUM + name, np.zeros(1)) for name in weights}
    if first == config.rounds or number < first:
        return weights
    if since < first:  # none yet, or of what were the last rounds before there were more of them
        since, before = number, dict.fromkeys(weights, np.zeros(1))
    sums = {name: np.reshape(before[name] + weight, weight.shape) for name, weight in weights.items()}
    if number < config.rounds:
        memory.update({SUM + name: total for name, total in sums.items()})
        memory[SINCE] = np.array([since], dtype=np.float64)
        return weights
    memory.update({WITHOUT + name: np.asarray(weight, dtype=np.float64) for name, weight in weights.items()})
    return {name: np.asarray(total / (number - since + 1), dtype=np.float32) for name, total in sums.items()}


def to_go_on_from(weights: Weights, memory: Memory) -> Weights:
    """Where the next round starts: the weights, or what they would be if no last round had ended in a mean."""
    return {name: np.asarray(memory.pop(WITHOUT + name, weight), dtype=np.float32) for name, weight in weights.items()}
