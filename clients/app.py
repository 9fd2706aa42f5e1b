"""The ClientApp: decodes a message, hands it to the resident worker, encodes the sums.

The same app runs in a simulation's workers and on an edge device.
"""

import json
import os
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp

from clients.consensus import ConsensusWorker
from clients.general import GeneralWorker
from clients.home import Home
from clients.mutual import MutualWorker
from clients.secure_sum import FOLDER, Answer, Member, masked_sum, members_of, say
from clients.worker import ClientRefused, Finished, Worker
from common.config import from_flat
from common.errors import place_of, told_of
from common.store import cache_folder
from common.wire import (
    ClientLine,
    Instruction,
    mark_answer,
    pack_joined,
    pack_reply,
    pack_told,
    unpack_files,
    unpack_instruction,
    unpack_student,
)

app = ClientApp()
NEEDS = ("teacher", "teacher_hash", "dataset", "student", "student_hash")  # of an instruction, what a worker is made of
MASKED = ("masked", "masked_hash")  # and one with general rounds
WORKERS: dict[str, type[Worker]] = {"fedmd": ConsensusWorker, "ds-fl": ConsensusWorker, "fedkd": MutualWorker}

_resident: dict[str, Worker] = {}  # at most one: a new run replaces it


@app.query("teach")
def teach(message: Message, context: Context) -> Message:
    """Compute the teacher's outputs for the clients' examples, where they are not on disk yet."""

    def work(instruction: Instruction, worker: Worker, finished: Finished) -> RecordDict:
        lines = worker.teach(instruction.clients, finished)
        if worker.config.privacy.secure_aggregation:  # how many examples a client has is told by no other way either
            lines = [ClientLine(line.client, 0, 0.0, problem=line.problem) for line in lines]
        return pack_reply({}, lines)

    return _answer(message, context, work)


@app.query("weigh")
def weigh(message: Message, context: Context) -> Message:
    """Say how much the student's heads and neurons matter on the clients' examples, before round 1."""

    def work(instruction: Instruction, worker: Worker, finished: Finished) -> RecordDict:
        return _sums("weigh", worker, instruction, lambda asked: worker.weigh(asked.clients, finished))

    return _answer(message, context, work)


@app.train()
def train(message: Message, context: Context) -> Message:
    """Distil the student on each listed client; reply with the sum of the updates, or with each."""

    def work(instruction: Instruction, worker: Worker, finished: Finished) -> RecordDict:
        arrays = _arrays(message, "train", instruction, worker)
        return _sums("train", worker, instruction, lambda asked: worker.train(arrays, asked, finished))

    return _answer(message, context, work)


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    """Score student and teacher on each listed client's held-out data; reply with summed statistics."""

    def work(instruction: Instruction, worker: Worker, finished: Finished) -> RecordDict:
        arrays = _arrays(message, "evaluate", instruction, worker)
        return _sums("evaluate", worker, instruction, lambda asked: worker.evaluate(arrays, asked, finished))

    return _answer(message, context, work)


@app.query("keys")
def keys(message: Message, context: Context) -> Message:
    """In a secure sum: draw keys, tell the public ones."""
    return _stage(message, context, Member.keys)


@app.query("shares")
def shares(message: Message, context: Context) -> Message:
    """In a secure sum: shares of what the masks are made of, sealed for each of the others."""
    return _stage(message, context, Member.letters)


@app.query("unmask")
def unmask(message: Message, context: Context) -> Message:
    """In a secure sum: what opens the sum of those who are still there."""
    return _stage(message, context, Member.reveal)


@app.query("join")
def join(message: Message, context: Context) -> Message:
    """On a device of its own: read the data, say how many examples there are and which models are here."""

    def answer() -> Message:
        home = home_of(context)
        return Message(pack_joined(home.join(unpack_instruction(message.content))), reply_to=message)

    return _safely(answer)


@app.query("supply")
def supply(message: Message, context: Context) -> Message:
    """On a device of its own: keep a model's files."""

    def answer() -> Message:
        instruction, began = unpack_instruction(message.content), time.perf_counter()
        home_of(context).take(instruction, unpack_files(message.content))
        lines = [ClientLine(client, 0, time.perf_counter() - began) for client in instruction.clients]
        content = mark_answer(pack_reply({}, lines), instruction, message.metadata.message_type)
        return Message(content, reply_to=message)

    return _safely(answer)


def _sums(what: str, worker: Worker, instruction: Instruction, answer: Answer) -> RecordDict:
    """What a worker has summed up, under masks where the keys say so."""
    if worker.config.privacy.secure_aggregation:
        return pack_reply(*masked_sum(worker, what, instruction, answer))
    return pack_reply(*answer(instruction))


def _stage(message: Message, context: Context, work: Callable[[Member], Any]) -> Message:
    def answer() -> Message:
        instruction = unpack_instruction(message.content)
        config = from_flat(json.loads(instruction.config))
        if is_home(context):
            home = home_of(context)
            home.is_asked(instruction)
            instruction, cache = replace(instruction, scoreboard="", host=""), home.cache
        else:
            cache = cache_folder(config.runtime.cache)
        if _is_over(instruction):
            raise PhaseOver
        members = members_of(cache / FOLDER, instruction, config.privacy.secure_threshold)
        content = mark_answer(pack_told(*say(members, work)), instruction, message.metadata.message_type)
        _finished(instruction)(len(instruction.clients))
        return Message(content, reply_to=message)

    return _safely(answer)


def _arrays(message: Message, kind: str, instruction: Instruction, worker: Worker) -> dict[str, Any]:
    shapes = worker.expects(kind, instruction)
    return unpack_student(message.content, shapes) if shapes else {}


def _answer(message: Message, context: Context, work: Callable[[Instruction, Worker, Finished], RecordDict]) -> Message:
    def answer() -> Message:
        instruction, home = unpack_instruction(message.content), None
        if is_home(context):  # whatever it says of folders and files is another machine's
            home = home_of(context)
            instruction = replace(instruction, teacher="", dataset="", student="", masked="", scoreboard="", host="")
        if _is_over(instruction):
            raise PhaseOver
        worker = _worker(instruction, home)
        content = work(instruction, worker, _finished(instruction))
        return Message(mark_answer(content, instruction, message.metadata.message_type), reply_to=message)

    return _safely(answer)


class PhaseOver(Exception):
    """Nobody waits for this answer any more."""


class ClientFailed(RuntimeError):
    """A whole message failed; the text holds the error's kind and place, never its message."""


def _safely(work: Callable[[], Message]) -> Message:
    """Flower sends an exception's text to the server word for word, and a text can quote private data."""
    try:
        return work()
    except ClientRefused as error:
        failure = ClientFailed(str(error))
    except Exception as error:
        failure = ClientFailed(f"{told_of(error)}{place_of(error)}")
    raise failure


def is_home(context: Context) -> bool:
    """Whether this is a client's own device, and no worker of a simulation."""
    return "state" in context.node_config


def home_of(context: Context) -> Home:
    """The home of the client whose device this is.

    Raises:
        ClientRefused: this is a worker of a simulation.
    """
    if not is_home(context):
        raise ClientRefused("no client has its data here")
    return Home.read(Path(str(context.node_config["state"])))


def _worker(instruction: Instruction, home: Home | None) -> Worker:
    if home is None:
        needs = {name: getattr(instruction, name) for name in (*NEEDS, *(MASKED if instruction.masked else ()))}
    else:
        needs = home.needs(instruction)
    name = json.dumps([instruction.config, needs])
    if name not in _resident:
        _resident.clear()
        config = from_flat(json.loads(instruction.config)) if home is None else home.config(instruction)
        kind = GeneralWorker if instruction.masked else WORKERS.get(config.server.strategy, Worker)
        _resident[name] = kind(config, **needs)
    return _resident[name]


def _is_over(instruction: Instruction) -> bool:
    """Whether the server, on this machine, has taken its scoreboard away: enough others have answered."""
    board = Path(instruction.scoreboard)
    return _is_near(instruction) and board.parent.is_dir() and not board.exists()


def _is_near(instruction: Instruction) -> bool:
    """Whether there is a scoreboard on this machine: one seen through a shared folder may be out of date."""
    return bool(instruction.scoreboard) and instruction.host == socket.gethostname()


def _finished(instruction: Instruction) -> Finished:
    """Tells a progress display on the same machine how many more clients are done."""

    def mark(count: int) -> None:
        with suppress(OSError):  # a board that is not here, or no longer: nobody looks
            handle = os.open(instruction.scoreboard, os.O_WRONLY | os.O_APPEND)
            try:
                os.write(handle, b"." * count)
            finally:
                os.close(handle)

    return mark if _is_near(instruction) else lambda count: None
