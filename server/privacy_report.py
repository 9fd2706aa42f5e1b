"""What a run says of its privacy: the block in summary.json, and lines on screen before round 1."""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from common.accounting import NEIGHBOURS
from common.privacy_keys import PrivacyKeys
from common.wire import SPENT, ClientLine
from server.client_privacy import ClientPrivacy
from server.ledger import LEDGER

NOTHING = {"unit": "none", "epsilon": None, "delta": None, "accountant": None}  # no sum is noised


def privacy_block(federation: Any, history: Any) -> dict[str, Any]:
    """The block of summary.json. What is not noised is said not to be protected."""
    keys = federation.config.privacy
    found = spending_of_examples(keys, history.privacy, []) if keys.unit == "example" else history.privacy
    return {**NOTHING, **found, "secure_aggregation": keys.secure_aggregation}


def spending(privacy: ClientPrivacy) -> dict[str, Any]:
    """What a run whose unit is a client has spent so far."""
    keys = privacy.keys
    holds = privacy.noise > 0.0 and not keys.noise_cohort
    found: dict[str, Any] = {
        "unit": "client",
        "epsilon": privacy.epsilon,
        "delta": keys.delta,
        "accountant": keys.accountant,
        "neighbours": f"{NEIGHBOURS} client",
        "noise_multiplier": privacy.noise,
        "clip_norm": privacy.clip_norm,
        "rate": privacy.rate,
        "rounds_charged": len(privacy.ledger.steps("update")),
        "protects": {"student": holds, "scores": holds and keys.scores_share > 0.0, "cost": False, "faults": False},
        "reproducible": False,
    }
    if keys.scores_share:
        found["scores"] = {"share": keys.scores_share, "noise_multiplier": privacy.noise_scores}
    if keys.noise_cohort:
        found["noise_cohort"] = keys.noise_cohort
        found["noise_population"] = privacy.population
    return {**found, "note": _note(privacy)}


def spending_of_examples(keys: PrivacyKeys, before: Mapping[str, Any], lines: Sequence[ClientLine]) -> dict[str, Any]:
    """What a run whose unit is an example has spent so far: the most that a client says.

    Args:
        before: the same after the round before; empty: there was none.
        lines: of the clients that are in the round.
    """
    found: dict[str, Any] = {
        "unit": "example",
        "delta": keys.delta,
        "accountant": keys.accountant,
        "neighbours": f"{NEIGHBOURS} example of a client",
        "clip_norm": keys.clip_norm,
        "lot": keys.lot,
    }
    for name in SPENT:
        said = [before.get(name, 0.0), *(getattr(line, name) for line in lines)]
        found[name] = None if None in said else max(said)  # None: nothing bounds it
    noisy = found["epsilon"] is not None
    # scores are of other examples, that this run never trains on; their number, and that of those trained on, stands in
    # every client's line, and how long a client takes can be seen
    found["protects"] = {"student": noisy, "updates": noisy, "scores": False, "counts": False, "times": False}
    words = [
        "holds for a client's update, towards the server too; lots and noise come from the operating system's entropy, "
        "so the run cannot be reproduced bit for bit",
        "epsilon is the largest over clients whose answers were taken, each with its own noise; lifetime_epsilon is "
        "over all runs in its ledger",
        "the clients' scores are exact and not protected",
    ]
    if not noisy:
        words.append("gradients are clipped and not noised: nothing is protected")
    return {**found, "reproducible": False, "note": "; ".join(words)}


def privacy_words(block: Mapping[str, Any]) -> tuple[str, str, str]:
    """A summary's block as a table says it: what it is about, epsilon, delta."""
    simulated = " simulated" if block.get("noise_cohort") else ""  # it holds for no client of the run
    epsilon = "no epsilon" if block["epsilon"] is None else f"epsilon {block['epsilon']:.3g}{simulated}"
    return f"privacy of one {block['unit']}", epsilon, f"delta {block['delta']:g}"


def told(privacy: ClientPrivacy, done: int) -> Iterator[str]:
    """What is said before the first round of this process."""
    keys, left = privacy.keys, privacy.config.rounds - done
    planned = privacy.planned(left)
    spent = (
        "no epsilon" if math.isinf(planned) else f"epsilon {planned:.3g} at delta {keys.delta:g} ({keys.accountant})"
    )
    yield f"privacy of clients: noise of {privacy.noise:.4g} clip norms, {spent} in all"
    if keys.delta >= 1.0 / privacy.population:
        yield (
            f"privacy.delta = {keys.delta:g}: of {privacy.population} clients that allows one to be given away whole; "
            f"give less than {1.0 / privacy.population:g}"
        )


def _note(privacy: ClientPrivacy) -> str:
    keys = privacy.keys
    what = "students and metrics.jsonl" if keys.scores_share else "students"
    # the server draws the cohort, and members of a secure sum know each other: towards them no chance counts
    towards = "" if keys.distributed_noise and privacy.rate == 1.0 else " but the server"
    towards += " and those who are in a cohort" if keys.secure_aggregation and privacy.rate < 1.0 else ""
    words = [f"holds for the {what}, towards everybody{towards}"]
    if keys.noise_cohort:
        words = [
            f"simulated: noise and epsilon are those of {privacy.population} clients of which {keys.noise_cohort} are "
            "in a round on average, and hold for no other federation; the clients of this run are not protected so"
        ]
    words.append(
        "cohorts and noise come from the operating system's entropy, so the run cannot be reproduced bit for bit"
    )
    if not keys.scores_share:
        words.append("the clients' scores are exact and not protected")
    if privacy.noise == 0.0:
        words.append("updates are clipped and not noised: nothing is protected")
    if privacy.config.server.packing == "on":
        words.append("updates are clipped by the clients' software")
    words.append(f"{LEDGER} says what was charged")
    return "; ".join(words)
