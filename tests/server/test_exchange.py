"""Replies are folded in once each, losses tried again elsewhere, and nobody waits for nodes that do not answer."""

import json
import time
from types import SimpleNamespace

import pytest
from flwr.app import Error

from common.config import from_flat
from common.wire import mark_answer, message_bytes, pack_reply, unpack_instruction, unpack_student
from server.exchange import RETRY_MESSAGES
from server.intake import Summed
from tests.server.memory_grid import (
    CLIENTS,
    RUN,
    SHAPES,
    TIMEOUT,
    Later,
    Run,
    answer,
    broken,
    counted_once,
    inside_an_app,
    kills,
    silent,
    size_of,
    spoilt,
    well,
)


@pytest.fixture(autouse=True)
def _inside_an_app(monkeypatch):
    inside_an_app(monkeypatch)


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
    slow = {2: lambda node, clients: Later(0.6 * TIMEOUT, answer(clients))}
    run = Run(tmp_path, {1: lambda node, clients: Later(1.3 * TIMEOUT, answer(clients)), **slow}, sloppy=sloppy)
    books, _ = run.phase()
    assert books.accepted == books.recovered | set(run.lists(2)[0]) == set(CLIENTS)
    assert books.recovered == set(run.lists(1)[0])


def test_replies_nobody_waits_for_are_fetched_and_thrown_away(tmp_path):
    """Flower keeps them for ever otherwise."""
    run = Run(tmp_path, {1: lambda node, clients: Later(1.3 * TIMEOUT, answer(clients)), 2: well})
    run.phase()
    late = run.grid.messages[0].metadata.message_id
    time.sleep(0.5 * TIMEOUT)
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
