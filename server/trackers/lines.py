"""A line of metrics.jsonl as numbers with names: ``{"train/loss": 0.4, "evaluate/student/accuracy": 0.8}``."""

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

COUNTED = ("failed", "rejected", "late")  # lists of clients: of these, how many


def numbers_of(line: Mapping[str, Any]) -> tuple[int, dict[str, float]]:
    """The round and its finite numbers, named by the phase and where they stand in the line; no text."""
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


def lines_before(path: Path) -> list[dict[str, Any]]:
    """What a metrics.jsonl holds, up to a line that is only half there."""
    found = []
    for text in path.read_text().splitlines() if path.is_file() else []:
        try:
            found.append(json.loads(text))
        except ValueError:
            break
    return found
