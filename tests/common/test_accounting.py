"""Epsilon: two libraries agree, a closed form agrees, and the noise that is found spends what it may."""

import math

import pytest
from scipy.stats import norm

from common.accounting import epsilon, noise_for, spent

DELTA = 1e-5
TABLE = [
    (1.0, 0.01, 2000), (1.0, 0.3, 20), (0.8, 0.05, 200), (0.7, 0.1, 50), (2.0, 0.5, 100), (4.0, 1.0, 10),
    (1.5, 0.9, 12), (1.2, 0.02, 1000),
]  # fmt: skip


@pytest.mark.parametrize("noise, rate, steps", TABLE)
def test_two_libraries_agree_to_two_percent(noise, rate, steps):
    pld, prv = (
        epsilon(noise_multiplier=noise, rate=rate, steps=steps, delta=DELTA, accountant=accountant)
        for accountant in ("pld", "prv")
    )
    assert prv == pytest.approx(pld, rel=0.02)
    rdp = epsilon(noise_multiplier=noise, rate=rate, steps=steps, delta=DELTA, accountant="rdp")
    assert pld < rdp < 1.3 * pld


@pytest.mark.parametrize("accountant", ["pld", "prv"])
def test_without_sampling_it_is_the_gaussian_mechanism_s(accountant):
    # Balle and Wang 2018 (https://arxiv.org/abs/1805.06530), theorem 8; n steps are one with noise over sqrt(n)
    found = epsilon(noise_multiplier=4.0, rate=1.0, steps=4, delta=DELTA, accountant=accountant)
    noise = 2.0
    delta = norm.cdf(0.5 / noise - found * noise) - math.exp(found) * norm.cdf(-0.5 / noise - found * noise)
    assert delta == pytest.approx(DELTA, rel=0.2)  # of epsilon that is 2 %


@pytest.mark.parametrize("accountant", ["pld", "prv", "rdp"])
def test_steps_add_up_in_any_order_and_cut(accountant):
    way = {"delta": DELTA, "accountant": accountant}
    parts = [(1.0, 0.1, 3), (2.0, 0.2, 5), (1.0, 0.1, 4)]
    assert spent(parts, **way) == spent([(2.0, 0.2, 5), (1.0, 0.1, 7)], **way)
    assert spent(parts, **way) > spent([(1.0, 0.1, 7)], **way) > spent([], **way) == 0.0


def test_no_noise_is_no_bound_and_nobody_in_it_spends_nothing():
    assert epsilon(noise_multiplier=0.0, rate=0.1, steps=1, delta=DELTA) == math.inf
    assert epsilon(noise_multiplier=0.0, rate=0.0, steps=1, delta=DELTA) == 0.0
    assert epsilon(noise_multiplier=1.0, rate=0.1, steps=0, delta=DELTA) == 0.0


@pytest.mark.parametrize("target", [1.0, 8.0])
def test_the_noise_that_is_found_spends_what_it_may_and_hardly_less(target):
    noise = noise_for(target, rate=0.2, steps=30, delta=DELTA)
    found = epsilon(noise_multiplier=noise, rate=0.2, steps=30, delta=DELTA)
    assert 0.99 * target < found <= target
