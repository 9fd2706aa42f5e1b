"""One-run auditing: the bound by hand, and never above the truth beyond its confidence."""

import math

import numpy as np
import pytest
from scipy import stats

from common.accounting import epsilon
from simulations.audits.one_run import distance, gaussian_epsilon, guess, judge, lower_bound, p_value


def test_the_p_value_is_the_binomial_tail_and_the_delta_term():
    # 3 of 4 right at epsilon ln 3, so that a guess is right with 3/4: P[B >= 3] = 4 (3/4)^3 (1/4) + (3/4)^4 = 189/256;
    # below are P[B = 2] = 54/256, P[B = 1] = 12/256, P[B = 0] = 1/256; the largest of 54, 66/2, 67/3 is 54
    assert p_value(4, 4, 3, math.log(3), 0.0) == pytest.approx(189 / 256)
    assert p_value(10, 4, 3, math.log(3), 0.001) == pytest.approx(189 / 256 + 2 * 10 * 0.001 * 54 / 256)
    assert p_value(4, 4, 0, 1.0, 0.0) == p_value(4, 4, 1, 9.0, 0.5) == 1.0
    # the mass lies well below v: there a mean over more than one value is the most
    honest = 0.5
    pmf = stats.binom.pmf(np.arange(8), 8, honest)
    most = max(pmf[8 - i : 8].sum() / i for i in range(1, 9))
    assert p_value(8, 8, 8, 0.0, 0.01) == pytest.approx(honest**8 + 2 * 8 * 0.01 * most)
    with pytest.raises(ValueError, match="5 right of 4"):
        p_value(10, 4, 5, 1.0, 0.0)


def test_the_bound_of_guesses_that_are_all_right():
    # all r right: honest^r = 0.05, epsilon = logit(0.05^(1/r))
    for guesses in (8, 100, 1000):
        honest = 0.05 ** (1 / guesses)
        assert lower_bound(guesses, guesses, guesses, 0.0) == pytest.approx(math.log(honest / (1 - honest)), abs=1e-5)
    assert lower_bound(100, 100, 50, 0.0) == 0.0
    assert lower_bound(100, 4, 4, 0.0) == 0.0  # 1/16 is above 5 %
    assert lower_bound(100, 100, 99, 1e-3) < lower_bound(100, 100, 99, 1e-5) < lower_bound(100, 100, 99, 0.0)


def test_guesses_are_the_highest_in_and_the_lowest_out():
    scores = np.array([0.9, 0.1, 0.8, 0.2, 0.5, 0.4, 0.6, 0.3])
    inside = np.array([1, 0, 0, 1, 1, 1, 0, 0], dtype=bool)
    assert guess(scores, inside, 0.25) == (2, 2)
    assert guess(scores, inside, 0.5) == (4, 2)
    assert guess(scores, inside, 1 / 100) == (2, 2)


def test_randomised_response_is_never_above_its_epsilon_and_comes_near():
    """Each bit is told truly with exp(e) / (1 + exp(e)): epsilon e, delta 0, and the bound's worst case."""
    rng, runs, found = np.random.default_rng(1), 100, []
    for e in (0.5, 2.0):
        true = 1 / (1 + math.exp(-e))
        above = 0
        for _ in range(runs):
            inside = rng.random(400) < 0.5
            told = inside ^ (rng.random(400) > true)
            above += judge(told + 1e-3 * rng.random(400), inside, delta=1e-5).epsilon > e
        assert above <= stats.binom.ppf(0.999, runs, 0.05)
        inside = rng.random(40_000) < 0.5
        told = inside ^ (rng.random(40_000) > true)
        found.append(judge(told + 1e-3 * rng.random(40_000), inside, delta=1e-9).epsilon)
    assert found == [pytest.approx(0.5, rel=0.15), pytest.approx(2.0, rel=0.05)]
    assert found[0] < 0.5 and found[1] < 2.0


def test_the_gaussian_mechanism_is_never_above_its_epsilon():
    rng, runs = np.random.default_rng(2), 100
    truth = epsilon(noise_multiplier=1.0, rate=1.0, steps=1, delta=1e-5)
    findings = []
    for _ in range(runs):
        inside = rng.random(1000) < 0.5
        findings.append(judge(inside + rng.standard_normal(1000), inside, delta=1e-5))
    assert max(each.epsilon for each in findings) < truth  # far below: the bound is loose for normal noise
    assert min(each.epsilon for each in findings) > 0.5
    # the Gaussian bound is as tight as its 95 % say
    wrong = sum(each.gaussian_low > truth for each in findings)
    assert stats.binom.ppf(0.001, runs, 0.05) <= wrong <= stats.binom.ppf(0.999, runs, 0.05)
    assert np.mean([each.gaussian for each in findings]) == pytest.approx(truth, rel=0.02)
    assert np.mean([each.gaussian_low for each in findings]) > 0.85 * truth


@pytest.mark.parametrize("noise", [0.3, 1.0, 4.0])
def test_two_normal_distributions_have_the_epsilon_of_the_accountant(noise):
    assert gaussian_epsilon(1 / noise, 1e-5) == pytest.approx(
        epsilon(noise_multiplier=noise, rate=1.0, steps=1, delta=1e-5), rel=0.01
    )
    assert gaussian_epsilon(0.0, 1e-5) == 0.0


def test_the_distance_is_in_deviations_and_its_limit_that_of_noncentral_t():
    inside = np.array([1, 1, 1, 0, 0, 0], dtype=bool)
    mu, low = distance(np.array([4.0, 5.0, 6.0, 1.0, 2.0, 3.0]), inside)  # means 5 and 2, both variances 1
    assert mu == pytest.approx(3.0)
    assert stats.nct.sf(3.0 * math.sqrt(1.5), 4, low * math.sqrt(1.5)) == pytest.approx(0.05, abs=1e-6)
    assert distance(np.array([1.0, 2.0, 3.0, 4.0, 5.0, 6.0]), inside) == (0.0, 0.0)
    rng = np.random.default_rng(0)
    far = rng.standard_normal(200) + 40.0 * (np.arange(200) % 2)  # beyond what the distribution can be computed for
    mu, low = distance(far, np.arange(200) % 2 == 1)
    assert 0.85 * mu < low < mu


def test_what_cannot_be_judged_is_said():
    with pytest.raises(ValueError, match="not finite"):
        judge(np.array([1.0, np.nan, 0.0, 2.0]), np.array([True, True, False, False]), delta=1e-5)
    with pytest.raises(ValueError, match="1 of 3 canaries are in"):
        judge(np.zeros(3), np.array([True, False, False]), delta=1e-5)
