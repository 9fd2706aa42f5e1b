"""What a round of DP-SGD costs a client, and whether it may: from the keys and the client's ledger to its steps."""

import json
import math
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from clients.ledger import Declined, Ledger
from clients.private_steps import Lots, PrivateSteps
from common.accounting import noise_for
from common.config import Config
from common.errors import InputError
from common.hashing import hash_json
from common.privacy_keys import PrivacyKeys
from common.store import write_atomically
from common.wire import Instruction


def begin_round(
    config: Config, instruction: Instruction, keys: NDArray[np.uint8], *, cache: Path, ledger: Path
) -> tuple[PrivateSteps, dict[str, float | None]]:
    """The steps of a client's round, which its ledger holds from now on, and what its line says of what is spent.

    Args:
        keys: (n, 16) content keys of the examples that it trains on.
        cache: where noise that was found once is kept.
        ledger: the folder of the client's.

    Raises:
        Declined: the client's budget does not allow it.
    """
    privacy, epochs = config.privacy, config.client.epochs
    lots = Lots(privacy.lot, len(keys))
    try:
        noise = calibrated_noise(privacy, lots, lots.steps * epochs * config.rounds, cache)
    except InputError as error:
        raise Declined(str(error)) from None
    steps = PrivateSteps(lots, noise=noise, clip_norm=privacy.clip_norm)
    spent = Ledger(ledger, keys).claim(
        instruction.run, instruction.round, steps.spending(epochs),
        limit=privacy.lifetime_epsilon or privacy.epsilon or math.inf,
        delta=privacy.delta, accountant=privacy.accountant,
    )  # fmt: skip
    return steps, {"epsilon": _finite(spent.run), "lifetime_epsilon": _finite(spent.ever)}


def calibrated_noise(keys: PrivacyKeys, lots: Lots, steps: int, cache: Path) -> float:
    """The noise multiplier of a client that makes so many steps in a whole run, found once on this machine.

    Raises:
        InputError: there is none; see `common.accounting.noise_for`.
    """
    if not keys.epsilon:
        return keys.noise_multiplier
    asked = {"rate": lots.rate, "steps": steps, "delta": keys.delta, "accountant": keys.accountant}
    path = cache / "noise" / f"{hash_json([keys.epsilon, asked])[:32]}.json"
    try:
        return float(json.loads(path.read_bytes())["noise"])
    except (OSError, ValueError, KeyError, TypeError):
        found = noise_for(keys.epsilon, rate=lots.rate, steps=steps, delta=keys.delta, accountant=keys.accountant)
        write_atomically(path, json.dumps({"epsilon": keys.epsilon, **asked, "noise": found}).encode())
        return found


def _finite(epsilon: float) -> float | None:
    """None: nothing bounds it."""
    return epsilon if math.isfinite(epsilon) else None
