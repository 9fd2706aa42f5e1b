"""The parts of a noise are discrete Gaussians, and together they are the whole."""

import math

import numpy as np
import pytest
from scipy import stats

from common.distributed_noise import Coins, discrete_gaussian, distributed_noise, surplus


def test_a_small_draw_has_the_weights_of_the_discrete_gaussian():
    draws, deviation = discrete_gaussian(60_000, 1.7, Coins()), 1.7
    support = np.arange(-6, 7)
    weights = np.exp(-(np.arange(-40, 41) ** 2) / (2 * deviation**2))
    expected = np.exp(-(support**2) / (2 * deviation**2)) / weights.sum()
    counts = np.array([(draws == value).sum() for value in support])
    inside = counts.sum() / len(draws)
    assert inside == pytest.approx(expected.sum(), abs=0.002)
    assert stats.chisquare(counts, expected / expected.sum() * counts.sum()).pvalue > 1e-6


@pytest.mark.parametrize("deviation", [10.0, 2.0**32, 2.0**45])
def test_a_large_draw_is_a_gaussian_of_the_right_deviation(deviation):
    draws = discrete_gaussian(50_000, deviation, Coins())
    assert draws.std() == pytest.approx(deviation, rel=0.02)
    assert abs(draws.mean()) < 5 * deviation / math.sqrt(50_000)
    spread = np.random.default_rng(0).uniform(-0.5, 0.5, len(draws))  # the steps of a small one are no gaps
    assert stats.kstest((draws + spread) / deviation, "norm").pvalue > 1e-6


def test_the_parts_of_as_many_clients_as_must_stay_are_the_whole():
    sigma = 3.0 * 2.0**32
    whole = sum(distributed_noise((200, 150), sigma, 43) for _ in range(43))
    assert whole.shape == (200, 150)
    assert whole.std() == pytest.approx(sigma, rel=0.02)
    assert surplus(sigma, 43) == 0.0
    assert surplus(1.0, 2) == pytest.approx(10 * math.exp(-(math.pi**2) / 2))


@pytest.mark.parametrize("sigma", [1.0, 2.0**60, math.nan])
def test_a_part_that_is_no_gaussian_or_leaves_64_bits_is_refused(sigma):
    with pytest.raises(ValueError, match="a part of the noise"):
        distributed_noise((3,), sigma, 4)


def test_the_same_key_gives_the_same_noise_and_no_key_another_each_time():
    with_key = [distributed_noise((50,), 2.0**32, 3, b"k" * 32) for _ in range(2)]
    without = [distributed_noise((50,), 2.0**32, 3) for _ in range(2)]
    assert (with_key[0] == with_key[1]).all()
    assert not (without[0] == without[1]).any()
