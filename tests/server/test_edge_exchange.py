"""Exchanges with clients that have a device each: silence, absence and lost messages."""

import threading
from types import SimpleNamespace

import numpy as np
import pytest
from flwr.app.error import Error
from flwr.common.constant import ErrorCode
from flwr.supercore.task_identity import TaskIdentity

from common.bundle import bundled
from common.config import from_flat
from common.tasks import text_task
from common.wire import unpack_instruction
from server import edge_exchange
from server.edge_exchange import EdgeExchange
from server.exchange import StreamingGrid
from server.intake import Summed
from tests.server.memory_grid import ARRAYS, RUN, SHAPES, Heard, Later, MemoryGrid, OwnError, answer, size_of

TIMEOUT = 3.0
HOMES = {0: 100, 1: 101, 2: 102}
AWAY = Error(code=ErrorCode.NODE_UNAVAILABLE, reason="away")


@pytest.fixture(autouse=True)
def _inside_an_app(monkeypatch):
    """Flower makes messages inside apps only."""
    for name in ("_run_id", "_node_id", "_task_id"):
        monkeypatch.setattr(TaskIdentity, name, 1)


def well(node, clients):
    return bundled(answer(clients))


def in_turn(*answers):
    """A node that answers its questions one after the other with these; functions are called."""
    left = list(answers)

    def node(node, clients):
        one = left.pop(0)
        return one(node, clients) if callable(one) else one

    return node


class Run:
    def __init__(self, folder, nodes):
        sizes = np.array([size_of(client) for client in HOMES])
        keys = {"server.round-timeout": TIMEOUT, "task": "text", "data.source": "/ours.csv", "runtime.cache": "/cache"}
        federation = SimpleNamespace(
            config=from_flat(keys),
            data=SimpleNamespace(
                train_sizes=sizes, eligible=np.arange(3), key="d" * 32,
                task=text_task(("text",), ("a", "b"), "label", False),
            ),
            teacher=SimpleNamespace(folder=folder, hash="e" * 64),
            masked=None,
            homes=HOMES,
            struck_off=set,
            tiers=SimpleNamespace(shapes={}),
            tier_of=np.zeros(3, dtype=np.int64),
            pupil=SimpleNamespace(key="s" * 32, hash="f" * 64),
        )  # fmt: skip
        self.grid, self.progress = MemoryGrid(nodes), Heard()
        self.exchange = EdgeExchange(
            federation, RUN, folder, self.progress, stopped=lambda: False, on_hang=lambda: None
        )
        exchange = self.exchange
        self.streaming = StreamingGrid(self.grid, exchange.tick, exchange.ask_again, exchange.moot)

    def phase(self):
        messages = self.exchange.open("train", 1, tuple(HOMES), grid=self.streaming, arrays=ARRAYS, info="")
        intake = Summed(SHAPES, self.exchange.sizes)
        replies = self.streaming.send_and_receive(messages, timeout=TIMEOUT)
        books = self.exchange.collect(self.streaming, replies, intake.take)
        assert sorted(line.client for line in intake.lines) == sorted(books.accepted)
        return books

    def asked(self, node):
        return sum(who == node for who, _, _ in self.grid.sent)


def test_each_client_is_asked_at_home_and_told_nothing_of_the_servers(tmp_path):
    run = Run(tmp_path, dict.fromkeys(HOMES.values(), well))
    books = run.phase()
    assert books.accepted == set(HOMES)
    assert [(node, clients) for node, _, clients in run.grid.sent] == [(100, (0,)), (101, (1,)), (102, (2,))]
    for message in run.grid.messages:
        told = unpack_instruction(message.content)
        assert (told.teacher, told.dataset, told.student, told.scoreboard, told.host) == ("",) * 5
        assert (told.teacher_hash, told.student_hash) == ("e" * 64, "f" * 64)
        assert str(tmp_path) not in str(told)
        assert "/ours.csv" not in told.config
        assert "/cache" not in told.config
        assert len(message.content["student"]) == 1  # one array travels


def test_a_lost_message_is_sent_again_and_counted_once(tmp_path, monkeypatch):
    monkeypatch.setattr(edge_exchange, "PATIENCE_SECONDS", 0.3)
    run = Run(tmp_path, {100: well, 101: well, 102: in_turn(None, None, well)})
    books = run.phase()
    assert books.accepted == set(HOMES)
    assert [run.asked(node) for node in HOMES.values()] == [1, 1, 3]
    assert books.lost == []


def test_an_answer_to_the_first_question_counts_when_it_was_only_slow(tmp_path, monkeypatch):
    monkeypatch.setattr(edge_exchange, "PATIENCE_SECONDS", 0.3)
    slow = Later(1.0, bundled(answer((2,))))
    run = Run(tmp_path, {100: well, 101: well, 102: in_turn(slow, None, None)})
    books = run.phase()
    assert books.accepted == set(HOMES)
    assert books.seconds < TIMEOUT  # what was asked again is not waited for
    assert run.asked(102) >= 2


def test_whoever_is_away_is_waited_for(tmp_path):
    run = Run(tmp_path, {100: well, 101: well, 102: in_turn(AWAY, well)})

    def nodes():  # it is seen again after a while
        return list(HOMES.values()) if back.is_set() else [100, 101]

    back = threading.Event()
    threading.Timer(0.5, back.set).start()
    run.grid.get_node_ids = nodes
    books = run.phase()
    assert books.accepted == set(HOMES)
    assert books.recovered == {2}
    assert any("waits for client 2: its device is away" in line for line in run.progress.heard)


def test_whoever_stays_away_is_lost_when_time_is_up(tmp_path):
    run = Run(tmp_path, {100: well, 101: well, 102: in_turn(AWAY)})
    run.grid.get_node_ids = lambda: [100, 101]
    books = run.phase()
    assert books.accepted == {0, 1}
    assert books.losses() == [(2, "failed: its device is away")]
    assert books.seconds >= TIMEOUT


def test_an_answer_from_another_node_is_refused(tmp_path):
    run = Run(tmp_path, dict.fromkeys(HOMES.values(), well))
    deliver = run.grid._arrive

    def forged(message, given):
        deliver(message, given)
        if message.metadata.dst_node_id == 101:
            run.grid.arrived[-1][1].metadata.__dict__["_src_node_id"] = 100

    run.grid._arrive = forged
    books = run.phase()
    assert books.accepted == {0, 2}
    assert books.losses() == [(1, "rejected: its answer came from another node")]


def test_what_is_no_bundle_is_refused(tmp_path):
    broken = bundled(answer((1,)))
    for record in broken.values():
        if "bundle" in record:
            record["bundle"].data = record["bundle"].data[:-1]
    run = Run(tmp_path, {100: well, 101: in_turn(broken, broken), 102: well})
    books = run.phase()
    assert books.accepted == {0, 2}
    assert books.losses() == [(1, "rejected: bundle: the header does not describe the bytes that came")]


def test_an_error_while_the_same_question_is_on_its_way_again_is_no_loss(tmp_path, monkeypatch):
    monkeypatch.setattr(edge_exchange, "PATIENCE_SECONDS", 0.3)
    stopped = Later(0.6, Error(code=ErrorCode.CLIENT_APP_CRASHED, reason="ClientApp stopped responding."))
    slow = Later(1.0, bundled(answer((2,))))
    run = Run(tmp_path, {100: well, 101: well, 102: in_turn(stopped, slow, None, None)})
    books = run.phase()
    assert books.accepted == set(HOMES)
    assert (books.failed, books.recovered) == ({}, set())


def test_a_client_that_calls_itself_away_has_failed(tmp_path):
    """Only the SuperLink's word is believed: whoever is there and says so would be waited for without end."""
    itself = OwnError(code=ErrorCode.NODE_UNAVAILABLE, reason="away")
    run = Run(tmp_path, {100: well, 101: well, 102: lambda node, clients: itself})
    books = run.phase()
    assert books.accepted == {0, 1}
    assert set(books.failed) == {2}
    assert books.seconds < TIMEOUT


def test_a_node_that_dies_of_its_work_each_time_is_given_up_when_time_is_over(tmp_path):
    run = Run(tmp_path, {100: well, 101: well, 102: lambda node, clients: AWAY})
    books = run.phase()
    assert books.accepted == {0, 1}
    assert TIMEOUT <= books.seconds < 10 * TIMEOUT


def test_an_error_alone_gets_another_chance(tmp_path):
    crashed = Error(code=ErrorCode.CLIENT_APP_CRASHED, reason="ClientApp stopped responding.")
    run = Run(tmp_path, {100: well, 101: in_turn(crashed, crashed), 102: in_turn(crashed, well)})
    books = run.phase()
    assert books.accepted == {0, 2}
    assert books.losses() == [(1, "failed: ClientApp stopped responding.")]


def test_whoever_is_struck_off_meanwhile_is_not_waited_for(tmp_path):
    run = Run(tmp_path, {100: well, 101: well, 102: in_turn(AWAY)})
    run.grid.get_node_ids = lambda: [100, 101]
    run.exchange.federation.struck_off = lambda: {2, 9}
    books = run.phase()
    assert books.accepted == {0, 1}
    assert books.losses() == [(2, "failed: it may not take part any more")]
    assert books.seconds < TIMEOUT
