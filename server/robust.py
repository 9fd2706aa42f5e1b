"""Robust rules: one update that stands for the round when some clients may send anything.

    median         coordinate-wise median                        Yin et al. 2018, https://arxiv.org/abs/1803.01498
    trimmed-mean   coordinate-wise mean without the f smallest   the same
                   and the f largest of n values; n > 2f
    krum           the update with the smallest sum of squared   Blanchard et al. 2017,
                   distances to its n - f - 2 nearest others;    https://arxiv.org/abs/1703.02757
                   n >= 2f + 3
    multi-krum     the mean of the n - f updates that Krum       the same
                   scores lowest

f = server.byzantine, n the updates that came. Beside them, `bound_norm` limits how far one client can move
the plain mean (Sun et al. 2019, https://arxiv.org/abs/1911.07963).

Every update counts once, however many examples are behind it: a weight comes from the client, and a hostile
one would give itself the largest. For the same reason nothing here adds updates up before they are compared,
and the caller collects them all. An update that holds NaN or Inf is the caller's to reject; here it raises.

All arithmetic is float64. Arrays are read in blocks of columns, so that beyond the updates themselves memory
is that of cohort x block and of one result.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from common.errors import InputError
from common.keys import ServerKeys

Updates = Sequence[Mapping[str, NDArray[np.float32]]]  # ordered by client id
RobustRule = Callable[[Updates, ServerKeys], dict[str, NDArray[np.float64]]]

SPARE = {"trimmed-mean": 1, "krum": 3, "multi-krum": 3}  # clients needed beyond twice the hostile ones
BLOCK = 1 << 14  # columns at a time: the sort stays in the processor's cache


def median(updates: Updates, keys: ServerKeys) -> dict[str, NDArray[np.float64]]:
    """The coordinate-wise median; of an even number, the middle of the two middle values. Yin et al. 2018.

    A coordinate stays between the honest clients' smallest and largest value while fewer than half are hostile.

    Args:
        updates: n mappings of the same names to arrays of the same shapes.

    Returns:
        Arrays of those names and shapes.

    Raises:
        ValueError: no update came, or one is not finite.
    """
    _check_updates(updates, "median", 0)
    return _mean_of_the_middle(updates, (len(updates) - 1) // 2)


def trimmed_mean(updates: Updates, keys: ServerKeys) -> dict[str, NDArray[np.float64]]:
    """The coordinate-wise mean of what is left without the f smallest and f largest values. Yin et al. 2018.

    Args:
        updates: n mappings of the same names to arrays of the same shapes; n > 2f.

    Returns:
        Arrays of those names and shapes.

    Raises:
        ValueError: too few updates for f = ``keys.byzantine``, or one is not finite.
    """
    _check_updates(updates, "trimmed-mean", keys.byzantine)
    return _mean_of_the_middle(updates, keys.byzantine)


def krum(updates: Updates, keys: ServerKeys) -> dict[str, NDArray[np.float64]]:
    """The one update nearest to its neighbours, see `krum_scores`; of equal ones the first. Blanchard et al. 2017.

    Args:
        updates: n mappings of the same names to arrays of the same shapes; n >= 2f + 3.

    Returns:
        A copy of the chosen update.

    Raises:
        ValueError: too few updates for f = ``keys.byzantine``, or one is not finite.
    """
    chosen = updates[_best(updates, keys.byzantine, "krum")[0]]
    return {name: array.astype(np.float64) for name, array in chosen.items()}


def multi_krum(updates: Updates, keys: ServerKeys) -> dict[str, NDArray[np.float64]]:
    """The mean of the n - f updates with the lowest `krum_scores`. Blanchard et al. 2017.

    Args:
        updates: n mappings of the same names to arrays of the same shapes; n >= 2f + 3.

    Returns:
        Arrays of those names and shapes.

    Raises:
        ValueError: too few updates for f = ``keys.byzantine``, or one is not finite.
    """
    best = _best(updates, keys.byzantine, "multi-krum")
    chosen = sorted(best[: len(updates) - keys.byzantine])  # in the order of clients: the sum's bits depend on it
    found = {}
    for name, array in updates[0].items():
        total = np.zeros(array.shape, dtype=np.float64)
        for place in chosen:
            total += updates[place][name]
        found[name] = total / len(chosen)
    return found


ROBUST_RULES: dict[str, RobustRule] = {
    "median": median,
    "trimmed-mean": trimmed_mean,
    "krum": krum,
    "multi-krum": multi_krum,
}


def krum_scores(updates: Updates, f: int) -> NDArray[np.float64]:
    """(n,) each update's sum of squared distances to its n - f - 2 nearest others, all arrays together; n >= 2f + 3."""
    nearest = len(updates) - f - 2
    distances = _squared_distances(updates)
    np.fill_diagonal(distances, np.inf)  # not a neighbour of itself
    scores: NDArray[np.float64] = np.sort(distances, axis=1)[:, :nearest].sum(axis=1)
    return scores


def bound_norm(update: Mapping[str, NDArray[np.float32]], bound: float) -> dict[str, NDArray[np.float32]]:
    """update * min(1, bound / ||update||), the L2 norm taken over all arrays together. Sun et al. 2019.

    An update within the bound comes back as it is; another ends at the bound, up to float32's rounding.

    Raises:
        ValueError: the bound is not positive or the update is not finite.
    """
    if not bound > 0.0:
        raise ValueError(f"the norm's bound is {bound}; give more than 0")
    norm = float(np.sqrt(sum(np.square(array, dtype=np.float64).sum() for array in update.values())))
    if not np.isfinite(norm):
        raise ValueError("the update holds NaN or Inf: it has no norm to bound")
    if norm <= bound:
        return dict(update)
    return {name: (array.astype(np.float64) * (bound / norm)).astype(np.float32) for name, array in update.items()}


def least_cohort(strategy: str, f: int) -> int:
    """The fewest updates with which a rule bears f hostile ones; 1 for rules that do not use f."""
    return 2 * f + SPARE[strategy] if strategy in SPARE else 1


def check_byzantine(strategy: str, cohort: int, f: int) -> None:
    """Refuse, before round 1, a cohort too small for the rule.

    Args:
        cohort: clients a round really has: ``server.cohort``, or all where that is 0.

    Raises:
        InputError: naming ``server.byzantine`` and ``server.cohort``, and what would be right.
    """
    if cohort >= least_cohort(strategy, f):
        return
    most = (cohort - SPARE.get(strategy, 1)) // 2
    way = f"server.byzantine at most {most} or a larger server.cohort" if most >= 0 else "a larger server.cohort"
    raise InputError(
        f"server.byzantine = {f}: {_need(strategy, f)} clients a round, and server.cohort gives {cohort}; give {way}"
    )


def _need(strategy: str, f: int) -> str:
    sum_of = f"2 x {f} + {SPARE[strategy]} = " if strategy in SPARE else ""
    return f"{strategy} needs at least {sum_of}{least_cohort(strategy, f)}"


def _check_updates(updates: Updates, strategy: str, f: int) -> None:
    if len(updates) < least_cohort(strategy, f):
        bear = f" to bear server.byzantine = {f}" if strategy in SPARE else ""
        raise ValueError(f"{len(updates)} updates came; {_need(strategy, f)}{bear}")
    for place, update in enumerate(updates):
        if not all(np.isfinite(array).all() for array in update.values()):
            raise ValueError(f"update {place} of {len(updates)} holds NaN or Inf")


def _blocks(updates: Updates, name: str) -> Iterator[tuple[slice, NDArray[np.float32]]]:
    """One array of all updates, as (n, columns) pieces: which columns, and their values."""
    flat = [update[name].reshape(-1) for update in updates]
    for start in range(0, flat[0].size, BLOCK):
        columns = slice(start, start + BLOCK)
        yield columns, np.stack([array[columns] for array in flat])


def _mean_of_the_middle(updates: Updates, cut: int) -> dict[str, NDArray[np.float64]]:
    """Coordinate by coordinate: sort, leave ``cut`` values out at each end, average the rest.

    Sorted values are added up in their order, so the bits do not depend on the order of clients.
    """
    found = {}
    for name, array in updates[0].items():
        flat = np.empty(array.size, dtype=np.float64)
        for columns, values in _blocks(updates, name):
            values.sort(axis=0)
            flat[columns] = values[cut : len(updates) - cut].mean(axis=0, dtype=np.float64)
        found[name] = flat.reshape(array.shape)
    return found


def _best(updates: Updates, f: int, strategy: str) -> list[int]:
    """Places of the updates, lowest Krum score first; of equal ones the earlier first."""
    _check_updates(updates, strategy, f)
    return [int(place) for place in np.argsort(krum_scores(updates, f), kind="stable")]


def _squared_distances(updates: Updates) -> NDArray[np.float64]:
    """(n, n) squared L2 distances, from a Gram matrix added up block by block: |a|^2 + |b|^2 - 2 a.b."""
    gram = np.zeros((len(updates), len(updates)), dtype=np.float64)
    for name in updates[0]:
        for _, values in _blocks(updates, name):
            wide = values.astype(np.float64)
            gram += wide @ wide.T
    squares = np.diag(gram)
    distances = squares[:, None] + squares[None, :] - 2.0 * gram
    symmetric: NDArray[np.float64] = np.triu(distances, 1) + np.triu(distances, 1).T  # equal scores stay equal
    return np.maximum(symmetric, 0.0)  # rounding may leave less
