"""What a run folder holds, for its report: of a run that ended its summary, of one that was killed what it wrote."""

import json
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from common.errors import InputError
from common.section import Scalar
from server.lines import read_lines
from server.run_folder import SHARDS

UNFINISHED = "unfinished"
MOST_SHOWN = 60  # characters of a value that is refused
FAULTS = ("failed", "rejected", "late")
Line = dict[str, Any]
# names of the classes, (clients, classes) examples of each, (clients,) examples of all
Shards = tuple[list[str], NDArray[np.int64], NDArray[np.int64]]


@dataclass(frozen=True)
class Run:
    """A run.

    Attributes:
        summary: that of the run; of one that did not end, the parts of it that its journals tell, with the status
            `UNFINISHED`.
        keys: the configuration, dotted.
        lines, costs: of metrics.jsonl and costs.jsonl.
        shards: see `Shards`; None: they are not told.
        kept: the student's shape as slim/shape.json has it; empty: there is none yet.
    """

    folder: Path
    summary: Line
    keys: dict[str, Scalar]
    lines: Sequence[Line]
    costs: Sequence[Line]
    shards: Shards | None
    kept: Line

    @property
    def metric(self) -> str:
        """The headline score; empty: nothing was scored."""
        return str(self.summary.get("metric") or "")

    @property
    def ended(self) -> bool:
        return bool(self.summary["status"] != UNFINISHED)

    def of(self, phase: str) -> list[Line]:
        """The lines of a phase, a round each, in order."""
        return [line for line in self.lines if line.get("phase") == phase]

    def key(self, name: str, default: Scalar = "") -> Scalar:
        return self.keys.get(name, default)


def read_run(folder: Path) -> Run:
    """Open a run folder, whatever became of the run.

    Raises:
        InputError: the folder holds no run, or its summary is none.
    """
    try:
        document = tomllib.loads((folder / "config.toml").read_text())
    except (OSError, ValueError):
        raise InputError(f"{folder}: no run there (its config.toml cannot be read)") from None
    keys = _flat(document)
    lines, costs = read_lines(folder / "metrics.jsonl"), read_lines(folder / "costs.jsonl")
    summary = _checked(folder / "summary.json") or _so_far(keys, lines, costs)
    return Run(folder, summary, keys, lines, costs, _shards(folder), _object(folder / "slim" / "shape.json"))


def _object(path: Path) -> Line:
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _checked(path: Path) -> Line:
    """A summary that has what every report asks for; empty: there is none, or half of one.

    Raises:
        InputError: it lacks something, or has something else in its place.
    """
    found = _object(path)
    wanted = {"status": str, "rounds": int}
    if found.get("metric"):
        wanted |= dict.fromkeys(("teacher", "student", "retention", "cost", "faults"), dict)
    for name, kind in wanted.items() if found else ():
        if not isinstance(found.get(name), kind):
            raise InputError(
                f"{path}: {name} = {json.dumps(found.get(name))[:MOST_SHOWN]}: damaged, or of another version; "
                "without this file the report tells what the journals hold"
            )
    return found


def _flat(document: Mapping[str, Any]) -> dict[str, Scalar]:
    found: dict[str, Scalar] = {}
    for name, value in document.items():
        found |= {f"{name}.{key}": inner for key, inner in value.items()} if isinstance(value, dict) else {name: value}
    return found


def _shards(folder: Path) -> Shards | None:
    found = _object(folder / SHARDS)
    if not found or not {"classes", "counts"} <= found.keys():
        return None
    counts = np.asarray(found["counts"], dtype=np.int64)
    sizes = np.asarray(found.get("sizes", counts.sum(axis=1)), dtype=np.int64)
    return [str(name) for name in found["classes"]], counts, sizes


def _so_far(keys: Mapping[str, Scalar], lines: Sequence[Line], costs: Sequence[Line]) -> Line:
    """What summary.json would say of sizes in bytes, times and scores, as `server.journal` adds them up."""
    train = [line for line in lines if line.get("phase") == "train"]
    scored = [line for line in lines if line.get("phase") == "evaluate"]
    valid = [line for line in lines if line.get("phase") == "validation"]
    found: Line = {
        "status": UNFINISHED,
        "task": str(keys.get("task", "")),
        "seed": keys.get("seed"),
        "rounds": max((line["round"] for line in train), default=0),
        "clients": int(keys.get("data.clients", 0)),
    }
    last = scored[-1] if scored else {"student": {}, "teacher": {}}
    validation = valid[-1]["student"] if valid else {}
    if not (metrics := [*last["student"], *validation]):
        return found
    examples = sum(line.get("examples", 0) for line in train) * int(keys.get("client.epochs", 1))
    seconds = sum(line["seconds"] for line in costs if line["phase"] == "train")
    total = {name: sum(line[name] for line in costs) for name in ("bytes_up", "bytes_down", "seconds")}
    rate = examples / seconds if seconds else 0.0
    faults = {name: sum(len(line.get(name, ())) for line in lines) for name in FAULTS}
    faults["retried"] = sum(len(line.get("recovered", ())) for line in costs)
    hidden = keys.get("privacy.unit") == "client" or keys.get("privacy.secure-aggregation")  # no journal names them all
    return found | {
        "metric": metrics[0],
        "teacher": {"federated": last["teacher"], "validation": {}},
        "student": {"federated": last["student"], "validation": validation},
        "retention": {"federated": last.get("retention"), "validation": None},
        "privacy": _spent(keys, train),
        "cost": {**total, "train_s": seconds, "examples": examples, "examples_per_s": rate},
        **({} if hidden else {"faults": faults}),
    }


def _spent(keys: Mapping[str, Scalar], train: Sequence[Line]) -> Line:
    unit = keys.get("privacy.unit", "none")
    if unit == "none":
        return {"unit": unit}
    spent = train[-1].get("epsilon") if train else None
    simulated = keys.get("privacy.noise-cohort", 0)
    return {
        "unit": unit,
        "epsilon": spent,
        "delta": keys.get("privacy.delta"),
        "noise_cohort": simulated,
        "so_far": True,
    }
