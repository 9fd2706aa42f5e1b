"""Adding up what nodes return, one reply at a time.

The sum that FedAvg takes the mean of, sum_c n_c (w_c - w), is held as integers (`common.fixed_point`): the same
bits for any order and grouping of replies, and memory of one model however many clients reply.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from common.fixed_point import CLIENT_LIMIT, LIMIT, Rows, largest_of
from common.wire import ClientLine

Sums = Mapping[str, NDArray[np.int64] | Rows]


class Rejected(ValueError):
    """A reply that must not enter the sum; the message says why."""


class UpTo(dict[int, int]):
    """Sizes of clients that may run out of time or energy: they count what they have trained on, at most all."""


def check_count(line: ClientLine, sizes: Mapping[int, int]) -> None:
    """Raise `Rejected` unless a client counts the examples it is known to have: a count is a weight."""
    size = sizes[line.client]
    if line.examples <= 0 or line.examples > size or (line.examples < size and not isinstance(sizes, UpTo)):
        raise Rejected(f"client {line.client} counts {line.examples} examples; it has {sizes[line.client]}")


@dataclass
class RunningSum:
    """The sum so far.

    Attributes:
        totals: int64 arrays by name.
        weight: examples behind ``totals``.
        lines: accounting of the clients in the sum.
        bound: for each array a number that none of its totals can exceed.
    """

    totals: dict[str, NDArray[np.int64]]
    weight: int = 0
    lines: list[ClientLine] = field(default_factory=list)
    bound: dict[str, int] = field(default_factory=dict)

    @classmethod
    def zeros(cls, shapes: Mapping[str, tuple[int, ...]]) -> "RunningSum":
        return cls({name: np.zeros(shape, dtype=np.int64) for name, shape in shapes.items()})

    def fold(self, part: Sums, lines: list[ClientLine], sizes: Mapping[int, int]) -> None:
        """Add one node's sum and forget it; arguments and errors as of `check`."""
        self.add(part, lines, self.check(part, lines, sizes))

    def check(self, part: Sums, lines: list[ClientLine], sizes: Mapping[int, int]) -> dict[str, int]:
        """What ``bound`` will be with one node's sum; nothing is added yet.

        Args:
            sizes: examples each client is known to have.

        Raises:
            Rejected: a client's count is not the one it is known to have or not positive, or the sum would leave
                the 64-bit range.
        """
        accepted = [line for line in lines if not line.problem]
        for line in accepted:
            check_count(line, sizes)
        bound = dict(self.bound)
        if not accepted:
            return bound
        for name in self.totals:
            some = part[name]
            largest = largest_of(some.values if isinstance(some, Rows) else some)
            bound[name] = bound.get(name, 0) + largest
            if largest >= min(LIMIT, len(accepted) * CLIENT_LIMIT) or bound[name] >= 2**63:
                raise Rejected(f"{name}: a value is too large to add up")
        return bound

    def add(self, part: Sums, lines: list[ClientLine], bound: dict[str, int]) -> None:
        """Add what `check` has let pass."""
        accepted = [line for line in lines if not line.problem]
        if not accepted:
            return
        self.bound = bound
        for name, total in self.totals.items():
            some = part[name]
            if isinstance(some, Rows):
                total[some.index] += some.values
            else:
                np.add(total, some, out=total)
        self.weight += sum(line.examples for line in accepted)
        self.lines.extend(accepted)
