"""Attacks of a server that sees each client's model or votes, beside a loop over clients and a hand-worked case."""

import numpy as np
import pytest
from scipy.stats import norm

from common.config import from_flat
from common.progress import Silent
from simulations.audits.fedmia import FedMia, all_for_one, combined, moved
from simulations.audits.rates import auc
from simulations.audits.votes import SURE, as_logits
from simulations.laboratory import Laboratory
from tests.conftest import make_reviews

CLIENTS = np.array([2, 5, 7, 9])


def test_all_for_one_is_that_of_a_loop_over_examples():
    rng = np.random.default_rng(0)
    owner = rng.choice([2, 5, 7, 9, 11], 60)  # 11 is not in the round
    phi = rng.normal(0, 2, (4, 60))
    found = all_for_one(phi, CLIENTS, owner)
    for x, one in enumerate(owner):
        if one == 11:
            assert np.isnan(found[x])
            continue
        others = [phi[k, x] for k, client in enumerate(CLIENTS) if client != one]
        own = phi[CLIENTS.tolist().index(one), x]
        assert found[x] == pytest.approx(norm.logcdf(own, np.mean(others), np.std(others, ddof=1)))


def test_a_client_that_is_as_sure_as_the_others_says_half():
    """The others say 1, 2 and 3: mean 2, deviation 1."""
    phi = np.array([[2.0, 3.0], [1.0, 1.0], [2.0, 2.0], [3.0, 3.0]])
    found = all_for_one(phi, CLIENTS, np.array([2, 2]))
    assert np.exp(found) == pytest.approx([0.5, norm.cdf(1.0)])


def test_rounds_are_combined_as_fisher_does():
    p = np.array([[0.3, 0.7, np.nan], [0.9, np.nan, np.nan]])
    both, one, none = combined(np.log(p))
    # of two: Pr[Gamma(2, 1) >= x] = (1 + x) exp(-x) at x = -log 0.27
    assert 1 / (1 + np.exp(-both)) == pytest.approx((1 - np.log(0.27)) * 0.27)
    assert 1 / (1 + np.exp(-one)) == pytest.approx(0.7)
    assert np.isnan(none)
    assert np.isfinite(combined(np.array([[-1e5, -0.0]]))).all()


def test_how_often_a_client_was_drawn_says_nothing_of_what_it_holds():
    """The share of the rounds' p is uniform: whoever is in fewer rounds is not accused more."""
    rng = np.random.default_rng(0)
    p = np.log(rng.random((8, 4000)))
    p[1:, :2000] = np.nan
    assert auc(combined(p)[:2000], combined(p)[2000:]) == pytest.approx(0.5, abs=0.03)


@pytest.mark.parametrize("strategy", ["median", "multi-krum"])
def test_updates_that_a_rule_compares_are_watched_one_by_one(tmp_path, tiny_teacher, strategy):
    keys = {
        "task": "text", "data.source": str(make_reviews(tmp_path / "reviews.csv")), "data.clients": 6,
        "data.max-length": 32, "data.alpha": 10.0, "teacher.model": str(tiny_teacher), "student.layers": 2,
        "rounds": 2, "server.cohort": 5, "server.strategy": strategy,
    }  # fmt: skip
    lab = Laboratory(from_flat(keys), Silent())
    (row,) = FedMia(models=1).run(lab, Silent())
    assert 0.0 <= row["success"] <= 1.0 and row["members"] > 10


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
