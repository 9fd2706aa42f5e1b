"""The books of an exchange: every client is asked, and is accepted, lost or not waited for, and that once."""

import pytest

from common.wire import NOT_FINITE, ClientLine
from server.phase import Phase

HERE, THERE = 100, 200


def line(client, seconds=1.0, problem=""):
    return ClientLine(client, 0 if problem else 9, seconds, problem=problem)


def phase(*clients, goal=None, kind="train"):
    return Phase(kind, 3, clients, len(clients) if goal is None else goal)


def kinds(books):
    """What became of whom."""
    return {
        "accepted": sorted(books.accepted),
        "failed": sorted(books.failed),
        "rejected": sorted(books.rejected),
        "late": sorted(books.late),
        "surplus": books.surplus,
    }


def nobody(**others):
    return {"accepted": [], "failed": [], "rejected": [], "late": [], "surplus": []} | others


def test_before_any_answer_everyone_is_open_and_nobody_lost():
    books = phase(1, 4, 9)
    assert kinds(books) == nobody(surplus=[1, 4, 9])
    assert (books.lost, books.missing, books.reached) == ([], 3, False)


def test_an_answer_is_accepted_client_by_client():
    books = phase(1, 4, 9)
    books.accept(HERE, [line(1), line(4, problem="OSError"), line(9, problem=NOT_FINITE)], {})
    assert kinds(books) == nobody(accepted=[1], failed=[4], rejected=[9])
    assert books.losses() == [(4, "failed: OSError"), (9, f"rejected: {NOT_FINITE}")]
    assert (books.lost, books.missing, books.reached) == ([4, 9], 2, False)


def test_an_update_that_the_server_does_not_take_is_rejected_though_its_line_is_good():
    books = phase(1, 4)
    books.accept(HERE, [line(1), line(4)], {4: "client 4 counts 8 examples; it has 9"})
    assert kinds(books) == nobody(accepted=[1], rejected=[4])
    assert books.losses() == [(4, "rejected: client 4 counts 8 examples; it has 9")]


def test_each_way_to_be_lost_says_why():
    books = phase(1, 2, 3, 4)
    books.fail([4, 2], "its worker process died")
    books.reject([3], "unexpected records: 1")
    books.give_up([1])
    assert kinds(books) == nobody(failed=[2, 4], rejected=[3], late=[1])
    assert books.lost == [1, 2, 3, 4]
    assert books.losses() == [
        (1, "late: no reply in time"),
        (2, "failed: its worker process died"),
        (3, "rejected: unexpected records: 1"),
        (4, "failed: its worker process died"),
    ]
    assert books.faults() == {"failed": [2, 4], "rejected": [3], "late": [1]}


def test_a_client_is_lost_in_one_way_the_last():
    books = phase(7)
    for change, kind in (
        (lambda: books.fail([7], "a"), "failed"),
        (lambda: books.reject([7], "b"), "rejected"),
        (lambda: books.give_up([7]), "late"),
        (lambda: books.fail([7], "c"), "failed"),
        (lambda: books.give_up([7]), "late"),
        (lambda: books.accept(HERE, [line(7, problem="OSError")], {}), "failed"),
        (lambda: books.accept(HERE, [line(7)], {7: "wrong"}), "rejected"),
    ):
        change()
        assert kinds(books) == nobody(**{kind: [7]})
        assert len(books.losses()) == 1


@pytest.mark.parametrize("lose", ["fail", "reject", "give_up"])
def test_a_client_that_answers_after_all_is_recovered_and_no_longer_lost(lose):
    books = phase(1, 2)
    {
        "fail": lambda: books.fail([1], "x"),
        "reject": lambda: books.reject([1], "x"),
        "give_up": lambda: books.give_up([1]),
    }[lose]()
    assert books.lost == [1]
    books.accept(THERE, [line(1), line(2)], {})
    assert kinds(books) == nobody(accepted=[1, 2])
    assert books.recovered == {1}
    assert (books.lost, books.losses(), books.missing, books.reached) == ([], [], 0, True)


def test_who_is_lost_again_is_not_recovered():
    books = phase(1)
    books.fail([1], "first")
    books.accept(THERE, [line(1, problem="second")], {})
    assert books.recovered == set()
    assert books.losses() == [(1, "failed: second")]


def test_a_second_answer_of_a_client_does_not_count_twice():
    books = phase(1, 2, goal=2)
    books.accept(HERE, [line(1)], {})
    books.accept(THERE, [line(1)], {})
    assert kinds(books) == nobody(accepted=[1], surplus=[2])
    assert (books.missing, books.reached, books.recovered) == (1, False, set())


def test_the_goal_is_reached_by_the_first_answers_and_the_others_are_surplus():
    books = phase(1, 2, 3, 4, 5, goal=2)
    books.accept(HERE, [line(4)], {})
    books.fail([1], "x")
    assert (books.reached, books.missing) == (False, 1)
    books.accept(THERE, [line(2)], {})
    assert (books.reached, books.missing) == (True, 0)
    assert kinds(books) == nobody(accepted=[2, 4], failed=[1], surplus=[3, 5])
    assert books.costs()["surplus"] == [3, 5]


def test_more_answers_than_the_goal_miss_nobody():
    books = phase(1, 2, 3, goal=2)
    books.accept(HERE, [line(1), line(2), line(3)], {})
    assert (books.reached, books.missing, books.surplus) == (True, 0, [])


def test_lost_clients_count_against_the_goal_not_against_all_that_were_asked():
    books = phase(*range(10), goal=6)
    books.fail(list(range(6)), "x")
    books.accept(HERE, [line(client) for client in range(6, 10)], {})
    assert books.missing == 2
    assert len(books.lost) == 6


def test_costs_name_the_round_and_how_busy_each_node_was():
    books = phase(1, 2, 3, kind="query.teach")
    books.accept(HERE, [line(1, 3.0), line(2, 1.0)], {})
    books.accept(THERE, [line(3, 1.0, problem="OSError")], {})
    books.began, books.ended = 50.0, 60.0
    books.bytes_up, books.bytes_down = 5, 7
    assert books.costs() == {
        "round": 3, "phase": "teach", "seconds": 10.0, "bytes_up": 5, "bytes_down": 7, "busy": [0.1, 0.4],
        "recovered": [], "surplus": [],
    }  # fmt: skip


def test_an_open_phase_has_lasted_until_now():
    books = phase(1)
    first = books.seconds
    assert 0 <= first <= books.seconds < 60
