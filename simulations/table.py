"""The table at the end of a run."""

import math
from typing import Any

from rich.table import Table


def result_table(summary: dict[str, Any]) -> Table:
    """Teacher against student, from a run's summary; fits 80 columns."""
    teacher, student, cost = summary["teacher"], summary["student"], summary["cost"]
    table = Table(title=f"{summary['task']}: {summary['status']} after {summary['rounds']} rounds", title_style="bold")
    for name, side in (("", "left"), ("teacher", "right"), ("student", "right"), ("student / teacher", "right")):
        table.add_column(name, justify=side)  # type: ignore[arg-type]
    for where, label in (("federated", "held by the clients"), ("validation", "public validation")):
        for metric, score in student[where].items():
            if metric in ("n", "spearman_bound"):
                continue
            bound = student[where].get("spearman_bound") if metric == "spearman" else None
            below = teacher[where].get(metric)
            text = f"{_score(score)} ±{bound:.0e}" if bound else _score(score)
            table.add_row(f"{metric}, {label}", _score(below), text, _share(score, below))
    table.add_row("parameters", f"{teacher['params']:,}", f"{student['params']:,}", f"{student['params_ratio']:.1%}")
    if summary["tiers"]:
        _add_tiers(table, summary)
    table.add_section()
    table.add_row("time", "", f"{cost['wall_s']:.0f} s", "")
    table.add_row("training", "", f"{cost['train_s']:.0f} s", f"{cost['examples_per_s']:.0f} examples/s")
    table.add_row("bytes", "", f"{cost['bytes_down'] / 1e6:.0f} MB down", f"{cost['bytes_up'] / 1e6:.0f} MB up")
    faults = {name: count for name, count in summary["faults"].items() if count}
    if faults:
        table.add_row("faults", "", ", ".join(f"{count} {name}" for name, count in faults.items()), "")
    return table


def _add_tiers(table: Table, summary: dict[str, Any]) -> None:
    """A row per tier: its scores on its own clients' data and on public validation, there beside the teacher's."""
    metric, teacher = summary["metric"], summary["teacher"]
    table.add_section()
    table.add_row("layers/heads/neurons", "clients", "validation", "of the teacher's")
    for tier in summary["tiers"]:
        own, public = (tier[where].get(metric) for where in ("federated", "validation"))
        table.add_row(
            f"{tier['layers']}/{tier['heads']}/{tier['neurons']}, {tier['clients']} clients",
            _score(own),
            _score(public),
            _share(public, teacher["validation"].get(metric)),
        )


def _score(value: float | None) -> str:
    return "-" if value is None or math.isnan(value) else f"{value:.4f}"


def _share(above: float | None, below: float | None) -> str:
    share = math.nan if above is None or below is None or below <= 0 else above / below
    return "-" if math.isnan(share) else f"{share:.1%}"
