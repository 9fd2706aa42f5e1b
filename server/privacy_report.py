"""What a run says of privacy: whose presence is hidden, how well, and what is not."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from common.accounting import NEIGHBOURS
from common.wire import ClientLine
from server.preparation import Federation

if TYPE_CHECKING:
    from server.history import History

NOTHING = {"unit": "none", "epsilon": None, "delta": None, "accountant": None}  # nothing is claimed


def note_spent(history: "History", lines: Sequence[ClientLine]) -> dict[str, Any]:
    """Take up what clients say that they have spent; what the round's metrics line says of it."""
    for name in ("epsilon", "lifetime_epsilon"):
        said = [getattr(line, name) for line in lines]
        before = getattr(history, name)
        unbounded = before is None or None in said
        setattr(history, name, None if unbounded else max([before, *said]))
    return {"epsilon": history.epsilon, "lifetime_epsilon": history.lifetime_epsilon}


def privacy_block(federation: Federation, history: "History") -> dict[str, Any]:
    """`privacy` of summary.json; epsilon None: nothing bounds it."""
    keys = federation.config.privacy
    if keys.unit != "example":
        return dict(NOTHING)
    return {
        "unit": keys.unit,
        "epsilon": history.epsilon,
        "delta": keys.delta,
        "accountant": keys.accountant,
        "neighbours": f"{NEIGHBOURS} example of a client",
        "lifetime_epsilon": history.lifetime_epsilon,
        "clip_norm": keys.clip_norm,
        "lot": keys.lot,
        # held-out examples are others than those trained on, and nothing hides them; how many there are of both, and
        # how long training takes, is told as it is
        "protects": {"updates": True, "student": True, "scores": False, "counts": False, "times": False},
    }


def privacy_words(block: Mapping[str, Any]) -> str:
    """A summary's block in a table's cell."""
    epsilon = "no bound" if block["epsilon"] is None else f"epsilon {block['epsilon']:.3g}"
    return f"{epsilon} of a {block['unit']}, delta {block['delta']:g}"
