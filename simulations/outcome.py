"""What runs have measured, as numbers with names; means and spreads of them over seeds, averages over tasks."""

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from simulations.table import share

PLACES = ("validation", "federated")
Numbers = Mapping[str, float | None]  # None: not defined, or not measured


@dataclass(frozen=True)
class Spread:
    """Mean of n numbers and their standard deviation (of a sample, n - 1 below; None when there is one)."""

    mean: float | None
    std: float | None
    n: int


def read_json(path: Path) -> dict[str, Any] | None:
    """The object in a file; None when there is none, or half of one."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def numbers(summary: Mapping[str, Any], ceiling: float | None = None) -> Numbers:
    """The headline scores, sizes and costs of a completed run, from its summary."""
    metric, cost = summary["metric"], summary["cost"]
    return {
        **{f"{where}.{who}": summary[who][where].get(metric) for where in PLACES for who in ("student", "teacher")},
        **{f"params.{who}": summary[who]["params"] for who in ("student", "teacher")},
        "bytes": cost["bytes_up"] + cost["bytes_down"],
        "seconds": cost["wall_s"],
        "ceiling": ceiling,
    }


def spread(values: Sequence[float | None]) -> Spread:
    """One undefined value makes mean and deviation undefined: leaving it out would flatter."""
    known = [value for value in values if value is not None and not math.isnan(value)]
    if not known or len(known) < len(values):
        return Spread(None, None, len(values))
    return Spread(statistics.fmean(known), statistics.stdev(known) if len(known) > 1 else None, len(known))


def spreads(runs: Sequence[Numbers]) -> dict[str, Spread]:
    """Of every number over the runs."""
    return {name: spread([run[name] for run in runs]) for name in (runs[0] if runs else ())}


def averaged(tasks: Sequence[Mapping[int, Numbers]]) -> dict[int, Numbers]:
    """Over the tasks, for each seed with which all of them were run: an average of fewer could not be compared.

    Args:
        tasks: of each task the runs by seed.
    """
    seeds = [seed for seed in tasks[0] if all(seed in task for task in tasks)] if tasks else []
    return {
        seed: {name: spread([task[seed][name] for task in tasks]).mean for name in tasks[0][seed]} for seed in seeds
    }


def shares(found: Mapping[str, Spread]) -> dict[str, float | None]:
    """What is kept: quotients of means, as published tables have them."""

    def mean(name: str) -> float | None:
        return found[name].mean if name in found else None

    return {
        **{f"{where}.kept": share(mean(f"{where}.student"), mean(f"{where}.teacher")) for where in PLACES},
        "params.ratio": share(mean("params.student"), mean("params.teacher")),
        "ceiling.kept": share(mean("validation.student"), mean("ceiling")),
    }
