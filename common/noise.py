"""What a client tells of its update besides the update, where the batch grows with the gradient noise scale.

The server needs the clients' mean squared norm, see `server.growth`. It travels as one more array of the update, so
that it is weighted, added up exactly and checked as all others are.
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from common.fixed_point import Rows

SQUARES = "squared-norm"  # no weight has a hyphen in its name
SQUARES_SHAPE = {SQUARES: (1,)}


def squares_of(update: Mapping[str, NDArray[Any] | Rows]) -> dict[str, NDArray[np.float32]]:
    """The squared norm of a client's update, as an array of it; of rows it has the bits of the whole array."""
    rows: list[float] = []
    for part in update.values():
        values = np.ascontiguousarray(part.values if isinstance(part, Rows) else part)
        # row by row, then exactly: rows of zeros change nothing
        rows += np.square(values, dtype=np.float64).reshape(len(values), -1).sum(axis=1).tolist() if values.size else []
    total = math.fsum(rows) if np.isfinite(rows).all() else math.nan  # fsum raises at infinity
    with np.errstate(over="ignore"):
        return {SQUARES: np.array([total], dtype=np.float64).astype(np.float32)}
