"""What privacy a run would give, and at what noise, before it is run."""

import math
from collections.abc import Iterator, Sequence

from clients.example_privacy import calibrated_noise
from clients.private_steps import Lots
from common.accounting import epsilon
from common.config import Config
from common.dataset import FederatedDataset
from common.store import cache_folder
from server.client_privacy import ClientPrivacy
from server.privacy_report import told


def planned_privacy(config: Config, data: FederatedDataset, trained: int) -> list[str]:
    """In words; empty: nothing is protected.

    Args:
        trained: numbers in a client's update.

    Raises:
        InputError: there is no noise that keeps what is asked for.
    """
    words: list[str] = []
    if config.privacy.unit == "client":
        mechanism = ClientPrivacy(config, data.clients, {"student": (trained,)})
        mechanism.begin()
        words += told(mechanism, 0)
    elif config.privacy.unit == "example":
        words += _of_examples(config, data)
    if config.privacy.secure_aggregation:
        words.append("secure aggregation: the server sees sums alone")
    return words


def _of_examples(config: Config, data: FederatedDataset) -> Iterator[str]:
    """Noise and epsilon of the smallest client, of the largest, and of the one that spends most."""
    keys = config.privacy
    sizes = sorted({int(count) for count in data.train_sizes[data.eligible]})
    plans = {count: _plan(config, count) for count in (sizes[0], sizes[-1])}
    if not keys.epsilon:  # else each has its own noise for it
        plans |= {count: _plan(config, count) for count in _first_of_steps(keys.lot, sizes)}
    most = max(plans, key=lambda count: plans[count][1])
    for count in sorted({sizes[0], most, sizes[-1]}):
        noise, found = plans[count]
        spent = f"epsilon {found:.3g} at delta {keys.delta:g} ({keys.accountant})" if noise else "no epsilon"
        yield f"privacy of examples: noise of {noise:.4g} clip norms for {count:,} of them, {spent} in all rounds"
    if 0 < keys.lifetime_epsilon < keys.epsilon:
        yield f"clients will decline: privacy.lifetime-epsilon = {keys.lifetime_epsilon} is less than privacy.epsilon"


def _plan(config: Config, count: int) -> tuple[float, float]:
    """The noise of a client with so many examples, and what it spends in all rounds."""
    keys = config.privacy
    lots = Lots(keys.lot, count)
    steps = lots.steps * config.client.epochs * config.rounds
    noise = calibrated_noise(keys, lots, steps, cache_folder(config.runtime.cache))
    if not noise:
        return 0.0, math.inf
    return noise, epsilon(
        noise_multiplier=noise, rate=lots.rate, steps=steps, delta=keys.delta, accountant=keys.accountant
    )


def _first_of_steps(lot: int, sizes: Sequence[int]) -> list[int]:
    """Of ascending sizes with as many steps an epoch the smallest, in whose lots an example is oftenest."""
    found: dict[int, int] = {}
    for count in sizes:
        found.setdefault(Lots(lot, count).steps, count)
    return [*found.values()]
