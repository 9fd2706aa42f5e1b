"""Every table that the program shows: a sheet of text, drawn for a terminal, or written as Markdown or HTML."""

import html
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from server.privacy_report import privacy_words

Row = tuple[str, ...]
STYLE = """
:root { color-scheme: light dark; }
body { font: 16px/1.5 system-ui, sans-serif; margin: 2rem auto; padding: 0 1rem; width: fit-content; max-width: 100%;
       box-sizing: border-box; color: CanvasText; background: Canvas; }
div { overflow-x: auto; } table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
caption { text-align: left; font-weight: 600; font-size: 1.25rem; padding-bottom: .5rem; }
th, td { text-align: right; padding: .3rem .7rem; vertical-align: bottom; overflow-wrap: anywhere; }
th { font-weight: 600; } th[scope=row] { text-align: left; font-weight: 400; white-space: pre; overflow-wrap: normal; }
thead th { border-bottom: 2px solid; min-width: 5rem; }
tbody:not(:last-child) tr:last-child > * { border-bottom: 1px solid GrayText; }
"""
NAME_WIDTH = 12  # characters that the first column keeps in a narrow terminal


@dataclass(frozen=True)
class Sheet:
    """A table as text.

    Attributes:
        head: the columns' names; the first column is the rows' names.
        sections: groups of rows, with space between them.
        notes: lines under the table.
        width: characters at which what stands in the other columns folds; 0: it does not.
    """

    title: str
    head: Row
    sections: Sequence[Sequence[Row]]
    notes: Sequence[str] = ()
    width: int = 0


def show(console: Console, sheet: Sheet) -> None:
    """Print a table and its notes."""
    console.print(drawn(sheet), crop=False)
    for note in sheet.notes:
        console.print(note, markup=False, highlight=False, soft_wrap=True)


def drawn(sheet: Sheet) -> Table:
    """The sheet for a terminal. Names in the first column give way when it is narrow, figures never."""
    table = Table(
        title=Text(sheet.title, style="bold"), box=box.SIMPLE, padding=(0, 1, 0, 0), pad_edge=False
    )  # fmt: skip
    columns = list(zip(sheet.head, *(row for rows in sheet.sections for row in rows), strict=True))
    table.add_column(Text(sheet.head[0]), overflow="fold", vertical="bottom", min_width=NAME_WIDTH)
    for column in columns[1:]:
        widest = max(map(len, column))
        table.add_column(
            Text(column[0]), justify="right", overflow="fold", no_wrap=not sheet.width,
            min_width=None if sheet.width else widest, max_width=sheet.width or None,
        )  # fmt: skip
    for rows in sheet.sections:
        for row in rows:
            table.add_row(*map(Text, row))
        table.add_section()
    return table


def markdown(sheet: Sheet) -> str:
    """The sheet as a Markdown table, for a README."""

    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(" ".join(cell.split()).replace("|", "\\|") for cell in cells) + " |"

    ruler = ["---", *["---:"] * (len(sheet.head) - 1)]
    rows = [line(row) for section in sheet.sections for row in section]
    notes = ["", *("\n".join(sheet.notes),)] if sheet.notes else []
    return "\n".join([f"**{sheet.title}**", "", line(sheet.head), line(ruler), *rows, *notes]) + "\n"


def page(sheet: Sheet) -> str:
    """The sheet as an HTML page that needs nothing else."""
    cells = html.escape
    head = "".join(f'<th scope="col">{cells(cell)}</th>' for cell in sheet.head[1:])
    bodies = "\n".join("<tbody>" + "\n".join(map(_html_row, rows)) + "</tbody>" for rows in sheet.sections)
    notes = "\n".join(f"<p>{cells(note)}</p>" for note in sheet.notes)
    title = cells(sheet.title)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{title}</title><style>{STYLE}</style></head>\n<body>"
        f'<div tabindex="0" role="region" aria-label="{title}"><table><caption>{title}</caption>\n'
        f"<thead><tr><td></td>{head}</tr></thead>\n{bodies}</table></div>\n{notes}</body></html>\n"
    )


def _html_row(row: Row) -> str:
    name, *cells = map(html.escape, row)
    return f'<tr><th scope="row">{name}</th>' + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>"


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
    if summary.get("privacy", {}).get("unit", "none") != "none":
        name, epsilon, delta = privacy_words(summary["privacy"])
        costs.append((name, "", epsilon, delta))
    faults = {name: count for name, count in summary["faults"].items() if count}
    if faults:
        costs.append(("faults", "", ", ".join(f"{count} {name}" for name, count in faults.items()), ""))
    title = f"{summary['task']}: {summary['status']} after {summary['rounds']} rounds"
    if (scored := sorted({*summary.get("scored", {}).values()})) not in ([], [summary["rounds"]]):
        title += f", scores of round {' and '.join(map(str, scored))}"
    return drawn(
        Sheet(title, ("", "teacher", "student", "student / teacher"), [[*scores, size], _tiers(summary), costs])
    )


def _tiers(summary: dict[str, Any]) -> list[Row]:
    """A row per tier: its scores on its own clients' text and on public validation, there beside the teacher's."""
    rows = []
    for tier in summary.get("tiers", ()):
        below = summary["teacher"]["validation"].get(summary["metric"])
        own, public = (tier[where].get(summary["metric"]) for where in ("federated", "validation"))
        name = f"{tier_name(tier)}, {tier['clients']} clients"
        rows.append((name, score(own), score(public), percent(share(public, below))))
    return [("layers/heads/neurons", "clients", "validation", "of the teacher's"), *rows] if rows else []


def tier_name(tier: Mapping[str, Any]) -> str:
    """A tier's student by its size."""
    return f"{tier['layers']}/{tier['heads']}/{tier['neurons']}"


def share(above: float | None, below: float | None) -> float | None:
    """One score over another; None where it means nothing: one is undefined, or the lower one is not above 0."""
    if above is None or below is None or math.isnan(above) or not below > 0:
        return None
    return above / below


def score(value: float | None) -> str:
    return "-" if value is None or math.isnan(value) else f"{value:.4f}"


def percent(value: float | None) -> str:
    return "-" if value is None or math.isnan(value) else f"{value:.1%}"


def figure(value: float | None) -> str:
    """A number in four characters, up to 9999."""
    return "-" if value is None or math.isnan(value) else f"{value:.1f}" if abs(value) < 99.95 else f"{value:.0f}"


def points(value: float | None) -> str:
    """A score of at most 1 in the hundredths that GLUE's tables use."""
    return "-" if value is None or math.isnan(value) else f"{100 * value:.1f}"
