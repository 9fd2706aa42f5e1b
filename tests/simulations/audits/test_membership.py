"""Membership attacks beside loops that follow the papers line by line, on scores that were planted."""

import math

import numpy as np
import pytest
from scipy.stats import norm

from simulations.audits.lira import lira
from simulations.audits.loss_threshold import LossThreshold
from simulations.audits.membership import log_confidence, scaled_confidence
from simulations.audits.rates import auc, tpr_at
from simulations.audits.rmia import rmia
from simulations.audits.shadows import Answers

MODELS, EXAMPLES = 12, 400


def planted(gain, seed=0, models=MODELS, examples=EXAMPLES):
    """Scaled confidences of models that are surer, by about ``gain`` deviations, of what they were trained on."""
    rng = np.random.default_rng(seed)
    inside = rng.random((models, examples)) < 0.5
    hard, memorised = rng.normal(1, 2, examples), rng.exponential(gain, examples) if gain else np.zeros(examples)
    phi = hard + np.where(inside, memorised, 0) + rng.normal(0, 1, (models, examples))
    return phi, inside


def logistic(phi):
    return 1 / (1 + np.exp(-phi))


def by_hand_lira(phi, inside):
    """Algorithm 1 of the paper, one example of one target at a time; the deviations are those of all examples."""
    models, examples = phi.shape
    online, offline = np.full(phi.shape, np.nan), np.full(phi.shape, np.nan)
    for target in range(models):
        parts, squares, free = {}, [0.0, 0.0], [0, 0]
        for x in range(examples):
            for held in (False, True):
                values = [phi[k, x] for k in range(models) if k != target and inside[k, x] == held]
                parts[x, held] = np.mean(values) if values else math.nan
                squares[held] += sum((value - parts[x, held]) ** 2 for value in values)
                free[held] += max(len(values) - 1, 0)
        std = [math.sqrt(squares[held] / free[held]) for held in (False, True)]
        for x in range(examples):
            value, out, into = phi[target, x], parts[x, False], parts[x, True]
            online[target, x] = norm.logpdf(value, into, std[1]) - norm.logpdf(value, out, std[0])
            offline[target, x] = norm.cdf(value, out, std[0])
    return online, offline


def by_hand_rmia(p, inside, population, gamma, a, *, online):
    models, examples = p.shape
    found = np.full(p.shape, np.nan)
    for target in range(models):
        others = [k for k in range(models) if k != target]
        mean_z = population[others].mean(axis=0)
        for x in range(examples):
            into = [p[k, x] for k in others if inside[k, x]]
            out = [p[k, x] for k in others if not inside[k, x]]
            if not out or (online and not into):
                continue
            of_x = (np.mean(into) + np.mean(out)) / 2 if online else ((1 + a) * np.mean(out) + 1 - a) / 2
            of_z = mean_z if online else ((1 + a) * mean_z + 1 - a) / 2
            found[target, x] = np.mean((p[target, x] / of_x) / (population[target] / of_z) >= gamma)
    return found


def test_lira_is_that_of_a_loop_over_examples():
    phi, inside = planted(1.0, models=6, examples=60)
    inside[:, 0] = np.arange(6) == 2  # of the third model no reference holds it
    found, (online, offline) = lira(phi, inside), by_hand_lira(phi, inside)
    np.testing.assert_allclose(found["online"], online, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(norm.cdf(found["offline"]), offline, rtol=1e-9, atol=1e-12)
    assert np.isnan(found["online"][2, 0])


def test_with_many_models_lira_knows_each_examples_own_deviation():
    phi, inside = planted(1.0, models=64, examples=20)
    loud = phi * np.where(np.arange(20) == 0, 10.0, 1.0)
    target = lira(loud, inside)["offline"][5]
    out = [loud[k, 0] for k in range(64) if k != 5 and not inside[k, 0]]
    assert target[0] == pytest.approx((loud[5, 0] - np.mean(out)) / np.std(out, ddof=1))


@pytest.mark.parametrize("online", [True, False])
def test_rmia_is_that_of_a_loop_over_examples(online):
    phi, inside = planted(1.0, models=6, examples=60)
    p, population = logistic(phi), logistic(np.random.default_rng(1).normal(1, 2, (6, 50)))
    found = rmia(p, inside, population, 1.1, 0.3)["online" if online else "offline"]
    np.testing.assert_allclose(found, by_hand_rmia(p, inside, population, 1.1, 0.3, online=online), atol=1e-12)


def rates(scores, inside, asked=0.01):
    known = np.isfinite(scores)
    members, others = scores[known & inside], scores[known & ~inside]
    return tpr_at(members, others, asked), auc(members, others)


def attacks(phi, inside):
    population = np.random.default_rng(2).normal(1, 2, (len(phi), 500)) + np.random.default_rng(3).normal(0, 1, 500)
    yield from lira(phi, inside).values()
    yield from rmia(logistic(phi), inside, logistic(population), 1.0, 0.3).values()


def test_what_was_memorised_is_found():
    phi, inside = planted(3.0)
    for scores in attacks(phi, inside):
        found, area = rates(scores, inside)
        assert found.low > found.chance
        assert area > 0.75
    assert rates(lira(phi, inside)["online"], inside)[0].tpr > 2 * rates(phi, inside)[0].tpr


def test_models_that_were_not_trained_on_them_say_nothing():
    phi, inside = planted(0.0, models=16, examples=1000)
    for scores in attacks(phi, inside):
        found, area = rates(scores, inside)
        assert found.low <= found.chance
        assert found.high > 0.005
        assert area == pytest.approx(0.5, abs=0.015)


def test_untrained_models_that_all_say_the_same_accuse_nobody():
    phi, inside = np.tile(planted(0.0)[0][0], (MODELS, 1)), planted(0.0)[1]
    for scores in lira(phi, inside).values():
        assert rates(scores, inside)[0].tpr <= 0.02


def test_confidences_are_those_of_the_softmax():
    logits, labels = np.random.default_rng(0).normal(0, 3, (2, 5, 3)).astype(np.float32), np.array([0, 2, 1, 1, 0])
    p = np.exp(logits.astype(np.float64))
    p = (p / p.sum(-1, keepdims=True))[:, np.arange(5), labels]
    np.testing.assert_allclose(log_confidence(logits, labels), np.log(p), rtol=1e-12)
    np.testing.assert_allclose(scaled_confidence(logits, labels), np.log(p / (1 - p)), rtol=1e-6)
    answers = Answers(np.ones((2, 5), dtype=bool), logits, labels, logits, labels)
    np.testing.assert_allclose(LossThreshold().scores(answers)[""], np.log(p))


def test_a_confidence_of_nearly_one_is_not_rounded_to_it():
    assert scaled_confidence(np.array([[[60.0, 0.0]]], dtype=np.float32), np.array([0]))[0, 0] == 60.0
