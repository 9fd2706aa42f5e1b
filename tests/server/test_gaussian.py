"""The noise is normal, of the deviation that was asked for, whole, and never the same twice."""

import numpy as np
import pytest
from scipy import stats

from server.gaussian import BLOCK, gaussian


@pytest.mark.parametrize("deviation", [1.0, 3.7e5, 0.708 * 2.0**32, 2.0**57])
def test_the_measured_deviation_is_the_one_asked_for(deviation):
    """Its standard error is 0.2 % here."""
    found = gaussian(100_000, deviation)
    expected = np.sqrt(deviation**2 + (1 / 12 if deviation < 100 else 0))  # rounding adds 1/12
    assert found.std() == pytest.approx(expected, rel=0.02)
    assert abs(found.mean()) < 5 * expected / np.sqrt(len(found))
    assert found.dtype == np.int64


def test_the_noise_is_normal():
    assert stats.kstest(gaussian(50_000, 2.0**32) / 2.0**32, "norm").pvalue > 1e-6


def test_small_noise_has_the_chances_of_a_rounded_normal():
    counts = np.bincount(gaussian(200_000, 0.8) + 10, minlength=21)
    edges = np.arange(-10, 12) - 0.5
    chances = np.diff(stats.norm.cdf(edges / 0.8))
    kept = chances * 200_000 > 5
    assert stats.chisquare(counts[kept], chances[kept] / chances[kept].sum() * counts[kept].sum()).pvalue > 1e-6


def test_all_blocks_are_drawn_and_no_two_draws_are_alike():
    first, second = gaussian(BLOCK + 3, 2.0**40), gaussian(BLOCK + 3, 2.0**40)
    assert len(np.unique(np.concatenate([first, second]))) > 2 * BLOCK  # of 2^40 numbers hardly any comes twice


def test_no_noise_is_zero_and_what_does_not_fit_is_refused():
    assert not gaussian(5, 0.0).any()
    for wrong in (-1.0, 2.0**59, np.nan):
        with pytest.raises(ValueError, match="deviation"):
            gaussian(5, wrong)
