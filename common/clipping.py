"""Clipping: a client's whole update scaled down to a norm, so that no client moves a sum by more than that.

With d an update over all its arrays, C the clip norm and n its number of values (McMahan et al. 2018,
https://arxiv.org/abs/1710.06963, section 3, flat clipping):

    d <- d * min(1, (C - s) / ||d||)        s = C 2^-22 + sqrt(n) 2^-33

The slack s pays for what comes after: float32 rounds each scaled value by 2^-24 of it, and the exact sum rounds it to
a multiple of 2^-32, by 2^-33 at most. So what enters the integer sum has a norm of C at most, not of C and a little,
and C is the sum's sensitivity to adding or removing one client. A client of which nothing comes, or whose update is
zero or not finite, adds nothing.

`below` is what adaptive clipping counts (Andrew et al. 2021, https://arxiv.org/abs/1905.03871): one half where the
norm is at most C, minus one half where it was above. Around zero because the sensitivity is half as large then.
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from common.fixed_point import SCALE, NotFinite, Rows

BELOW = "below-clip"  # no weight has a hyphen in its name
BELOW_SHAPE = {BELOW: (1,)}
HALF = 0.5
Update = Mapping[str, NDArray[np.float32] | Rows]


def slack(bound: float, values: int) -> float:
    """What an update's norm must stay below the bound by, so that rounding cannot lift it above."""
    return bound * 2.0**-22 + math.sqrt(values) * 0.5 / SCALE


def clip(update: Update, bound: float) -> tuple[dict[str, Any], float]:
    """The update with a norm below the bound, and the norm that it had; new arrays where it is scaled.

    Raises:
        NotFinite: it has no norm.
        ValueError: the bound is not positive, or so small that rounding is all that would be left.
    """
    parts = {name: part.values if isinstance(part, Rows) else part for name, part in update.items()}
    most = bound - slack(bound, sum(part.size for part in parts.values()))
    if not most > 0.5 * bound:  # also true for NaN
        raise ValueError(f"the clip norm is {bound}; give more than what rounding adds to an update's norm")
    norm = norm_of(parts)
    if not math.isfinite(norm):
        raise NotFinite("an update holds NaN or Inf: it has no norm to clip")
    if norm <= most:
        return dict(update), norm
    return {name: _times(part, most / norm) for name, part in update.items()}, norm


def norm_of(arrays: Mapping[str, NDArray[Any]]) -> float:
    """The L2 norm over all arrays together, in float64."""
    return math.sqrt(sum(float(np.square(array, dtype=np.float64).sum()) for array in arrays.values()))


def below(norm: float, bound: float) -> dict[str, NDArray[np.float32]]:
    """Whether a norm is within the bound, as one more array of an update."""
    return {BELOW: np.array([HALF if norm <= bound else -HALF], dtype=np.float32)}


def _times(part: NDArray[np.float32] | Rows, factor: float) -> NDArray[np.float32] | Rows:
    if isinstance(part, Rows):
        return Rows(part.index, _scaled(part.values, factor))
    return _scaled(part, factor)


def _scaled(array: NDArray[np.float32], factor: float) -> NDArray[np.float32]:
    return np.asarray(np.multiply(array, factor, dtype=np.float64), dtype=np.float32)
