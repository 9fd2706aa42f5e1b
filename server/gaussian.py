"""Gaussian noise as whole numbers, from the operating system's entropy.

What is noised here are sums S of integers. Noise is rint(X), X normal with deviation sigma in the sum's own steps, and

    S + rint(X) = rint(S + X)

so that what is released is a function of the Gaussian mechanism's S + X alone: rounding costs no privacy. It is added
as integers. Mironov 2012 (https://doi.org/10.1145/2382196.2382264) tells two sums apart because the floating-point
numbers that S + X can be differ with S; here every S reaches the same integers.

What is left is that the normal numbers themselves are made of floating-point numbers. Each is the sum of two
independent draws, so that no grid of one shows (Holohan and Braghin 2021, https://arxiv.org/abs/2107.10138), each by
Box and Muller from 64 random bits per uniform number: it ends at 9.5 deviations, beyond which a value lies with a
chance of 2e-21.
"""

import math
import secrets

import numpy as np
from numpy.typing import NDArray

MOST = 2.0**58  # of a deviation: a draw stays well within 64 bits
BLOCK = 1 << 16


def gaussian(count: int, deviation: float) -> NDArray[np.int64]:
    """(count,) noise in whole steps; ``deviation`` is in steps too, 0: none.

    Raises:
        ValueError: the deviation is negative, or too large for 64 bits.
    """
    if not 0.0 <= deviation <= MOST:
        raise ValueError(f"noise of deviation {deviation:g}: give 0 to {MOST:g} steps")
    found = np.zeros(count, dtype=np.int64)
    if deviation == 0.0:
        return found
    for start in range(0, count, BLOCK):
        part = found[start : start + BLOCK]
        part[:] = np.rint(deviation / math.sqrt(2.0) * (_normal(len(part)) + _normal(len(part))))
    return found


def _normal(count: int) -> NDArray[np.float64]:
    """(count,) standard normal numbers. Box and Muller 1958."""
    pairs = -(-count // 2)
    bits = np.frombuffer(secrets.token_bytes(16 * pairs), dtype=np.uint64)
    uniform = (bits.astype(np.float64) + 0.5) * 2.0**-64  # above 0, at most 1
    radius, angle = np.sqrt(-2.0 * np.log(uniform[:pairs])), 2.0 * np.pi * uniform[pairs:]
    return np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])[:count]
