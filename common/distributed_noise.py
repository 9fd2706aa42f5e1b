"""Noise that no one adds alone: each client draws its part, and the sum of the parts hides any one client.

The discrete Gaussian N_Z(0, s^2) has weight exp(-x^2 / (2 s^2)) on each integer x (Canonne, Kamath and Steinke 2020,
https://arxiv.org/abs/2004.00010). Each of n clients draws with s^2 = sigma^2 / n; the sum is all but N_Z(0, sigma^2):
by Kairouz, Liu and Steinke 2021 (https://arxiv.org/abs/2102.06387, theorem 1) the sum of n discrete Gaussians costs at
most

    tau = 10 * sum over k = 1 .. n - 1 of exp(-2 pi^2 s^2 k / (k + 1)),    per entry,

more than one of variance n s^2. Here s is about 2^32 clip norms of noise: tau is below 10 n exp(-pi^2 s^2), which is 0
to any precision from s = 10 on. Of n members, as many as the threshold must stay: n is the threshold, so that the noise
is enough with the fewest survivors and a little more than enough with all.

How the draw differs from exact: its coins compare 53 random bits with a probability in double precision, which is off
by less than 2^-52. A draw tosses fewer than 2^6 coins in the mean, so D draws add less than D * 2^-46 to delta: those
of a student of five million parameters less than 1e-7 a client. The bits are ChaCha20's under a key of the system's own
randomness: who keeps the key can send the same words again, and nobody else can tell them from chance.
"""

import math
import secrets

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import ChaCha20
from numpy.typing import NDArray

SMALLEST = 10.0  # of one part's deviation: below, the sum of parts is no Gaussian
LARGEST = 2.0**50  # so that no part comes near the end of 64 bits
BLOCK = 1 << 16


class Coins:
    """Random bits.

    Args:
        key: 32 bytes; the same key gives the same bits. None: a new one.
    """

    def __init__(self, key: bytes | None = None) -> None:
        self._stream = Cipher(ChaCha20(key or secrets.token_bytes(32), bytes(16)), None).encryptor()

    def words(self, count: int) -> NDArray[np.uint64]:
        """(count,) words of 64 random bits."""
        return np.frombuffer(self._stream.update(bytes(8 * count)), dtype="<u8").astype(np.uint64)

    def tossed(self, chances: NDArray[np.float64]) -> NDArray[np.bool_]:
        """One coin for each chance."""
        return (self.words(len(chances)) >> np.uint64(11)).astype(np.float64) * 2.0**-53 < chances

    def below(self, bound: int, count: int) -> NDArray[np.int64]:
        """Whole numbers from 0 to bound - 1, all as likely: of random ones of as many bits the first that are below."""
        found, mask = np.empty(count, dtype=np.int64), (1 << bound.bit_length()) - 1
        done = 0
        while done < count:
            some = self.words(2 * (count - done) + 16) & np.uint64(mask)
            kept = some[some < bound][: count - done].astype(np.int64)
            found[done : done + len(kept)] = kept
            done += len(kept)
        return found


def distributed_noise(
    shape: tuple[int, ...], sigma: float, members: int, key: bytes | None = None
) -> NDArray[np.int64]:
    """One client's part: discrete Gaussian noise of variance sigma^2 / members.

    Args:
        sigma: deviation of the whole noise, in units of the integers that are summed.
        members: how many parts are enough: the threshold of the secure sum.
        key: see `Coins`; it serves one noise.

    Raises:
        ValueError: the part is too small to add up to a Gaussian, or too large for 64 bits.
    """
    part = sigma / math.sqrt(members)
    if not SMALLEST <= part <= LARGEST:
        raise ValueError(f"a part of the noise has the deviation {part:g}; it must be from {SMALLEST:g} to 2^50")
    return discrete_gaussian(math.prod(shape), part, Coins(key)).reshape(shape)


def surplus(sigma: float, members: int) -> float:
    """Kairouz, Liu and Steinke's tau, per entry: by how much the parts' sum may be worse than one whole noise."""
    variance = sigma * sigma / members
    return 10.0 * math.fsum(math.exp(-2.0 * math.pi**2 * variance * k / (k + 1)) for k in range(1, members))


def discrete_gaussian(count: int, deviation: float, coins: Coins) -> NDArray[np.int64]:
    """(count,) draws of N_Z(0, deviation^2), by rejection from the discrete Laplace (Canonne et al., algorithm 3)."""
    scale = math.floor(deviation) + 1
    found = np.empty(count, dtype=np.int64)
    done = 0
    while done < count:
        some = discrete_laplace(min(BLOCK, 2 * (count - done) + 16), scale, coins)
        away = np.abs(some).astype(np.float64) - deviation * deviation / scale
        kept = some[coins.tossed(np.exp(-away * away / (2.0 * deviation * deviation)))][: count - done]
        found[done : done + len(kept)] = kept
        done += len(kept)
    return found


def discrete_laplace(count: int, scale: int, coins: Coins) -> NDArray[np.int64]:
    """At most ``count`` draws with weight exp(-|x| / scale) on each integer x (algorithm 2), none where one failed."""
    low = coins.below(scale, count)
    low = low[coins.tossed(np.exp(-low / scale))]
    sizes = low + scale * _geometric(len(low), coins)
    negative = coins.tossed(np.full(len(sizes), 0.5))
    kept = ~(negative & (sizes == 0))  # there is one zero
    return np.asarray(np.where(negative, -sizes, sizes)[kept])


def _geometric(count: int, coins: Coins) -> NDArray[np.int64]:
    """Draws with weight exp(-v) on v = 0, 1, ...: coins of probability 1/e, up to the first that fails."""
    found, going = np.zeros(count, dtype=np.int64), np.arange(count)
    while len(going):
        going = going[coins.tossed(np.full(len(going), math.exp(-1.0)))]
        found[going] += 1
    return found
