"""``fedistill edge run``: a run of real clients, with the display, run folder and exit codes of a simulation."""

import json
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from common.config import Config
from common.corpus import load_corpus
from common.edge import alone_in
from common.errors import InputError, Interrupted, RunFailed
from common.keys import AT_CLIENTS, VOTING
from common.progress import Progress
from common.section import Scalar
from common.store import write_atomically
from common.wire import Joined
from server.app import default_folder
from server.edge_folder import EdgeFolder
from server.run_folder import RunFolder
from simulations.simulate import in_foreground, say_what_runs

MEMBERS = "clients.json"  # in the run folder
GONE = 0  # in place of the node of a client that was struck off
AGAIN_SECONDS = 2.0  # between two tries to find the SuperLink
LOST_SECONDS = 600.0  # without it, and the run has failed


def run_on_edge(
    edge: EdgeFolder,
    config: Config,
    out: Path | None,
    *,
    resume: bool = False,
    least: int = 0,
    wait: float = 300.0,
) -> dict[str, Any]:
    """Run a federation of real clients in the foreground and return its summary.

    Args:
        config: with `keys_of_clients`, or a resumed run's.
        least: begin with so many clients when ``wait`` seconds are over; 0: with all that may take part, or not.

    Raises:
        InputError: nothing was started.
        RunFailed, Interrupted: the run folder says how far it came.
    """
    check_keys(config)
    with alone_in(edge.state, "run.lock", "another run of this federation goes on"):
        folder = RunFolder(out or default_folder(config), config, resume=resume)

        def work(progress: Progress, prepared: Callable[[], None], stop: threading.Event) -> dict[str, Any]:
            from server.edge_link import LinkLost, control_of

            control_of(edge)
            prepared()
            absence = Absence()
            while True:
                try:
                    return _attempt(edge, config, folder, progress, stop, absence.end, least=least, wait=wait)
                except LinkLost as error:
                    if absence.is_too_long():
                        raise
                    progress.line(f"{error}; trying again")
                if stop.wait(AGAIN_SECONDS):
                    raise Interrupted
                folder.take_up()

        return in_foreground(folder, config, work)


class Absence:
    """Of the SuperLink: it is waited for so long from when it was missed, however long the run went well before."""

    def __init__(self) -> None:
        self._since: float | None = time.monotonic()

    def end(self) -> None:
        self._since = None

    def is_too_long(self) -> bool:
        """Asked whenever it is missed."""
        now = time.monotonic()
        self._since = now if self._since is None else self._since
        return now - self._since > LOST_SECONDS


def keys_of_clients(edge: EdgeFolder) -> dict[str, Scalar]:
    """What a new run's keys say of clients on devices: who may take part, and that the private data are with them.

    Raises:
        InputError: nobody may.
    """
    clients = max(edge.admitted(), default=-1) + 1
    if not clients:
        raise InputError(f"{edge.path}: no client may take part; make one with `fedistill edge add-client`")
    return {"data.private": AT_CLIENTS, "data.clients": clients, "data.partition": "natural"}


def check_keys(config: Config) -> None:
    """Raise `InputError` naming a key that does not fit clients on devices."""
    if config.data.private != AT_CLIENTS:  # the keys are of a run that is resumed
        raise InputError("--resume: this run was a simulation; go on with `fedistill simulate --resume`")
    if config.server.strategy in VOTING:
        raise InputError(
            f"server.strategy = {config.server.strategy!r}: no public text is sent to devices; give another"
        )
    if config.distill.general_rounds or config.distill.prior_correction:
        what = "general-rounds" if config.distill.general_rounds else "prior-correction"
        raise InputError(f"distill.{what}: what it needs is not sent to devices; leave it out")
    if config.task == "text" and not config.data.source:
        raise InputError("data.source is empty: task = text needs a CSV, JSONL or Parquet file of public text")
    if config.student.model:
        raise InputError(
            f"student.model = {config.student.model!r}: a student of its own is not sent to devices; leave it out"
        )


def _attempt(  # noqa: PLR0917
    edge: EdgeFolder,
    config: Config,
    folder: RunFolder,
    progress: Progress,
    stop: threading.Event,
    found: Callable[[], None],
    *,
    least: int,
    wait: float,
) -> dict[str, Any]:
    """The run, or what is left of it, for as long as the SuperLink answers.

    Those who joined when it began stay its clients: one that is not there when it goes on is away, and may come back.

    Args:
        found: called when the SuperLink has been found.
    """
    from server.edge_link import edge_run, nodes_of_clients
    from server.joining import join
    from server.preparation import prepare
    from server.run import run_federation

    corpus = load_corpus(config)
    with edge_run(edge, stop.is_set) as grid:
        found()
        before = read_members(folder.path)
        homes = {client: node for client, node in nodes_of_clients(edge).items() if client < config.data.clients}
        asked = {client: node for client, node in homes.items() if not before or client in before}
        joined = join(
            grid, asked, config, corpus.task, least=1 if before else least or len(asked), seconds=wait,
            progress=progress, stopped=stop.is_set,
        )  # fmt: skip
        members = before or {client: (one.train, one.heldout) for client, one in joined.items()}
        for client in with_other_data(joined, members):
            progress.line(f"client {client} is left out: it has other data than when the run began")
            homes[client] = GONE
            del joined[client]
        if not joined:
            raise RunFailed("every client has other data than when the run began; start a new run")
        federation = prepare(config, progress, replace(corpus, sizes=members))
        write_members(folder.path, members)
        federation.homes = {client: homes.get(client, GONE) for client in members}
        federation.struck_off = edge.struck_off
        federation.held = {client: set(joined[client].held) if client in joined else set() for client in members}
        say_what_runs(progress, config, federation)
        return run_federation(federation, folder, grid, progress, nodes=len(joined), stopped=stop.is_set)


def read_members(run: Path) -> dict[int, tuple[int, int]]:
    """Train and held-out examples of those who joined when a run began, by client; none has begun: nothing."""
    path = run / MEMBERS
    if not path.is_file():
        return {}
    return {int(client): (int(train), int(held)) for client, (train, held) in json.loads(path.read_text()).items()}


def write_members(run: Path, members: Mapping[int, tuple[int, int]]) -> None:
    write_atomically(
        run / MEMBERS, json.dumps({str(client): list(sizes) for client, sizes in members.items()}).encode()
    )


def with_other_data(joined: Mapping[int, Joined], members: Mapping[int, tuple[int, int]]) -> list[int]:
    """Those who say other numbers of examples, trained on and held out, than when the run began."""
    return sorted(client for client, one in joined.items() if (one.train, one.heldout) != members[client])
