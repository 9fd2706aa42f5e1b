"""Which nodes get work: those that hang or die get none, the faster more; who is not needed is not waited for."""

import pytest

from common.errors import Interrupted, RunFailed
from tests.server.memory_grid import CLIENTS, Run, answer, broken, inside_an_app, kills, silent, spoilt, well


@pytest.fixture(autouse=True)
def _inside_an_app(monkeypatch):
    inside_an_app(monkeypatch)


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
