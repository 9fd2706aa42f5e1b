"""An audit's plots: every figure against what the arms spend, and ROCs on logarithmic axes. PNG and SVG."""

import csv
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from common.store import write_atomically
from simulations.audits.attack import Row
from simulations.audits.figures import Figure, Line, against, lines, unit_of

if TYPE_CHECKING:
    from simulations.audits.audit_file import Audit

KEY, NONE = "privacy.epsilon", "none"
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")  # Okabe and Ito's
MOST, ABREAST = 9, 3  # panels, and those of a row
GRID = np.logspace(-4, 0, 161)
SAME = 0.01  # chances of guessing that differ by no more are told as one


def plot(plan: "Audit", rows: Sequence[Row], out: Path) -> list[Path]:
    """Draw what there is: audit.png and .svg, and roc.png and .svg where attacks have left ROCs."""
    if not rows:
        return []
    found = _save(_against_epsilon(plan, rows), out / "audit")
    curves = curves_of(plan, out)
    return found + (_save(_rocs(curves), out / "roc") if curves else [])


def _against_epsilon(plan: "Audit", rows: Sequence[Row]) -> Any:
    """A panel for each attack: its success against epsilon, a line for each unit; or against the arms."""
    table, arms = against(rows, tuple(plan.plan.arms)), tuple(plan.plan.arms)
    shown = [line for line in table if any(_drawn(cell) for cell in table[line].values())][:MOST]
    figure, axes = _panels(len(shown))
    privacy = {run.arm: run.config.privacy for run in plan.plan.runs}
    spent = {arm: _words(privacy[arm].epsilon) for arm in arms if privacy[arm].unit == "none" or privacy[arm].epsilon}
    numbers = sorted({privacy[arm].epsilon for arm in arms if spent.get(arm, NONE) != NONE})
    places = {**{_words(epsilon): place for place, epsilon in enumerate(numbers)}, NONE: len(numbers)}
    by_unit = numbers and len(spent) == len(arms) and _one_each(privacy, arms)
    for axis, line in zip(axes, shown, strict=False):
        if by_unit:
            groups = {u: [a for a in arms if privacy[a].unit in (u, "none")] for u in ("example", "client")}
            drawn = {unit: members for unit, members in groups.items() if any(privacy[a].unit == unit for a in members)}
            for shift, (unit, members) in enumerate(drawn.items()):
                _line(axis, [(places[spent[a]] + 0.06 * shift, table[line][a]) for a in members], COLOURS[shift], unit)
            axis.set_xticks(list(places.values()), list(places), fontsize=8)
            axis.set_xlabel("epsilon", fontsize=8)
        else:
            for place, arm in enumerate(arms):
                _line(axis, [(place, table[line][arm])], COLOURS[place % len(COLOURS)], arm)
            axis.set_xticks(range(len(arms)), arms, fontsize=7, rotation=30, ha="right")
        _chance(axis, rows, line)
        axis.set_title(f"{' '.join(line).strip()}\n{lines(rows)[line]}", fontsize=9)
        axis.set_ylim(bottom=0)
        factor, sign = unit_of(lines(rows)[line])
        axis.yaxis.set_major_formatter(lambda value, _, factor=factor, sign=sign: f"{factor * value:g}{sign}")
    if by_unit and shown:
        axes[0].legend(fontsize=8, title="unit", title_fontsize=8)
    return figure


def _one_each(privacy: Any, arms: Sequence[str]) -> bool:
    """Whether an arm is known by its unit and epsilon."""
    return len({(privacy[arm].unit, privacy[arm].epsilon) for arm in arms}) == len(arms)


def _line(axis: Any, points: Sequence[tuple[float, Figure | None]], colour: str, label: str) -> None:
    there = sorted((place, cell.mean, cell.std or 0.0) for place, cell in points if cell is not None and _drawn(cell))
    if there:
        x, y, spread = zip(*there, strict=True)
        axis.errorbar(x, y, yerr=spread, color=colour, marker="o", markersize=4, capsize=3, lw=1.4, label=label)


def _drawn(cell: Figure | None) -> bool:
    return cell is not None and cell.mean is not None


def _chance(axis: Any, rows: Sequence[Row], line: Line) -> None:
    """What guessing reaches, over arms and seeds."""
    chances = [
        float(str(row["chance"]))
        for row in rows
        if (row["attack"], row.get("variant") or "") == line and row.get("chance") is not None
    ]
    if chances and max(chances) - min(chances) > SAME:  # one line would be false for some of the arms
        factor, sign = unit_of(lines(rows)[line])
        said = f"guessing: {factor * min(chances):.3g} to {factor * max(chances):.3g}{sign}"
        axis.text(0.99, 0.99, said, transform=axis.transAxes, fontsize=7, ha="right", va="top", color="grey")
    elif chances:
        axis.axhline(float(np.mean(chances)), color="grey", lw=1, ls=":")
        axis.text(0.99, float(np.mean(chances)), "guessing", transform=axis.get_yaxis_transform(), fontsize=7,
                  ha="right", va="bottom", color="grey")  # fmt: skip


def _words(epsilon: float) -> str:
    return f"{epsilon:g}" if epsilon else NONE


def curves_of(plan: "Audit", out: Path) -> dict[str, dict[str, NDArray[np.float64]]]:
    """By attack and arm (points,) true-positive rates on `GRID`, the mean over seeds."""
    found: dict[str, dict[str, list[NDArray[np.float64]]]] = {}
    for run in plan.plan.runs:
        for path in sorted((out / run.folder / "roc").glob("*.csv")):
            if path.stem.partition(" ")[0] in plan.attacks:
                found.setdefault(path.stem, {}).setdefault(run.arm, []).append(_on_grid(path))
    return {attack: {arm: np.mean(curves, axis=0) for arm, curves in arms.items()} for attack, arms in found.items()}


def _on_grid(path: Path) -> NDArray[np.float64]:
    """The rates at `GRID`: a ROC is a staircase."""
    with path.open(newline="") as stream:
        points = np.array([[float(row["fpr"]), float(row["tpr"])] for row in csv.DictReader(stream)])
    return np.asarray(points[np.searchsorted(points[:, 0], GRID * (1 + 1e-9), side="right") - 1, 1])


def _rocs(curves: dict[str, dict[str, NDArray[np.float64]]]) -> Any:
    figure, axes = _panels(min(len(curves), MOST))
    for axis, (attack, arms) in zip(axes, curves.items(), strict=False):
        for number, (arm, tpr) in enumerate(arms.items()):
            style = "-" if number < len(COLOURS) else "--"
            axis.plot(
                GRID, np.maximum(tpr, GRID[0] / 10), style, color=COLOURS[number % len(COLOURS)], lw=1.4, label=arm
            )
        axis.plot(GRID, GRID, color="grey", lw=1, ls=":")
        axis.set(xscale="log", yscale="log", xlim=(GRID[0], 1), ylim=(GRID[0], 1))
        axis.set_title(attack, fontsize=9)
        axis.set_xlabel("false-positive rate", fontsize=8)
        axis.set_ylabel("true-positive rate", fontsize=8)
    axes[0].legend(fontsize=7)
    return figure


def _panels(count: int) -> tuple[Any, Any]:
    from matplotlib.figure import Figure as Canvas

    columns = min(max(count, 1), ABREAST)
    down = -(-max(count, 1) // columns)
    figure = Canvas(figsize=(3.4 * columns, 2.9 * down), layout="constrained")
    axes = np.ravel(figure.subplots(down, columns))
    for axis in axes:
        axis.tick_params(labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    for axis in axes[max(count, 1) :]:
        axis.set_visible(False)
    return figure, axes


def _save(figure: Any, path: Path) -> list[Path]:
    written = []
    for form in ("png", "svg"):
        content = BytesIO()
        figure.savefig(content, format=form, dpi=150)
        written.append(path.with_suffix(f".{form}"))
        write_atomically(written[-1], content.getvalue())
    return written
