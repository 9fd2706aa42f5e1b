"""``fedistill edge client``: one owner of private data, as a Flower SuperNode that is kept alive."""

import os
import re
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import tomli_w

from clients.edge_folder import ClientFolder, check_data
from clients.fleet import Unreachable, answers, introduce
from common.edge import alone_in
from common.processes import Child, Stop, flower_environment, free_port, until_stopped
from common.store import write_atomically

FIRST_WAIT, LONGEST_WAIT = 1.0, 30.0  # seconds before another try; each is twice the last
SETTLED_SECONDS = 60.0  # a SuperNode that lived so long starts the count anew
LOOK_SECONDS = 15.0  # between two looks at whether the server answers
JOINED = re.compile(r"SuperNode ID: (\d+)")  # what Flower 1.41 logs
HELD = "Failed to activate SuperNode"
Tell = Callable[[str], None]


def run_client(folder: ClientFolder, data: Path, threads: int, tell: Tell) -> None:
    """Take part until asked to stop.

    Args:
        data: this client's private examples.
        threads: for training.

    Raises:
        InputError: folder or data are not as they must be, or the server refuses the key.
    """
    path = check_data(data)
    folder.make_state()
    with alone_in(folder.state, "lock", "a client runs from this folder already"), until_stopped() as stop:
        node = {"client": folder.settings.client, "data": str(path)}
        write_atomically(folder.state / "node.toml", tomli_w.dumps(node).encode())
        wait = FIRST_WAIT
        while not stop.asked:
            began = time.monotonic()
            try:
                introduce(folder)
                reason = _run_supernode(folder, threads, tell, stop)
            except Unreachable as error:
                reason = str(error)
            if stop.asked:
                break
            wait = FIRST_WAIT if time.monotonic() - began > SETTLED_SECONDS else wait
            tell(f"{reason}; trying again in {wait:.0f} s")
            stop.wait(wait)
            wait = min(2 * wait, LONGEST_WAIT)
    tell("stopped")


def _run_supernode(folder: ClientFolder, threads: int, tell: Tell, stop: Stop) -> str:
    """Run a SuperNode until it ends or is to stop; returns why it has ended."""
    held = []

    def hear(line: str) -> None:
        if found := JOINED.search(line):
            with suppress(OSError):  # a full disk: a killed SuperNode is then let in again a minute later
                write_atomically(folder.node_file, found[1].encode())
            tell(f"joined {folder.settings.address}")
        elif HELD in line:
            held.append(line)

    environment = {**flower_environment(folder.state / "flower"), "OMP_NUM_THREADS": str(threads)}
    child = Child(supernode_arguments(folder), environment, folder.state / "supernode.log", hear)
    try:
        _watch(child, folder, tell, stop)
    finally:
        child.stop()
    if held:
        return "the server holds this client for present: its folder is in use on another machine, or was a minute ago"
    return f"the SuperNode ended by itself (exit code {child.exit_code}, see {folder.state / 'supernode.log'})"


def _watch(child: Child, folder: ClientFolder, tell: Tell, stop: Stop) -> None:
    """Tell when the server goes silent and when it is back; the SuperNode itself tries on without end."""
    address, silent, looked = folder.settings.address, False, time.monotonic()
    while child.running and not stop.wait(0.5):
        if time.monotonic() - looked < LOOK_SECONDS:
            continue
        looked = time.monotonic()
        if silent == answers(folder):
            silent = not silent
            tell(f"{address} does not answer; trying until it does" if silent else f"{address} answers again")


def supernode_arguments(folder: ClientFolder) -> list[str]:
    """The module that starts the SuperNode, and its arguments. Its own interface is open to this machine alone."""
    return [
        "clients.fleet", str(os.getpid()),
        "--superlink", folder.settings.address,
        "--root-certificates", str(folder.ca_file),
        "--auth-supernode-private-key", str(folder.key_file),
        "--node-config", str(folder.state / "node.toml"),
        "--host", "127.0.0.1",
        "--port", str(free_port()),
    ]  # fmt: skip
