"""``fedistill edge client``: one owner of private data, as a Flower SuperNode that is kept alive."""

import os
import re
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import tomli_w

from clients.edge_folder import ClientFolder, check_data
from clients.fleet import KeyRefused, Unreachable, answers, introduce
from clients.home import Home, keep_teacher
from common.edge import alone_in
from common.processes import Child, Stop, flower_environment, free_port, until_stopped
from common.runtime_api import UNANSWERED, WITHDRAWN, make_secret
from common.store import write_atomically

REFUSALS = 3  # of our key, until it is believed
FIRST_WAIT, LONGEST_WAIT = 1.0, 30.0  # seconds before another try; each is twice the last
SETTLED_SECONDS = 60.0  # a SuperNode that lived so long starts the count anew
LOOK_SECONDS = 15.0  # between two looks at whether the server answers
JOINED = re.compile(r"SuperNode ID: (\d+)")  # what Flower 1.41 logs
HELD = "Failed to activate SuperNode"
Tell = Callable[[str], None]


def run_client(folder: ClientFolder, data: Path, tell: Tell, *, teacher: Path | None = None, **own: Any) -> None:
    """Take part until asked to stop.

    Args:
        data: this client's private examples.
        own: what else its owner says, see `Home`.
        teacher: a folder that holds the shared teacher; None: the server sends it, once.

    Raises:
        InputError: folder or data are not as they must be, or the server refuses the key.
    """
    path = check_data(data)
    folder.make_state()
    with alone_in(folder.state, "lock", "a client runs from this folder already"), until_stopped() as stop:
        home = Home(folder.state, folder.settings.client, path, **own)
        home.write()
        if teacher is not None:
            tell(f"the teacher in {teacher} is {keep_teacher(home, teacher)[:16]}")
        write_atomically(folder.state / "node.toml", tomli_w.dumps({"state": str(home.state)}).encode())
        make_secret(folder.secret_file)
        wait, refusals = FIRST_WAIT, 0
        while not stop.asked:
            began = time.monotonic()
            try:
                introduce(folder)
                reason = _run_supernode(folder, tell, stop)
                refusals = 0
            except Unreachable as error:
                reason = str(error)
            except KeyRefused as error:  # a server that has just started may not have read the list yet
                refusals += 1
                if refusals >= REFUSALS:
                    raise
                reason = str(error)
            if stop.asked:
                break
            wait = FIRST_WAIT if time.monotonic() - began > SETTLED_SECONDS else wait
            tell(f"{reason}; trying again in {wait:.0f} s")
            stop.wait(wait)
            wait = min(2 * wait, LONGEST_WAIT)
    tell("stopped")


def _run_supernode(folder: ClientFolder, tell: Tell, stop: Stop) -> str:
    """Run a SuperNode and who works for it until it ends or is to stop; returns why it has ended."""
    held = []

    def hear(line: str) -> None:
        if found := JOINED.search(line):
            with suppress(OSError):  # a full disk: a killed SuperNode is then let in again a minute later
                write_atomically(folder.node_file, found[1].encode())
            tell(f"joined {folder.settings.address}")
        elif HELD in line:
            held.append(line)

    environment, port = flower_environment(folder.state / "flower"), free_port()
    child = Child(supernode_arguments(folder, port), environment, folder.state / "supernode.log", hear)
    try:
        _watch(child, folder, tell, stop, port)
    finally:
        child.stop()
    if held:
        return "the server holds this client for present: its folder is in use on another machine, or was a minute ago"
    return f"the SuperNode ended by itself (exit code {child.exit_code}, see {folder.state / 'supernode.log'})"


def _watch(child: Child, folder: ClientFolder, tell: Tell, stop: Stop, port: int) -> None:
    """Keep a resident worker at a SuperNode's side; tell when the server goes silent and when it is back."""
    address, silent, looked = folder.settings.address, False, time.monotonic()
    worker = _start_resident(folder, port)
    try:
        while child.running and not stop.wait(0.5):
            if not worker.running:
                tell(_why_ended(worker, folder))
                worker.stop()
                if worker.exit_code == UNANSWERED:
                    return  # our SuperNode would wait for its answer for ever
                worker = _start_resident(folder, port)
            if time.monotonic() - looked < LOOK_SECONDS:
                continue
            looked = time.monotonic()
            if silent == answers(folder):  # the SuperNode itself tries on without end
                silent = not silent
                tell(f"{address} does not answer; trying until it does" if silent else f"{address} answers again")
    finally:
        worker.stop()


def _why_ended(worker: Child, folder: ClientFolder) -> str:
    if worker.exit_code == WITHDRAWN:
        return "a message was withdrawn by the server"
    return f"the worker has ended (exit code {worker.exit_code}, see {folder.worker_log}); started again"


def _start_resident(folder: ClientFolder, port: int) -> Child:
    arguments = ["clients.resident", str(os.getpid()), f"127.0.0.1:{port}", str(folder.state)]
    environment = {**flower_environment(folder.state / "flower"), "OMP_WAIT_POLICY": "PASSIVE"}
    return Child(arguments, environment, folder.worker_log, lambda line: None)


def supernode_arguments(folder: ClientFolder, port: int) -> list[str]:
    """The module that starts the SuperNode, and its arguments. Its own interface is open to this machine alone."""
    return [
        "clients.fleet", str(os.getpid()),
        "--superlink", folder.settings.address,
        "--root-certificates", str(folder.ca_file),
        "--auth-supernode-private-key", str(folder.key_file),
        "--node-config", str(folder.state / "node.toml"),
        "--host", "127.0.0.1",
        "--port", str(port),
        "--isolation", "process",  # code that comes with a run is not started: `clients.resident` asks for the work
        "--superexec-auth-secret-file", str(folder.secret_file),
    ]  # fmt: skip
