"""The process of a client that trains: it asks its SuperNode for messages and answers them, with models in memory.

Run as a module: ``python -m clients.resident PARENT_PID ADDRESS STATE``.
"""

import hashlib
import json
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import httpx
from flwr.app import Array, Context, Message, RecordDict
from flwr.app.error import Error
from flwr.common.constant import ErrorCode
from flwr.supercore.constant import TaskType
from flwr.supernode.runtime.run_clientapp import pull_task_input, push_message

from clients.app import app
from common.bundle import bundled, unbundled
from common.processes import end_with
from common.runtime_api import TaskDesk, working

POLL_SECONDS = 0.1
SILENT_SECONDS = 5.0  # without an answer of our own SuperNode: it is gone, and we are started again with it
WITHDRAWN = 75  # EX_TEMPFAIL, sysexits.h
MAY_LEAVE = ("clients", "joined", "update", "student", "teacher")  # records; some with an ending, see `_is_known`


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
            line["error"] = message.error.code
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
    """The message is not to be answered any more: end, to be started again.

    One whose way here was cut is waited for without end by Flower's code, which nothing else can break off.
    """
    os._exit(WITHDRAWN)


def work(desk: TaskDesk, audit: Audit) -> None:
    """Answer messages until our SuperNode is gone."""
    heard, answers = time.monotonic(), Answers()
    while time.monotonic() - heard < SILENT_SECONDS:
        try:
            token = desk.acquire(TaskType.CLIENT_APP)
            heard = time.monotonic()
        except httpx.HTTPError:
            token = ""
        if not token:
            time.sleep(POLL_SECONDS)
            continue
        with desk.connect(token) as connection, working(connection, withdrawn):
            message, context, _, _ = pull_task_input(connection)
            message.content = unbundled(message.content)
            audit.note("received", message)
            reply = answers.to(message, context)
            audit.note("sent", reply)
            if reply.has_content():
                reply.content = bundled(reply.content)
            push_message(connection, reply, context)
        heard = time.monotonic()


def main(parent: str, address: str, state: str) -> None:
    """Work until the process that has started this one ends, or its SuperNode."""
    end_with(int(parent))
    folder = Path(state)
    desk = TaskDesk(address, folder / "superexec.secret", authority=None, name="flwr-clientapp")
    work(desk, Audit(folder / "audit.jsonl"))


if __name__ == "__main__":
    main(*sys.argv[1:])
