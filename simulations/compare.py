"""``fedistill compare``: runs side by side."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common.config import Config, load_config
from common.errors import InputError
from simulations.display import console_on
from simulations.outcome import PLACES, Numbers, numbers, read_json, shares, spreads
from simulations.table import Row, Sheet, figure, percent, score, show

ABREAST, WIDTH = 4, 11  # runs that fit 80 columns, each so many characters wide
LABELS = {"federated": "held by the clients", "validation": "public validation"}


def compare(runs: Sequence[Path]) -> None:
    """Print a table of run folders.

    Raises:
        InputError: one is no run's folder.
    """
    console = console_on(sys.stdout)
    read = [_read(run) for run in runs]
    for start in range(0, len(runs), ABREAST):
        part = slice(start, start + ABREAST)
        show(console, compare_sheet(names(runs)[part], read[part], differing([config for config, _ in read])))


def _read(run: Path) -> tuple[Config, dict[str, Any]]:
    summary = read_json(run / "summary.json")
    if summary is None or not (run / "config.toml").is_file():
        raise InputError(f"{run}: no finished run there (summary.json and config.toml are needed)")
    return load_config(run / "config.toml"), summary


def names(runs: Sequence[Path]) -> list[str]:
    """The runs' paths without the folders that they begin and end with alike."""
    parts = [run.resolve().parts for run in runs]
    while all(len(each) > 1 for each in parts) and len({each[0] for each in parts}) == 1:
        parts = [each[1:] for each in parts]
    while all(len(each) > 1 for each in parts) and len({each[-1] for each in parts}) == 1:
        parts = [each[:-1] for each in parts]
    return ["/".join(each) for each in parts]


def differing(configs: Sequence[Config]) -> list[str]:
    """The keys that have not the same value in all."""
    flats = [config.flat() for config in configs]
    return [key for key in flats[0] if len({flat[key] for flat in flats}) > 1]


def compare_sheet(named: Sequence[str], runs: Sequence[tuple[Config, dict[str, Any]]], keys: Sequence[str]) -> Sheet:
    """Runs as columns: their differing keys, scores with the share of the teacher's, sizes, costs."""
    flats = [config.flat() for config, _ in runs]
    found = [numbers(summary) if "student" in summary else {} for _, summary in runs]

    def row(label: str, cells: Sequence[str]) -> Row:
        return (label, *cells)

    said = [row(key, [str(flat[key]) for flat in flats]) for key in keys]
    said.append(row("status", [str(summary["status"]) for _, summary in runs]))
    metrics = [str(summary.get("metric", "-")) for _, summary in runs]
    scores = [row("metric", metrics)]
    for where in PLACES:
        scores.append(row(LABELS[where], [score(each.get(f"{where}.student")) for each in found]))
        scores.append(row("  of the teacher's", [_kept(each, f"{where}.kept") for each in found]))
    costs = [
        row("parameters", [_count(each.get("params.student")) for each in found]),
        row("  of the teacher's", [_kept(each, "params.ratio") for each in found]),
        row("megabytes sent", [figure(_over(each.get("bytes"), 1e6)) for each in found]),
        row("seconds", [figure(each.get("seconds")) for each in found]),
    ]
    return Sheet("runs side by side", ("", *named), [said, scores, costs], width=WIDTH)


def _kept(found: Numbers, name: str) -> str:
    return percent(shares(spreads([found]))[name]) if found else "-"


def _count(value: float | None) -> str:
    return "-" if value is None else f"{value:,.0f}"


def _over(value: float | None, unit: float) -> float | None:
    return None if value is None else value / unit
