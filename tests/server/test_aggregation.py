"""FedAvg from a running integer sum: the weighted average, the same for any order, and nothing wrong let in."""

import copy
from itertools import permutations

import numpy as np
import pytest

from common.config import from_flat
from common.fixed_point import ExactSum, Rows, add_into, mean
from common.wire import ClientLine
from server.aggregation import Rejected, RunningSum, check_count
from server.rules import fedavg

SHAPES = {"a": (2, 3), "b": (4,)}


def line(client, examples, problem=""):
    return ClientLine(client, examples, 0.1, problem=problem)


def updates(count, seed=0):
    rng = np.random.default_rng(seed)
    return [{name: rng.normal(size=shape).astype(np.float32) for name, shape in SHAPES.items()} for _ in range(count)]


def part(update, weight):
    """What a node sends for one client."""
    alone = ExactSum({name: array.shape for name, array in update.items()})
    alone.add({name: array.astype(np.float32) for name, array in update.items()}, weight)
    return alone.totals


def step(start, total, lr):
    """The next weights: along the mean update."""
    update = {name: mean(array, total.weight) for name, array in total.totals.items()}
    return fedavg(start, update, {}, from_flat({"server.lr": lr}).server)


def test_hand_case():
    total = RunningSum.zeros({"w": (2,)})
    total.fold(part({"w": np.array([1.0, 0.0])}, 30), [line(0, 30)], {0: 30})
    total.fold(part({"w": np.array([-1.0, 0.5])}, 10), [line(1, 10)], {1: 10})
    start = {"w": np.array([10.0, 20.0], dtype=np.float32)}
    assert step(start, total, 1.0)["w"].tolist() == [10.5, 20.125]
    assert step(start, total, 0.5)["w"].tolist() == [10.25, 20.0625]


def test_fedavg_is_the_weighted_average_of_the_clients_models():
    changes, weights = updates(7), [3, 11, 200, 1, 57, 8, 1000]
    start = updates(1, seed=1)[0]
    total = RunningSum.zeros(SHAPES)
    for client, (update, weight) in enumerate(zip(changes, weights, strict=True)):
        total.fold(part(update, weight), [line(client, weight)], {client: weight})
    found = step(start, total, 1.0)
    for name in SHAPES:
        models = [start[name].astype(np.float64) + update[name] for update in changes]
        np.testing.assert_allclose(found[name], np.average(models, axis=0, weights=weights), atol=1e-6)
        assert found[name].dtype == np.float32
    assert total.weight == sum(weights)


def test_replies_in_any_order_and_packing_give_the_same_bits():
    changes, sizes = updates(4), {0: 5, 1: 17, 2: 3, 3: 101}
    parts = [part(update, sizes[client]) for client, update in enumerate(changes)]
    lines = [line(client, size) for client, size in sizes.items()]
    found = set()
    for order in permutations(range(4)):
        total = RunningSum.zeros(SHAPES)
        for client in order:
            total.fold(parts[client], [lines[client]], sizes)
        found.add(step(changes[0], total, 1.0)["a"].tobytes())
    packed = {name: parts[2][name].copy() for name in SHAPES}
    for name in SHAPES:
        add_into(packed[name], parts[0][name])
        add_into(packed[name], parts[3][name])
    total = RunningSum.zeros(SHAPES)
    total.fold(parts[1], [lines[1]], sizes)
    total.fold(packed, [lines[2], lines[0], lines[3]], sizes)
    found.add(step(changes[0], total, 1.0)["a"].tobytes())
    assert len(found) == 1
    assert total.weight == 126
    assert sorted(each.client for each in total.lines) == [0, 1, 2, 3]


@pytest.mark.parametrize("examples", [0, -4, 3, 5, 2**40])
def test_a_count_that_is_not_the_known_one_is_refused_and_changes_nothing(examples):
    total = RunningSum.zeros(SHAPES)
    total.fold(part(updates(1)[0], 9), [line(7, 9)], {7: 9})
    before = copy.deepcopy(total)
    lines = [line(0, 6), line(1, examples), line(2, 0, "ValueError")]
    with pytest.raises(Rejected, match=f"client 1 counts {examples} examples; it has 4"):
        total.fold(part(updates(1)[0], 10), lines, {0: 6, 1: 4, 2: 5})
    assert all((total.totals[name] == before.totals[name]).all() for name in SHAPES)
    assert (total.weight, total.lines) == (before.weight, before.lines)


@pytest.mark.parametrize("examples", [0, -4, 3, 5, 2**40])
def test_a_count_is_checked_for_one_client_as_for_many(examples):
    check_count(line(1, 4), {1: 4})
    with pytest.raises(Rejected, match=f"client 1 counts {examples} examples; it has 4"):
        check_count(line(1, examples), {1: 4})


def test_a_client_with_no_examples_to_train_on_has_no_say():
    with pytest.raises(Rejected):
        RunningSum.zeros(SHAPES).fold(part(updates(1)[0], 1), [line(0, 0)], {0: 0})


def test_clients_with_a_problem_weigh_nothing():
    total = RunningSum.zeros(SHAPES)
    total.fold(part(updates(1)[0], 6), [line(0, 6), line(1, 0, "update is not finite")], {0: 6, 1: 4})
    assert (total.weight, [each.client for each in total.lines]) == (6, [0])


def test_a_reply_in_which_everybody_has_a_problem_adds_nothing():
    total = RunningSum.zeros(SHAPES)
    total.fold(part(updates(1)[0], 6), [line(1, 0, "OSError")], {1: 4})
    assert not total.totals["a"].any()
    assert total.weight == 0
    with pytest.raises(ValueError, match="total weight is 0"):
        step(updates(1)[0], total, 1.0)


def test_a_sum_that_would_overflow_is_refused_and_leaves_no_trace():
    total = RunningSum.zeros({"a": (2,), "b": (2,)})
    for huge in (2**56, -(2**56), 2**62, 2**63 - 1, -(2**63)):
        with pytest.raises(Rejected, match="b: a value is too large"):
            total.fold({"a": np.ones(2, np.int64), "b": np.array([huge, 0])}, [line(0, 5)], {0: 5})
    big = {"a": np.ones(2, np.int64), "b": np.array([2**62 - 2**10, 0])}
    together, sizes = [line(client, 5) for client in range(64)], dict.fromkeys(range(64), 5)
    total.fold(big, together, sizes)
    total.fold(big, together, sizes)
    with pytest.raises(Rejected, match="b: a value is too large"):
        total.fold(big, together, sizes)
    assert total.totals["a"].tolist() == [2, 2]
    assert total.weight == 640


def test_whoever_sends_the_largest_numbers_shuts_nobody_out():
    total, most = RunningSum.zeros({"b": (1,)}), 2**56 - 1
    for client in range(100):
        total.fold({"b": np.array([most])}, [line(client, 5)], {client: 5})
    total.fold({"b": np.array([7])}, [line(100, 5)], {100: 5})
    assert total.totals["b"].tolist() == [100 * most + 7]


def test_rows_of_an_array_are_added_as_the_whole_would_be():
    shapes, sizes = {"words": (5, 2), "b": (1,)}, {0: 3, 1: 4}
    rows, whole = RunningSum.zeros(shapes), RunningSum.zeros(shapes)
    for client, index in ((0, [0, 3]), (1, [3, 4])):
        part = Rows(np.array(index), np.array([[1, -2], [3, 4]]))
        bias = np.array([client])
        rows.fold({"words": part, "b": bias}, [line(client, sizes[client])], sizes)
        whole.fold({"words": part.dense((5, 2)), "b": bias}, [line(client, sizes[client])], sizes)
    assert rows.totals["words"].tolist() == whole.totals["words"].tolist()
    assert rows.totals["words"].tolist() == [[1, -2], [0, 0], [0, 0], [4, 2], [3, 4]]
    huge = Rows(np.array([2]), np.array([[2**62, 0]]))
    with pytest.raises(Rejected, match="words: a value is too large"):
        rows.fold({"words": huge, "b": np.array([1])}, [line(0, 3)], sizes)
    assert rows.totals["b"].tolist() == [1]
