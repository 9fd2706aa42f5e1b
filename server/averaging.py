"""The final student as the mean of the last rounds' students.

Cohorts with skewed labels pull the weights to and fro from round to round; their mean over the last rounds lies
between (Polyak and Juditsky 1992, https://doi.org/10.1137/0330046; for networks Izmailov et al. 2018,
https://arxiv.org/abs/1803.05407). Rounds go on from the weights themselves: only the last round ends in the mean.
"""

import numpy as np
from numpy.typing import NDArray

from common.config import Config

Weights = dict[str, NDArray[np.float32]]
Memory = dict[str, NDArray[np.float64]]
SUM = "sum-of-last/"


def mean_of_last(config: Config, number: int, weights: Weights, memory: Memory) -> Weights:
    """The weights that round ``number`` ends with: in the last round the mean over `server.average-rounds` rounds.

    Args:
        memory: the server's between rounds, where the sum so far is kept: float64 under ``sum-of-last/NAME``.
    """
    span = config.server.average_rounds
    if span == 1 or number <= config.rounds - span:
        return weights
    sums = {name: memory.get(SUM + name, np.float64(0.0)) + weight for name, weight in weights.items()}
    if number < config.rounds:
        memory.update({SUM + name: np.asarray(total, dtype=np.float64) for name, total in sums.items()})
        return weights
    for name in weights:
        memory.pop(SUM + name, None)
    return {name: np.asarray(total / span, dtype=np.float32) for name, total in sums.items()}
