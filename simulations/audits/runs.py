"""The attacks of an audit, run by run, and several runs side by side; what an attack has found is a file.

An attack works in one process, but for models on halves of the data (`simulations.audits.shadows`): so runs are what
is shared out, and the models of a run among the processes that are left over.
"""

import json
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, wait
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.errors import InputError, RunFailed, place_of
from common.progress import Progress, Silent, Step
from common.section import Scalar
from common.store import write_atomically
from server.run_folder import finite
from simulations.audits.attack import Attack, Row
from simulations.laboratory import Laboratory
from simulations.outcome import read_json
from simulations.pool import pool, processes
from simulations.sweep_file import Planned

LOOK_SECONDS = 0.3  # between two looks for what has been found
Attacks = Mapping[str, Attack]


@dataclass(frozen=True)
class Found:
    """What an attack has found in a run, and how long it took."""

    rows: list[Row]
    seconds: float


def known(folder: Path, attack: Attack) -> Found | None:
    """What an attack that is done has left in a run's folder.

    Raises:
        InputError: it was done with other options.
    """
    found = read_json(folder / f"{attack.name}.json")
    if found is None:
        return None
    if found["options"] != _options(attack):
        told = ", ".join(f"{name} = {value!r}" for name, value in found["options"].items())
        raise InputError(f"{folder / attack.name}.json: with other options ({told}); remove it, or give another --out")
    return Found([dict(row) for row in found["rows"]], found.get("seconds", 0.0))


def attack_all(
    runs: Sequence[Planned], attacks: Attacks, out: Path, progress: Progress, tell: Callable[[str], Any]
) -> Generator[tuple[Planned, str, Found], None, None]:
    """Do what is not done yet; each attack once it is.

    Args:
        tell: hears what is being done.

    Raises:
        InputError: an attack does not fit the run.
        RunFailed: a process ended.
    """
    left = {run: [name for name in attacks if known(out / run.folder, attacks[name]) is None] for run in runs}
    left = {run: names for run, names in left.items() if names}
    if min(processes(runs[0].config), len(left)) > 1:
        yield from _side_by_side(left, attacks, out, progress, tell)
        return
    for run, names in left.items():
        for name, found in _attack(run, [attacks[name] for name in names], out / run.folder, progress, tell):
            yield run, name, found


def _side_by_side(
    left: dict[Planned, list[str]], attacks: Attacks, out: Path, progress: Progress, tell: Callable[[str], Any]
) -> Generator[tuple[Planned, str, Found], None, None]:
    waiting = [(run, name) for run, names in left.items() for name in names]
    most = processes(waiting[0][0].config)
    count = min(most, len(left))
    tell(f"{count} runs at a time")
    with pool(count, share=most // count) as workers:
        running = {
            workers.submit(_attack_there, run, [attacks[name] for name in names], out / run.folder)
            for run, names in left.items()
        }
        while running:
            ended, running = wait(running, timeout=LOOK_SECONDS, return_when=FIRST_COMPLETED)
            for job in ended:
                for line in job.result():
                    progress.line(line)
            for run, name in list(waiting):
                if (found := known(out / run.folder, attacks[name])) is not None:
                    waiting.remove((run, name))
                    yield run, name, found


class _Said(Silent):
    """Keeps what an attack has to say until its run is done."""

    def __init__(self) -> None:
        super().__init__()
        self.said: list[str] = []

    def line(self, text: str) -> None:
        self.said.append(text)

    @contextmanager
    def step(self, name: str, total: float | None) -> Iterator[Step]:
        """Not among what is said."""
        with Silent().step(name, total) as step:
            yield step


def _attack_there(run: Planned, attacks: Sequence[Attack], folder: Path) -> list[str]:
    """In a process of its own: all of a run's attacks; what they said.

    Raises:
        InputError, RunFailed: with the run's name. Of another error only what it is and where: its text may be private.
    """
    said = _Said()
    try:
        for _ in _attack(run, attacks, folder, said, lambda words: None):
            pass
    except (InputError, RunFailed) as error:
        raise type(error)(f"{run.name}: {error}") from None
    except Exception as error:
        raise RunFailed(f"{run.name}: {type(error).__name__}{place_of(error)}") from None
    return said.said


def _attack(
    run: Planned, attacks: Sequence[Attack], folder: Path, progress: Progress, tell: Callable[[str], Any]
) -> Iterator[tuple[str, Found]]:
    """Each attack once its file is written."""
    write_atomically(folder / "config.toml", run.config.toml().encode())
    tell(f"{run.name}: {attacks[0].name}")
    lab = Laboratory(run.config, progress, folder)
    for attack in attacks:
        tell(f"{run.name}: {attack.name}")
        began = time.monotonic()
        rows = [dict(row) for row in attack.run(lab, progress)]
        found = Found(rows, time.monotonic() - began)
        _keep(folder, attack, found)
        yield attack.name, found


def _keep(folder: Path, attack: Attack, found: Found) -> None:
    content = {"options": _options(attack), "paper": attack.paper, "seconds": found.seconds, "rows": found.rows}
    write_atomically(folder / f"{attack.name}.json", (json.dumps(finite(content), indent=1) + "\n").encode())


def _options(attack: Attack) -> dict[str, Scalar]:
    return dict(vars(attack))
