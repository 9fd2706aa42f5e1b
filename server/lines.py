"""The lines of a run's journals: read, and as numbers with names."""

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

COUNTED = ("failed", "rejected", "late")  # lists of clients: of these, how many


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The lines of a journal, up to one that is none; the last one of a run that was killed may be half there."""
    found: list[dict[str, Any]] = []
    for text in path.read_bytes().splitlines() if path.is_file() else []:
        try:
            line = json.loads(text)
        except ValueError:
            break
        if not isinstance(line, dict) or type(line.get("round")) is not int or "phase" not in line:
            break
        found.append(line)
    return found


def numbers_of(line: Mapping[str, Any]) -> tuple[int, dict[str, float]]:
    """The round and a line's finite numbers, named by its phase and where they stand in it; no text.

    ``{"train/loss": 0.4, "evaluate/student/accuracy": 0.8}``, say.
    """
    phase = line.get("phase", "run")
    told = {name: value for name, value in line.items() if name not in ("round", "phase")}
    found = {f"{phase}/{name}": value for name, value in _numbers(told)}
    return int(line.get("round", 0)), {name: value for name, value in found.items() if math.isfinite(value)}


def _numbers(value: Any, name: str = "") -> Iterator[tuple[str, float]]:
    within = f"{name}/" if name else ""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _numbers(inner, f"{within}{key}")
    elif isinstance(value, list) and name in COUNTED:
        yield name, float(len(value))
    elif isinstance(value, list):
        for number, inner in enumerate(value, start=1):
            yield from _numbers(inner, f"{within}{number}")
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield name, float(value)
