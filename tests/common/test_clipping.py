"""One global norm per update, and a sum of integers that no client moves by more than the bound."""

import math

import numpy as np
import pytest

from common.clipping import BELOW, below, clip, norm_of, slack
from common.fixed_point import SCALE, ExactSum, NotFinite, Rows

SHAPES = {"a": (40, 30), "b": (7,), "c": ()}


def updates(count, seed=0):
    """Of norms from a thousandth to a thousand."""
    rng = np.random.default_rng(seed)
    sizes = 10.0 ** rng.uniform(-3, 3, count)
    found = []
    for size in sizes:
        drawn = {name: rng.normal(size=shape) for name, shape in SHAPES.items()}
        found.append({name: np.float32(size / norm_of(drawn) * part) for name, part in drawn.items()})
    return found


def test_the_clipped_sum_is_that_of_a_loop_over_clients():
    bound, total, expected = 0.7, ExactSum(SHAPES), {name: np.zeros(shape) for name, shape in SHAPES.items()}
    for update in updates(30):
        total.add(clip(update, bound)[0], 1)
        whole = np.concatenate([np.float64(part).reshape(-1) for part in update.values()])
        factor = min(1.0, bound / float(np.linalg.norm(whole)))
        for name, part in update.items():
            expected[name] += factor * np.float64(part)
    for name, part in total.totals.items():
        np.testing.assert_allclose(part / SCALE, expected[name], rtol=0, atol=1e-6)


@pytest.mark.parametrize("bound", [1e-4, 0.3, 1.0, 123.456])
def test_what_enters_the_integer_sum_has_at_most_the_bounds_norm(bound):
    """All rounding included: of float32 and of the grid, also where every value is rounded up."""
    worst = {"a": np.full((40, 30), 1.0, np.float32), "b": np.zeros(7, np.float32), "c": np.float32(0)}
    for update in [*updates(50, seed=1), worst]:
        total = ExactSum(SHAPES)
        total.add(clip(update, bound)[0], 1)
        square = sum(int(value) ** 2 for part in total.totals.values() for value in part.reshape(-1))
        assert square <= int(bound * SCALE) ** 2
        if norm_of(update) > bound:
            assert math.sqrt(square) > (bound - 3 * slack(bound, 1208)) * SCALE


def test_rows_are_clipped_as_the_whole_array():
    rows = Rows(np.array([1, 3]), np.float32([[3, 0], [0, 4]]))
    found, norm = clip({"a": rows, "b": np.float32([12])}, 6.5)
    assert norm == 13.0
    np.testing.assert_allclose(found["a"].dense((5, 2)), [[0, 0], [1.5, 0], [0, 0], [0, 2], [0, 0]], rtol=1e-6)
    np.testing.assert_allclose(found["b"], [6], rtol=1e-6)


def test_an_update_that_is_zero_stays_and_one_without_a_norm_is_none():
    nothing = {name: np.zeros(shape, np.float32) for name, shape in SHAPES.items()}
    found, norm = clip(nothing, 1.0)
    assert norm == 0.0
    assert all(not part.any() for part in found.values())
    for bad in (math.nan, math.inf):
        with pytest.raises(NotFinite):
            clip({**nothing, "c": np.float32(bad)}, 1.0)


@pytest.mark.parametrize("bound", [0.0, -1.0, 1e-12, math.nan])
def test_a_bound_that_rounding_would_drown_is_refused(bound):
    with pytest.raises(ValueError, match="clip norm"):
        clip({"a": np.ones((40, 30), np.float32)}, bound)


def test_a_client_says_on_which_side_of_the_bound_its_norm_is():
    assert [float(below(norm, 1.0)[BELOW][0]) for norm in (0.0, 1.0, 1.01)] == [0.5, 0.5, -0.5]
