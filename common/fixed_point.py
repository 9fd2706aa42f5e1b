"""Sums that do not depend on order: real numbers as 64-bit integers with 32 fractional bits.

A client's update times its example count is rounded once to a multiple of 2^-32. From there on everything is
integer addition, which is associative: any arrival order, any grouping and any number of workers give the
same bits. The range is +-2^31 with a rounding error of at most 2^-33 per client.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

FRACTION_BITS = 32
SCALE = 2.0**FRACTION_BITS
LIMIT = 2.0**62  # of one encoded value; leaves room to see an overflow coming


class NotFinite(ValueError):
    """A value is NaN, infinite or too large to add up."""


def encode(values: NDArray[Any], weight: int) -> NDArray[np.int64]:
    """round(values * weight * 2^32) as int64, same shape.

    Raises:
        NotFinite: a value is NaN, infinite or too large.
    """
    # float32 has 24 bits and a count at most 29 here: the product is exact in float64, rint rounds once
    scaled = values.astype(np.float64) * (float(weight) * SCALE)
    largest = float(np.abs(scaled).max(initial=0.0))
    if not largest < LIMIT:  # also true for NaN
        raise NotFinite("an update holds NaN, Inf or a value too large to add up")
    return np.rint(scaled).astype(np.int64)


def overflows(total: NDArray[np.int64], part: NDArray[np.int64]) -> bool:
    """Whether total + part leaves the 64-bit range somewhere: same signs in, another sign out."""
    both = total + part
    return bool(((~(total ^ part) & (total ^ both)) < 0).any())


def add_into(total: NDArray[np.int64], part: NDArray[np.int64]) -> None:
    """total += part, in place.

    Raises:
        OverflowError: a sum would leave the 64-bit range; ``total`` is as before.
    """
    if overflows(total, part):
        raise OverflowError("the sum of updates leaves the 64-bit range")
    np.add(total, part, out=total)


def mean(total: NDArray[np.int64], weight: int) -> NDArray[np.float64]:
    """The weighted mean that a sum of encoded values stands for."""
    if weight <= 0:
        raise ValueError(f"the total weight is {weight}; a mean needs a positive one")
    return total.astype(np.float64) / (float(weight) * SCALE)
