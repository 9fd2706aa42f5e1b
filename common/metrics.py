"""GLUE scores of a whole federation from integer counts that are only ever added.

A client turns its predictions and labels into one int64 vector (`tally`); the vectors of all clients are
summed; `scores` turns the sum into the scores that scikit-learn and SciPy give on the pooled predictions.
Integer addition is associative, so any order and grouping of clients gives the same bits, and masks modulo
2^64 (secure aggregation) cancel exactly. A vector's length depends on the spec alone, never on the data.

Classes: the vector is the confusion matrix C, row = label, column = prediction. With K classes, t = row sums,
p = column sums, n = sum of C and c = trace of C:

    accuracy  c / n
    f1        2 C11 / (t1 + p1), the binary F1 of class 1 that GLUE reports for MRPC and QQP
    f1_macro  mean over all K classes of 2 Ckk / (tk + pk); a class that never occurs counts as 0
    matthews  (c n - t.p) / sqrt((n^2 - p.p) (n^2 - t.t)), Gorodkin's R_K; 0 where that is 0 / 0

Several classes at once (multi-label: an example has any number of the K classes, and a class is predicted where its
logit is above 0, its probability above a half): the vector is [exact, counts]. ``exact`` counts the examples with every
class right; ``counts`` are for each class tp, fp, fn, tn, which add up to n.

    f1_micro         2 TP / (2 TP + FP + FN) of the counts added over the classes
    f1_macro         mean over all K classes of 2 tp / (2 tp + fp + fn); a class that never occurs counts as 0
    subset_accuracy  exact / n

Regression (one output x, one label y): the vector is [n, sums, histogram, ties].

    sums       of x, y, xx, yy, xy on a fixed grid, exact integers in LIMBS int64 limbs of 32 bits each
    histogram  joint counts of PREDICTION_BINS prediction bins x LABEL_BINS label bins
    ties       per label bin: labels equal to its centre, and labels equal to its single-precision centre
    pearson    (n Sxy - Sx Sy) / sqrt((n Sxx - Sx^2) (n Syy - Sy^2))
    spearman   of the binned values, with a proven bound on its distance from the exact one (`_spearman`)

Sources: Wang et al., "GLUE", ICLR 2019 (which task has which score). Gorodkin, "Comparing two K-category
assignments by a K-category correlation coefficient", Comput. Biol. Chem. 28 (2004). Kendall, "The treatment
of ties in ranking problems", Biometrika 33 (1945): the variance of tied ranks.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from operator import mul

import numpy as np
from numpy.typing import ArrayLike, NDArray

CLASS_METRICS = ("accuracy", "f1", "f1_macro", "matthews")
MULTI_LABEL_METRICS = ("f1_micro", "f1_macro", "subset_accuracy")
REGRESSION_METRICS = ("pearson", "spearman")

PREDICTION_BINS = 512
PREDICTION_MARGIN = 0.1  # prediction bins reach this share of the label range beyond both ends
LABEL_BINS = 101  # centres a hundredth of the range apart: multiples of 0.2 and 0.25 up to 5 are centres
LABEL_SLACK = 1e-6  # share of the label range: 0.1 stored in single precision is still within (0, 0.1)

# Grid of the exact sums. A step is 2^-47 of the label range rounded up to a power of two (2^-44 for STS-B):
# there every single-precision score above 2^-21 is exact. A value has at most 62 bits, so it lies within 2^15
# such ranges of the centre (262144 for STS-B); a product has at most 124. The highest of four limbs grows by
# at most 2^28 an example, the others by less than 2^32 a shard: no sum over MAX_EXAMPLES leaves int64. Adding
# carries nothing from limb to limb: shards cut otherwise may spell the same total, and score, in other limbs.
GRID_BITS = 47
VALUE_BITS = 62
LIMBS = 4
LIMB_BITS = 32
MAX_EXAMPLES = 2**31 - 1

_SUMS = slice(1, 1 + 5 * LIMBS)
_HISTOGRAM = slice(_SUMS.stop, _SUMS.stop + PREDICTION_BINS * LABEL_BINS)
_TIES = slice(_HISTOGRAM.stop, _HISTOGRAM.stop + 2 * LABEL_BINS)

# Added to the Spearman bound for float rounding, ours after the last exact integer and that of any oracle.
_FLOAT_ROUNDING = 1e-12


@dataclass(frozen=True)
class ScoreSpec:
    """What is scored.

    num_labels: number of classes, or 1 where the model predicts a score (regression).
    metrics: from `CLASS_METRICS`, `MULTI_LABEL_METRICS` where multi_label, or `REGRESSION_METRICS` where num_labels
        is 1; the first is the headline.
    label_range: lowest and highest label; read for regression only.
    multi_label: whether an example has any number of the classes.

    Raises ValueError for a combination that has no meaning.
    """

    num_labels: int
    metrics: tuple[str, ...]
    label_range: tuple[float, float] = (0.0, 5.0)
    multi_label: bool = False

    def __post_init__(self) -> None:
        if self.num_labels < 1:
            raise ValueError(f"num_labels is {self.num_labels}; it must be 1 (a score) or the number of classes")
        if not self.metrics or len(set(self.metrics)) != len(self.metrics):
            raise ValueError(f"metrics is {self.metrics!r}; name at least one, and each once")
        if self.multi_label and self.num_labels == 1:
            raise ValueError("num_labels is 1; multi_label needs at least 2 classes")
        several = MULTI_LABEL_METRICS if self.multi_label else CLASS_METRICS
        allowed = REGRESSION_METRICS if self.num_labels == 1 else several
        for name in self.metrics:
            if name not in allowed:
                raise ValueError(f"metric {name!r} does not go with num_labels={self.num_labels}: use {allowed}")
        if "f1" in self.metrics and self.num_labels != 2:
            raise ValueError(f"metric 'f1' needs num_labels=2, not {self.num_labels}: use 'f1_macro'")
        low, high = self.label_range
        if self.num_labels == 1 and not (low < high and math.isfinite(high - low)):
            raise ValueError(f"label_range is {self.label_range}; it must be two finite numbers, the lower first")


def statistics_length(spec: ScoreSpec) -> int:
    """Number of int64 in a vector of `tally`: K x K for K classes, 1 + 4 K for multi-label, else one constant."""
    if spec.multi_label:
        return 1 + 4 * spec.num_labels
    return _TIES.stop if spec.num_labels == 1 else spec.num_labels**2


def tally(spec: ScoreSpec, predictions: ArrayLike, labels: ArrayLike) -> NDArray[np.int64]:
    """The statistics of one shard, shape (statistics_length(spec),).

    predictions: logits (n, num_labels), of which the largest (the first of equals) is the predicted class; or
        scores (n,) or (n, 1) for regression. n may be 0.
    labels: (n,), whole numbers 0 .. num_labels - 1, or for regression numbers within label_range; for multi-label
        (n, num_labels) of 0 and 1.

    Raises ValueError where a shape or a value is not so, where a prediction is NaN or infinite, and for a
    score too far off for the grid. No message shows a value, since the data is private.
    """
    outputs, targets = _numbers("predictions", predictions), _numbers("labels", labels)
    if spec.num_labels == 1 and outputs.ndim == 2 and outputs.shape[1] == 1:
        outputs = outputs[:, 0]
    expected = targets.shape if spec.num_labels == 1 else (*targets.shape[:1], spec.num_labels)
    if outputs.shape != expected or targets.shape != (expected if spec.multi_label else expected[:1]):
        raise ValueError(
            f"predictions of shape {outputs.shape} do not go with labels of shape {targets.shape} "
            f"for num_labels={spec.num_labels}"
        )
    if spec.num_labels == 1:
        return _tally_scores(spec, outputs, targets)
    if spec.multi_label:
        return _tally_multi_label(outputs, targets)
    return _tally_classes(spec, outputs, targets)


def scores(spec: ScoreSpec, statistics: NDArray[np.int64]) -> dict[str, float]:
    """The spec's metrics in order, then "spearman_bound" where "spearman" is one of them, then the count "n".

    statistics: a vector of `tally`, or the sum of any number of them; checked by `check_statistics` first.
    A score that is not defined (no examples, the correlation of a constant) is nan, and so is its bound; an
    F1 or Matthews of 0 / 0 is 0, as in scikit-learn.
    """
    check_statistics(spec, statistics)
    values: dict[str, float] = {}
    if spec.multi_label:
        exact, *counts = statistics.tolist()
        n = sum(counts[:4])
        for name in spec.metrics:
            values[name] = _multi_label_score(name, exact, counts) if n else math.nan
    elif spec.num_labels > 1:
        confusion = statistics.reshape(spec.num_labels, spec.num_labels).tolist()
        n = sum(map(sum, confusion))
        for name in spec.metrics:
            values[name] = _class_score(name, confusion) if n else math.nan
    else:
        n = int(statistics[0])
        bound = math.nan
        for name in spec.metrics:
            if name == "pearson":
                values[name] = _pearson(n, _sums(statistics))
            else:
                values[name], bound = _spearman(statistics)
        if "spearman" in spec.metrics:
            values["spearman_bound"] = bound
    return {**values, "n": n}


def check_statistics(spec: ScoreSpec, statistics: NDArray[np.int64]) -> None:
    """Raise ValueError unless the vector, which comes from the network, can be a sum of `tally` vectors.

    Every condition holds for one shard and for any sum of shards, so the check serves before and after
    adding. It cannot tell a lie that is consistent in itself.
    """
    if not isinstance(statistics, np.ndarray) or statistics.dtype != np.int64:
        raise ValueError("statistics must be an array of int64")
    if statistics.shape != (statistics_length(spec),):
        raise ValueError(f"statistics have shape {statistics.shape}, expected ({statistics_length(spec)},)")
    if spec.num_labels == 1:
        _check_regression(statistics)
        return
    if spec.multi_label:
        _check_multi_label(statistics)
        return
    if statistics.min() < 0:
        raise ValueError("statistics: a count of the confusion matrix is negative")
    # Python's sum, here and below: NumPy's would wrap on the counts of a hostile client.
    if sum(statistics.tolist()) > MAX_EXAMPLES:
        raise ValueError(f"statistics: the confusion matrix holds more than {MAX_EXAMPLES} examples")


def _numbers(name: str, values: ArrayLike) -> NDArray[np.float64]:
    array = np.asarray(values)
    # Asked of the dtype, because NumPy's own message about a string that is no number quotes the string.
    if array.dtype.kind not in "biuf":
        raise ValueError(f"{name} must be an array of real numbers")
    array = array.astype(np.float64)
    if not np.isfinite(array).all():
        raise ValueError(f"{name} hold a NaN or an infinity")
    return array


# Classes


def _tally_classes(spec: ScoreSpec, logits: NDArray[np.float64], labels: NDArray[np.float64]) -> NDArray[np.int64]:
    k = spec.num_labels
    if ((labels < 0) | (labels >= k) | (labels != np.rint(labels))).any():
        raise ValueError(f"labels must be whole numbers from 0 to {k - 1}")
    cells = labels.astype(np.int64) * k + logits.argmax(axis=1)
    return np.bincount(cells, minlength=k * k).astype(np.int64)


def _class_score(name: str, confusion: list[list[int]]) -> float:
    """One score of a confusion matrix with at least one example."""
    labelled = [sum(row) for row in confusion]
    predicted = [sum(column) for column in zip(*confusion, strict=True)]
    hits = [row[k] for k, row in enumerate(confusion)]
    n = sum(labelled)
    if name == "accuracy":
        return sum(hits) / n
    if name == "matthews":
        covariance = sum(hits) * n - _dot(labelled, predicted)
        return _correlation(covariance, n * n - _dot(predicted, predicted), n * n - _dot(labelled, labelled), 0.0)
    f1 = [2 * h / (t + p) if t + p else 0.0 for h, t, p in zip(hits, labelled, predicted, strict=True)]
    return f1[1] if name == "f1" else math.fsum(f1) / len(f1)


# Several classes at once


def _tally_multi_label(logits: NDArray[np.float64], labels: NDArray[np.float64]) -> NDArray[np.int64]:
    if ((labels != 0) & (labels != 1)).any():
        raise ValueError("labels must be 0 or 1 for each class")
    there, said = labels == 1, logits > 0
    counts = [part.sum(axis=0) for part in (there & said, ~there & said, there & ~said, ~there & ~said)]
    exact = (there == said).all(axis=1).sum()
    return np.concatenate([[exact], np.stack(counts, axis=1).reshape(-1)]).astype(np.int64)


def _multi_label_score(name: str, exact: int, counts: list[int]) -> float:
    """One score of at least one example, from tp, fp, fn, tn of each class in turn."""
    if name == "subset_accuracy":
        return exact / sum(counts[:4])
    hits, wrong, missed = counts[0::4], counts[1::4], counts[2::4]
    if name == "f1_micro":
        hits, wrong, missed = [sum(hits)], [sum(wrong)], [sum(missed)]
    f1 = [2 * tp / (2 * tp + fp + fn) if tp + fp + fn else 0.0 for tp, fp, fn in zip(hits, wrong, missed, strict=True)]
    return math.fsum(f1) / len(f1)


def _check_multi_label(statistics: NDArray[np.int64]) -> None:
    exact, *counts = statistics.tolist()
    if min(exact, *counts) < 0:
        raise ValueError("statistics: a count of the classes is negative")
    totals = {sum(counts[start : start + 4]) for start in range(0, len(counts), 4)}
    n = max(totals)
    if len(totals) > 1 or n > MAX_EXAMPLES:
        raise ValueError(f"statistics: the classes do not all count the same examples, at most {MAX_EXAMPLES}")
    errors = [fp + fn for fp, fn in zip(counts[1::4], counts[2::4], strict=True)]
    # an example with an error is not exact; each error can spoil one more example at most
    if not n - sum(errors) <= exact <= n - max(errors):
        raise ValueError("statistics: no examples with these counts have that many classes all right")


# Regression: exact moments


def _tally_scores(spec: ScoreSpec, predictions: NDArray[np.float64], labels: NDArray[np.float64]) -> NDArray[np.int64]:
    low, high = spec.label_range
    width = high - low
    if ((labels < low - LABEL_SLACK * width) | (labels > high + LABEL_SLACK * width)).any():
        raise ValueError(f"labels must lie within label_range {spec.label_range}")

    statistics = np.zeros(statistics_length(spec), dtype=np.int64)
    statistics[0] = len(labels)
    x = _on_grid("predictions", predictions, spec.label_range)
    y = _on_grid("labels", labels, spec.label_range)
    totals = (sum(x), sum(y), _dot(x, x), _dot(y, y), _dot(x, y))
    statistics[_SUMS] = [limb for total in totals for limb in _to_limbs(total)]

    row, column = _prediction_bin(predictions, low, width), _label_bin(labels, low, width)
    histogram = np.bincount(row * LABEL_BINS + column, minlength=PREDICTION_BINS * LABEL_BINS)
    statistics[_HISTOGRAM] = histogram

    # GLUE keeps labels in single precision, a CSV file gives double: each is a tie among its own kind only.
    centre = (low + np.arange(LABEL_BINS) * width / (LABEL_BINS - 1))[column]
    double = labels == centre
    single = (labels == centre.astype(np.float32)) & ~double
    statistics[_TIES] = np.concatenate([np.bincount(column[t], minlength=LABEL_BINS) for t in (double, single)])
    return statistics


def _on_grid(name: str, values: NDArray[np.float64], label_range: tuple[float, float]) -> list[int]:
    """Values as whole steps from the centre of the label range. One rounding, of at most half a step."""
    low, high = label_range
    _, exponent = math.frexp(high - low)
    with np.errstate(over="ignore"):
        steps = np.rint(np.ldexp(values - (low + (high - low) / 2), GRID_BITS - exponent))
    if (np.abs(steps) > 2.0**VALUE_BITS).any():
        raise ValueError(f"{name} lie more than 2^{VALUE_BITS - GRID_BITS + exponent} from the middle of label_range")
    whole: list[int] = steps.astype(np.int64).tolist()
    return whole


def _to_limbs(total: int) -> list[int]:
    """Limbs from the lowest: 0 <= limb < 2^32, except the highest, which carries the sign."""
    lower = [(total >> (LIMB_BITS * i)) & (2**LIMB_BITS - 1) for i in range(LIMBS - 1)]
    return [*lower, total >> (LIMB_BITS * (LIMBS - 1))]


def _sums(statistics: NDArray[np.int64]) -> list[int]:
    """The sums of x, y, xx, yy, xy in grid steps, exact."""
    limbs = statistics[_SUMS].reshape(5, LIMBS).tolist()
    return [sum(limb << (LIMB_BITS * i) for i, limb in enumerate(total)) for total in limbs]


def _pearson(n: int, sums: list[int]) -> float:
    x, y, xx, yy, xy = sums
    return _correlation(n * xy - x * y, n * xx - x * x, n * yy - y * y, math.nan)


def _correlation(covariance: int, variance_x: int, variance_y: int, undefined: float) -> float:
    """covariance / sqrt(variance_x variance_y); `undefined` where a variance is 0."""
    if variance_x == 0 or variance_y == 0:
        return undefined
    # Python divides integers of any size with one rounding, so the square is exact to its last bit.
    square = covariance * covariance / (variance_x * variance_y)
    return math.copysign(math.sqrt(square), covariance)


def _dot(a: Sequence[int], b: Sequence[int]) -> int:
    return sum(map(mul, a, b))


# Regression: ranks


def _prediction_bin(predictions: NDArray[np.float64], low: float, width: float) -> NDArray[np.int64]:
    """Bin of each prediction; the two edge bins also hold everything beyond them."""
    share = (predictions - low + PREDICTION_MARGIN * width) / ((1 + 2 * PREDICTION_MARGIN) * width)
    return np.clip(np.floor(share * PREDICTION_BINS), 0, PREDICTION_BINS - 1).astype(np.int64)


def _label_bin(labels: NDArray[np.float64], low: float, width: float) -> NDArray[np.int64]:
    """Bin whose centre low + k width / 100 is nearest."""
    return np.rint((labels - low) / width * (LABEL_BINS - 1)).astype(np.int64)


def _spearman(statistics: NDArray[np.int64]) -> tuple[float, float]:
    """Spearman's correlation of the binned values, and a bound on its distance from the exact one.

    Take ranks less their mean, ties averaged. Let r~ be the rank of a bin, the mean of the ranks that its m
    members share out, and r = r~ + e the exact rank. Bins are ordered intervals, so e sums to 0 within each:

        |e|^2 <= E = sum over bins of (m^3 - m - sum over known ties of (t^3 - t)) / 12      (Kendall)
        |r|^2 = |r~|^2 + |e|^2, since r~ is constant in a bin: it lies in [|r~|^2, |r~|^2 + E]
        <rx, ry> = <r~x, r~y> + <r~x, ey> + <ex, r~y> + <ex, ey>

    Within each bin b of y, ey is orthogonal to the mean of r~x, so that by Cauchy-Schwarz |<r~x, ey>| is at
    most sum_b sqrt(W_b E_b), with W_b the sum of squares of r~x around its mean in b. Likewise <ex, r~y>, and
    |<ex, ey>| <= sqrt(Ex Ey). The quotient is extreme at ends of these intervals, and never beyond -1 or 1.
    """
    joint = statistics[_HISTOGRAM].reshape(PREDICTION_BINS, LABEL_BINS)
    used_x, used_y = joint.any(axis=1), joint.any(axis=0)
    ties = statistics[_TIES].reshape(2, LABEL_BINS)[:, used_y].astype(object)
    # Ranks are doubled to be whole; Python integers, as their squares add up to 2^63 at 3 million examples.
    joint_xy = joint[used_x][:, used_y].astype(object)
    count_x, count_y = joint_xy.sum(axis=1), joint_xy.sum(axis=0)
    rank_x, rank_y = _doubled_ranks(count_x), _doubled_ranks(count_y)
    xx, yy = (count_x * rank_x**2).sum(), (count_y * rank_y**2).sum()
    if xx == 0 or yy == 0:
        return math.nan, math.nan
    xy = rank_x @ joint_xy @ rank_y

    error_x, error_y = _spread(count_x), _spread(count_y) - _spread(ties).sum(axis=0)
    reach = (
        _root_dot(_within(joint_xy, rank_x, count_y), error_y)
        + _root_dot(_within(joint_xy.T, rank_y, count_x), error_x)
        + math.sqrt(error_x.sum() * error_y.sum())
    )
    correlation = _correlation(xy, xx, yy, math.nan)
    lengths = math.sqrt(xx * yy), math.sqrt((xx + error_x.sum()) * (yy + error_y.sum()))
    highest = min(1.0, max((xy + reach) / length for length in lengths))
    lowest = max(-1.0, min((xy - reach) / length for length in lengths))
    return correlation, min(2.0, max(highest - correlation, correlation - lowest) + _FLOAT_ROUNDING)


def _doubled_ranks(counts: NDArray[np.object_]) -> NDArray[np.object_]:
    """Twice the mean rank of each bin, less twice the mean of all ranks."""
    through = counts.cumsum()
    ranks: NDArray[np.object_] = 2 * through - counts - through[-1:]
    return ranks


def _spread(counts: NDArray[np.object_]) -> NDArray[np.object_]:
    """Sum of squares of `counts` untied doubled ranks around their mean, 4 (m^3 - m) / 12: whole."""
    spread: NDArray[np.object_] = (counts**3 - counts) // 3
    return spread


def _within(joint: NDArray[np.object_], ranks: NDArray[np.object_], counts: NDArray[np.object_]) -> NDArray[np.object_]:
    """Per column of `joint`, the sum of squares of the ranks of its rows around their mean in it."""
    # One division of exact integers: the difference of two floats could lose every digit.
    within: NDArray[np.object_] = (counts * (ranks**2 @ joint) - (ranks @ joint) ** 2) / counts
    return within


def _root_dot(a: NDArray[np.object_], b: NDArray[np.object_]) -> float:
    return float(np.sqrt(a.astype(np.float64) * b.astype(np.float64)).sum())


def _check_regression(statistics: NDArray[np.int64]) -> None:
    n = int(statistics[0])
    if not 0 <= n <= MAX_EXAMPLES:
        raise ValueError(f"statistics: the count n is not within 0 .. {MAX_EXAMPLES}")

    lower = statistics[_SUMS].reshape(5, LIMBS)[:, :-1]
    if lower.min() < 0 or lower.max() > n * (2**LIMB_BITS - 1):
        raise ValueError("statistics: a lower limb of a sum is not within 0 .. n (2^32 - 1)")
    x, y, xx, yy, xy = _sums(statistics)
    variance_x, variance_y = n * xx - x * x, n * yy - y * y
    if variance_x < 0 or variance_y < 0 or (n * xy - x * y) ** 2 > variance_x * variance_y:
        raise ValueError("statistics: no n pairs of numbers have these sums (Cauchy-Schwarz)")
    if max(xx, yy) > n << (2 * VALUE_BITS):
        raise ValueError("statistics: a sum of squares is larger than n examples can make it")

    histogram, ties = statistics[_HISTOGRAM], statistics[_TIES].reshape(2, LABEL_BINS)
    if histogram.min() < 0 or ties.min() < 0:
        raise ValueError("statistics: a count of the histogram or of its ties is negative")
    if sum(histogram.tolist()) != n:
        raise ValueError("statistics: the histogram does not hold n examples")
    held = histogram.reshape(PREDICTION_BINS, LABEL_BINS).sum(axis=0)
    # Each count first: two that are each at most n cannot wrap when added.
    if (ties > held).any() or (ties.sum(axis=0) > held).any():
        raise ValueError("statistics: a label bin has more ties than examples")
