"""What noise costs: epsilon of a run of Poisson-sampled Gaussian mechanisms, and the noise that an epsilon asks for.

Each of ``steps`` steps adds Gaussian noise of deviation ``noise_multiplier`` clip norms to a sum in which every unit
is with probability ``rate``, by itself and unknown to anybody. The neighbouring relation is add or remove one unit.
By privacy loss distributions (Koskela et al. 2020, https://arxiv.org/abs/1906.03049; Doroshenko et al. 2022,
https://arxiv.org/abs/2207.04380) or Renyi moments (Mironov 2017, https://arxiv.org/abs/1702.07476) of dp-accounting,
or privacy random variables (Gopi et al. 2021, https://arxiv.org/abs/2106.02848) of Opacus.
"""

import logging
import math
import warnings
from collections.abc import Sequence
from functools import cache
from typing import Any

from common.errors import InputError

NEIGHBOURS = "add or remove one"
LEAST_NOISE, MOST_NOISE = 1e-2, 1e6
Steps = tuple[float, float, int]  # noise multiplier, rate, how many
CLOSE = 1e-3  # of the noise that is found, relative
# steps of privacy loss that PLDs are rounded to, so that epsilon never comes out too small: a fifth of the time of
# dp-accounting's 1e-4, and from epsilon 1 on at most 0.02 % above it
INTERVAL = 5e-4


def epsilon(*, noise_multiplier: float, rate: float, steps: int, delta: float, accountant: str = "pld") -> float:
    """What is spent; infinite without noise.

    Args:
        rate: chance of a unit to be in a step, 0 to 1.
        accountant: pld, prv or rdp.

    Raises:
        InputError: the package that accounts is not installed.
    """
    return spent([(noise_multiplier, rate, steps)], delta=delta, accountant=accountant)


def spent(done: Sequence[Steps], *, delta: float, accountant: str = "pld") -> float:
    """What steps of several kinds spend together, in whatever order; arguments and errors as of `epsilon`."""
    together: dict[tuple[float, float], int] = {}
    for noise, rate, steps in done:
        if steps and rate > 0.0:
            together[noise, rate] = together.get((noise, rate), 0) + steps
    if not together:
        return 0.0
    if any(noise == 0.0 for noise, _ in together):
        return math.inf
    kinds = tuple(sorted((noise, rate, steps) for (noise, rate), steps in together.items()))
    return _opacus(kinds, delta) if accountant == "prv" else _google(kinds, delta, accountant)


def noise_for(
    target: float, *, rate: float, steps: int, delta: float, accountant: str = "pld", done: Sequence[Steps] = ()
) -> float:
    """The smallest noise multiplier, to `CLOSE`, with which no more than ``target`` is spent; see `noise_for_all`."""
    return noise_for_all(target, [(rate, steps)], delta=delta, accountant=accountant, done=done)


def noise_for_all(
    target: float,
    planned: Sequence[tuple[float, int]],
    *,
    delta: float,
    accountant: str = "pld",
    done: Sequence[Steps] = (),
) -> float:
    """The smallest noise multiplier, to `CLOSE`, of steps at several rates that together spend no more than ``target``.

    Args:
        planned: each rate, and how many steps there will be at it.
        done: what has been spent already.

    Raises:
        InputError: no noise that makes sense is enough; or as `epsilon`.
    """
    if not any(rate * steps for rate, steps in planned):
        return 0.0

    def spending(noise: float) -> float:
        return spent([*done, *((noise, rate, steps) for rate, steps in planned)], delta=delta, accountant=accountant)

    low, high, far = 0.0, 1.0, math.inf  # noise that is too little, noise that is enough, and what the first spends
    near = spending(high)
    while near > target:
        low, far, high = high, near, 2.0 * high
        if high > MOST_NOISE:
            raise InputError(f"privacy.epsilon = {target}: not even noise of {MOST_NOISE:g} clip norms reaches that")
        near = spending(high)
    while low == 0.0 and high > LEAST_NOISE:
        if (less := spending(high / 2.0)) > target:
            low, far = high / 2.0, less
        else:
            high, near = high / 2.0, less
    step = CLOSE / 2.0  # beyond where the target is thought to be, now to this side and now to the other
    while low and high - low > CLOSE * high:
        found = _between(low, far, high, near, target) * (1.0 + step)
        found = min(max(found, low + (high - low) / 16.0), high - (high - low) / 16.0)
        less = spending(found)
        if less <= target:
            high, near, step = found, less, -CLOSE / 2.0
        else:
            low, far, step = found, less, CLOSE / 2.0
    return high


def _between(low: float, far: float, high: float, near: float, target: float) -> float:
    """The noise that spends ``target``, were epsilon a power of it: ``far`` at ``low``, ``near`` at ``high``."""
    if not (math.isfinite(far) and near > 0.0):
        return (low + high) / 2.0
    power = math.log(far / near) / math.log(high / low)
    return low * (far / target) ** (1.0 / power) if power > 0.0 else (low + high) / 2.0


@cache
def _google(done: tuple[Steps, ...], delta: float, accountant: str) -> float:
    try:
        import dp_accounting
        from dp_accounting import pld, rdp
    except ImportError:
        raise InputError("dp-accounting is not installed: pip install 'fedistill[privacy]'") from None
    relation = dp_accounting.NeighboringRelation.ADD_OR_REMOVE_ONE
    found: Any = pld.PLDAccountant(relation, INTERVAL) if accountant == "pld" else rdp.RdpAccountant(None, relation)
    logging.getLogger("absl").setLevel(logging.ERROR)  # it tells of every Renyi order that it leaves out
    for noise, rate, steps in done:
        one: Any = dp_accounting.GaussianDpEvent(noise)
        if rate < 1.0:
            one = dp_accounting.PoissonSampledDpEvent(rate, one)
        found = found.compose(one, steps)
    return float(found.get_epsilon(delta))


@cache
def _opacus(done: tuple[Steps, ...], delta: float) -> float:
    try:
        from opacus.accountants import PRVAccountant
    except ImportError:
        raise InputError("Opacus is not installed: pip install 'fedistill[privacy]'") from None
    accountant = PRVAccountant()
    accountant.history = list(done)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return float(accountant.get_epsilon(delta))
