"""Training batches: examples of similar length together, each batch within a budget of padded word pieces."""

import numpy as np
from numpy.typing import NDArray


def token_budget_batches(lengths: NDArray[np.int64], budget: int, rng: np.random.Generator) -> list[NDArray[np.int64]]:
    """Cut n examples into batches and shuffle them.

    Examples are sorted by length, equal lengths in random order, and cut so that rows times the longest row
    stays within ``budget`` (a single longer example makes a batch of its own).

    Args:
        lengths: (n,) word pieces of each example.

    Returns:
        Position arrays that hold each of 0..n-1 once.
    """
    if not len(lengths):
        return []
    shuffled = rng.permutation(len(lengths))
    batches = cut(shuffled[np.argsort(lengths[shuffled], kind="stable")], lengths, budget)
    return [batches[i] for i in rng.permutation(len(batches))]


def cut(places: NDArray[np.int64], lengths: NDArray[np.int64], budget: int) -> list[NDArray[np.int64]]:
    """Cut positions, shortest example first, so that rows times the longest row of each part stays within ``budget``.

    A single longer example makes a part of its own.

    Args:
        lengths: (n,) word pieces of the examples at positions 0 to n-1.
    """
    parts, start = [], 0
    for end in range(1, len(places) + 1):
        # ascending: the next example would be the longest of the part
        full = end == len(places) or (end - start + 1) * int(lengths[places[end]]) > budget
        if full:
            parts.append(places[start:end])
            start = end
    return parts
