"""What privacy a run would give, and at what noise, before it is run."""

from collections.abc import Iterator

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
    """The noise of the smallest client and of the largest, in whose lots an example is oftenest and least often."""
    keys = config.privacy
    sizes = sorted({int(count) for count in data.train_sizes[data.eligible]})
    for count in dict.fromkeys((sizes[0], sizes[-1])):
        lots = Lots(keys.lot, count)
        steps = lots.steps * config.client.epochs * config.rounds
        noise = calibrated_noise(keys, lots, steps, cache_folder(config.runtime.cache))
        spent = "no epsilon"
        if noise:
            found = epsilon(
                noise_multiplier=noise, rate=lots.rate, steps=steps, delta=keys.delta, accountant=keys.accountant
            )
            spent = f"epsilon {found:.3g} at delta {keys.delta:g} ({keys.accountant})"
        yield f"privacy of examples: noise of {noise:.4g} clip norms for {count:,} of them, {spent} in all rounds"
    if 0 < keys.lifetime_epsilon < keys.epsilon:
        yield f"clients will decline: privacy.lifetime-epsilon = {keys.lifetime_epsilon} is less than privacy.epsilon"
