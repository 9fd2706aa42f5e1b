"""Every table that the program shows: a sheet of text, drawn for a terminal or written as Markdown."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

Row = tuple[str, ...]


@dataclass(frozen=True)
class Sheet:
    """A table as text.

    Attributes:
        head: the columns' names; the first column is the rows' names.
        sections: groups of rows, with space between them.
        notes: lines under the table.
    """

    title: str
    head: Row
    sections: Sequence[Sequence[Row]]
    notes: Sequence[str] = ()


def drawn(sheet: Sheet) -> Table:
    """The sheet for a terminal. Names in the first column give way when it is narrow, figures never."""
    table = Table(
        title=Text(sheet.title, style="bold"), box=box.SIMPLE, padding=(0, 1, 0, 0), pad_edge=False,
        caption=Text("\n".join(sheet.notes)) if sheet.notes else None, caption_justify="left",
    )  # fmt: skip
    for place, name in enumerate(sheet.head):
        table.add_column(
            Text(name), justify="right" if place else "left", no_wrap=place > 0, overflow="fold", vertical="bottom"
        )
    for rows in sheet.sections:
        for row in rows:
            table.add_row(*map(Text, row))
        table.add_section()
    return table


def markdown(sheet: Sheet) -> str:
    """The sheet as a Markdown table, for a README."""

    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.strip().replace("|", "\\|") for cell in cells) + " |"

    ruler = ["---", *["---:"] * (len(sheet.head) - 1)]
    rows = [line(row) for section in sheet.sections for row in section]
    notes = ["", *("\n".join(sheet.notes),)] if sheet.notes else []
    return "\n".join([f"**{sheet.title}**", "", line(sheet.head), line(ruler), *rows, *notes]) + "\n"


def result_table(summary: dict[str, Any]) -> Table:
    """Teacher against student, from a run's summary; fits 80 columns."""
    teacher, student, cost = summary["teacher"], summary["student"], summary["cost"]
    scores: list[Row] = []
    for where, label in (("federated", "held by the clients"), ("validation", "public validation")):
        for metric, value in student[where].items():
            if metric in ("n", "spearman_bound"):
                continue
            bound = student[where].get("spearman_bound") if metric == "spearman" else None
            below = teacher[where].get(metric)
            text = f"{score(value)} ±{bound:.0e}" if bound else score(value)
            scores.append((f"{metric}, {label}", score(below), text, percent(share(value, below))))
    size = ("parameters", f"{teacher['params']:,}", f"{student['params']:,}", percent(student["params_ratio"]))
    costs = [
        ("time", "", f"{cost['wall_s']:.0f} s", ""),
        ("training", "", f"{cost['train_s']:.0f} s", f"{cost['examples_per_s']:.0f} examples/s"),
        ("bytes", "", f"{cost['bytes_down'] / 1e6:.0f} MB down", f"{cost['bytes_up'] / 1e6:.0f} MB up"),
    ]
    faults = {name: count for name, count in summary["faults"].items() if count}
    if faults:
        costs.append(("faults", "", ", ".join(f"{count} {name}" for name, count in faults.items()), ""))
    title = f"{summary['task']}: {summary['status']} after {summary['rounds']} rounds"
    return drawn(Sheet(title, ("", "teacher", "student", "student / teacher"), [[*scores, size], costs]))


def share(above: float | None, below: float | None) -> float | None:
    """One score over another; None where it means nothing: one is undefined, or the lower one is not above 0."""
    if above is None or below is None or math.isnan(above) or not below > 0:
        return None
    return above / below


def score(value: float | None) -> str:
    return "-" if value is None or math.isnan(value) else f"{value:.4f}"


def percent(value: float | None) -> str:
    return "-" if value is None or math.isnan(value) else f"{value:.1%}"


def points(value: float | None) -> str:
    """A score of at most 1 in the hundredths that GLUE's tables use."""
    return "-" if value is None or math.isnan(value) else f"{100 * value:.1f}"
