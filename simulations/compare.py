"""``fedistill compare``: runs side by side; those that differ in their seed alone are one column."""

import csv
import io
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from common.config import Config, load_config
from common.errors import InputError
from common.section import Scalar
from common.store import write_atomically
from simulations.display import console_on
from simulations.outcome import PLACES, Numbers, Spread, numbers, read_json, shares, spread, spreads
from simulations.table import Row, Sheet, figure, markdown, page, percent, score, show

ABREAST, WIDTH = 4, 11  # columns that fit 80 characters, each so many wide
LABELS = {"federated": "held by the clients", "validation": "public validation"}
FORMS = {"table": ".txt", "markdown": ".md", "csv": ".csv", "html": ".html"}  # and what their files end with
UNFINISHED = "unfinished"  # it has no summary: it goes on, or it was killed
SEEDS_NAMED = 6  # more are only counted
TITLE = "runs side by side"


@dataclass(frozen=True)
class Run:
    """A run's folder: its keys, its summary, the numbers in that (none before its first score)."""

    path: Path
    config: Config
    summary: Mapping[str, Any]
    found: Numbers

    @property
    def status(self) -> str:
        return str(self.summary["status"])

    @property
    def epsilon(self) -> float | None:
        block = self.summary.get("privacy", {})
        return block.get("epsilon") if block.get("unit", "none") != "none" else None

    @property
    def simulated(self) -> bool:
        """Its epsilon is that of another federation, and holds for none of its clients."""
        return bool(self.summary.get("privacy", {}).get("noise_cohort"))


@dataclass(frozen=True)
class Column:
    """Runs of the same keys but their seeds; each seed is there once."""

    runs: tuple[Run, ...]

    @property
    def counted(self) -> tuple[Run, ...]:
        """Those that means are of: a run that stopped early would spoil them. One alone says how far it came."""
        return self.runs if len(self.runs) == 1 else tuple(run for run in self.runs if run.status == "completed")

    @property
    def found(self) -> dict[str, Spread]:
        known = [run.found for run in self.counted]
        return spreads(known) if all(known) else {}

    @property
    def flat(self) -> dict[str, Scalar]:
        return {key: value for key, value in self.runs[0].config.flat().items() if key != "seed"}

    @property
    def seeds(self) -> tuple[int, ...]:
        return tuple(run.config.seed for run in self.runs)

    @property
    def shared(self) -> Path:
        """What the paths of its runs begin with alike."""
        parts = [run.path.resolve().parts for run in self.runs]
        same = [each[0] for each in zip(*parts, strict=False) if len(set(each)) == 1]
        return Path(*same) if len(self.runs) > 1 else self.runs[0].path


def compare(folders: Sequence[Path], form: str = "", out: Path | None = None) -> None:
    """Print a table of runs, or write it to a file.

    Args:
        folders: of runs, or of sweeps: all of their runs that have begun.
        form: one of `FORMS`; empty: as the file's name ends, else a table.

    Raises:
        InputError: one holds no run, there is no such form, the file cannot be written.
    """
    form = _form(form, out)
    runs = [read_run(path) for folder in folders for path in run_folders(folder)]
    columns = merged(runs)
    if form == "csv":
        _put(csv_of(runs), out)
    elif form == "table":
        stream = io.StringIO()
        console = console_on(sys.stdout) if out is None else Console(file=stream, width=100)
        for sheet in [compare_sheet(columns, part) for part in _parts(len(columns))]:
            show(console, sheet)
        if out is not None:
            _put(stream.getvalue(), out)
    else:
        sheet = compare_sheet(columns)
        _put(markdown(sheet) if form == "markdown" else page(sheet), out)


def _form(form: str, out: Path | None) -> str:
    if form and form not in FORMS:
        raise InputError(f"--format {form}: give one of {', '.join(FORMS)}")
    if out is not None and out.is_dir():
        raise InputError(f"--out {out}: a folder; give a file")
    ends = "" if out is None else out.suffix.lower()
    return form or next((name for name, suffix in FORMS.items() if suffix == ends), "table")


def _put(text: str, out: Path | None) -> None:
    if out is None:
        sys.stdout.write(text)
        return
    try:
        write_atomically(out, text.encode())
    except OSError as error:
        raise InputError(f"--out {out}: {error.strerror}; give a file that can be written") from None


def _parts(count: int) -> list[slice]:
    return [slice(start, start + ABREAST) for start in range(0, count, ABREAST)]


# --- runs ----------------------------------------------------------------------------------------


def run_folders(folder: Path) -> list[Path]:
    """The folder itself, or those of a sweep's runs that have begun, in the sweep's order.

    Raises:
        InputError: neither a run nor a sweep.
    """
    if (folder / "config.toml").is_file():
        return [folder]
    arms = (read_json(folder / "sweep.json") or {}).get("arms", {})
    listed = [run for arm in arms.values() for task in arm["tasks"].values() for run in task["runs"]]
    begun = [path for path in (folder / run["folder"] for run in listed) if (path / "config.toml").is_file()]
    if not begun:
        raise InputError(f"{folder}: no run there, and no sweep (config.toml or sweep.json is needed)")
    return begun


def read_run(path: Path) -> Run:
    """A run as far as it has come.

    Raises:
        InputError: its keys or its summary are of another version, or damaged.
    """
    kept, told = path / "config.toml", path / "summary.json"
    try:
        config = load_config(kept)
    except InputError as error:
        said = str(error).removeprefix(f"{kept}: ")
        raise InputError(f"{kept}: {said}; was it written by another version?") from None
    summary = {"status": UNFINISHED, **(read_json(told) or {})}
    try:
        found = numbers(summary) if "student" in summary else {}
    except (KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{told}: damaged, or of another version ({error}); leave this run out") from None
    return Run(path, config, summary, found)


def merged(runs: Sequence[Run]) -> list[Column]:
    """Runs that differ in nothing but their seed together; where one was run twice, the second is another column."""
    columns: list[Column] = []
    for run in runs:
        flat = Column((run,)).flat
        place = next((n for n, one in enumerate(columns) if one.flat == flat and run.config.seed not in one.seeds), -1)
        if place < 0:
            columns.append(Column((run,)))
        else:
            columns[place] = Column((*columns[place].runs, run))
    return columns


def names(folders: Sequence[Path]) -> list[str]:
    """The paths without the folders that they begin and end with alike."""
    parts = [folder.resolve().parts for folder in folders]
    while all(len(each) > 1 for each in parts) and len({each[0] for each in parts}) == 1:
        parts = [each[1:] for each in parts]
    while all(len(each) > 1 for each in parts) and len({each[-1] for each in parts}) == 1:
        parts = [each[:-1] for each in parts]
    return ["/".join(each) for each in parts]


def column_names(columns: Sequence[Column]) -> list[str]:
    """As `names`; of several seeds what their paths share, unless that would not tell columns apart."""
    shared = [column.shared for column in columns]
    return names(shared if len(set(shared)) == len(shared) else [column.runs[0].path for column in columns])


def differing(configs: Sequence[Config]) -> list[str]:
    """The keys that have not the same value in all."""
    flats = [config.flat() for config in configs]
    return [key for key in flats[0] if len({flat[key] for flat in flats}) > 1]


# --- the table -----------------------------------------------------------------------------------


def compare_sheet(columns: Sequence[Column], part: slice = slice(None)) -> Sheet:
    """Columns (or a part of them) with their differing keys, scores with the share of the teacher's, sizes, costs."""
    shown, heads = columns[part], column_names(columns)[part]

    def row(label: str, cell: Callable[[Column], str]) -> Row:
        return (label, *map(cell, shown))

    varied = [key for key in differing([column.runs[0].config for column in columns]) if key != "seed"]
    said = [row(key, lambda one, key=key: _value(one.flat[key])) for key in varied]  # type: ignore[misc]
    if len({column.seeds for column in columns}) > 1 or any(len(column.seeds) > 1 for column in columns):
        said.append(row("seeds", _seeds))
    said.append(row("status", _status))
    scores = [row("metric", lambda one: ", ".join(dict.fromkeys(str(r.summary.get("metric", "-")) for r in one.runs)))]
    for where in PLACES:
        scores.append(row(LABELS[where], lambda one, where=where: _with(one, f"{where}.student", score)))  # type: ignore[misc]
        scores.append(row("  of the teacher's", lambda one, where=where: _kept(one, f"{where}.kept")))  # type: ignore[misc]
    costs = [
        row("parameters", lambda one: _with(one, "params.student", _count)),
        row("  of the teacher's", lambda one: _kept(one, "params.ratio")),
        row("megabytes sent", lambda one: _with(one, "bytes", _mega)),
        row("seconds", lambda one: _with(one, "seconds", figure)),
    ]
    if any(run.epsilon is not None for column in columns for run in column.runs):
        costs.append(row("epsilon, the largest", _epsilon))
    notes = ["±: standard deviation over seeds, of completed runs."] if any(len(one.seeds) > 1 for one in shown) else []
    return Sheet(TITLE, ("", *heads), [said, scores, costs], notes, width=WIDTH)


def _value(value: Scalar) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _seeds(column: Column) -> str:
    few = ", ".join(map(str, column.seeds))
    if len(column.seeds) == 1:
        return few
    return f"{len(column.seeds)}: {few}" if len(column.seeds) <= SEEDS_NAMED else f"{len(column.seeds)} seeds"


def _status(column: Column) -> str:
    each = [run.status for run in column.runs]
    if len(set(each)) == 1:
        return each[0]
    return ", ".join(f"{each.count(status)} {status}" for status in dict.fromkeys(each))


def _with(column: Column, name: str, said: Callable[[float | None], str]) -> str:
    """The mean, and the deviation where it is not 0 as it is shown."""
    found = column.found.get(name)
    if found is None:
        return "-"
    apart = said(found.std) if found.std else ""
    return said(found.mean) + (f" ±{apart}" if apart.strip("0.,") else "")


def _kept(column: Column, name: str) -> str:
    return percent(shares(column.found)[name]) if column.found else "-"


def _epsilon(column: Column) -> str:
    found = [run.epsilon for run in column.runs if run.epsilon is not None]
    simulated = " simulated" if any(run.simulated for run in column.runs) else ""
    return f"{max(found):.3g}{simulated}" if found else "-"


def _count(value: float | None) -> str:
    return "-" if value is None else f"{value:,.0f}"


def _mega(value: float | None) -> str:
    return figure(None if value is None else value / 1e6)


# --- numbers for another program -----------------------------------------------------------------


def csv_of(runs: Sequence[Run]) -> str:
    """Every run as a column, every number as it is: bytes, seconds, scores; what is not known is empty."""
    flats = [run.config.flat() for run in runs]
    rows: list[list[object]] = [["", *names([run.path for run in runs])]]
    rows += [
        [key, *(_value(flat[key]) for flat in flats)]
        for key in dict.fromkeys(["seed", *differing([run.config for run in runs])])
    ]
    rows += [["status", *(run.status for run in runs)], ["metric", *(run.summary.get("metric", "") for run in runs)]]
    found = [{**run.found, **_shares(run), _epsilon_name(run): run.epsilon} for run in runs]
    every = dict.fromkeys(name for each in found for name in each)
    rows += [[name, *("" if (value := each.get(name)) is None else value for each in found)] for name in every]
    stream = io.StringIO()
    csv.writer(stream, lineterminator="\n").writerows(rows)
    return stream.getvalue()


def _epsilon_name(run: Run) -> str:
    return "epsilon.simulated" if run.simulated else "epsilon"


def _shares(run: Run) -> dict[str, float | None]:
    if not run.found:
        return {}
    return shares({name: spread([value]) for name, value in run.found.items()})
