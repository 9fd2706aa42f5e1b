"""What a client tells of itself beside its update, as words of the secure sum: the server learns the total alone.

A loss is a mean over examples: it is summed times the client's count, in fixed point with 32 fractional bits; so are
the clients' own scores and their squares, for their mean and deviation.
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from common.fixed_point import CLIENT_LIMIT, SCALE, NotFinite
from common.wire import LOSSES, ClientLine

COUNTS = ("clients", "examples", "scored")
NAMES = (*COUNTS, "score", "score_squared", *LOSSES)
TAIL = {"tail/numbers": (len(NAMES),)}


def tail_of(line: ClientLine) -> NDArray[np.int64]:
    """One client's words.

    Raises:
        NotFinite: a loss is NaN, infinite or too large to add up.
    """
    score = line.score or 0.0
    told: dict[str, float] = {"score": score, "score_squared": score * score}
    told |= {name: (getattr(line, name) or 0.0) * line.examples for name in LOSSES}
    counts = {"clients": 1, "examples": line.examples, "scored": int(line.score is not None)}
    return np.asarray([counts[name] if name in COUNTS else _encoded(told[name]) for name in NAMES], dtype=np.int64)


def _encoded(value: float) -> int:
    if not abs(value) * SCALE < CLIENT_LIMIT:
        raise NotFinite("a loss is NaN, infinite or too large to add up")
    return round(value * SCALE)


def read_tail(words: NDArray[np.int64]) -> dict[str, Any]:
    """The totals: counts as they are, ``losses`` as means over the examples, ``spread`` of the clients' own scores."""
    found: Mapping[str, int] = {name: int(word) for name, word in zip(NAMES, words, strict=True)}
    examples, scored = found["examples"], found["scored"]
    spread: dict[str, float] = {"clients": scored}
    if scored > 0:
        mean = found["score"] / SCALE / scored
        square = found["score_squared"] / SCALE / scored
        spread = {"std": math.sqrt(max(square - mean * mean, 0.0)), "mean": mean, "clients": scored}
    losses = {name: found[name] / SCALE / examples if examples > 0 else math.nan for name in LOSSES}
    return {"clients": found["clients"], "examples": examples, "losses": losses, "spread": spread}
