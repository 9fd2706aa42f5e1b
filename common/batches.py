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
    by_length = shuffled[np.argsort(lengths[shuffled], kind="stable")]
    batches, start = [], 0
    for end in range(1, len(by_length) + 1):
        # sorted ascending: the next example would be the longest of the batch
        full = end == len(by_length) or (end - start + 1) * int(lengths[by_length[end]]) > budget
        if full:
            batches.append(by_length[start:end])
            start = end
    return [batches[i] for i in rng.permutation(len(batches))]
