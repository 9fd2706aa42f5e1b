"""The process of a client that trains: it asks its SuperNode for messages and answers them, with models in memory.

Run as a module: ``python -m clients.resident PARENT_PID ADDRESS STATE``.
"""

import hashlib
import json
import os
import sys
import time
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import httpx
from flwr.app import Array, Context, Message, RecordDict
from flwr.app.error import Error
from flwr.common.constant import ErrorCode
from flwr.common.serde import context_from_proto
from flwr.proto.node_pb2 import Node
from flwr.proto.runtime_pb2 import PullAppMessagesRequest, PullTaskInputRequest
from flwr.supercore.constant import TaskType
from flwr.supercore.inflatable.inflatable_protobuf_utils import (
    make_confirm_message_received_fn_protobuf,
    make_pull_object_fn_protobuf,
)
from flwr.supercore.inflatable.inflatable_utils import ObjectPullError, pull_and_inflate_object_from_tree
from flwr.supercore.runtime import RuntimeHttpClient
from flwr.supercore.task_identity import TaskIdentity
from flwr.supernode.runtime.run_clientapp import push_message

from clients.app import app
from common.bundle import bundled, unbundled
from common.errors import place_of, told_of
from common.processes import end_with
from common.runtime_api import UNANSWERED, WITHDRAWN, TaskDesk, working

POLL_SECONDS = 0.1
LOOK_SECONDS = 20.0  # between two looks whether a message that does not come has been given up
SILENT_SECONDS = 5.0  # without an answer of our own SuperNode: it is gone, and we are started again with it
MAY_LEAVE = (
    "clients",
    "joined",
    "update",
    "student",
    "teacher",
    "secure",
)  # records; some with an ending, see `_is_known`


class Audit:
    """A line of JSON for each message: which records, how many arrays and bytes, their hash; never what they hold."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def note(self, way: str, message: Message) -> None:
        line: dict[str, Any] = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "way": way,
            "kind": message.metadata.message_type,
            "flower_run": message.metadata.run_id,
        }
        if message.has_error():
            line["error"] = [message.error.code, message.error.reason]
        else:
            line["records"] = {name: _outline(record) for name, record in message.content.items()}
        with self._path.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(line) + "\n")


def _outline(record: Mapping[str, Any]) -> dict[str, Any]:
    digest, size, shapes = hashlib.sha256(), 0, {}
    for name, value in record.items():
        data = value.data if isinstance(value, Array) else str(value).encode()
        digest.update(data)
        size += len(data)
        if isinstance(value, Array):
            shapes[name] = list(value.shape)
    return {"bytes": size, "sha256": digest.hexdigest(), **({"shapes": shapes} if shapes else {})}


class Answers:
    """Gives answers, and gives the last one again where the same question comes again: its answer was lost."""

    def __init__(self) -> None:
        self._asked, self._content = "", RecordDict()

    def to(self, message: Message, context: Context) -> Message:
        asked = _identity(message)
        if asked == self._asked:
            return Message(self._content, reply_to=message)
        reply = answer(message, context)
        if reply.has_content():
            self._asked, self._content = asked, reply.content
        return reply


def _identity(message: Message) -> str:
    """What is asked: the same for two messages that ask the same."""
    outlines = {name: _outline(record) for name, record in sorted(message.content.items())}
    return json.dumps([message.metadata.run_id, message.metadata.message_type, outlines])


def answer(message: Message, context: Context) -> Message:
    """The app's answer; an error where it has none, or one that holds what may not leave."""
    try:
        reply = app(message=message, context=context)
        unknown = [name for name in reply.content if not _is_known(name)]
        if not unknown:
            return reply
        reason = f"{len(unknown)} records are of a kind that may not leave"
    except Exception as error:  # its text is safe: `clients.app` has seen to that
        reason = str(error)[:200]
    return Message(Error(code=ErrorCode.CLIENT_APP_RAISED_EXCEPTION, reason=reason), reply_to=message)


def _is_known(name: str) -> bool:
    stem, _, number = name.partition("-")
    return stem in MAY_LEAVE and (not number or number.isdecimal())


def withdrawn() -> None:
    """The message is not to be answered any more: end, whatever the work, to be started again."""
    os._exit(WITHDRAWN)


def _handle(message: Message, context: Context, answers: Answers, audit: Audit) -> Message:
    """The answer as it travels; whatever goes wrong, there is one."""
    try:
        message.content = unbundled(message.content)
        audit.note("received", message)
        reply = answers.to(message, context)
        audit.note("sent", reply)
        if reply.has_content():
            reply.content = bundled(reply.content)
    except Exception as error:
        reason = f"{told_of(error)}{place_of(error)}"
        return Message(Error(code=ErrorCode.CLIENT_APP_RAISED_EXCEPTION, reason=reason), reply_to=message)
    return reply


class Superseded(Exception):
    """A message that never came whole: its sender is gone, and another one waits."""

    def __init__(self, token: str) -> None:
        super().__init__()
        self.token = token


def fetch(connection: RuntimeHttpClient, desk: TaskDesk) -> tuple[Message, Context]:
    """The message of a task, when all of it has arrived at our SuperNode.

    Raises:
        Superseded: our SuperNode has gone on to another one.
    """
    task = connection.PullTaskInput(PullTaskInputRequest())
    context = context_from_proto(task.context)
    TaskIdentity.task_id, TaskIdentity.run_id = task.task_id, context.run_id
    TaskIdentity.node_id = context.node_id
    (tree,) = connection.PullMessages(PullAppMessagesRequest()).message_object_trees
    node, run = Node(node_id=context.node_id), context.run_id
    while True:
        try:
            message = pull_and_inflate_object_from_tree(
                tree,
                make_pull_object_fn_protobuf(connection.PullObject, node, run),
                make_confirm_message_received_fn_protobuf(connection.ConfirmMessageReceived, node, run),
                return_type=Message, max_time=LOOK_SECONDS, initial_backoff=POLL_SECONDS, backoff_cap=1.0,
            )  # fmt: skip
        except ObjectPullError:
            if token := desk.acquire(TaskType.CLIENT_APP):
                raise Superseded(token) from None
        else:
            message.metadata.__dict__["_message_id"] = tree.object_id  # it does not travel with the message
            return message, context


def work(desk: TaskDesk, audit: Audit) -> None:
    """Answer messages until our SuperNode is gone."""
    heard, answers, token = time.monotonic(), Answers(), ""
    while time.monotonic() - heard < SILENT_SECONDS:
        try:
            token = token or desk.acquire(TaskType.CLIENT_APP)
            heard = time.monotonic()
        except httpx.HTTPError:
            pass
        if not token:
            time.sleep(POLL_SECONDS)
            continue
        try:
            with desk.connect(token) as connection, working(connection, withdrawn):
                token = ""
                message, context = fetch(connection, desk)
                push_message(connection, _handle(message, context, answers, audit), context)
        except Superseded as other:
            token = other.token
        except Exception:  # our SuperNode waits for an answer that will not come: both begin anew
            traceback.print_exc()
            os._exit(UNANSWERED)
        heard = time.monotonic()


def main(parent: str, address: str, state: str) -> None:
    """Work until the process that has started this one ends, or its SuperNode."""
    end_with(int(parent))
    folder = Path(state)
    desk = TaskDesk(address, folder / "superexec.secret", authority=None, name="flwr-clientapp")
    work(desk, Audit(folder / "audit.jsonl"))


if __name__ == "__main__":
    main(*sys.argv[1:])
