"""Adding up what nodes return, one reply at a time.

FedAvg (McMahan et al. 2017, https://arxiv.org/abs/1602.05629) in its update form,

    w <- w + server.lr * sum_c n_c (w_c - w) / sum_c n_c,

with the sum held as integers (`common.fixed_point`): the same bits for any order and grouping of replies,
and memory of one model however many clients reply.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from common.fixed_point import LIMIT, mean, overflows
from common.wire import ClientLine

Sums = Mapping[str, NDArray[np.int64]]


class Rejected(ValueError):
    """A reply that must not enter the sum; the message says why."""


@dataclass
class RunningSum:
    """The sum so far.

    Attributes:
        totals: int64 arrays by name.
        weight: examples behind ``totals``.
        lines: accounting of the clients in the sum.
    """

    totals: dict[str, NDArray[np.int64]]
    weight: int = 0
    lines: list[ClientLine] = field(default_factory=list)

    @classmethod
    def zeros(cls, shapes: Mapping[str, tuple[int, ...]]) -> "RunningSum":
        return cls({name: np.zeros(shape, dtype=np.int64) for name, shape in shapes.items()})

    def fold(self, part: Sums, lines: list[ClientLine], sizes: Mapping[int, int]) -> None:
        """Add one node's sum and forget it.

        Args:
            sizes: examples each client is known to have.

        Raises:
            Rejected: a client's count is not the one it is known to have or not positive, or the sum would leave
                the 64-bit range; nothing is added then.
        """
        accepted = [line for line in lines if not line.problem]
        for line in accepted:
            if line.examples <= 0 or line.examples != sizes[line.client]:
                raise Rejected(f"client {line.client} counts {line.examples} examples; it has {sizes[line.client]}")
        if not accepted:
            return
        for name, total in self.totals.items():  # all before the first: a refused reply leaves no trace
            if np.abs(part[name].astype(np.float64)).max(initial=0.0) >= LIMIT or overflows(total, part[name]):
                raise Rejected(f"{name}: a value is too large to add up")
        for name, total in self.totals.items():
            np.add(total, part[name], out=total)
        self.weight += sum(line.examples for line in accepted)
        self.lines.extend(accepted)


def fedavg(weights: Mapping[str, NDArray[Any]], total: RunningSum, server_lr: float) -> dict[str, NDArray[np.float32]]:
    """The next round's weights. Raises ValueError when nobody is in the sum."""
    return {
        name: (weight.astype(np.float64) + server_lr * mean(total.totals[name], total.weight)).astype(np.float32)
        for name, weight in weights.items()
    }


SERVER_RULES = {"fedavg": fedavg}
