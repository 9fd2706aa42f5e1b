"""A cohort follows from (seed, round) and stable ids; nodes share its work evenly, and all of it."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from server.assignment import assign, pick_cohort

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


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 500), min_size=1, max_size=40), st.integers(1, 9))
def test_every_client_is_assigned_once_and_no_node_waits_for_long(sizes, count):
    known = dict(enumerate(sizes))
    nodes = [1000 + node for node in range(count)]
    assigned = assign(list(known), known, nodes)
    assert sorted(client for clients in assigned.values() for client in clients) == sorted(known)
    assert all(assigned.values())
    assert set(assigned) <= set(nodes)
    # the last client of the fullest node went there when it was the least loaded
    load = {node: sum(max(known[client], 1) for client in assigned.get(node, ())) for node in nodes}
    fullest = max(load, key=load.get)
    assert load[fullest] - max(known[assigned[fullest][-1]], 1) <= min(load.values())


def test_more_nodes_than_clients_leaves_nodes_out():
    assert assign([4], {4: 10}, [7, 8, 9]) == {7: (4,)}
