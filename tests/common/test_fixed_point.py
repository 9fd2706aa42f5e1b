"""Sums of encoded updates: exact, independent of order and grouping, refusing what cannot be added."""

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.fixed_point import LIMIT, NotFinite, add_into, encode, mean

updates = st.lists(st.floats(-100.0, 100.0, width=32), min_size=3, max_size=3)
clients = st.lists(st.tuples(updates, st.integers(1, 100_000)), min_size=1, max_size=12)


def encoded(clients):
    return [encode(np.asarray(values, dtype=np.float32), weight) for values, weight in clients]


def total(parts):
    result = np.zeros(3, dtype=np.int64)
    for part in parts:
        add_into(result, part)
    return result


@settings(max_examples=150, deadline=None)
@given(clients, st.randoms(use_true_random=False))
def test_any_order_and_grouping_of_clients_gives_the_same_bits(clients, random):
    parts = encoded(clients)
    expected = total(parts).tobytes()
    random.shuffle(parts)
    cut = random.randint(0, len(parts))
    assert total(parts).tobytes() == expected
    assert total([total(parts[:cut]), total(parts[cut:])]).tobytes() == expected


@settings(max_examples=150, deadline=None)
@given(clients)
def test_a_sum_is_the_rational_one_within_half_a_step_per_client(clients):
    found = total(encoded(clients))
    for place in range(3):
        exact = sum(Fraction(float(np.float32(values[place]))) * weight for values, weight in clients)
        assert abs(Fraction(int(found[place]), 2**32) - exact) <= Fraction(len(clients), 2**33)


def test_hand_case():
    assert encode(np.array([1.0, -0.5, 2.0**-33, 3 * 2.0**-33], dtype=np.float32), 1).tolist() == [
        2**32,
        -(2**31),
        0,  # halves go to the even neighbour
        2,
    ]
    assert encode(np.array([0.25], dtype=np.float32), 12).tolist() == [3 * 2**32]
    assert mean(np.array([3 * 2**32, -(2**31)]), 12).tolist() == [0.25, -1 / 24]


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e30, -1e30, 2.0**30])
def test_what_cannot_be_added_is_refused_without_its_value(bad):
    with pytest.raises(NotFinite) as caught:
        encode(np.array([0.0, bad], dtype=np.float32), 1)
    assert not any(digit in str(caught.value) for digit in "0123456789")


def test_the_limit_counts_after_weighting():
    assert encode(np.array([1024.0], dtype=np.float32), 2**19)[0] == 2**61 < LIMIT
    with pytest.raises(NotFinite):
        encode(np.array([1024.0], dtype=np.float32), 2**20)


@pytest.mark.parametrize("sign", [1, -1])
def test_an_overflow_raises_instead_of_wrapping(sign):
    part = np.array([0, sign * (2**62 - 1)], dtype=np.int64)
    result = np.zeros(2, dtype=np.int64)
    add_into(result, part)
    add_into(result, part)
    assert result[1] == sign * (2**63 - 2)
    with pytest.raises(OverflowError):
        add_into(result, part)


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
    assert encode(np.zeros((0, 3), dtype=np.float32), 5).shape == (0, 3)
    assert encode(np.zeros((2, 2), dtype=np.float32), 5).tolist() == [[0, 0], [0, 0]]
