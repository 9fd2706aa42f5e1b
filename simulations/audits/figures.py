"""Which defence stops which attack: attacks as rows, arms as columns, from the rows of an audit."""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from simulations.audits.attack import Row
from simulations.table import Row as Cells
from simulations.table import Sheet

ABREAST, WIDTH = 7, 8  # arms that fit 80 columns, each so many characters wide
Line = tuple[str, str]  # an attack and its variant


@dataclass(frozen=True)
class Figure:
    """An attack's success in an arm.

    Attributes:
        mean, std: over seeds; None: it could not be tried, or there is one seed.
        through: whether it did better than guessing does: the lower ends of its intervals, in the mean over seeds,
            above chance; None: it is no attack, or nothing is known of chance.
        seeds: how many.
    """

    mean: float | None
    std: float | None
    through: bool | None
    seeds: int


def lines(rows: Sequence[Row]) -> dict[Line, str]:
    """Every attack and variant in its order, and what its figures are."""
    return {(str(row["attack"]), str(row.get("variant") or "")): str(row.get("measure") or "") for row in rows}


def figure(rows: Sequence[Row], line: Line, arm: str) -> Figure | None:
    """What stands in the table where an attack meets a defence; None: not there yet."""
    found = [row for row in rows if (row["attack"], row.get("variant") or "", row["arm"]) == (*line, arm)]
    tried = [row for row in found if row.get("success") is not None]
    if not found:
        return None
    if not tried:
        return Figure(None, None, None, 0)
    values = [_number(row["success"]) for row in tried]
    bounds = [_number(row["success"] if row.get("low") is None else row["low"]) for row in tried]
    chances = [_number(row["chance"]) for row in tried if row.get("chance") is not None]
    through = statistics.fmean(bounds) > statistics.fmean(chances) if chances else None
    std = statistics.stdev(values) if len(values) > 1 else None
    return Figure(statistics.fmean(values), std, through, len(values))


def against(rows: Sequence[Row], arms: Sequence[str]) -> dict[Line, dict[str, Figure | None]]:
    """Attack x defence."""
    return {line: {arm: figure(rows, line, arm) for arm in arms} for line in lines(rows)}


def attack_sheets(rows: Sequence[Row], arms: Sequence[str]) -> list[Sheet]:
    """The table in parts that fit 80 columns."""
    if not rows:
        return []
    found = against(rows, arms)
    parts = [arms[start : start + ABREAST] for start in range(0, len(arms), ABREAST)]
    return [_sheet(rows, found, part, WIDTH, spread=False, last=part is parts[-1]) for part in parts]


def wide_sheet(rows: Sequence[Row], arms: Sequence[str]) -> Sheet:
    """The table whole, with deviations over seeds."""
    return _sheet(rows, against(rows, arms), arms, 0, spread=True, last=True)


def _sheet(
    rows: Sequence[Row],
    found: Mapping[Line, Mapping[str, Figure | None]],
    arms: Sequence[str],
    width: int,
    *,
    spread: bool,
    last: bool,
) -> Sheet:
    named = lines(rows)
    shown: dict[bool, list[Cells]] = {False: [], True: []}
    for (attack, variant), cells in found.items():
        first = cells[arms[0]]
        is_attack = any(cell is not None and cell.through is not None for cell in cells.values()) or first is None
        label = f"{attack} {variant}".strip()
        shown[is_attack].append((label, *(_cell(cells[arm], spread=spread) for arm in arms)))
    seeds = ", ".join(str(seed) for seed in sorted({int(str(row["seed"])) for row in rows}))
    tasks = ", ".join(dict.fromkeys(str(row["task"]) for row in rows))
    notes = _notes(named, spread=spread) if last else []
    return Sheet(f"{tasks}: attacks and what stops them, seeds {seeds}", ("", *arms), [*shown.values()], notes, width)


def _notes(named: Mapping[Line, str], *, spread: bool) -> list[str]:
    attacks: dict[str, list[str]] = {}
    for (attack, _), measure in named.items():
        if measure and attack not in attacks.setdefault(measure, []):
            attacks[measure].append(attack)
    notes = [f"{', '.join(names)}: {measure}." for measure, names in attacks.items()]
    return [
        *notes,
        "Mean over seeds, shares in hundredths" + ("; ±: standard deviation." if spread else "."),
        "*: it got through, its 95 % interval is above what guessing may reach.",
        "-: it cannot be tried there.",
    ]


def _cell(found: Figure | None, *, spread: bool) -> str:
    if found is None:
        return ""
    if found.mean is None:
        return "-"
    more = f" ±{100 * found.std:.1f}" if spread and found.std is not None else ""
    return f"{100 * found.mean:.1f}{more}{'*' if found.through else ''}"


def _number(value: object) -> float:
    assert isinstance(value, int | float)
    return float(value) if math.isfinite(value) else math.nan
