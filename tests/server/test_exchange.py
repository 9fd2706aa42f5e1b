"""Replies are folded in once each, losses tried again elsewhere, and nobody waits for nodes that do not answer.

The grid here lives in this process and hands messages over as Flower's does: they get their ids when they are
pushed, replies name the message they answer, and an error for a dead node comes from nobody's node id.
"""

import json
import time
from dataclasses import dataclass, field
from types import SimpleNamespace
from uuid import uuid4

import numpy as np
import pytest
from flwr.app import Error, Message
from flwr.supercore.task_identity import TaskIdentity

from common.config import from_flat
from common.errors import Interrupted, RunFailed
from common.progress import Silent
from common.wire import ClientLine, mark_answer, message_bytes, pack_reply, unpack_instruction, unpack_student
from server.exchange import RETRY_MESSAGES, Exchange, StreamingGrid
from server.intake import Summed

SHAPES = {"w": (1,)}
ARRAYS = {"w": np.array([0.5], dtype=np.float32)}
CLIENTS = tuple(range(12))
RUN = "0123456789abcdef"
TIMEOUT = 0.4


@pytest.fixture(autouse=True)
def _inside_an_app(monkeypatch):
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
            if isinstance(given, Error):
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


# --- when all is well ---------------------------------------------------------------------------


def test_every_client_is_asked_once_and_counted_once(tmp_path):
    run = Run(tmp_path, {1: well, 2: well, 3: well})
    books, _ = run.phase()
    assert books.accepted == set(CLIENTS)
    assert [node for node, _, _ in run.grid.sent] == [1, 2, 3]
    assert sorted(client for _, _, clients in run.grid.sent for client in clients) == list(CLIENTS)
    assert (books.lost, books.recovered, run.hangs, run.progress.heard) == ([], set(), [], [])
    assert books.bytes_down == sum(message_bytes(message) for message in run.grid.messages) > 0
    assert books.bytes_up > 0
    assert books.ended > books.began


def test_a_message_says_what_to_do_and_brings_the_student(tmp_path):
    run = Run(tmp_path, {1: well, 2: well}, strategy="fedprox", cohort=2, over_select=2.0)
    run.exchange.feedback = {3: 4, 5: 1}
    run.number = 6
    messages = run.open((0, 3, 5, 7))
    found = [unpack_instruction(message.content) for message in messages]
    assert {client: round_ for one in found for client, round_ in zip(one.clients, one.feedback, strict=True)} == {
        0: 0, 3: 4, 5: 1, 7: 0
    }  # fmt: skip
    for message, instruction in zip(messages, found, strict=True):
        assert message.metadata.message_type == "train"
        assert (instruction.run, instruction.round) == (RUN, 7)
        assert from_flat(json.loads(instruction.config)) == run.exchange.config
        assert (instruction.dataset, instruction.teacher_hash) == ("d" * 32, "h" * 64)
        assert instruction.scoreboard == str(tmp_path / ".finished-7-train")
        assert unpack_student(message.content, SHAPES)["w"].tolist() == [0.5]


def test_a_message_without_arrays_brings_no_student(tmp_path):
    run = Run(tmp_path, {1: well})
    messages = run.exchange.open("query.teach", 1, (1,), grid=run.streaming, arrays={}, info="")
    assert list(messages[0].content) == ["instruction"]


def test_the_bar_moves_by_a_client_for_each_byte_on_the_board(tmp_path):
    run, steps = Run(tmp_path, {1: well}), []
    run.open()
    run.exchange._step = SimpleNamespace(advance=steps.append)
    board = tmp_path / ".finished-1-train"
    assert board.read_bytes() == b""
    for text in (b"..", b"..", b"....."):
        board.write_bytes(text)
        run.exchange.tick()
    board.write_bytes(b"." * 30)  # who is tried again is done twice
    run.exchange.tick()
    board.unlink()
    run.exchange.tick()
    assert steps == [2, 3, 7]


# --- losses -------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [broken, silent, spoilt], ids=["fails", "is silent", "is refused"])
def test_what_a_node_loses_is_tried_again_on_another(tmp_path, bad):
    run = Run(tmp_path, {1: bad, 2: well, 3: well})
    books, _ = run.phase()
    lost = run.lists(1)[0]
    assert len(run.lists(1)) == 1  # and not on the same one
    assert books.accepted == set(CLIENTS)
    assert books.recovered == set(lost)
    assert books.lost == []
    assert all(books.tried[client][0] == 1 and books.tried[client][1] in (2, 3) for client in lost)
    assert all(len(books.tried[client]) == 1 for client in set(CLIENTS) - set(lost))
    assert len(run.hangs) == (bad is silent)
    assert sorted(run.progress.heard) == sorted(
        f"round 1: client {client} {what}; tried again"
        for client in lost
        for what in [
            {
                broken: "failed: OSError at nodes.py:1",
                silent: "late: no reply in time",
                spoilt: f"rejected: client {lost[0]} counts 1 examples; it has {size_of(lost[0])}",
            }[bad]
        ]
    )


def test_what_is_tried_again_is_shared_among_the_others(tmp_path):
    run = Run(tmp_path, {1: broken, 2: well, 3: well, 4: well}, tuple(range(40)))
    run.phase()
    counts = [sum(len(clients) for clients in run.lists(node)[1:]) for node in (2, 3, 4)]
    assert sum(counts) == 10
    assert max(counts) - min(counts) <= 1


def test_one_client_that_fails_is_tried_again_alone_and_its_neighbours_count(tmp_path):
    asked = []

    def fails_client_4_at_first(node, clients):
        asked.extend((node, clients) for client in clients if client == 4)
        return answer(clients, problems=[4] if len(asked) == 1 else [])

    run = Run(tmp_path, {1: fails_client_4_at_first, 2: fails_client_4_at_first})
    books, _ = run.phase()
    (first, together), (second, alone) = asked
    assert len(together) == 6
    assert (alone, first + second) == ((4,), 3)
    assert books.accepted == set(CLIENTS)
    assert books.recovered == {4}


def test_who_is_lost_twice_is_lost_and_named(tmp_path):
    run = Run(tmp_path, {1: lambda node, clients: answer(clients, problems=[4]), 2: kills(4)})
    books, _ = run.phase()
    assert books.lost == [4]
    assert books.accepted == set(CLIENTS) - {4}
    assert run.progress.heard[-1].startswith("round 1: client 4 failed: OS")
    assert not run.progress.heard[-1].endswith("tried again")


def test_a_single_node_gets_what_it_lost_again(tmp_path):
    calls = []

    def second_time(node, clients):
        calls.append(clients)
        return broken(node, clients) if len(calls) == 1 else answer(clients)

    run = Run(tmp_path, {1: second_time})
    books, _ = run.phase()
    assert books.accepted == set(CLIENTS)
    assert calls[0] == run.lists(1)[0]
    assert len(calls) > 2  # in several small lists


@pytest.mark.parametrize("lost", [1, 15, 16, 17, 50])
def test_lost_clients_are_tried_again_in_small_lists(tmp_path, lost):
    """So that one which kills its worker takes few with it."""
    clients = tuple(range(lost))
    run = Run(tmp_path, {1: silent}, clients)
    run.grid.nodes[2] = well
    run.exchange.misses[2] = 99
    messages = run.open(clients)
    run.exchange.misses.clear()
    books = run.exchange.collect(
        run.streaming, run.streaming.send_and_receive(messages, timeout=0.05), Summed(SHAPES, run.exchange.sizes).take
    )
    assert books.accepted == set(clients)
    lists = run.lists(2)
    assert len(lists) <= RETRY_MESSAGES
    assert max(len(one) for one in lists) == -(-lost // RETRY_MESSAGES)


def test_a_client_that_kills_its_worker_takes_nobody_with_it(tmp_path):
    run = Run(tmp_path, {1: kills(4), 2: kills(4)})
    books, _ = run.phase()
    assert books.accepted == set(CLIENTS) - {4}
    assert books.lost == [4]


def test_a_client_that_was_lost_twice_travels_alone_until_it_answers(tmp_path):
    run = Run(tmp_path, {1: kills(4), 2: kills(4)})
    run.phase()
    books, _ = run.phase()
    assert (4,) in [clients for _, _, clients in run.grid.sent]
    assert books.recovered == set()  # nobody else was lost at first
    assert books.lost == [4]
    run.grid.nodes = {1: well, 2: well}
    run.phase(kind="evaluate")  # another kind of work
    assert sorted(len(clients) for _, _, clients in run.grid.sent) == [6, 6]
    books, _ = run.phase()
    assert (4,) in [clients for _, _, clients in run.grid.sent]
    assert books.lost == []
    run.phase()
    assert sorted(len(clients) for _, _, clients in run.grid.sent) == [6, 6]


# --- answers that come too often or too late ----------------------------------------------------


@pytest.mark.parametrize("sloppy", [False, True])
def test_an_answer_that_comes_twice_counts_once(tmp_path, sloppy):
    run = Run(tmp_path, {1: lambda node, clients: [answer(clients), answer(clients)], 2: well}, sloppy=sloppy)
    books, _ = run.phase()
    once, _ = Run(tmp_path, {1: well, 2: well}).phase()
    assert books.accepted == set(CLIENTS)
    assert books.bytes_up == once.bytes_up


def test_a_grid_that_hands_over_too_much_is_put_right_and_nobody_waits_longer_than_for_the_last(tmp_path):
    """Each reply once, of the messages that were sent, and the end when all are in, however long there is."""
    run = Run(tmp_path, {1: lambda node, clients: [answer(clients), answer(clients)], 2: well, 3: broken}, sloppy=True)
    stray = run.open()
    run.streaming.grid.push_messages(stray)
    messages = run.open()
    began = time.monotonic()
    replies = list(run.streaming.send_and_receive(messages, timeout=60.0))
    assert time.monotonic() - began < 30
    assert sorted(reply.metadata.reply_to_message_id for reply in replies) == sorted(
        message.metadata.message_id for message in messages
    )
    assert list(run.streaming.send_and_receive([], timeout=60.0)) == []


def test_an_answer_that_comes_again_in_the_next_phase_is_not_counted_there(tmp_path):
    run = Run(
        tmp_path, {1: lambda node, clients: [answer(clients), Later(0.02, answer(clients))], 2: well}, sloppy=True
    )
    for _ in range(3):
        time.sleep(0.03)
        books, _ = run.phase()
        assert books.accepted == set(CLIENTS)


def test_whoever_hands_over_replies_a_question_is_answered_once(tmp_path):
    """Also without the grid that sorts replies: the exchange knows what it has asked."""
    run = Run(tmp_path, {1: well, 2: well})
    messages = run.open()
    replies = list(run.streaming.send_and_receive(messages, timeout=TIMEOUT))
    other = Run(tmp_path, {1: well}, (1, 2))
    stray = list(other.streaming.send_and_receive(other.open(), timeout=TIMEOUT))
    intake = Summed(SHAPES, run.exchange.sizes)
    run.exchange._scoreboard.touch()
    books = run.exchange.collect(run.streaming, [*stray, *replies, *replies, *stray], intake.take)
    counted_once(books, intake)
    assert books.accepted == set(CLIENTS)


@pytest.mark.parametrize("sloppy", [False, True])
def test_a_late_answer_is_not_counted_when_another_node_has_answered(tmp_path, sloppy):
    """Node 1 answers after the time is up, while node 2, slow too, works on the second chance."""
    slow = {2: lambda node, clients: Later(0.15, answer(clients))}
    run = Run(tmp_path, {1: lambda node, clients: Later(TIMEOUT + 0.05, answer(clients)), **slow}, sloppy=sloppy)
    books, _ = run.phase()
    assert books.accepted == books.recovered | set(run.lists(2)[0]) == set(CLIENTS)
    assert books.recovered == set(run.lists(1)[0])


def test_replies_nobody_waits_for_are_fetched_and_thrown_away(tmp_path):
    """Flower keeps them for ever otherwise."""
    run = Run(tmp_path, {1: lambda node, clients: Later(TIMEOUT + 0.05, answer(clients)), 2: well})
    run.phase()
    late = run.grid.messages[0].metadata.message_id
    time.sleep(0.1)
    run.grid.nodes = {1: well, 2: well}
    books, _ = run.phase()
    assert books.accepted == set(CLIENTS)
    assert late in run.grid.asked
    assert run.grid.arrived == []


def test_clients_that_never_answer_are_late(tmp_path):
    run = Run(tmp_path, {1: silent})
    began = time.monotonic()
    books, _ = run.phase()
    assert books.late == set(CLIENTS)
    assert books.missing == len(CLIENTS)
    assert time.monotonic() - began >= 2 * TIMEOUT
    assert books.losses()[0] == (0, "late: no reply in time")


# --- nodes that hang or die ---------------------------------------------------------------------


def test_the_runtime_hears_of_a_hang_once_for_each_wait_and_only_then(tmp_path):
    for nodes, hangs in (
        ({1: well, 2: well}, 0),
        ({1: broken, 2: well}, 0),
        ({1: spoilt, 2: spoilt}, 0),
        ({1: silent, 2: well}, 1),
        ({1: silent, 2: silent}, 3),  # who waited behind others is tried once more, first
    ):
        run = Run(tmp_path, nodes)
        run.phase()
        assert len(run.hangs) == hangs


@pytest.mark.parametrize("bad", [broken, silent])
def test_a_node_that_answers_nothing_in_two_phases_in_a_row_gets_no_more_work(tmp_path, bad):
    run = Run(tmp_path, {1: bad, 2: well})
    for _ in range(2):
        books, _ = run.phase()
        assert run.lists(1)
        assert books.accepted == set(CLIENTS)
    hangs = len(run.hangs)
    for _ in range(2):
        books, _ = run.phase()
        assert run.lists(1) == []
        assert books.accepted == set(CLIENTS)
    assert len(run.hangs) == hangs


def test_a_node_that_answers_in_between_goes_on_working(tmp_path):
    run = Run(tmp_path, {1: broken, 2: well})
    for node in (broken, well, broken, well, broken, broken):
        run.grid.nodes = {1: node, 2: well}
        run.phase()
        assert run.lists(1)
    run.phase()
    assert run.lists(1) == []


def test_a_node_that_only_its_client_breaks_goes_on_working(tmp_path):
    run = Run(tmp_path, {1: kills(4), 2: kills(4)})
    for _ in range(5):
        books, _ = run.phase()
        assert books.lost == [4]
        assert run.lists(1)
        assert run.lists(2)


def test_when_no_node_is_left_the_run_fails(tmp_path):
    run = Run(tmp_path, {1: broken, 2: broken})
    for _ in range(2):
        books, _ = run.phase()
        assert books.accepted == set()
    with pytest.raises(RunFailed, match="no node is left that answers"):
        run.phase()
    run.exchange.close()
    assert not list(tmp_path.glob(".finished-*"))


def test_a_node_that_is_gone_is_not_asked_and_a_new_one_is(tmp_path):
    run = Run(tmp_path, {1: well, 2: well})
    run.phase()
    run.grid.nodes = {2: well, 3: well}
    run.phase()
    assert {node for node, _, _ in run.grid.sent} == {2, 3}


# --- asking more than are needed ----------------------------------------------------------------


def test_the_first_answers_are_enough_and_nobody_waits_for_the_others(tmp_path):
    """Nodes 3 and 4 never answer: of twelve asked, six are waited for, one message each."""
    run = Run(tmp_path, {1: well, 2: well, 3: silent, 4: silent})
    books, _ = run.phase(goal=6)
    assert all(len(clients) == 1 for _, _, clients in run.grid.sent)
    assert sorted(clients[0] for _, _, clients in run.grid.sent) == list(CLIENTS)
    assert len(books.accepted) == 6
    assert books.accepted == {clients[0] for node, _, clients in run.grid.sent if node in (1, 2)}
    assert books.surplus == sorted(set(CLIENTS) - books.accepted)
    assert (books.lost, books.missing, books.recovered, run.hangs) == ([], 0, set(), [])
    assert run.progress.heard == []


def test_no_more_than_the_goal_are_counted_though_all_have_answered(tmp_path):
    run = Run(tmp_path, {1: well, 2: well, 3: well})
    books, intake = run.phase(goal=5)
    assert len(books.accepted) == len(intake.lines) == 5
    books, intake = run.phase(goal=7)  # and what is left over does not enter the next phase
    assert len(books.accepted) == len(intake.lines) == 7


def test_a_lost_client_is_not_tried_again_when_the_others_are_enough(tmp_path):
    run = Run(tmp_path, {1: broken, 2: well, 3: well})
    books, _ = run.phase(goal=8)
    assert len(run.grid.sent) == len(CLIENTS)
    assert len(books.accepted) == 8
    assert books.missing == 0


def test_when_the_first_answers_are_not_enough_the_lost_are_tried_again(tmp_path):
    run = Run(tmp_path, {1: broken, 2: well, 3: well})
    books, _ = run.phase(goal=10)
    assert len(books.accepted) == 10
    assert len(books.recovered) == 2
    assert books.missing == 0


# --- who works for whom -------------------------------------------------------------------------


def test_a_node_seen_to_be_faster_gets_more_work(tmp_path):
    clients = tuple(range(40))
    run = Run(
        tmp_path,
        {1: lambda node, chosen: answer(chosen, seconds=0.3), 2: lambda node, chosen: answer(chosen, seconds=0.1)},
        clients,
    )
    run.phase()
    assert (len(run.lists(1)[0]), len(run.lists(2)[0])) == (20, 20)
    run.phase()
    assert (len(run.lists(1)[0]), len(run.lists(2)[0])) == (10, 30)


@pytest.mark.parametrize("kind", ["evaluate", "query.teach"])
def test_only_training_tells_how_fast_a_node_is(tmp_path, kind):
    run = Run(tmp_path, {1: lambda node, chosen: answer(chosen, seconds=9.0), 2: well})
    run.phase(kind=kind)
    assert run.exchange.speeds == {}


def test_how_a_round_is_assigned_does_not_change_its_sum(tmp_path):
    found = set()
    for speeds in ({}, {1: 1.0, 2: 50.0}, {1: 9.0, 2: 1.0, 3: 4.0}):
        run = Run(tmp_path, {1: well, 2: well, 3: well})
        run.exchange.speeds = speeds
        _, intake = run.phase()
        found.add((intake.total.totals["w"].tobytes(), intake.examples))
    assert len(found) == 1


# --- waiting and stopping -----------------------------------------------------------------------


def test_a_stop_is_noticed_while_waiting(tmp_path):
    asked = []
    run = Run(tmp_path, {1: silent}, stopped=lambda: len(asked) > 3 or asked.append(1))
    with pytest.raises(Interrupted):
        run.phase()
    run.exchange.close()
    assert run.exchange.phase is None
    assert not list(tmp_path.glob(".finished-*"))
    run.exchange.close()  # twice does no harm


def test_the_run_waits_for_its_nodes(tmp_path):
    run, polls = Run(tmp_path, {1: well}), []

    def ids():
        polls.append(1)
        return [1] if len(polls) < 4 else [1, 2, 3]

    run.grid.get_node_ids = ids
    run.exchange.wait_for_nodes(run.streaming, 3)
    assert len(polls) >= 4


def test_too_few_nodes_fail_the_run_when_time_is_up(tmp_path):
    run = Run(tmp_path, {1: well})
    with pytest.raises(RunFailed, match="1 nodes came; the run waits for 2"):
        run.exchange.wait_for_nodes(run.streaming, 2)


# --- what is told -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reason", "told"),
    [
        ("ray.exceptions.ActorDiedError: The actor died unexpectedly", "its worker process died"),
        ("ActorUnavailableError: ...", "its worker process died"),
        ("WorkerCrashedError", "its worker process died"),
        (
            "An exception was raised.: <class 'ClientAppException'>:<'\\nException ClientFailed occurred. "
            "Message: OSError at worker.py:12'>",
            "OSError at worker.py:12",
        ),
        ("two\n  lines", "two lines"),
        ("x" * 5000, "x" * 120),
        ("", "no reason given"),
        (None, "no reason given"),
    ],
)
def test_a_nodes_error_is_told_in_a_few_words(tmp_path, reason, told):
    run = Run(tmp_path, {1: lambda node, clients: Error(code=1, reason=reason)}, (1,))
    books, _ = run.phase()
    assert books.failed == {1: told}


def test_a_nodes_error_cannot_play_with_the_terminal(tmp_path):
    """The reason is the node's own text, as a client's problem is."""
    run = Run(tmp_path, {1: lambda node, clients: Error(code=1, reason="\x1b[2J\x1b]0;gone\x07")}, (1,))
    run.phase()
    assert run.progress.heard
    assert all(line.isprintable() for line in run.progress.heard)


def test_a_refused_reply_is_told_in_the_words_of_the_check(tmp_path):
    run = Run(tmp_path, {1: lambda node, clients: pack_reply({}, [])}, (1,))
    books, _ = run.phase()
    assert books.rejected == {1: "client lines: not one for each client that was asked"}


@pytest.mark.parametrize("changed", [{"round": 0}, {"kind": "evaluate"}, {"run": "f" * 16}])
def test_the_answer_to_another_question_is_refused(tmp_path, changed):
    """The sum would be right in all but its place."""
    told = {"run": RUN, "round": 1, "kind": "train", **changed}
    question = SimpleNamespace(run=told["run"], round=told["round"])
    stale = Run(tmp_path, {1: lambda node, clients: mark_answer(answer(clients), question, told["kind"])}, (1,))
    books, intake = stale.phase()
    assert books.rejected == {1: "its answer is to another question"}
    assert not intake.lines
