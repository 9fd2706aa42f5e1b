"""An audit's report.html: which defence stops which attack, ROCs, and what is leaked against what the student is worth.

The page is made of the same parts as a run's (`server.report`).
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from common.store import write_atomically
from server.report.page import Fact, Figure, Section, Table, page
from server.report.plots import COLOURS, SOFT, canvas, legend_above, short, svg, theme
from server.report.words import listed, share
from simulations.audits.attack import Row
from simulations.audits.figures import Figure as Found
from simulations.audits.figures import Line, against, lines, unit_of, wide_sheet
from simulations.audits.plots import GRID, curves_of

if TYPE_CHECKING:
    from simulations.audits.audit_file import Audit

UTILITY: Line = ("utility", "")
MARKS, STYLES = "osD^vP*X", ("-", "--", "-.", ":")
RATES = {1e-4: "0.01 %", 1e-3: "0.1 %", 1e-2: "1 %", 1e-1: "10 %", 1.0: "100 %"}
Curves = Mapping[str, NDArray[np.float64]]
Cells = Mapping[str, Found | None]


def write_audit_report(plan: "Audit", rows: Sequence[Row], out: Path) -> Path:
    """Write ``report.html`` into an audit's folder and return its path."""
    target = out / "report.html"
    arms = tuple(plan.plan.arms)
    papers = {name: attack.paper for name, attack in plan.attacks.items()}
    write_atomically(target, audit_page(rows, arms, papers, curves_of(plan, out)).encode())
    return target


def audit_page(
    rows: Sequence[Row], arms: Sequence[str], papers: Mapping[str, str], curves: Mapping[str, Curves]
) -> str:
    """The page.

    Args:
        papers: by attack, its address.
        curves: by attack and variant, by arm: (points,) true-positive rates on `GRID`.
    """
    if not rows:
        return page("fedistill: audit", "No attack has ended yet.", (), ())
    table, sheet = against(rows, arms), wide_sheet(rows, arms)
    summed = Table(sheet.title, sheet.head, [row for part in sheet.sections for row in part])
    first = Section("Which defence stops which attack", [summed], wide=True, notes=sheet.notes)
    attacks = {line: cells for line, cells in table.items() if line != UTILITY}
    with theme():
        parts = [
            _attack(number, line, rows, table, curves.get(_name(line), {}), papers.get(line[0], ""))
            for number, line in enumerate(attacks)
        ]
        tasks = listed(list(dict.fromkeys(str(row["task"]) for row in rows)))
        return page(
            f"fedistill: audit of {tasks}", _verdict(attacks, arms), _facts(table, attacks, arms), [first, *parts]
        )


def _name(line: Line) -> str:
    return " ".join(line).strip()


def _through(attacks: Mapping[Line, Cells], arm: str) -> tuple[list[str], int]:
    """The attacks that got through there, and how many were tried."""
    tried = [
        line for line, cells in attacks.items() if _known(cells.get(arm)) and _there(cells[arm]).through is not None
    ]
    return [_name(line) for line in tried if _there(attacks[line][arm]).through], len(tried)


def _known(found: Found | None) -> bool:
    return found is not None and found.mean is not None


def _there(found: Found | None) -> Found:
    assert found is not None
    return found


def _verdict(attacks: Mapping[Line, Cells], arms: Sequence[str]) -> str:
    words = []
    for arm in arms:
        through, tried = _through(attacks, arm)
        if tried:
            words.append(f"{len(through)} of {tried} in arm {arm}")
    return f"Attacks that got through: {listed(words)}." if words else "No attack could be tried."


def _facts(table: Mapping[Line, Cells], attacks: Mapping[Line, Cells], arms: Sequence[str]) -> Iterator[Fact]:
    for arm in arms:
        through, tried = _through(attacks, arm)
        worth = table.get(UTILITY, {}).get(arm)
        said = f"utility {share(_there(worth).mean)}" if _known(worth) else "utility not measured"
        if tried:
            yield Fact(f"Arm {arm}", f"{len(through)} of {tried} through", said)


def _attack(  # noqa: PLR0917
    number: int, line: Line, rows: Sequence[Row], table: Mapping[Line, Cells], curves: Curves, paper: str
) -> Section:
    """One attack: its ROC, and its success against utility."""
    parts: list[str | Table | Figure] = [_roc(number, line, curves)] if curves else []
    leak = _leak(number, line, rows, table)
    if leak:
        parts.append(leak)
    elif UTILITY in table:
        parts.append("It could not be tried where utility was measured.")
    else:
        parts.append("Utility was not measured: add the attack `utility`, and this is set against it.")
    return Section(_name(line), [*parts, *([f"Paper: {paper}"] if paper else [])])


def _roc(number: int, line: Line, curves: Curves) -> Figure:
    figure, axes = canvas(3.4)
    for place, (arm, rates) in enumerate(curves.items()):
        axes.plot(GRID, np.maximum(rates, GRID[0] / 10), _style(place), color=_colour(place), label=short(arm))
    axes.plot(GRID, GRID, ":", color=SOFT, lw=1, label="guessing")
    axes.set(xscale="log", yscale="log", xlim=(GRID[0], 1), ylim=(GRID[0], 1.1))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_ticks(list(RATES), list(RATES.values()))
        axis.set_minor_locator(_no_ticks())
    axes.set(xlabel="false positives", ylabel="true positives")
    axes.grid()
    legend_above(figure, axes, 3)
    at = {words: int(np.searchsorted(GRID, rate * (1 - 1e-9))) for rate, words in RATES.items() if rate < 1}
    told = [f"{arm} {share(float(rates[at['0.1 %']]))}" for arm, rates in curves.items()]
    note = "Both axes are logarithmic: what counts is the left, where few are accused wrongly. Mean over seeds."
    rows = [(arm, *(share(float(rates[place])) for place in at.values())) for arm, rates in curves.items()]
    numbers = Table("True positives at so many false positives", ("arm", *at), rows)
    words = f"Members that are found at 0.1 % false positives: {', '.join(told)}."
    return Figure(svg(figure, f"roc-{number}"), words, note, [numbers])


def _no_ticks() -> Any:
    from matplotlib.ticker import NullLocator

    return NullLocator()


def _leak(number: int, line: Line, rows: Sequence[Row], table: Mapping[Line, Cells]) -> Figure | None:
    """A point for each arm: what the student is worth, and what the attack got."""
    worth, measure = table.get(UTILITY, {}), lines(rows)[line]
    known = [arm for arm, cell in table[line].items() if _known(cell) and _known(worth.get(arm))]
    if not known:
        return None
    factor, sign = unit_of(measure)
    scaled = ((worth, 100.0), (table[line], factor))
    both = {arm: tuple(by * float(_there(cells[arm]).mean or 0.0) for cells, by in scaled) for arm in known}
    guessed = {arm: factor * found for arm in known if (found := _guessed(rows, line, arm)) is not None}
    through = {arm: _there(table[line][arm]).through for arm in known}
    figure, axes = canvas(3.0)
    for place, (arm, point) in enumerate(both.items()):
        face = _colour(place) if through[arm] else "none"
        axes.plot(*point, MARKS[place % len(MARKS)], color=_colour(place), markerfacecolor=face, markersize=8,
                  markeredgewidth=1.6, label=short(arm), clip_on=False)  # fmt: skip
    if guessed:
        places = [both[arm][0] for arm in guessed]
        axes.plot(places, list(guessed.values()), "_", color=SOFT, markersize=16, label="guessing", clip_on=False)
    axes.margins(x=0.12)
    axes.set_ylim(0, 1.15 * max(*(leak for _, leak in both.values()), *guessed.values(), 1e-3))
    axes.grid()
    axes.set(xlabel=f"{short(lines(rows)[UTILITY], 30)}, %", ylabel=f"{short(measure, 30)}{',' * bool(sign)}{sign}")
    legend_above(figure, axes, 3)
    note = "Right and low is good: a student that is worth much and tells little. Filled: the attack got through."
    numbers = _leak_table(both, guessed, through, (lines(rows)[UTILITY], measure), sign)
    return Figure(svg(figure, f"leak-{number}"), _leak_words(both, measure, sign), note, [numbers])


def _guessed(rows: Sequence[Row], line: Line, arm: str) -> float | None:
    """What guessing reaches in an arm, the mean over seeds; None: nothing is known of it."""
    own = [row for row in rows if (row["attack"], row.get("variant") or "", row["arm"]) == (*line, arm)]
    found = [float(str(row["chance"])) for row in own if row.get("chance") is not None]
    return float(np.mean(found)) if found else None


def _leak_words(both: Mapping[str, tuple[float, ...]], measure: str, sign: str) -> str:
    most, least = (pick(both, key=lambda arm: both[arm][1]) for pick in (max, min))
    words = f"Most leaks in arm {most}: {both[most][1]:.1f}{sign} ({measure}) at a utility of {both[most][0]:.1f} %"
    if both[most][1] > both[least][1]:
        words += f"; least in arm {least}: {both[least][1]:.1f}{sign} at {both[least][0]:.1f} %"
    return f"{words}."


def _leak_table(
    both: Mapping[str, tuple[float, ...]],
    guessed: Mapping[str, float],
    through: Mapping[str, bool | None],
    what: tuple[str, str],
    sign: str,
) -> Table:
    said = {True: "yes", False: "no", None: "-"}
    rows = [
        (arm, f"{both[arm][0]:.2f} %", f"{both[arm][1]:.2f}{sign}",
         f"{guessed[arm]:.2f}{sign}" if arm in guessed else "-", said[through[arm]])
        for arm in both
    ]  # fmt: skip
    return Table("Utility and leak", ("arm", *what, "guessing", "got through"), rows)


def _colour(place: int) -> str:
    return COLOURS[place % len(COLOURS)]


def _style(place: int) -> str:
    return STYLES[place // len(COLOURS) % len(STYLES)]
