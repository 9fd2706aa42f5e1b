"""Robust rules against NumPy, SciPy and brute force; what a cohort must be; bounded norms."""

import itertools
import tracemalloc

import numpy as np
import pytest
from scipy.stats import trim_mean

from common.config import from_flat
from common.errors import InputError
from server import robust
from server.robust import ROBUST_RULES, bound_norm, check_byzantine, krum_scores, least_cohort

SHAPES = {"layer.weight": (5, 7), "layer.bias": (7,), "scale": ()}


def keys(f=1):
    return from_flat({"server.byzantine": f}).server


def updates(count, seed=0, spread=1.0):
    rng = np.random.default_rng(seed)
    return [
        {name: np.asarray(rng.normal(scale=spread, size=shape), dtype=np.float32) for name, shape in SHAPES.items()}
        for _ in range(count)
    ]


def numbers(*values):
    return [{"w": np.array([value], dtype=np.float32)} for value in values]


def stacked(given, name):
    return np.stack([update[name] for update in given]).astype(np.float64)


def flat(update):
    return np.concatenate([np.ravel(array).astype(np.float64) for array in update.values()])


def brute_force_scores(given, f):
    rows = [flat(update) for update in given]
    found = []
    for mine in range(len(rows)):
        others = [((rows[mine] - rows[other]) ** 2).sum() for other in range(len(rows)) if other != mine]
        found.append(sum(sorted(others)[: len(rows) - f - 2]))
    return np.array(found)


# --- what they compute --------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2, 3, 8, 11])
def test_median_is_numpys(count):
    given = updates(count)
    found = ROBUST_RULES["median"](given, keys())
    for name, shape in SHAPES.items():
        assert (found[name] == np.median(stacked(given, name), axis=0)).all()
        assert (found[name].dtype, found[name].shape) == (np.float64, shape)


@pytest.mark.parametrize(("count", "f"), [(1, 0), (6, 0), (3, 1), (7, 1), (7, 3), (10, 4)])
def test_trimmed_mean_is_scipys(count, f):
    given = updates(count)
    found = ROBUST_RULES["trimmed-mean"](given, keys(f))
    for name, shape in SHAPES.items():
        expected = trim_mean(stacked(given, name), (f + 0.5) / count, axis=0)
        np.testing.assert_allclose(found[name], expected, rtol=1e-12, atol=1e-15)
        assert (found[name].dtype, found[name].shape) == (np.float64, shape)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("count", "f"), [(3, 0), (5, 1), (9, 2), (12, 4)])
def test_krum_and_multi_krum_are_brute_force(count, f, seed):
    given = updates(count, seed)
    expected = brute_force_scores(given, f)
    np.testing.assert_allclose(krum_scores(given, f), expected, rtol=1e-12)
    order = np.argsort(expected.round(9), kind="stable")
    chosen = ROBUST_RULES["krum"](given, keys(f))
    assert all((chosen[name] == given[order[0]][name]).all() for name in SHAPES)
    averaged = ROBUST_RULES["multi-krum"](given, keys(f))
    for name, shape in SHAPES.items():
        expected_mean = stacked([given[place] for place in order[: count - f]], name).mean(axis=0)
        np.testing.assert_allclose(averaged[name], expected_mean, rtol=1e-12, atol=1e-15)
        assert (averaged[name].dtype, averaged[name].shape) == (np.float64, shape)


def test_hand_case_krum():
    # five numbers, f = 1: the two nearest others each. 0: 1 + 4; 1: 1 + 1; 2: 1 + 4 (to 1 and 0); 5: 9 + 16; 90: far
    given = numbers(0, 1, 2, 5, 90)
    assert krum_scores(given, 1).tolist() == [5.0, 2.0, 5.0, 25.0, 85.0**2 + 88.0**2]
    assert ROBUST_RULES["krum"](given, keys(1))["w"].tolist() == [1.0]
    assert ROBUST_RULES["multi-krum"](given, keys(1))["w"].tolist() == [2.0]


def test_krum_takes_the_first_client_of_equal_scores():
    # with one neighbour to look at, the nearest two always score the same
    for first, second in ((1.0, 2.0), (2.0, 1.0)):
        assert ROBUST_RULES["krum"](numbers(9, first, second), keys(0))["w"].tolist() == [first]


def test_krum_measures_distance_over_all_arrays_together():
    # by "a" alone the first would win, by "b" alone the third
    places = [(0, 50), (0, -50), (3, 0), (13, 0), (23, 0)]
    given = [{"a": np.float32([a]), "b": np.float32([b])} for a, b in places]
    assert ROBUST_RULES["krum"](given, keys(1))["a"].tolist() == [13.0]


def test_krum_keeps_nearly_equal_updates_apart():
    # they differ in their last bits: distances in float32 would be rounding alone
    steps = 64 * np.finfo(np.float32).eps
    given = [{"w": np.full(1000, 1.0 + place * steps, dtype=np.float32)} for place in (0, 3, 8, 12, 20)]
    np.testing.assert_allclose(krum_scores(given, 1), brute_force_scores(given, 1), rtol=1e-3)
    assert (ROBUST_RULES["krum"](given, keys(1))["w"] == given[1]["w"]).all()


@pytest.mark.parametrize("rule", ROBUST_RULES)
def test_blocks_change_nothing(rule, monkeypatch):
    given = updates(9)
    whole = ROBUST_RULES[rule](given, keys(2))
    monkeypatch.setattr(robust, "BLOCK", 4)
    pieces = ROBUST_RULES[rule](given, keys(2))
    assert all(whole[name].tobytes() == pieces[name].tobytes() for name in SHAPES)


@pytest.mark.parametrize("rule", ROBUST_RULES)
def test_the_order_of_clients_does_not_matter(rule):
    given = updates(7)
    expected = ROBUST_RULES[rule](given, keys(2))
    for order in itertools.islice(itertools.permutations(range(7)), 0, None, 211):
        found = ROBUST_RULES[rule]([given[place] for place in order], keys(2))
        for name in SHAPES:
            if rule == "multi-krum":  # a plain sum: in client order it has one set of bits, in another the last differ
                np.testing.assert_allclose(found[name], expected[name], rtol=1e-12, atol=1e-15)
            else:
                assert found[name].tobytes() == expected[name].tobytes()


@pytest.mark.parametrize("rule", ROBUST_RULES)
def test_updates_are_left_alone(rule):
    given = updates(7)
    for update in given:
        for array in update.values():
            array.flags.writeable = False  # as they come off the wire
    found = ROBUST_RULES[rule](given, keys(2))
    assert not any(np.shares_memory(found[name], update[name]) for update in given for name in SHAPES)


@pytest.mark.parametrize("rule", ROBUST_RULES)
def test_memory_is_a_block_of_the_cohort_and_one_result(rule):
    given = [{"w": np.full(500_000, place, dtype=np.float32)} for place in range(20)]
    tracemalloc.start()
    ROBUST_RULES[rule](given, keys(2))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    result, block = 500_000 * 8, 20 * robust.BLOCK * 8
    assert peak < result + 3 * block  # the stacked updates alone would be 20 * 500_000 * 4 = 40 MB


# --- where they hold and where they break, in numbers one can see ------------------------------------


def test_median_holds_below_half_and_breaks_at_half():
    honest = [1.0, 2.0, 3.0, 4.0, 5.0]
    assert ROBUST_RULES["median"](numbers(*honest, *(4 * [1e30])), keys())["w"][0] == 5.0
    assert ROBUST_RULES["median"](numbers(*honest, *(5 * [1e30])), keys())["w"][0] > 1e29


def test_trimmed_mean_holds_at_f_and_breaks_beyond():
    honest = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]
    assert ROBUST_RULES["trimmed-mean"](numbers(*honest, 1e30, 1e30), keys(2))["w"][0] == 4.5
    assert ROBUST_RULES["trimmed-mean"](numbers(*honest, 1e30, 1e30, 1e30), keys(2))["w"][0] > 1e29


def test_krum_breaks_when_colluders_have_neighbours_enough_among_themselves():
    # n = 2f + 3 = 9 and f = 3: a score looks at four neighbours. Four far colluders still need an honest one, five not
    honest = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]
    assert ROBUST_RULES["krum"](numbers(*honest[:5], *(4 * [1e15])), keys(3))["w"][0] == 3.0
    assert ROBUST_RULES["krum"](numbers(*honest[:4], *(5 * [1e15])), keys(3))["w"][0] == np.float32(1e15)
    # but four that stay near win already: one small distance against four
    assert ROBUST_RULES["krum"](numbers(*honest[:5], *(4 * [-1.0])), keys(3))["w"][0] == -1.0


def test_multi_krum_averages_one_of_f_plus_1_far_updates_in():
    honest = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]
    assert ROBUST_RULES["multi-krum"](numbers(*honest, 1e15, -1e15, 1e16), keys(3))["w"][0] == 3.5
    assert abs(ROBUST_RULES["multi-krum"](numbers(*honest[:5], 1e15, -1e15, 1e16, -1e17), keys(3))["w"][0]) > 1e14


@pytest.mark.parametrize("rule", ROBUST_RULES)
def test_the_largest_float32_neither_overflows_nor_wins(rule):
    huge = float(np.finfo(np.float32).max)
    found = ROBUST_RULES[rule](numbers(1, 2, 3, 4, 5, huge, -huge), keys(2))["w"]
    assert 1.0 <= found[0] <= 5.0


# --- refusals -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rule", "count", "f", "message"),
    [
        ("median", 0, 1, "0 updates came; median needs at least 1"),
        (
            "trimmed-mean",
            4,
            2,
            r"4 updates came; trimmed-mean needs at least 2 x 2 \+ 1 = 5 to bear server.byzantine = 2",
        ),
        ("krum", 6, 2, r"6 updates came; krum needs at least 2 x 2 \+ 3 = 7 to bear server.byzantine = 2"),
        ("multi-krum", 2, 0, r"2 updates came; multi-krum needs at least 2 x 0 \+ 3 = 3 to bear server.byzantine = 0"),
    ],
)
def test_too_few_updates_are_refused(rule, count, f, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        ROBUST_RULES[rule](updates(count), keys(f))


@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("rule", ROBUST_RULES)
def test_an_update_that_is_not_finite_is_refused(rule, poison):
    given = updates(7)
    given[4]["layer.bias"][3] = poison
    with pytest.raises(ValueError, match="update 4 of 7 holds NaN or Inf"):
        ROBUST_RULES[rule](given, keys(2))


@pytest.mark.parametrize(
    ("strategy", "cohort", "f", "message"),
    [
        (
            "krum",
            9,
            4,
            "server.byzantine = 4: krum needs at least 2 x 4 + 3 = 11 clients a round, and server.cohort gives 9; "
            "give server.byzantine at most 3 or a larger server.cohort",
        ),
        (
            "multi-krum",
            2,
            1,
            "server.byzantine = 1: multi-krum needs at least 2 x 1 + 3 = 5 clients a round, and server.cohort gives 2; "
            "give a larger server.cohort",
        ),
        (
            "trimmed-mean",
            2,
            1,
            "server.byzantine = 1: trimmed-mean needs at least 2 x 1 + 1 = 3 clients a round, and server.cohort "
            "gives 2; give server.byzantine at most 0 or a larger server.cohort",
        ),
    ],
)
def test_a_cohort_too_small_is_refused_by_name(strategy, cohort, f, message):
    with pytest.raises(InputError) as caught:
        check_byzantine(strategy, cohort, f)
    assert str(caught.value) == message


@pytest.mark.parametrize("strategy", ROBUST_RULES)
def test_what_the_check_lets_through_the_rule_can_do(strategy):
    for cohort, f in itertools.product(range(1, 10), range(5)):
        if cohort >= least_cohort(strategy, f):
            check_byzantine(strategy, cohort, f)
            ROBUST_RULES[strategy](updates(cohort), keys(f))
        else:
            with pytest.raises(InputError):
                check_byzantine(strategy, cohort, f)
            with pytest.raises(ValueError, match="needs at least"):
                ROBUST_RULES[strategy](updates(cohort), keys(f))


@pytest.mark.parametrize("strategy", ["fedavg", "fedprox", "fedavgm", "fedadam", "fedyogi", "fedadagrad", "median"])
def test_rules_without_f_take_any_cohort(strategy):
    check_byzantine(strategy, 1, 50)


# --- bounded norms ------------------------------------------------------------------------------


def test_hand_case_bound_norm():
    # 3, 4 and 12 over two arrays: 13
    update = {"a": np.float32([3.0, 4.0]), "b": np.float32([[12.0]])}
    found = bound_norm(update, 6.5)
    assert (found["a"].tolist(), found["b"].tolist()) == ([1.5, 2.0], [[6.0]])
    assert found["a"].dtype == np.float32
    assert update["a"].tolist() == [3.0, 4.0]


def test_an_update_within_the_bound_keeps_its_bits():
    update = updates(1)[0]
    for bound in (np.linalg.norm(flat(update)), 1e6):
        found = bound_norm(update, float(bound))
        assert all(found[name].tobytes() == update[name].tobytes() for name in SHAPES)


@pytest.mark.parametrize("size", [1e-30, 1.0, 1e30])
def test_bounded_updates_keep_their_direction_and_end_at_the_bound(size):
    update = {name: (array * np.float32(size)) for name, array in updates(1)[0].items()}
    before = flat(update)
    after = flat(bound_norm(update, float(np.linalg.norm(before)) / 7))
    np.testing.assert_allclose(after, before / 7, rtol=1e-6)
    assert np.linalg.norm(after) == pytest.approx(np.linalg.norm(before) / 7, rel=1e-6)


def test_bound_norm_refuses_what_has_no_norm():
    for poison in (np.nan, np.inf):
        with pytest.raises(ValueError, match="NaN or Inf"):
            bound_norm({"a": np.float32([1.0, poison])}, 1.0)
    for bound in (0.0, -1.0, np.nan):
        with pytest.raises(ValueError, match="bound is"):
            bound_norm({"a": np.float32([1.0])}, bound)
