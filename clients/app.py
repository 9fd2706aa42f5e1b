"""The ClientApp: decodes a message, hands it to the resident worker, encodes the sums.

The same app runs in a simulation's workers and on an edge device.
"""

import json
from collections.abc import Callable
from pathlib import Path

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from clients.worker import Worker
from common.config import from_flat
from common.errors import place_of
from common.wire import Instruction, pack_reply, unpack

app = ClientApp()

_resident: dict[str, Worker] = {}  # at most one: a new run replaces it


@app.query("teach")
def teach(message: Message, context: Context) -> Message:
    """Compute the teacher's outputs for the clients' examples, where they are not on disk yet."""

    def work() -> Message:
        instruction, _ = unpack(message.content)
        lines = _worker(instruction).teach(instruction.clients, _finished(instruction))
        return Message(pack_reply({}, lines), reply_to=message)

    return _safely(work)


@app.train()
def train(message: Message, context: Context) -> Message:
    """Distil the student on each listed client; reply with the sum of the updates."""

    def work() -> Message:
        worker = _worker(unpack(message.content)[0])
        instruction, arrays = unpack(message.content, worker.shapes)
        update, lines = worker.train(arrays, instruction.round, instruction.clients, _finished(instruction))
        return Message(pack_reply({"update": update}, lines), reply_to=message)

    return _safely(work)


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    """Score student and teacher on each listed client's held-out data; reply with summed statistics."""

    def work() -> Message:
        worker = _worker(unpack(message.content)[0])
        instruction, arrays = unpack(message.content, worker.shapes)
        student, teacher, lines = worker.evaluate(arrays, instruction.clients, _finished(instruction))
        return Message(pack_reply({"student": student, "teacher": teacher}, lines), reply_to=message)

    return _safely(work)


class ClientFailed(RuntimeError):
    """A whole message failed; the text holds the error's kind and place, never its message."""


def _safely(work: Callable[[], Message]) -> Message:
    """Flower sends an exception's text to the server word for word, and a text can quote private data."""
    try:
        return work()
    except Exception as error:
        failure = ClientFailed(f"{type(error).__name__}{place_of(error)}")
    raise failure


def _worker(instruction: Instruction) -> Worker:
    name = json.dumps([instruction.config, instruction.teacher, instruction.teacher_hash, instruction.dataset])
    if name not in _resident:
        _resident.clear()
        config = from_flat(json.loads(instruction.config))
        _resident[name] = Worker(config, instruction.teacher, instruction.teacher_hash, instruction.dataset)
    return _resident[name]


def _finished(instruction: Instruction) -> Callable[[], None]:
    """Tells a progress display on the same machine that one more client is done."""
    if not instruction.scoreboard:
        return lambda: None
    board = Path(instruction.scoreboard)

    def mark() -> None:
        with board.open("ab") as stream:
            stream.write(b".")

    return mark
