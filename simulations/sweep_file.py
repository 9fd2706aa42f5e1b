"""A sweep in a TOML file: keys of a run, and around them what is varied.

Above the sections stand ``seeds = [0, 1, 2]``, ``tasks = ["sst2", "mrpc"]`` (or ``tasks = "glue"``: all that
``data.source`` holds), ``ceiling = true`` and ``skip-absent-teachers = true``. ``[arms.NAME]`` holds the keys in which
an arm differs, ``[grid]`` keys with a list of values each, which every arm is crossed with, ``[task.NAME]`` those of
one of the tasks, such as its number of rounds. Everything else is a key of every run.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from common.config import Config, from_flat, read_settings, read_toml
from common.errors import InputError
from common.section import Scalar
from common.tasks import GLUE
from simulations.grid import crossed, flattened, take_grid

ALONE = "run"  # the arm of a file that names none
SKIP = "skip-absent-teachers"
OWN = ("seeds", "tasks", "ceiling", SKIP)
# keys that a ceiling does not depend on
TRAINING = ("rounds", "data.public-text", "student.", "distill.", "server.", "client.", "tracking.")


@dataclass(frozen=True, eq=False)
class Planned:
    """One run of a sweep: the keys that are given to it, and all of them resolved."""

    arm: str
    task: str
    seed: int
    keys: Mapping[str, Scalar]
    config: Config

    @property
    def folder(self) -> Path:
        """Below the sweep's own."""
        return Path(self.arm, self.task, f"seed-{self.seed}")

    @property
    def name(self) -> str:
        return f"{self.arm} {self.task} seed {self.seed}"

    @property
    def ceiling_key(self) -> tuple[tuple[str, Scalar], ...]:
        """Runs of the same have one ceiling."""
        flat = self.config.flat()
        return tuple(
            (key, value) for key, value in flat.items() if key == "client.precision" or not key.startswith(TRAINING)
        )


@dataclass(frozen=True)
class Sweep:
    """Runs in their order (seed by seed, so that arms can soon be compared).

    Attributes:
        arms: by name the keys in which an arm differs.
        skipped: GLUE tasks whose text is not there.
        may_skip: whether an arm is left out, and does not fail, when neither this machine nor the hub has its teacher.
        absent: by name the arms that were, and why.
    """

    runs: tuple[Planned, ...]
    arms: Mapping[str, Mapping[str, Scalar]]
    ceiling: bool
    skipped: tuple[str, ...] = ()
    may_skip: bool = False
    absent: Mapping[str, str] = field(default_factory=dict)


def read_sweep(path: Path, settings: Sequence[str] = (), seeds: Sequence[int] | None = None) -> Sweep:
    """Read a sweep, lay ``key=value`` settings over every arm, check each run.

    ``seeds`` go before those of the file.

    Raises:
        InputError: naming the file or key, what was found and what would be right.
    """
    return sweep_of(path, read_toml(path), settings, seeds)


def sweep_of(
    path: Path, document: dict[str, Any], settings: Sequence[str] = (), seeds: Sequence[int] | None = None
) -> Sweep:
    """The same of what was read from the file."""
    grid, over = take_grid(path, document), read_settings(settings)
    arms = crossed(path, sections(path, document, "arms"), grid) or {ALONE: {}}
    of_task = sections(path, document, "task")
    own = {name: document.pop(name) for name in OWN if name in document}
    base = document | over
    for key in over:
        if key in grid:
            raise InputError(f"-s {key}: the grid of {path} varies it; change it there")
        if taken := [arm for arm, keys in arms.items() if key in keys]:
            raise InputError(f"-s {key}: the arm {taken[0]} of {path} sets it; change it there")
    ceiling, may_skip = (own.get(name, False) for name in ("ceiling", SKIP))
    for name, given in (("ceiling", ceiling), (SKIP, may_skip)):
        if type(given) is not bool:
            raise InputError(f"{path}: {name} = {given!r}: give true or false")
    if seeds is not None and "seed" in over:
        raise InputError(f"-s seed={over['seed']}: the seeds are 0 to {len(seeds) - 1}; leave it out")
    chosen = tuple(seeds) if seeds is not None else _seeds(path, own, base)
    tasks, skipped = _tasks(path, own, base)
    if other := sorted(of_task.keys() - {*tasks, *skipped}):
        raise InputError(f"{path}: task.{other[0]}: no such task among the sweep's; leave the section out")
    for arm, keys in arms.items():
        for name, listed in (("seed", chosen), ("task", tasks)):
            if name in keys and listed:
                raise InputError(f"{path}: arms.{arm}.{name}: the sweep's {name}s are a list; leave it out")
    runs = [
        _planned(path, arm, {**base, **of_task.get(task, {}), **over, **keys, **named, "seed": seed})
        for seed in chosen
        for task, named in ((task, {"task": task} if task else {}) for task in tasks or ("",))
        for arm, keys in arms.items()
    ]
    return Sweep(tuple(runs), arms, ceiling, skipped, may_skip)


def _planned(path: Path, arm: str, keys: dict[str, Any]) -> Planned:
    try:
        config = from_flat(keys)
    except InputError as error:
        raise InputError(f"{path}: arm {arm}: {error}") from None
    return Planned(arm, config.task, config.seed, keys, config)


def sections(path: Path, document: dict[str, Any], kind: str) -> dict[str, dict[str, Scalar]]:
    """Takes the sections [KIND.NAME] out of the document."""
    named = {key: document.pop(key) for key in list(document) if key.partition(".")[0] == kind and key != "task"}
    found_in: dict[str, dict[str, Scalar]] = {}
    for key, keys in named.items():
        name = key.removeprefix(kind).removeprefix(".")
        if not re.fullmatch(r"[A-Za-z0-9][\w.+-]*", name) or not isinstance(keys, dict):
            raise InputError(
                f"{path}: {key}: give {kind} as sections, [{kind}.NAME], NAME of letters, digits and . - _ +"
            )
        found_in[name] = flattened(keys)
    return found_in


def _seeds(path: Path, own: Mapping[str, Any], base: Mapping[str, Any]) -> tuple[int, ...]:
    if "seeds" not in own:
        return (base.get("seed", 0),)
    seeds = own["seeds"]
    if "seed" in base:
        raise InputError(f"{path}: seed = {base['seed']}: there is a list of seeds; give one of the two")
    if not isinstance(seeds, list) or not seeds or any(type(seed) is not int for seed in seeds):
        raise InputError(f"{path}: seeds = {seeds!r}: give a list of whole numbers, e.g. [0, 1, 2]")
    if len(set(seeds)) < len(seeds):
        raise InputError(f"{path}: seeds = {seeds!r}: give different ones")
    return tuple(seeds)


def _tasks(path: Path, own: Mapping[str, Any], base: Mapping[str, Any]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The tasks of every arm (none: its own), and those of GLUE that are skipped."""
    if "tasks" not in own:
        return (), ()
    tasks = own["tasks"]
    if "task" in base:
        raise InputError(f"{path}: task = {base['task']!r}: there is a list of tasks; give one of the two")
    if tasks == "glue":
        return glue_tasks(str(base.get("data.source", "")))
    if not isinstance(tasks, list) or not tasks or any(type(task) is not str for task in tasks):
        raise InputError(f"{path}: tasks = {tasks!r}: give a list of names, e.g. ['sst2', 'mrpc'], or 'glue'")
    if len(set(tasks)) < len(tasks):
        raise InputError(f"{path}: tasks = {tasks!r}: give different ones")
    return tuple(tasks), ()


def glue_tasks(source: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """GLUE's tasks whose text a folder holds, and the others; without a folder the hub has all.

    Raises:
        InputError: the folder holds none.
    """
    if not source:
        return tuple(GLUE), ()
    folder = Path(source).expanduser()
    found = tuple(task for task in GLUE if any((folder / task).glob("train-*.parquet")))
    if not found:
        raise InputError(f"data.source = {source!r}: no GLUE task there (TASK/train-*.parquet); give another folder")
    return found, tuple(task for task in GLUE if task not in found)
