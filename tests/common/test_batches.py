"""Training batches hold each example once, stay within the budget and follow from the generator."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from common.batches import token_budget_batches
from common.seeding import generator


@settings(max_examples=200)
@given(st.lists(st.integers(2, 128), max_size=80), st.integers(64, 1024), st.integers(0, 2**63))
def test_batches_hold_each_example_once_within_the_budget(lengths, budget, seed):
    lengths = np.asarray(lengths, dtype=np.int64)
    batches = token_budget_batches(lengths, budget, generator(seed))
    assert sorted(np.concatenate([[], *batches]).tolist()) == list(range(len(lengths)))
    for batch in batches:
        assert len(batch) * lengths[batch].max() <= budget or len(batch) == 1
    again = token_budget_batches(lengths, budget, generator(seed))
    assert [batch.tolist() for batch in again] == [batch.tolist() for batch in batches]


def test_hand_case():
    """Lengths 4 4 4 | 8 8 fit 16 pieces; 20 stands alone."""
    batches = token_budget_batches(np.array([8, 4, 20, 4, 8, 4]), 16, generator(0))
    assert sorted(sorted(batch.tolist()) for batch in batches) == [[0, 4], [1, 3, 5], [2]]


def test_batches_are_as_few_as_the_budget_allows_for_equal_lengths():
    assert [len(b) for b in token_budget_batches(np.full(64, 16), 128, generator(0))] == [8] * 8


def test_another_generator_gives_other_batches_in_another_order():
    lengths = generator(7).integers(5, 60, 200)
    first, second = (token_budget_batches(lengths, 512, generator(0, "batches", epoch)) for epoch in (0, 1))
    assert [lengths[batch].max() for batch in first] != [lengths[batch].max() for batch in second]
    longest = [lengths[batch].max() for batch in first]
    assert longest != sorted(longest)
