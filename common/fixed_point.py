"""Sums that do not depend on order: real numbers as 64-bit integers with 32 fractional bits.

A client's update times its example count is rounded once to a multiple of 2^-32. From there on everything is
integer addition, which is associative: any arrival order, any grouping and any number of workers give the
same bits. A client's weighted update may reach +-2^24, and is rounded by at most 2^-33.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

FRACTION_BITS = 32
SCALE = 2.0**FRACTION_BITS
CLIENT_LIMIT = 2.0**56  # of one client's encoded value: whether it is taken must not depend on whom it is added to
LIMIT = 2.0**62  # of an encoded value and of a node's sum; leaves room to see an overflow coming
BLOCK = 1 << 15


class NotFinite(ValueError):
    """A value is NaN, infinite or too large to add up."""


@dataclass(frozen=True)
class Rows:
    """An array that is zero but for some rows.

    Attributes:
        index: (k,) int64 row numbers, ascending.
        values: (k, ...) these rows.
    """

    index: NDArray[np.int64]
    values: NDArray[Any]

    def dense(self, shape: tuple[int, ...]) -> NDArray[Any]:
        whole = np.zeros(shape, dtype=self.values.dtype)
        whole[self.index] = self.values
        return whole


class ExactSum:
    """Sum of weighted updates, each rounded once, as int64 arrays by name.

    Attributes:
        totals: round(update * weight * 2^32), added up; the caller reads them and leaves them alone.
    """

    def __init__(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self.totals = {name: np.zeros(shape, dtype=np.int64) for name, shape in shapes.items()}
        self._bound = 0.0  # no total is larger than this
        self._touched: dict[str, NDArray[np.bool_]] = {}  # rows of arrays to which `Rows` were added
        self._whole: set[str] = set()  # arrays to which something else was added

    @property
    def compact(self) -> dict[str, NDArray[np.int64] | Rows]:
        """The totals, as `Rows` where only rows were added."""
        found: dict[str, NDArray[np.int64] | Rows] = dict(self.totals)
        for name, touched in self._touched.items():
            if name in self._whole:
                continue
            index = np.flatnonzero(touched)
            found[name] = Rows(index, self.totals[name][index])
        return found

    def add(self, update: Mapping[str, NDArray[np.float32] | Rows], weight: int) -> None:
        """Add one client's update, float32 arrays of the sum's names and shapes, or some of their rows.

        Raises:
            NotFinite: a value is NaN, infinite or too large to add up; nothing is added then.
        """
        largest = 0.0
        for name in self.totals:
            part = update[name]
            largest = float(np.maximum(largest, _largest(part.values if isinstance(part, Rows) else part)))
        encoded = largest * weight * SCALE + 1.0
        bound = self._bound + encoded
        if not (encoded < CLIENT_LIMIT and bound < LIMIT):  # also true for NaN
            raise NotFinite("an update holds NaN, Inf or a value too large to add up")
        self._bound = bound
        for name, total in self.totals.items():
            part = update[name]
            if isinstance(part, Rows):
                some = np.zeros(part.values.shape, dtype=np.int64)
                _add_encoded(some.reshape(-1), np.ascontiguousarray(part.values).reshape(-1), weight)
                total[part.index] += some
                self._touched.setdefault(name, np.zeros(len(total), dtype=np.bool_))[part.index] = True
            else:
                self._whole.add(name)
                _add_encoded(total.reshape(-1), np.ascontiguousarray(part).reshape(-1), weight)


def largest_of(values: NDArray[np.int64]) -> int:
    """The largest magnitude in an array of integers."""
    return max(-int(values.min()), int(values.max())) if values.size else 0


def _largest(values: NDArray[np.float32]) -> float:
    """The largest magnitude, NaN when there is one."""
    if not values.size:
        return 0.0
    return float(np.maximum(-values.min(), values.max()))  # the only maximum that passes a NaN on


def _add_encoded(total: NDArray[np.int64], values: NDArray[np.float32], weight: int) -> None:
    """total += round(values * weight * 2^32), block by block, so that what lies in between stays in the cache."""
    # float32 has 24 bits and a count at most 29 here: the product is exact in float64, rint rounds once
    scale = float(weight) * SCALE
    scaled, whole = np.empty(BLOCK, dtype=np.float64), np.empty(BLOCK, dtype=np.int64)
    for start in range(0, len(total), BLOCK):
        part = values[start : start + BLOCK]
        real, integer = scaled[: len(part)], whole[: len(part)]
        np.multiply(part, scale, out=real, dtype=np.float64)
        np.rint(real, out=real)
        integer[:] = real
        total[start : start + BLOCK] += integer


def add_into(total: NDArray[np.int64], part: NDArray[np.int64]) -> None:
    """total += part, in place.

    Raises:
        OverflowError: a sum would leave the 64-bit range; ``total`` is as before.
    """
    both = total + part
    if ((~(total ^ part) & (total ^ both)) < 0).any():  # same signs in, another sign out
        raise OverflowError("the sum leaves the 64-bit range")
    total[...] = both


def mean(total: NDArray[np.int64], weight: int) -> NDArray[np.float64]:
    """The weighted mean that a sum of encoded values stands for."""
    if weight <= 0:
        raise ValueError(f"the total weight is {weight}; a mean needs a positive one")
    return total.astype(np.float64) / (float(weight) * SCALE)
