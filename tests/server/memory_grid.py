"""A grid in this process, that hands messages over as Flower's does.

They get their ids when they are pushed, replies name the message they answer, and an error for a dead node comes from
nobody's node id.
"""

import time
from dataclasses import dataclass, field
from types import SimpleNamespace
from uuid import uuid4

import numpy as np
from flwr.app import Error, Message
from flwr.supercore.task_identity import TaskIdentity

from common.config import from_flat
from common.progress import Silent
from common.wire import ClientLine, mark_answer, pack_reply, unpack_instruction
from server.exchange import Exchange, StreamingGrid
from server.intake import Summed

SHAPES = {"w": (1,)}
ARRAYS = {"w": np.array([0.5], dtype=np.float32)}
CLIENTS = tuple(range(12))
RUN = "0123456789abcdef"
TIMEOUT = 1.0


def inside_an_app(monkeypatch):
    """Flower makes messages inside apps only."""
    for name in ("_run_id", "_node_id", "_task_id"):
        monkeypatch.setattr(TaskIdentity, name, 1)


# --- nodes --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Later:
    """An answer after some seconds."""

    seconds: float
    answer: object


def answer(clients, seconds=0.01, problems=(), **changed):
    """A good reply: the node's sum has bit c once for each client c in it."""
    lines = [
        ClientLine(client, 0, seconds, problem="OSError")
        if client in problems
        else ClientLine(client, changed.get("examples", size_of(client)), seconds)
        for client in clients
    ]
    total = sum(2**client for client in clients if client not in problems)
    return pack_reply({"update": {"w": np.array([total], dtype=np.int64)}}, lines)


def size_of(client):
    return 10 + client % 3


def well(node, clients):
    return answer(clients)


def silent(node, clients):
    return None


def broken(node, clients):
    return Error(code=1, reason="OSError at nodes.py:1")


def spoilt(node, clients):
    return answer(clients, examples=1)


def kills(*poison):
    """A node that one of these clients takes with it, whoever travels along."""
    return lambda node, clients: broken(node, clients) if set(poison) & set(clients) else answer(clients)


class OwnError(Error):
    """One that the node itself has sent."""


@dataclass
class MemoryGrid:
    """Nodes by id, each a function of (node, clients) that gives what comes back.

    Attributes:
        nodes: answer content, an `Error`, `Later`, a list of these, or None for silence.
        sloppy: hand over whatever has arrived, asked for or not.
        sent: every message pushed, as (node, kind of message, clients).
        asked: all ids that replies were asked for.
    """

    nodes: dict
    sloppy: bool = False
    sent: list = field(default_factory=list)
    messages: list = field(default_factory=list)
    asked: set = field(default_factory=set)
    arrived: list = field(default_factory=list)

    def get_node_ids(self):
        return list(self.nodes)

    def push_messages(self, messages):
        for message in messages:
            assert message.metadata.message_id == ""
            message.metadata.__dict__["_message_id"] = str(uuid4())
            node, clients = message.metadata.dst_node_id, unpack_instruction(message.content).clients
            self.messages.append(message)
            self.sent.append((node, message.metadata.message_type, clients))
            given = self.nodes[node](node, clients)
            for one in given if isinstance(given, list) else [given]:
                self._arrive(message, one)
        return [message.metadata.message_id for message in messages]

    def _arrive(self, message, given):
        due = time.monotonic()
        if isinstance(given, Later):
            due, given = due + given.seconds, given.answer
        if given is not None:
            if not isinstance(given, Error) and "answers" not in given.get("clients", ()):
                mark_answer(given, unpack_instruction(message.content), message.metadata.message_type)
            reply = Message(given, reply_to=message)
            if isinstance(given, Error) and not isinstance(given, OwnError):
                reply.metadata.__dict__["_src_node_id"] = 1  # nobody's, as Flower's word for a dead node
            self.arrived.append((due, reply))

    def pull_messages(self, ids):
        ids, now = set(ids), time.monotonic()
        self.asked |= ids
        due = [
            (when, reply)
            for when, reply in self.arrived
            if when <= now and (self.sloppy or reply.metadata.reply_to_message_id in ids)
        ]
        self.arrived = [one for one in self.arrived if one not in due]
        return [reply for _, reply in due]


class Heard(Silent):
    def __init__(self):
        super().__init__()
        self.heard = []

    def line(self, text):
        self.heard.append(text)


class Run:
    """An exchange with some nodes, and what happened in it."""

    def __init__(self, folder, nodes, clients=CLIENTS, sloppy=False, stopped=lambda: False, **keys):
        flat = {"server.round-timeout": TIMEOUT, "rounds": 9}
        config = from_flat(flat | {f"server.{name.replace('_', '-')}": value for name, value in keys.items()})
        sizes = np.array([size_of(client) for client in range(max(clients) + 1)])
        federation = SimpleNamespace(
            config=config,
            data=SimpleNamespace(train_sizes=sizes, eligible=np.array(clients), key="d" * 32),
            teacher=SimpleNamespace(folder=folder, hash="h" * 64),
            masked=None,
            homes={},
            tiers=SimpleNamespace(shapes={}),
            tier_of=np.zeros(len(sizes), dtype=np.int64),
            pupil=SimpleNamespace(key="s" * 32, hash="p" * 64),
        )
        self.grid, self.clients, self.hangs, self.progress, self.folder = (
            MemoryGrid(nodes, sloppy), clients, [], Heard(), folder
        )  # fmt: skip
        self.exchange = Exchange(
            federation, RUN, folder, self.progress, stopped=stopped, on_hang=lambda: self.hangs.append(time.monotonic())
        )
        self.streaming = StreamingGrid(self.grid, self.exchange.tick)
        self.number = 0

    def open(self, clients=None, kind="train", goal=None):
        self.number += 1
        self.grid.sent.clear()
        chosen = self.clients if clients is None else clients
        return self.exchange.open(
            kind, self.number, chosen, grid=self.streaming, arrays=ARRAYS, info="", goal=goal
        )  # fmt: skip

    def phase(self, clients=None, kind="train", goal=None):
        """One phase from beginning to end: its books, and the sum."""
        messages = self.open(clients, kind, goal)
        intake = Summed(SHAPES, self.exchange.sizes)
        replies = self.streaming.send_and_receive(messages, timeout=TIMEOUT)
        books = self.exchange.collect(self.streaming, replies, intake.take)
        assert self.exchange.phase is None
        assert not list(self.folder.glob(".finished-*"))
        counted_once(books, intake)
        return books, intake

    def lists(self, node):
        """The client lists of the messages that a node got in the last phase."""
        return [clients for who, _, clients in self.grid.sent if who == node]


def counted_once(books, intake):
    """The sum holds each accepted client once, and nobody else."""
    assert int(intake.total.totals["w"][0]) == sum(2**client for client in books.accepted)
    assert sorted(line.client for line in intake.lines) == sorted(books.accepted)
    assert intake.examples == sum(size_of(client) for client in books.accepted)
    assert not books.accepted & set(books.lost)
    assert books.accepted | set(books.lost) | set(books.surplus) == set(books.clients)
