"""``fedistill glue``: the recipe of presets/glue.toml on every GLUE task there is text for, as articles show it.

Published figures beside it: DistilBERT and its teacher on GLUE's development sets, Sanh et al. 2019
(https://arxiv.org/abs/1910.01108), tables 1 and 3. That teacher saw all train text; ours sees the public part.
"""

import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from common.config import read_settings
from common.errors import InputError
from common.progress import Progress
from common.store import write_atomically
from common.tasks import GLUE
from server.run_folder import finite
from simulations.latency import run_latency
from simulations.outcome import Numbers, Spread, averaged, shares, spread, spreads
from simulations.sweep import Results, by_task, sweep
from simulations.sweep_file import read_sweep
from simulations.table import Row, Sheet, figure, markdown, share

PRESET = Path(__file__).parent / "presets" / "glue.toml"
AVERAGE = "mean"
BERT = {
    "cola": 56.3, "mnli": 86.7, "mrpc": 88.6, "qnli": 91.8, "qqp": 89.6, "rte": 69.3, "sst2": 92.7, "stsb": 89.0,
    "wnli": 53.5,
}  # fmt: skip
DISTILBERT = {
    "cola": 51.3, "mnli": 82.2, "mrpc": 87.5, "qnli": 89.2, "qqp": 88.5, "rte": 59.9, "sst2": 91.3, "stsb": 86.9,
    "wnli": 56.3,
}  # fmt: skip
METRICS = {"accuracy": "acc", "f1": "F1", "matthews": "MCC", "pearson": "r"}  # in the width of a figure
SIZES = (("params.teacher", "teacher M params"), ("params.student", "student M params"))
COSTS = (
    ("mb.teacher", "teacher, MB"), ("mb.student", "student, MB"), ("mb.slim", "  slim form, MB"),
    ("ms.teacher", "teacher, ms"), ("ms.student", "student, ms"), ("ms.slim", "  slim form, ms"),
)  # fmt: skip
NOTES = (
    "Scores in hundredths: mean, ± deviation over seeds; %: quotients of means.",
    "metric of our scores: accuracy, F1, Matthews correlation, Pearson's r.",
    "teacher: fine-tuned on public text alone; ceiling: its encoder, on all of train.",
    "2019: Sanh et al., trained centrally; mean: of these tasks (of all nine it",
    "says 79.5 and 77.0; 66 M of 110 M params, 1.63 x faster).",
    "student: as transformers opens it; slim form: without the zeros that fill it up.",
    "ms: median for a validation text, batch 1, one thread, fp32, models in turns.",
)
NOTHING = Spread(None, None, 0)


def glue(settings: Sequence[str], data: str, seeds: int, out: Path, *, resume: bool = False) -> None:
    """Run the sweep, measure sizes and latencies, print the article's table, leave glue.json and glue.md.

    Raises:
        InputError, RunFailed, Interrupted: as `simulations.sweep.sweep`.
    """
    if data and "data.source" in read_settings(settings):
        raise InputError(f"--data {data}: -s data.source is given too; give one of the two")
    source = [f"data.source={json.dumps(data)}"] if data else []
    plan = read_sweep(PRESET, [*source, *settings], seeds=range(seeds))

    def article(results: Results, progress: Progress) -> list[Sheet]:
        [arm] = plan.arms
        runs = by_task(plan, results, arm)
        measured = {
            task: run_latency(out / arm / task / f"seed-{min(done)}", progress) for task, done in runs.items() if done
        }
        sheet = glue_sheet(runs, measured)
        write_atomically(out / "glue.json", (json.dumps(finite(glue_json(runs, measured)), indent=2) + "\n").encode())
        write_atomically(out / "glue.md", markdown(sheet).encode())
        return [sheet]

    sweep(plan, out, resume=resume, more=article)


def glue_sheet(runs: Mapping[str, Mapping[int, Numbers]], measured: Mapping[str, Mapping[str, float]]) -> Sheet:
    """Systems as rows, tasks as columns, their mean first.

    Args:
        runs: of each task the completed runs by seed.
        measured: of each task what `run_latency` found.
    """
    columns = [spreads(list(each.values())) for each in (averaged(list(runs.values())), *runs.values())]
    kept = [shares(found) for found in columns]

    def line(label: str, values: Iterable[float | None]) -> Row:
        return (label, *(figure(_scaled(value, 100)) for value in values))

    def score(name: str, label: str) -> list[Row]:
        found = [column.get(name, NOTHING) for column in columns]
        return [line(label, (each.mean for each in found)), line("  ±", (each.std for each in found))]

    def part(name: str, label: str) -> Row:
        return line(label, (each[name] for each in kept))

    ours: list[Row] = [("metric", "", *(METRICS[GLUE[task].headline] for task in runs))]
    ours += [*score("validation.teacher", "teacher"), *score("validation.student", "student")]
    ours.append(part("validation.kept", "  % of teacher"))
    ours += [*score("ceiling", "ceiling"), part("ceiling.kept", "  student, % of it")]
    size = [
        (label, *(figure(_scaled(column.get(name, NOTHING).mean, 1e-6)) for column in columns)) for name, label in SIZES
    ]
    size.append(part("params.ratio", "  % of teacher"))
    sections = [ours, published(list(runs)), size, costs(list(runs), measured)]
    return Sheet("GLUE, public validation", ("", AVERAGE, *runs), sections, NOTES)


def published(tasks: Sequence[str]) -> list[Row]:
    """DistilBERT's row over the same tasks, and its teacher's."""
    above, below = ([statistics.fmean(row[task] for task in tasks), *(row[task] for task in tasks)]
                    for row in (DISTILBERT, BERT))  # fmt: skip
    return [
        ("BERT-base 2019", *(f"{value:.1f}" for value in below)),
        ("DistilBERT 2019", *(f"{value:.1f}" for value in above)),
        ("  % of BERT-base", *(figure(100 * a / b) for a, b in zip(above, below, strict=True))),
    ]


def costs(tasks: Sequence[str], measured: Mapping[str, Mapping[str, float]]) -> list[Row]:
    """Megabytes, milliseconds and how many times faster the student is."""

    def values(name: str) -> list[float | None]:
        found = [measured[task][name] if task in measured else None for task in tasks]
        return [spread(found).mean, *found]

    rows: list[Row] = [(label, *(figure(value) for value in values(name))) for name, label in COSTS]
    for name, label in (("student", "  x faster"), ("slim", "  slim, x faster")):
        faster = [share(a, b) for a, b in zip(values("ms.teacher"), values(f"ms.{name}"), strict=True)]
        rows.append((label, *("-" if each is None else f"{each:.2f}" for each in faster)))
    return rows


def glue_json(runs: Mapping[str, Mapping[int, Numbers]], measured: Mapping[str, Mapping[str, float]]) -> dict[str, Any]:
    """What the table shows, in full precision."""
    columns = {AVERAGE: averaged(list(runs.values())), **runs}
    found = {name: spreads(list(each.values())) for name, each in columns.items()}
    return {
        name: {"measured": {key: asdict(value) for key, value in each.items()}, "kept": shares(each)}
        | dict(measured.get(name, {}))
        for name, each in found.items()
    }


def _scaled(value: float | None, factor: float) -> float | None:
    return None if value is None else value * factor
