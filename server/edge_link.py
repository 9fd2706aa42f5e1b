"""A run on a federation's SuperLink, worked from this process as Flower's ServerApp process would."""

import hashlib
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any

import httpx
import tomli_w
from flwr.app import Message, Metadata
from flwr.app.error import Error
from flwr.app.message import make_message
from flwr.cli.build import build_fab_from_files
from flwr.common.constant import SUPERLINK_NODE_ID, ErrorCode
from flwr.common.serde import fab_to_proto, run_from_proto
from flwr.proto.control_pb2 import StartRunRequest, StopRunRequest
from flwr.proto.runtime_pb2 import PullTaskInputRequest
from flwr.supercore.constant import SYSTEM_MESSAGE_TYPE, TaskType
from flwr.supercore.control import ControlHttpClient
from flwr.supercore.fab import Fab
from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor
from flwr.supercore.run import RunNotRunningException
from flwr.supercore.task_identity import TaskIdentity
from flwr.superlink.grid.http_grid import HttpGrid

from common.edge import Endpoint
from common.errors import InputError, Interrupted, RunFailed
from common.runtime_api import TaskDesk, working
from common.version import FEDISTILL
from server.edge_folder import EdgeFolder
from server.roster import Roster

POLL_SECONDS = 0.1
PULL_SECONDS = 1.0  # most answers are here in less, or not yet there
START_SECONDS = 30.0


class LinkLost(RunFailed):
    """The SuperLink does not answer, or no longer knows the run."""


class EdgeGrid:
    """The nodes of a run; where the SuperLink is lost, that is said in one way."""

    def __init__(self, grid: HttpGrid) -> None:
        self._grid = grid
        self._unsent: list[Message] = []  # errors in place of answers to messages that nobody took
        self._pulls: dict[str, _Pull] = {}  # answers that come slowly, by the message they are to

    def get_node_ids(self) -> list[int]:
        return sorted(self._ask(self._grid.get_node_ids))

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        sent = list(messages)
        ids = list(self._ask(lambda: self._grid.push_messages(sent)))
        for message, name in zip(sent, ids, strict=True):
            if not name:  # a node that was struck off
                self._unsent.append(_error(message.metadata.message_id, "the server does not know its node any more"))
        return [message.metadata.message_id for message in sent]

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        """Answers that are here; each by itself: what one client has sent must not touch the others' answers.

        Nor must what it has not sent: Flower waits for all of an answer, for hours if its sender likes.
        """
        found, self._unsent = self._unsent, []
        for name in set(message_ids) - {reply.metadata.reply_to_message_id for reply in found}:
            pull = self._pulls.pop(name, None)
            if pull is None:
                pull = _Pull(partial(self._grid.pull_messages, [name]))
                pull.join(PULL_SECONDS)
            if pull.is_alive():
                self._pulls[name] = pull
                continue
            try:
                found += self._ask(pull.result)
            except LinkLost:
                raise
            except Exception as error:  # Flower opens what clients have sent, and checks little of it before
                found.append(_error(name, f"its answer cannot be opened ({type(error).__name__})"))
        return found

    def _ask(self, question: Callable[[], Any]) -> Any:
        try:
            return question()
        except (httpx.HTTPError, RunNotRunningException) as error:
            raise LinkLost(f"the SuperLink does not answer ({type(error).__name__})") from None


class _Pull(threading.Thread):
    """An answer on its way."""

    def __init__(self, pull: Callable[[], Iterable[Message]]) -> None:
        super().__init__(daemon=True)
        self._pull = pull
        self._found: list[Message] = []
        self._error: Exception | None = None
        self.start()

    def run(self) -> None:
        try:
            self._found = list(self._pull())
        except Exception as error:  # raised where it is asked for
            self._error = error

    def result(self) -> list[Message]:
        if self._error is not None:
            raise self._error
        return self._found


def _error(answered: str, reason: str) -> Message:
    """An answer that nobody has sent."""
    run = TaskIdentity.run_id
    return make_message(
        metadata=Metadata(
            run_id=run, message_id="", src_node_id=SUPERLINK_NODE_ID, dst_node_id=SUPERLINK_NODE_ID,
            message_type=SYSTEM_MESSAGE_TYPE, group_id="", ttl=0, reply_to_message_id=answered, created_at=time.time(),
        ),
        error=Error(code=ErrorCode.MESSAGE_UNAVAILABLE, reason=reason),
    )  # fmt: skip


@contextmanager
def edge_run(folder: EdgeFolder, stopped: Callable[[], bool]) -> Iterator[EdgeGrid]:
    """A new run of the federation, and its nodes; it ends with the block.

    Raises:
        LinkLost: no `fedistill edge server` runs from the folder, or it does not answer any more.
    """
    try:
        control, authority = control_of(folder), folder.ca_file.read_bytes()
    except InputError as error:
        raise LinkLost(str(error)) from None
    desk = TaskDesk(control.address, folder.secret_file, authority=authority, name="flwr-serverapp")
    flower = ControlHttpClient.from_server_address(
        control.address,
        insecure=False,
        root_certificates=authority,
        interceptors=[RuntimeVersionHttpInterceptor(component_name="flwr CLI")],
    )
    try:
        bundle = make_bundle()
        fab = Fab(hashlib.sha256(bundle).hexdigest(), bundle, {})
        run = flower.StartRun(StartRunRequest(fab=fab_to_proto(fab), federation="")).run_id
        try:
            with _grid_of(desk, control, authority, run, stopped) as grid:
                yield EdgeGrid(grid)
        finally:
            with suppress(httpx.HTTPError):  # one that is over already
                flower.StopRun(StopRunRequest(run_id=run))
    except httpx.HTTPError as error:
        raise LinkLost(f"{control.address}: the SuperLink does not answer ({type(error).__name__})") from None
    finally:
        flower.close()
        desk.close()


@contextmanager
def _grid_of(
    desk: TaskDesk, control: Endpoint, authority: bytes, run: int, stopped: Callable[[], bool]
) -> Iterator[HttpGrid]:
    """The run's grid, as the holder of its task."""
    end = time.monotonic() + START_SECONDS
    while True:
        if stopped():
            raise Interrupted
        if time.monotonic() > end:
            raise LinkLost("the SuperLink has not offered the run that was asked for")
        if not (token := desk.acquire(TaskType.SERVER_APP)):
            time.sleep(POLL_SECONDS)
            continue
        with suppress(_AnotherRun), _grid_with(token, control, authority, run) as grid:
            yield grid
            return


class _AnotherRun(Exception):
    """A task that somebody has left behind; it is told as failed."""


@contextmanager
def _grid_with(token: str, control: Endpoint, authority: bytes, run: int) -> Iterator[HttpGrid]:
    grid = HttpGrid(control.address, root_certificates=authority, token=token)
    grid._retry_invoker = None  # type: ignore[assignment] # its own would try for ever, or end this process
    try:
        client = grid._runtime_client
        with working(client):
            task = client.PullTaskInput(PullTaskInputRequest())
            found = run_from_proto(task.run)
            if found.run_id != run:
                raise _AnotherRun
            # what messages say of where they come from
            TaskIdentity.task_id, TaskIdentity.run_id = task.task_id, run
            TaskIdentity.node_id = task.context.node_id
            grid.set_run(found)
            yield grid
    finally:
        grid.close()


def control_of(folder: EdgeFolder) -> Endpoint:
    """Where the Control API of the server that runs from a folder is.

    Raises:
        InputError: none runs.
    """
    if not folder.control_file.is_file():
        raise InputError(f"{folder.path}: no server runs from here; start one: fedistill edge server {folder.path}")
    return Endpoint.read(folder.control_file)


def nodes_of_clients(folder: EdgeFolder) -> dict[int, int]:
    """The Flower node of each client that may take part, by the client's number: found by its key, not by its word.

    Raises:
        LinkLost: the server does not answer.
    """
    try:
        control = control_of(folder)
        with Roster(control.host, control.port, folder.ca_file) as roster:
            return roster.homes(folder.admitted())
    except (InputError, RunFailed) as error:
        raise LinkLost(str(error)) from None


def make_bundle() -> bytes:
    """What Flower wants to come with a run: no code, no data, a name and a version. Nobody unpacks it."""
    project = {
        "build-system": {"requires": ["hatchling"], "build-backend": "hatchling.build"},
        "project": {"name": "fedistill", "version": FEDISTILL, "description": "", "license": "Apache-2.0"},
        "tool": {
            "flwr": {
                "app": {
                    "publisher": "fedistill",
                    "components": {"serverapp": "server.app:app", "clientapp": "clients.app:app"},
                    "config": {},
                }
            }
        },
    }
    bundle, _ = build_fab_from_files({"pyproject.toml": tomli_w.dumps(project).encode()})
    return bundle
