"""A cohort follows from (seed, round) and stable ids; nodes share its work evenly, and all of it."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from server.assignment import FIXED_EXAMPLES, assign, pick_cohort

ELIGIBLE = np.array([0, 2, 3, 5, 8, 13, 21, 34, 55, 89])


def test_a_cohort_follows_from_seed_and_round():
    first = [pick_cohort(ELIGIBLE, 4, 0, number) for number in range(1, 30)]
    assert first == [pick_cohort(ELIGIBLE, 4, 0, number) for number in range(1, 30)]
    assert len(set(first)) > 20
    assert first != [pick_cohort(ELIGIBLE, 4, 1, number) for number in range(1, 30)]


def test_a_cohort_has_its_size_and_only_eligible_clients_once():
    for number in range(50):
        cohort = pick_cohort(ELIGIBLE, 4, 0, number)
        assert len(set(cohort)) == 4
        assert set(cohort) <= set(ELIGIBLE.tolist())
        assert list(cohort) == sorted(cohort)
        assert all(type(client) is int for client in cohort)


def test_every_client_is_drawn_as_often():
    drawn = [client for number in range(2000) for client in pick_cohort(ELIGIBLE, 3, 0, number)]
    counts = np.array([drawn.count(client) for client in ELIGIBLE])
    assert np.abs(counts - 600).max() < 5 * np.sqrt(2000 * 0.3 * 0.7)


def test_no_size_and_a_size_beyond_all_mean_everyone():
    for size in (0, 10, 99):
        assert pick_cohort(ELIGIBLE, size, 0, 1) == tuple(ELIGIBLE.tolist())


def test_the_largest_clients_go_first_to_the_least_loaded_node():
    sizes = {1: 7, 2: 5, 3: 4, 4: 3, 5: 3}
    assert assign([5, 3, 1, 4, 2], sizes, [100, 200]) == {100: (1, 4), 200: (2, 3, 5)}


@settings(max_examples=200)
@given(st.lists(st.integers(0, 500), min_size=1, max_size=40), st.integers(1, 9))
def test_every_client_is_assigned_once_and_no_node_waits_for_long(sizes, count):
    known = dict(enumerate(sizes))
    nodes = [1000 + node for node in range(count)]
    assigned = assign(list(known), known, nodes)
    assert sorted(client for clients in assigned.values() for client in clients) == sorted(known)
    assert all(assigned.values())
    assert set(assigned) <= set(nodes)
    # the last client of the fullest node went there when it was the least loaded
    load = {node: sum(known[client] + FIXED_EXAMPLES for client in assigned.get(node, ())) for node in nodes}
    fullest = max(load, key=load.get)
    assert load[fullest] - (known[assigned[fullest][-1]] + FIXED_EXAMPLES) <= min(load.values())


def test_more_nodes_than_clients_leaves_nodes_out():
    assert assign([4], {4: 10}, [7, 8, 9]) == {7: (4,)}


def test_many_small_clients_weigh_as_much_as_their_number():
    """A client costs FIXED_EXAMPLES besides its own: 20 of one example are 180, as much as one of 172."""
    sizes = {0: 172, **dict.fromkeys(range(1, 21), 1)}
    assert assign(list(sizes), sizes, [7, 8]) == {7: (0,), 8: tuple(range(1, 21))}


def test_a_node_that_is_three_times_as_fast_gets_three_times_the_work():
    sizes = dict.fromkeys(range(40), 92)
    lists = assign(list(sizes), sizes, [1, 2], {1: 50.0, 2: 150.0})
    assert (len(lists[1]), len(lists[2])) == (10, 30)


def test_a_node_that_was_never_seen_at_work_counts_as_average():
    """Of the nodes that are there: 100 and 300 examples a second make 200; node 9 is gone."""
    sizes = dict.fromkeys(range(60), 92)
    lists = assign(list(sizes), sizes, [1, 2, 3], {1: 100.0, 2: 300.0, 9: 1e9})
    assert {node: len(clients) for node, clients in lists.items()} == {1: 10, 2: 30, 3: 20}


@settings(max_examples=200)
@given(
    st.lists(st.integers(0, 500), min_size=1, max_size=30),
    st.lists(st.none() | st.floats(1.0, 1000.0), min_size=1, max_size=6),
)
def test_with_speeds_too_every_client_is_assigned_once_and_no_node_waits_for_long(sizes, speeds):
    known = dict(enumerate(sizes))
    observed = {node: speed for node, speed in enumerate(speeds) if speed is not None}
    assigned = assign(list(known), known, list(range(len(speeds))), observed)
    assert sorted(client for clients in assigned.values() for client in clients) == sorted(known)
    usual = sum(observed.values()) / len(observed) if observed else 1.0
    pace = [observed.get(node, usual) for node in range(len(speeds))]
    done = [sum(known[c] + FIXED_EXAMPLES for c in assigned.get(node, ())) / pace[node] for node in range(len(speeds))]
    last = max(range(len(speeds)), key=done.__getitem__)
    work = known[assigned[last][-1]] + FIXED_EXAMPLES
    # moved to any other node, the last client of the latest would not have been done sooner
    assert all(done[node] + work / pace[node] >= done[last] * (1 - 1e-9) for node in range(len(speeds)))


def test_over_selection_asks_for_more_and_for_no_more_than_there_are():
    for number in range(30):
        cohort = pick_cohort(ELIGIBLE, 4, 0, number, over_select=1.5)
        assert len(set(cohort)) == 6
        assert list(cohort) == sorted(cohort)
        assert set(cohort) <= set(ELIGIBLE.tolist())
    assert pick_cohort(ELIGIBLE, 6, 0, 1, over_select=10.0) == tuple(ELIGIBLE.tolist())
    assert pick_cohort(ELIGIBLE, 0, 0, 1, over_select=2.0) == tuple(ELIGIBLE.tolist())
    assert pick_cohort(ELIGIBLE, 4, 0, 1, over_select=1.0) == pick_cohort(ELIGIBLE, 4, 0, 1)


@pytest.mark.parametrize(
    ("size", "share", "asked"),
    [(10, 1.1, 11), (20, 1.1, 22), (100, 1.1, 110), (50, 1.14, 57), (10, 1.25, 13), (3, 1.1, 4), (1, 1.01, 2)],
)
def test_over_selection_asks_that_many_times_the_cohort_rounded_up(size, share, asked):
    assert len(pick_cohort(np.arange(1000), size, 0, 1, share)) == asked
