"""Sums of weighted updates: exact, independent of order and grouping, refusing what cannot be added."""

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.fixed_point import BLOCK, CLIENT_LIMIT, LIMIT, ExactSum, NotFinite, Rows, add_into, largest_of, mean

updates = st.lists(st.floats(-100.0, 100.0, width=32), min_size=3, max_size=3)
clients = st.lists(st.tuples(updates, st.integers(1, 100_000)), min_size=1, max_size=12)


def encode(values, weight):
    """The sum of one client's update alone."""
    array = np.asarray(values, dtype=np.float32)
    alone = ExactSum({"w": array.shape})
    alone.add({"w": array}, weight)
    return alone.totals["w"]


def encoded(clients):
    return [encode(values, weight) for values, weight in clients]


def summed(clients):
    """The clients one after the other in one sum."""
    result = ExactSum({"w": (3,)})
    for values, weight in clients:
        result.add({"w": np.asarray(values, dtype=np.float32)}, weight)
    return result.totals["w"]


def total(parts):
    result = np.zeros(3, dtype=np.int64)
    for part in parts:
        add_into(result, part)
    return result


@settings(max_examples=150)
@given(clients, st.randoms(use_true_random=False))
def test_any_order_and_grouping_of_clients_gives_the_same_bits(clients, random):
    parts = encoded(clients)
    expected = total(parts).tobytes()
    assert summed(clients).tobytes() == expected
    random.shuffle(clients)
    cut = random.randint(0, len(parts))
    assert summed(clients).tobytes() == expected
    assert total([summed(clients[:cut]), summed(clients[cut:])]).tobytes() == expected
    random.shuffle(parts)
    assert total(parts).tobytes() == expected
    assert total([total(parts[:cut]), total(parts[cut:])]).tobytes() == expected


@settings(max_examples=150)
@given(clients)
def test_a_sum_is_the_rational_one_within_half_a_step_per_client(clients):
    for found in (total(encoded(clients)), summed(clients)):
        for place in range(3):
            exact = sum(Fraction(float(np.float32(values[place]))) * weight for values, weight in clients)
            assert abs(Fraction(int(found[place]), 2**32) - exact) <= Fraction(len(clients), 2**33)


def test_hand_case():
    assert encode([1.0, -0.5, 2.0**-33, 3 * 2.0**-33], 1).tolist() == [
        2**32,
        -(2**31),
        0,  # halves go to the even neighbour
        2,
    ]
    assert encode([0.25], 12).tolist() == [3 * 2**32]
    assert mean(np.array([3 * 2**32, -(2**31)]), 12).tolist() == [0.25, -1 / 24]


def test_a_client_is_rounded_once_however_many_are_in_the_sum_before_it():
    """Three times a third of a step: each rounds to nothing, and together they stay nothing."""
    assert summed([([2.0**-34, -(2.0**-34), 0.0], 1)] * 3).tolist() == [0, 0, 0]
    assert summed([([2.0**-34, -(2.0**-34), 0.0], 3)]).tolist() == [1, -1, 0]


@pytest.mark.parametrize("size", [1, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK + 7])
def test_an_array_of_any_length_is_summed_entry_by_entry(size):
    rng = np.random.default_rng(size)
    first, second = rng.normal(size=(2, size)).astype(np.float32)
    result = ExactSum({"w": (size,)})
    result.add({"w": first}, 7)
    result.add({"w": second}, 1009)
    exact = [np.rint(array.astype(np.float64) * weight * 2.0**32) for array, weight in ((first, 7), (second, 1009))]
    np.testing.assert_array_equal(result.totals["w"], sum(array.astype(np.int64) for array in exact))


def test_an_array_in_another_memory_order_is_the_same_array():
    array = np.random.default_rng(0).normal(size=(300, 200)).astype(np.float32)
    strided = np.repeat(array, 2, axis=1)[:, ::2]
    for other in (np.asfortranarray(array), array.T.copy().T, strided):
        assert not other.flags.c_contiguous
        assert encode(other, 5).tobytes() == encode(array, 5).tobytes()
    assert encode(np.float32(0.5), 2).shape == ()
    assert encode(np.float32(0.5), 2) == 2**32


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e30, -1e30, 2.0**30])
def test_what_cannot_be_added_is_refused_without_its_value(bad):
    with pytest.raises(NotFinite) as caught:
        encode([0.0, bad], 1)
    assert not any(digit in str(caught.value) for digit in "0123456789")


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e30])
@pytest.mark.parametrize("name", ["a", "b", "c"])
@pytest.mark.parametrize("place", [0, 1, 2])
def test_one_bad_value_anywhere_refuses_the_update_and_nothing_of_it_is_added(name, place, bad):
    shapes = dict.fromkeys("abc", (3,))
    result = ExactSum(shapes)
    good = {each: np.array([1.0, -2.0, 0.5], dtype=np.float32) for each in shapes}
    result.add(good, 2)
    spoilt = {each: array.copy() for each, array in good.items()}
    spoilt[name][place] = bad
    with pytest.raises(NotFinite):
        result.add(spoilt, 2)
    assert all(total.tolist() == [2 * 2**32, -4 * 2**32, 2**32] for total in result.totals.values())
    result.add(good, 2)
    assert result.totals["c"].tolist() == [4 * 2**32, -8 * 2**32, 2 * 2**32]


def test_the_limit_of_a_client_counts_after_weighting_and_whoever_is_in_the_sum():
    assert encode([1024.0], 2**13)[0] == 2**55 < CLIENT_LIMIT
    for others in (0, 5):
        result = ExactSum({"w": (1,)})
        for _ in range(others):
            result.add({"w": np.array([1024.0], dtype=np.float32)}, 2**13)
        with pytest.raises(NotFinite):
            result.add({"w": np.array([1024.0], dtype=np.float32)}, 2**14)


def test_a_sum_that_could_leave_the_limit_takes_no_more():
    """127 times 2^55 is below 2^62; once more would reach it, whichever way it points."""
    result = ExactSum({"w": (2,)})
    for _ in range(127):
        result.add({"w": np.array([1024.0, 0.0], dtype=np.float32)}, 2**13)
    for value in (1024.0, -1024.0):
        with pytest.raises(NotFinite):
            result.add({"w": np.array([0.0, value], dtype=np.float32)}, 2**13)
    result.add({"w": np.array([0.0, 1.0], dtype=np.float32)}, 1)
    assert result.totals["w"].tolist() == [127 * 2**55, 2**32]
    assert LIMIT == 2**62


# --- arrays of which only some rows are not zero ------------------------------------------------


def some_rows(seed, count=3, length=8):
    rng = np.random.default_rng(seed)
    index = np.sort(rng.choice(length, count, replace=False))
    return Rows(index.astype(np.int64), rng.normal(size=(count, 2)).astype(np.float32))


def dense(total):
    return total.dense((8, 2)) if isinstance(total, Rows) else total


def test_some_rows_add_up_as_the_whole_array_would():
    rows, whole = ExactSum({"w": (8, 2)}), ExactSum({"w": (8, 2)})
    for seed in range(5):
        part = some_rows(seed)
        rows.add({"w": part}, seed + 1)
        whole.add({"w": part.dense((8, 2))}, seed + 1)
    assert rows.totals["w"].tobytes() == whole.totals["w"].tobytes()
    assert isinstance(rows.compact["w"], Rows)
    assert dense(rows.compact["w"]).tobytes() == whole.totals["w"].tobytes()
    assert whole.compact["w"].tobytes() == whole.totals["w"].tobytes()


def test_a_compact_sum_holds_the_rows_that_were_added_ascending():
    result = ExactSum({"w": (8, 2), "b": (2,)})
    bias = np.ones(2, dtype=np.float32)
    for index in ([6, 7], [1, 6], []):
        rows = Rows(np.array(index, dtype=np.int64), np.ones((len(index), 2), dtype=np.float32))
        result.add({"w": rows, "b": bias}, 1)
    assert result.compact["w"].index.tolist() == [1, 6, 7]
    assert (result.compact["w"].values / 2**32).tolist() == [[1, 1], [2, 2], [1, 1]]
    assert (result.compact["b"] / 2**32).tolist() == [3, 3]


@pytest.mark.parametrize("rows_first", [True, False])
def test_rows_and_whole_arrays_can_be_added_to_one_sum(rows_first):
    part, whole = {"w": some_rows(0)}, {"w": np.ones((8, 2), dtype=np.float32)}
    result = ExactSum({"w": (8, 2)})
    for update in (part, whole) if rows_first else (whole, part):
        result.add(update, 1)
    assert dense(result.compact["w"]).tobytes() == result.totals["w"].tobytes()


@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e30])
def test_rows_with_a_bad_value_are_refused_and_leave_no_trace(bad):
    result = ExactSum({"w": (8, 2)})
    good, spoilt = some_rows(1), some_rows(2)
    spoilt.values[2, 1] = bad
    result.add({"w": good}, 3)
    with pytest.raises(NotFinite):
        result.add({"w": spoilt}, 3)
    assert result.compact["w"].index.tolist() == good.index.tolist()
    assert dense(result.compact["w"]).tobytes() == result.totals["w"].tobytes()


def test_the_largest_magnitude_of_integers():
    for values, largest in (([], 0), ([0], 0), ([-5, 3], 5), ([2**63 - 1], 2**63 - 1), ([-(2**63), 1], 2**63)):
        assert largest_of(np.array(values, dtype=np.int64)) == largest


# --- the ends of the range ----------------------------------------------------------------------


@pytest.mark.parametrize("sign", [1, -1])
def test_an_overflow_raises_instead_of_wrapping(sign):
    part = np.array([0, sign * (2**62 - 1)], dtype=np.int64)
    result = np.zeros(2, dtype=np.int64)
    add_into(result, part)
    add_into(result, part)
    assert result[1] == sign * (2**63 - 2)
    with pytest.raises(OverflowError):
        add_into(result, part)
    assert result[1] == sign * (2**63 - 2)


def test_the_last_values_of_the_range_are_sums():
    for end in (2**63 - 1, -(2**63)):
        result = np.array([end - np.sign(end)], dtype=np.int64)
        add_into(result, np.array([np.sign(end)], dtype=np.int64))
        assert result[0] == end


@pytest.mark.parametrize("weight", [0, -3])
def test_a_mean_needs_a_positive_weight(weight):
    with pytest.raises(ValueError, match=f"total weight is {weight}"):
        mean(np.zeros(1, dtype=np.int64), weight)


def test_nothing_sums_to_nothing():
    assert encode(np.zeros((0, 3)), 5).shape == (0, 3)
    assert encode(np.zeros((2, 2)), 5).tolist() == [[0, 0], [0, 0]]
    nothing = ExactSum({})
    nothing.add({}, 5)
    assert nothing.totals == {}
