"""Numbers as the report writes them."""

import math
from collections.abc import Sequence
from typing import Any

NOTHING = "-"
BYTES = (("GB", 1e9), ("MB", 1e6), ("kB", 1e3))


def number(value: Any) -> str:
    """A score, a loss or a count."""
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return NOTHING
    return f"{value:.4f}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)


def share(value: Any) -> str:
    return NOTHING if value is None or not math.isfinite(value) else f"{100 * value:.1f} %"


def size(value: float) -> str:
    """So many bytes."""
    for name, unit in BYTES:
        if value >= unit:
            return f"{value / unit:.3g} {name}" if value < 999.5 * unit else f"{value / unit:,.0f} {name}"
    return f"{value:.0f} bytes"


def span(seconds: float) -> str:
    """A time."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes = round(seconds / 60)
    return f"{seconds / 60:.1f} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def many(count: int, what: str) -> str:
    """1 round, 2 rounds."""
    return f"{count:,} {what}{'' if count == 1 else 's'}"


def listed(words: Sequence[str]) -> str:
    """a, b and c."""
    return " and ".join(filter(None, (", ".join(words[:-1]), *words[-1:])))
