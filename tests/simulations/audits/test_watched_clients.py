"""Attacks of a server that sees each client's model or votes, beside a loop over clients and a hand-worked case."""

import numpy as np
import pytest
from scipy.stats import norm

from simulations.audits.fedmia import all_for_one, moved
from simulations.audits.rates import auc
from simulations.audits.votes import SURE, as_logits

CLIENTS = np.array([2, 5, 7, 9])


def test_all_for_one_is_that_of_a_loop_over_examples():
    rng = np.random.default_rng(0)
    owner = rng.choice([2, 5, 7, 9, 11], 60)  # 11 is not in the round
    phi = rng.normal(0, 2, (4, 60))
    found = all_for_one(phi, CLIENTS, owner)
    for x, one in enumerate(owner):
        if one == 11:
            assert found[x] == 0.0
            continue
        others = [phi[k, x] for k, client in enumerate(CLIENTS) if client != one]
        own = phi[CLIENTS.tolist().index(one), x]
        assert found[x] == pytest.approx(norm.logcdf(own, np.mean(others), np.std(others, ddof=1)))


def test_a_client_that_is_as_sure_as_the_others_says_half():
    """The others say 1, 2 and 3: mean 2, deviation 1."""
    phi = np.array([[2.0, 3.0], [1.0, 1.0], [2.0, 2.0], [3.0, 3.0]])
    found = all_for_one(phi, CLIENTS, np.array([2, 2]))
    assert np.exp(found) == pytest.approx([0.5, norm.cdf(1.0)])


@pytest.mark.parametrize("gain, low, high", [(0.0, 0.45, 0.55), (4.0, 0.85, 1.0)])
def test_what_a_client_has_memorised_is_found_and_nothing_else(gain, low, high):
    rng = np.random.default_rng(1)
    owner, inside = rng.choice(CLIENTS, 2000), rng.random(2000) < 0.5
    phi = rng.normal(0, 1, (4, 2000)) + rng.normal(0, 2, 2000)
    phi += gain * (inside & (owner == CLIENTS[:, None]))
    scores = all_for_one(phi, CLIENTS, owner)
    assert low <= auc(scores[inside], scores[~inside]) <= high


def test_a_clients_model_is_the_rounds_and_its_update():
    found = moved({"w": np.array([1.0, 2.0], np.float32)}, {"w": np.array([0.5, -2.0])})
    assert found["w"].tolist() == [1.5, 0.0] and found["w"].dtype == np.float32


def test_a_stand_in_learns_from_logits_chances_or_labels():
    logits, chances = np.array([[0.3, -1.2]]), np.array([[0.25, 0.75]])
    assert as_logits("fedmd", logits, labels_alone=False) == pytest.approx(logits)
    learnt = as_logits("ds-fl", chances, labels_alone=False)
    assert np.exp(learnt) == pytest.approx(chances)  # their softmax is what the client said
    assert as_logits("fedmd", logits, labels_alone=True).tolist() == [[SURE, 0.0]]
