"""A sweep's grid: keys with a list of values each, every combination an arm."""

import itertools
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from common.errors import InputError
from common.section import Scalar

GRID = "grid"
EXAMPLE = '[grid] with a list for each key, e.g. student.layers = [2, 3] or "client.lr" = [0.001, 0.0003]'
LONGEST = 200  # characters of a folder's name; file systems take 255 bytes
UNSAFE = re.compile(r"[^\w.+@-]")  # in a folder's name
Arms = dict[str, dict[str, Scalar]]


def take_grid(path: Path, document: dict[str, Any]) -> dict[str, list[Scalar]]:
    """Takes the section [grid] out of a sweep's document; empty: it has none.

    Raises:
        InputError: a key has no list of different values, or is varied elsewhere.
    """
    given = {key: document.pop(key) for key in list(document) if key.partition(".")[0] == GRID}
    grid = flattened({key.removeprefix(GRID).removeprefix("."): values for key, values in given.items()})
    if given and not grid:
        raise InputError(f"{path}: grid: empty; give {EXAMPLE}")
    for key, values in grid.items():
        if not key or not isinstance(values, list) or not values or any(map(_is_no_scalar, values)):
            raise InputError(f"{path}: {GRID}{'.' * bool(key)}{key} = {values!r}: give {EXAMPLE}")
        if len({(type(value) is bool, value) for value in values}) < len(values):
            raise InputError(f"{path}: grid.{key} = {values!r}: give different values")
        if key in ("seed", "task"):
            raise InputError(f"{path}: grid.{key}: give {key}s = {values!r} above the sections")
    return grid


def crossed(path: Path, arms: Arms, grid: Mapping[str, list[Scalar]]) -> Arms:
    """Each arm (without any: one of no keys) with every combination, the last key's values next to each other.

    Raises:
        InputError: an arm sets a key of the grid, two arms would have one name, or one a name that no folder can have.
    """
    if not grid:
        return arms
    for arm, keys in arms.items():
        if taken := [key for key in keys if key in grid]:
            raise InputError(f"{path}: arms.{arm}.{taken[0]}: the grid varies it; leave one of the two out")
    found: Arms = {}
    for arm, keys in (arms or {"": {}}).items():
        for values in itertools.product(*grid.values()):
            point = dict(zip(grid, values, strict=True))
            name = ",".join([*([arm] if arm else []), *_words(point)])
            if len(name.encode()) > LONGEST:
                raise InputError(
                    f"{path}: grid: the name {name[:40]}... of an arm would be longer than {LONGEST} characters; give "
                    "fewer keys or shorter values, or arms as [arms.NAME]"
                )
            if name in found:
                raise InputError(f"{path}: grid: two of its arms would be called {name}; give them as [arms.NAME]")
            found[name] = {**keys, **point}
    return found


def flattened(keys: Mapping[str, Any]) -> dict[str, Any]:
    """Tables in tables as dotted keys."""
    return {
        f"{part}.{inner}" if isinstance(value, dict) else part: found
        for part, value in keys.items()
        for inner, found in (value.items() if isinstance(value, dict) else ((part, value),))
    }


def _is_no_scalar(value: Any) -> bool:
    return not isinstance(value, str | int | float | bool)


def _words(point: Mapping[str, Scalar]) -> list[str]:
    """``layers=2``, safe as a folder's name; with the section where two keys end alike."""
    ends = [key.rpartition(".")[2] for key in point]
    named = [end if ends.count(end) == 1 else key for key, end in zip(point, ends, strict=True)]
    values = [str(value).lower() if isinstance(value, bool) else str(value) for value in point.values()]
    return [f"{name}={UNSAFE.sub('_', value)}" for name, value in zip(named, values, strict=True)]
