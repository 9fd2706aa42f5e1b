"""What the keys of privacy mean to each other and to the rest: combinations that make no sense, by name."""

from common.keys import FUSED, KEEPING, ROBUST, Keys
from common.secure_sum import LEAST


def check_privacy(config: Keys) -> None:
    """Raise ValueError for the first of some keys that do not fit each other."""
    for check in (_secure_aggregation,):
        check(config)


def _secure_aggregation(config: Keys) -> None:
    privacy, server, student = config.privacy, config.server, config.student
    if privacy.distributed_noise and not (privacy.secure_aggregation and privacy.unit == "client"):
        raise ValueError(
            "privacy.distributed-noise = true: each client adds a part of the noise to its words of a secure sum; give "
            "privacy.secure-aggregation = true and privacy.unit = 'client'"
        )
    if not privacy.secure_aggregation:
        return
    reasons = {
        f"server.strategy = {server.strategy!r} needs each client's own update": server.strategy in (*ROBUST, *FUSED),
        f"server.strategy = {server.strategy!r} has a sum of its own": server.strategy in KEEPING,
        f"server.norm-bound = {server.norm_bound} needs each client's own update": server.norm_bound > 0,
        f"server.wire = {server.wire!r} needs each client's own update": server.wire != "fp32",
        "server.packing = 'off' sends each client's own update": server.packing == "off",
        f"server.over-select = {server.over_select} loses clients on purpose": server.over_select > 1.0,
        f"student.tiers = {student.tiers!r} adds clients of each tier up by themselves": bool(student.tiers),
        "client.grow-batch = true adds the updates' norms up": config.client.grow_batch,
        f"server.cohort = {server.cohort} hides nobody, {LEAST} do": 0 < server.cohort < LEAST,
        f"data.clients = {config.data.clients} hides nobody, {LEAST} do": 0 < config.data.clients < LEAST,
    }
    for reason, found in reasons.items():
        if found:
            raise ValueError(f"privacy.secure-aggregation = true: {reason}; it does not fit that")
