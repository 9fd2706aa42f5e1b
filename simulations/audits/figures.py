"""Which defence stops which attack: attacks as rows, arms as columns, from the rows of an audit."""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from simulations.audits.attack import EPSILON, Row
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
            above chance; None: it is no attack, or nothing is known of chance or of an interval.
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
    std = statistics.stdev(values) if len(values) > 1 else None
    return Figure(statistics.fmean(values), std, _through(tried, statistics.fmean(values)), len(values))


def _through(tried: Sequence[Row], mean: float) -> bool | None:
    """See `Figure`."""
    chances = [_number(row["chance"]) for row in tried if row.get("chance") is not None]
    if not chances:
        return None
    chance, lows = statistics.fmean(chances), [row.get("low") for row in tried]
    if mean <= chance:  # and so is the interval's lower end, known or not
        return False
    return None if None in lows else statistics.fmean(map(_number, lows)) > chance


def unit_of(measure: str) -> tuple[float, str]:
    """What a figure is multiplied by to be printed, and what stands behind it."""
    return (1.0, "") if measure == EPSILON else (100.0, " %")


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
    guessed = lines([row for row in rows if row.get("chance") is not None])
    for line, cells in found.items():
        is_attack = line in guessed or cells[arms[0]] is None
        shown[is_attack].append((" ".join(line).strip(), *(_cell(cells[arm], named[line], spread) for arm in arms)))
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


def _cell(found: Figure | None, measure: str, spread: bool) -> str:
    if found is None:
        return ""
    if found.mean is None:
        return "-"
    factor, sign = unit_of(measure)
    digits = 1 if sign else 2
    more = f" ±{factor * found.std:.{digits}f}" if spread and found.std is not None else ""
    return f"{factor * found.mean:.{digits}f}{more}{'*' if found.through else ''}"


def _number(value: object) -> float:
    assert isinstance(value, int | float)
    return float(value) if math.isfinite(value) else math.nan
