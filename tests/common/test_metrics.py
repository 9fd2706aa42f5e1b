"""Scores from added statistics equal scikit-learn's and SciPy's on the pooled predictions."""

import math
import warnings
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

from common.metrics import (
    LIMBS,
    MAX_EXAMPLES,
    ScoreSpec,
    check_statistics,
    scores,
    statistics_length,
    tally,
)

STSB = ScoreSpec(1, ("pearson", "spearman"))
HISTOGRAM = 1 + 5 * LIMBS
TIES = -2 * 101


def class_spec(k):
    return ScoreSpec(k, ("accuracy", "f1", "f1_macro", "matthews") if k == 2 else ("accuracy", "f1_macro", "matthews"))


def logits_of(classes, k):
    return np.eye(k)[np.asarray(classes, dtype=int)]


def cut(rng, n):
    """Index sets of up to 12 shards of arbitrary sizes, some of them empty."""
    owner = rng.choice(12, size=n, p=rng.dirichlet(np.full(12, 0.3)))
    return [np.flatnonzero(owner == client) for client in range(12)]


def federated(spec, predictions, labels, shards):
    return scores(spec, sum(tally(spec, predictions[s], labels[s]) for s in shards))


def sklearn_scores(k, predicted, labels):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about the degenerate cases, which are the point
        oracle = {"accuracy": accuracy_score(labels, predicted)}
        if k == 2:
            oracle["f1"] = f1_score(labels, predicted, zero_division=0)
        macro = f1_score(labels, predicted, average="macro", labels=range(k), zero_division=0)
        return {
            **oracle,
            "f1_macro": macro,
            "matthews": matthews_corrcoef(labels, predicted),
            "n": len(labels),
        }


def exact_pearson(x, y):
    """Pearson of the very float values, in rationals up to the last root."""
    x, y = [Fraction(float(v)) for v in x], [Fraction(float(v)) for v in y]
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    xy = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True))
    xx, yy = sum((a - mean_x) ** 2 for a in x), sum((b - mean_y) ** 2 for b in y)
    return math.copysign(math.sqrt(xy * xy / (xx * yy)), xy)


def stsb_like(rng, n, noise=0.8):
    """Labels on STS-B's scale, in single precision as the hub stores them, and a student of usual quality."""
    tenths = np.where(rng.random(n) < 0.8, rng.integers(0, 26, n) * 20, rng.integers(0, 21, n) * 25)
    labels = (tenths / 100).astype(np.float32)
    return (labels + rng.normal(0, noise, n)).astype(np.float32), labels


# Classes


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("k", [2, 3, 7])
def test_class_scores_of_summed_shards_are_the_pooled_ones(k, seed):
    rng = np.random.default_rng(seed)
    n = int(rng.integers(1, 400))
    labels = rng.choice(k, size=n, p=rng.dirichlet(np.full(k, 0.7)))
    logits = rng.normal(size=(n, k)).astype(np.float32) + 1.5 * logits_of(labels, k)
    got = federated(class_spec(k), logits, labels, cut(rng, n))
    assert got == pytest.approx(sklearn_scores(k, logits.argmax(axis=1), labels), abs=1e-9)


@settings(max_examples=150)
@given(
    st.integers(2, 4).flatmap(
        lambda k: st.tuples(
            st.just(k),
            st.lists(st.tuples(st.integers(0, k - 1), st.integers(0, k - 1)), min_size=1, max_size=12),
        )
    )
)
def test_degenerate_class_scores_are_scikit_learns(case):
    k, pairs = case
    labels, predicted = np.array(pairs).T
    got = scores(class_spec(k), tally(class_spec(k), logits_of(predicted, k), labels))
    assert got == pytest.approx(sklearn_scores(k, predicted, labels), abs=1e-9)


def test_averaging_the_clients_own_scores_is_wrong():
    """Two flawless clients with one class each: pooled F1 and Matthews are 1, their averages 0.5 and 0."""
    spec = class_spec(2)
    clients = [tally(spec, logits_of([c] * 4, 2), [c] * 4) for c in (0, 1)]
    pooled, own = scores(spec, clients[0] + clients[1]), [scores(spec, c) for c in clients]
    assert (pooled["f1"], pooled["matthews"]) == (1.0, 1.0)
    assert np.mean([o["f1"] for o in own]) == 0.5
    assert np.mean([o["matthews"] for o in own]) == 0.0


def test_confusion_matrix_has_a_row_per_label_and_the_first_of_equal_logits_wins():
    logits = [[0.0, 2.0], [1.0, 1.0], [3.0, 2.0]]
    assert tally(class_spec(2), logits, [0, 1, 1]).tolist() == [0, 1, 2, 0]


def test_counts_near_the_limit_keep_every_digit():
    """A hundred million copies of every example leave a score alone; 64-bit arithmetic would wrap."""
    small = np.array([5, 1, 2, 4], dtype=np.int64)
    large = small * (MAX_EXAMPLES // 12)
    assert {**scores(class_spec(2), large), "n": 12} == scores(class_spec(2), small)

    small = tally(STSB, *stsb_like(np.random.default_rng(0), 21))
    large = scores(STSB, small * (MAX_EXAMPLES // 21))
    assert large["pearson"] == scores(STSB, small)["pearson"]
    assert large["spearman"] == scores(STSB, small)["spearman"]


@pytest.mark.parametrize("spec", [class_spec(2), class_spec(3), STSB], ids=["2", "3", "regression"])
def test_no_examples_add_nothing_and_score_nothing(spec):
    empty = tally(spec, np.zeros((0, spec.num_labels)), np.zeros(0))
    assert empty.shape == (statistics_length(spec),)
    assert not empty.any()
    got = scores(spec, empty)
    assert got.pop("n") == 0
    assert all(math.isnan(value) for value in got.values())


# Sums


@pytest.mark.parametrize("spec", [class_spec(3), STSB], ids=["classes", "regression"])
def test_order_grouping_and_masks_leave_every_bit_alone(spec):
    rng = np.random.default_rng(5)
    predictions, labels = stsb_like(rng, 300)
    if spec.num_labels > 1:
        predictions, labels = rng.normal(size=(300, 3)), rng.integers(0, 3, 300)
    whole = scores(spec, tally(spec, predictions, labels))
    for _ in range(5):
        shards = cut(rng, 300)
        parts = [tally(spec, predictions[s], labels[s]) for s in shards]
        total = sum(parts)

        shuffled = [rng.permutation(s) for s in shards]
        parts = [tally(spec, predictions[s], labels[s]) for s in shuffled]
        parts = [parts[client] for client in rng.permutation(12)]
        grouped = sum(parts[7:]) + (sum(parts[:3]) + sum(parts[3:7]))
        assert grouped.tobytes() == total.tobytes()

        mask = rng.integers(0, 2**64, size=total.shape, dtype=np.uint64)
        masked = sum((part.view(np.uint64) for part in parts[1:]), parts[0].view(np.uint64) + mask)
        assert (masked - mask).view(np.int64).tobytes() == total.tobytes()
        assert scores(spec, total) == whole


def test_length_depends_on_the_spec_alone():
    assert statistics_length(class_spec(3)) == 9
    assert statistics_length(STSB) == 1 + 20 + 512 * 101 + 202
    assert tally(STSB, [1.0, 2.0], [1.0, 4.0]).shape == tally(STSB, [[9.0]], [0.0]).shape


def test_scores_come_in_the_order_of_the_spec():
    statistics = tally(STSB, [1.0, 2.0, 3.0], [1.0, 2.0, 4.0])
    assert list(scores(STSB, statistics)) == ["pearson", "spearman", "spearman_bound", "n"]
    assert next(iter(scores(ScoreSpec(1, ("spearman", "pearson")), statistics))) == "spearman"
    assert list(scores(ScoreSpec(1, ("pearson",)), statistics)) == ["pearson", "n"]


# Pearson


@pytest.mark.parametrize("seed", range(20))
def test_pearson_of_summed_shards_is_the_pooled_one(seed):
    rng = np.random.default_rng(seed)
    predictions, labels = stsb_like(rng, int(rng.integers(3, 500)), noise=rng.choice([0.01, 0.8, 20.0]))
    got = federated(STSB, predictions, labels, cut(rng, len(labels)))
    assert got["pearson"] == pytest.approx(pearsonr(predictions.astype(float), labels.astype(float))[0], abs=1e-9)
    assert got["n"] == len(labels)


@pytest.mark.parametrize("offset, spread", [(3.0, 1e-4), (3.0, 1e-5), (1e5, 1.0), (-2e5, 1e-3), (0.0, 1e5)])
def test_pearson_survives_near_constants_and_large_offsets(offset, spread):
    rng = np.random.default_rng(1)
    _, labels = stsb_like(rng, 300)
    predictions = offset + spread * rng.uniform(-1, 1, 300) + 0.3 * spread * labels
    got = federated(STSB, predictions, labels, cut(rng, 300))["pearson"]
    assert got == pytest.approx(exact_pearson(predictions, labels), abs=1e-9)


def test_pearson_of_single_precision_predictions_has_no_rounding_but_the_last():
    rng = np.random.default_rng(2)
    _, labels = stsb_like(rng, 200)
    predictions = (3.0 + 1e-6 * rng.normal(size=200)).astype(np.float32)  # a handful of distinct floats
    assert scores(STSB, tally(STSB, predictions, labels))["pearson"] == pytest.approx(
        exact_pearson(predictions, labels), abs=1e-15
    )


def test_pearson_of_a_line_is_one_and_of_a_constant_undefined():
    labels = np.arange(6.0)
    assert scores(STSB, tally(STSB, 3 - 0.5 * labels, labels))["pearson"] == -1.0
    for got in (scores(STSB, tally(STSB, np.full(6, 2.7), labels)), scores(STSB, tally(STSB, [2.7], [1.0]))):
        assert math.isnan(got["pearson"])
        assert math.isnan(got["spearman"])
        assert math.isnan(got["spearman_bound"])


def test_scores_do_not_depend_on_the_scale_of_the_labels():
    rng = np.random.default_rng(3)
    labels = rng.integers(0, 101, 200) / 100
    predictions = labels + rng.normal(0, 0.2, 200)
    for scale in (2.0**-30, 2.0**-7, 2.0**20):
        spec = ScoreSpec(1, ("pearson", "spearman"), (0.0, scale))
        assert scores(spec, tally(spec, predictions * scale, labels * scale)) == pytest.approx(
            scores(
                ScoreSpec(1, ("pearson", "spearman"), (0.0, 1.0)),
                tally(ScoreSpec(1, ("pearson",), (0.0, 1.0)), predictions, labels),
            ),
            abs=1e-12,
        )


# Spearman


def assert_bound_holds(predictions, labels, shards=None):
    predictions, labels = np.asarray(predictions), np.asarray(labels)
    got = federated(STSB, predictions, labels, shards or [np.arange(len(labels))])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # constant input
        error = abs(got["spearman"] - spearmanr(predictions, labels)[0])
    # An undefined score is never claimed: where SciPy's is nan, so is ours.
    assert math.isnan(got["spearman"]) or error <= got["spearman_bound"] <= 2.0
    return got, error


def crowd(rng, kind, n):
    predictions, labels = stsb_like(rng, n)
    return {
        "student": (predictions, labels),
        "clipped": (predictions.clip(0, 5), labels),
        "useless": (rng.uniform(0, 5, n), labels),
        "collapsed": (2.5 + 0.01 * predictions, labels),
        "tied": (predictions.round(), labels.round()),
        "skewed": (np.exp(2 * rng.normal(size=n)), labels**4 / 125),
        "outside": (50 * rng.normal(size=n), labels),
        "double": (predictions, rng.uniform(0, 5, n)),
        "mixed": (predictions, np.where(rng.random(n) < 0.5, labels, labels.astype(float).round(2))),
        "reversed": (-labels + rng.normal(0, 1e-3, n), labels + 0.0),
    }[kind]


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(
    "kind",
    [
        "student",
        "clipped",
        "useless",
        "collapsed",
        "tied",
        "skewed",
        "outside",
        "double",
        "mixed",
        "reversed",
    ],
)
def test_spearman_is_within_its_bound(kind, seed):
    rng = np.random.default_rng(seed)
    predictions, labels = crowd(rng, kind, int(rng.integers(20, 900)))
    assert_bound_holds(predictions, labels, cut(rng, len(labels)))


tight = st.integers(0, 60).map(lambda i: 2.5 + i / 1000)  # 61 values within six prediction bins, or two label bins
wide = st.floats(-20, 20, width=32)


@settings(max_examples=300)
@given(st.lists(st.tuples(tight | wide, tight | st.integers(0, 25).map(lambda i: i / 5)), min_size=2, max_size=25))
def test_spearman_is_within_its_bound_wherever_values_share_a_bin(pairs):
    assert_bound_holds(*np.array(pairs).T)


def test_spearman_of_values_alone_in_their_bins_is_exact():
    got, error = assert_bound_holds([0.1, 1.0, 2.0, 3.0, 5.2, -9.0], [1.0, 0.0, 2.2, 2.25, 5.0, 0.2])
    assert max(error, got["spearman_bound"]) < 1e-11


def test_spearman_bound_is_small_for_a_set_like_stsb():
    for seed in range(5):
        got, error = assert_bound_holds(*stsb_like(np.random.default_rng(seed), 1500))
        assert got["spearman_bound"] < 0.01
        assert error < 0.001


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_labels_on_a_bin_centre_are_known_to_be_ties(dtype):
    """26 distinct labels and predictions alone in their bins: nothing is left to bound."""
    labels = (np.repeat(np.arange(26), 8) / 5).astype(dtype)
    predictions = np.random.default_rng(0).permutation(208) / 40
    got, _ = assert_bound_holds(predictions, labels)
    assert got["spearman_bound"] < 1e-11


def test_labels_next_to_a_bin_centre_are_not_taken_for_ties():
    labels = 2.5 + np.arange(-3, 4) / 1e4  # all in one bin, one of them on its centre
    labels = np.concatenate([labels, labels + 1.0])
    rising, _ = assert_bound_holds(np.arange(14) / 3, labels)
    falling, _ = assert_bound_holds(np.arange(14) / 3, labels[[*range(6, -1, -1), *range(13, 6, -1)]])
    assert rising == pytest.approx({**falling, "pearson": rising["pearson"]})  # the histogram cannot tell them apart
    assert rising["spearman_bound"] > 0.1


def test_labels_may_exceed_the_range_by_their_rounding_to_single_precision():
    spec = ScoreSpec(1, ("pearson",), (0.0, 0.1))
    labels = np.array([0.0, 0.05, 0.1], dtype=np.float32)
    assert float(labels[-1]) > 0.1
    assert scores(spec, tally(spec, [0.0, 1.0, 2.0], labels))["pearson"] == pytest.approx(1.0)


# Refusals


@pytest.mark.parametrize(
    "arguments, named",
    [
        ((0, ("accuracy",)), "num_labels is 0"),
        ((2, ()), "metrics"),
        ((2, ("accuracy", "accuracy")), "once"),
        ((2, ("bleu",)), "bleu"),
        ((2, ("pearson",)), "pearson"),
        ((1, ("accuracy",)), "accuracy"),
        ((3, ("f1",)), "f1_macro"),
        ((1, ("pearson",), (5.0, 5.0)), "label_range"),
        ((1, ("pearson",), (0.0, math.inf)), "label_range"),
    ],
)
def test_impossible_specs_are_named(arguments, named):
    with pytest.raises(ValueError, match=named):
        ScoreSpec(*arguments)


@pytest.mark.parametrize(
    "spec, predictions, labels, message",
    [
        (STSB, [271.5, math.nan], [1.0, 2.0], "predictions hold a NaN"),
        (STSB, [271.5, math.inf], [1.0, 2.0], "predictions hold a NaN or an inf"),
        (STSB, [1.5, 271828.5], [1.0, 2.0], "predictions lie more than"),
        (STSB, [1.5, 271e300], [1.0, 2.0], "predictions lie more than"),
        (STSB, [1.5, 1.5], [1.0, 271.5], "labels must lie within"),
        (STSB, [1.5, 1.5], [-0.2715, 1.0], "labels must lie within"),
        (STSB, [1.5, 1.5], [271.5, math.nan], "labels hold a NaN"),
        (STSB, [[271.5, 1.5]], [1.0], "do not go"),
        (STSB, [271.5, 1.5], [1.0], "do not go"),
        (STSB, [271.5], [[1.0]], "do not go"),
        (STSB, ["271 is private"], [1.0], "real numbers"),
        (STSB, [1.5], [b"271 is private"], "real numbers"),
        (STSB, [271j], [1.0], "real numbers"),
        (class_spec(2), [[271.5, 1.5]], [271], "whole numbers from 0 to 1"),
        (class_spec(2), [[271.5, 1.5]], [-1], "whole numbers from 0 to 1"),
        (class_spec(2), [[271.5, 1.5]], [0.271], "whole numbers from 0 to 1"),
        (class_spec(2), [[271.5, math.nan]], [1], "predictions hold a NaN"),
        (class_spec(2), [[271.5, 1.5, 1.5]], [1], "do not go"),
        (class_spec(2), [271.5, 1.5], [1, 1], "do not go"),
    ],
)
def test_bad_data_is_refused_without_showing_it(spec, predictions, labels, message):
    with pytest.raises(ValueError, match=message) as refusal:
        tally(spec, predictions, labels)
    assert "271" not in str(refusal.value)
    assert refusal.value.__context__ is None


def changed(at, to, spec=STSB):
    predictions, labels = stsb_like(np.random.default_rng(0), 50)
    if spec.num_labels > 1:
        predictions, labels = logits_of(labels.astype(int) % 2, 2), labels.astype(int) % 2
    statistics = tally(spec, predictions, labels)
    check_statistics(spec, statistics)
    statistics[at] = to
    return spec, statistics


@pytest.mark.parametrize(
    "spec, statistics, message",
    [
        (STSB, tally(STSB, [1.0], [1.0]).tolist(), "int64"),
        (STSB, tally(STSB, [1.0], [1.0]).astype(np.float64), "int64"),
        (STSB, tally(STSB, [1.0], [1.0]).astype(np.int32), "int64"),
        (STSB, tally(STSB, [1.0], [1.0])[:-1], "shape"),
        (STSB, tally(STSB, [1.0], [1.0])[None], "shape"),
        (class_spec(2), np.zeros(9, dtype=np.int64), "shape"),
        (*changed(0, -1, class_spec(2)), "negative"),
        (*changed(slice(None), 2**62, class_spec(2)), "more than"),
        (*changed(0, -271), "count n"),
        (*changed(0, 2**62), "count n"),
        (*changed(0, 271), "does not hold n"),
        (*changed(1, -271), "lower limb"),
        (*changed(1, 2**62), "lower limb"),
        (*changed(1 + LIMBS - 1, 271), "Cauchy"),  # the sum of x is far beyond what the sum of squares allows
        (*changed(1 + 3 * LIMBS - 1, -271), "Cauchy"),  # a negative sum of squares
        (*changed(1 + 5 * LIMBS - 1, 271), "Cauchy"),  # xy larger than xx and yy allow
        (*changed(1 + 3 * LIMBS - 1, 2**62), "sum of squares"),
        (*changed(HISTOGRAM, -1), "negative"),
        (*changed(HISTOGRAM, 271), "does not hold n"),
        (*changed(slice(HISTOGRAM, HISTOGRAM + 4), 2**62), "does not hold n"),  # wraps to 0 in 64 bits
        (*changed(TIES, -1), "negative"),
        (*changed(TIES, 271), "ties"),
        (*changed(slice(TIES, None), 2**62), "ties"),
    ],
)
def test_bad_statistics_are_refused_without_showing_them(spec, statistics, message):
    with pytest.raises(ValueError, match=message) as refusal:
        check_statistics(spec, statistics)
    assert "271" not in str(refusal.value)
    with pytest.raises(ValueError, match=message):
        scores(spec, statistics)


def test_the_largest_admitted_sum_stays_in_its_limbs():
    """MAX_EXAMPLES shards, each with the farthest prediction that `tally` takes."""
    one = tally(STSB, [2.5 + 2.0**18], [0.0])
    highest = [int(limb) * MAX_EXAMPLES for limb in one[1:HISTOGRAM]]
    assert max(map(abs, highest)) < 2**63
    assert (2**32 - 1) * MAX_EXAMPLES < 2**63
    total = np.array([int(v) * MAX_EXAMPLES for v in one], dtype=np.int64)
    check_statistics(STSB, total)
    with pytest.raises(ValueError, match="predictions lie more"):
        tally(STSB, [2.5 + 2.0**18 + 1.0], [0.0])
