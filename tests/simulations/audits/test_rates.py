"""Rates of membership attacks, by hand and beside scikit-learn and SciPy."""

import numpy as np
import pytest
from scipy.stats import binomtest
from sklearn.metrics import roc_auc_score, roc_curve

from simulations.audits.rates import auc, clopper_pearson, roc, tpr_at


def scores(ties, seed=0):
    rng = np.random.default_rng(seed)
    members, others = rng.normal(0.5, 1, 700), rng.normal(0, 1, 500)
    return (members.round(1), others.round(1)) if ties else (members, others)


def test_a_threshold_never_accuses_more_others_than_it_may():
    """Of ten others one is near the top: at 10 % it may be accused, at 9 % none, so the threshold is above it."""
    members, others = np.array([9.0, 8.0, 7.0, 7.0, -3.5]), np.array([8.5, 7.0, *range(-8, 0)])
    assert (tpr_at(members, others, 0.1).tpr, tpr_at(members, others, 0.1).fpr) == (0.4, 0.1)
    assert (tpr_at(members, others, 0.09).tpr, tpr_at(members, others, 0.09).fpr) == (0.2, 0.0)
    # the two members at 7 stand and fall with the other example there
    assert (tpr_at(members, others, 0.19).tpr, tpr_at(members, others, 0.2).tpr) == (0.4, 0.8)


def test_scores_that_are_all_the_same_accuse_nobody():
    same = np.zeros(2000)
    found = tpr_at(same, same, 0.01)
    assert (found.tpr, found.fpr, found.low) == (0.0, 0.0, 0.0)
    assert found.chance == found.high == pytest.approx(1 - 0.025 ** (1 / 2000))
    assert auc(same, same) == 0.5


@pytest.mark.parametrize("ties", [False, True])
def test_auc_and_roc_are_those_of_scikit_learn(ties):
    members, others = scores(ties)
    truth, both = np.repeat([1, 0], [700, 500]), np.concatenate([members, others])
    assert auc(members, others) == pytest.approx(roc_auc_score(truth, both), abs=1e-12)
    fpr, tpr, _ = roc_curve(truth, both, drop_intermediate=False)
    ours = roc(members, others)
    np.testing.assert_allclose(ours[0], fpr)
    np.testing.assert_allclose(ours[1], tpr)
    for asked in (0.001, 0.01, 0.1):
        assert tpr_at(members, others, asked).tpr == tpr[fpr <= asked].max()


@pytest.mark.parametrize("hits", [0, 1, 7, 40])
def test_the_interval_is_the_exact_one_of_scipy(hits):
    exact = binomtest(hits, 40).proportion_ci(0.95, method="exact")
    assert clopper_pearson(hits, 40) == pytest.approx((exact.low, exact.high), abs=1e-10)
