"""Attacks on a small real problem: where each rule holds, and where it breaks.

Nine clients learn scikit-learn's handwritten digits with logistic regression, six rounds long. f = 3 is what
Krum bears among nine (n = 2f + 3), and what trimmed-mean and multi-krum are told to bear as well.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from common.config import from_flat
from server.robust import ROBUST_RULES, bound_norm
from server.rules import SERVER_RULES
from simulations.attacks import flip_labels, scale, sign_flip

CLIENTS, F, CLASSES, ROUNDS, TRAINED_ON = 9, 3, 10, 6, 1300
CLOSE = 0.04  # of the accuracy without an attack; a rule that keeps this close holds
BROKEN = 0.6  # below this a model is of no use here; logistic regression reaches 0.93
KEYS = from_flat({"server.byzantine": F}).server


@dataclass(frozen=True)
class Outcome:
    """What a federation came to.

    Attributes:
        accuracy: on the test digits, after the last round.
        uphill: rounds in which the step went against the honest clients' mean update.
    """

    accuracy: float
    uphill: int


# --- the attacks: from the hostile clients' honest updates to what they send ---------------------------

ATTACKS: dict[str, Callable[[list], list]] = {
    "none": lambda updates: updates,
    "label flip": lambda updates: updates,  # the damage is done in training
    "sign flip": lambda updates: [sign_flip(update) for update in updates],
    "times 100": lambda updates: [scale(update, 100.0) for update in updates],
    "times -100": lambda updates: [scale(update, -100.0) for update in updates],
    # all send the same: far away, or so near that it could be one of the honest
    "collude far": lambda updates: len(updates) * [scale(updates[0], -100.0)],
    "collude near": lambda updates: len(updates) * [scale(updates[0], -0.3)],
}


def mean(updates, keys):
    """FedAvg's: the shards are of equal size."""
    return {name: np.mean([update[name].astype(np.float64) for update in updates], axis=0) for name in updates[0]}


def bounded_mean(updates, keys):
    """FedAvg's after bounding every norm at what an honest update has here."""
    return mean([bound_norm(update, 2.0) for update in updates], keys)


RULES = {"fedavg": mean, "fedavg, bounded": bounded_mean, **ROBUST_RULES}


# --- the federation -----------------------------------------------------------------------------


@cache
def digits():
    """Rows and labels, shuffled; the first 1300 are trained on."""
    rows, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(labels))
    return (rows[order] / 16.0).astype(np.float32), labels[order]


@cache
def shards(skewed):
    """Row numbers by client: equal random parts, or each class cut by a Dirichlet(1) draw."""
    rows = np.arange(TRAINED_ON)
    if not skewed:
        return np.array_split(rows, CLIENTS)
    rng, found = np.random.default_rng(0), [[] for _ in range(CLIENTS)]
    for label in range(CLASSES):
        own = rows[digits()[1][:TRAINED_ON] == label]
        cuts = (np.cumsum(rng.dirichlet(np.ones(CLIENTS)))[:-1] * len(own)).astype(int)
        for client, part in enumerate(np.split(own, cuts)):
            found[client].extend(part)
    return [np.array(part) for part in found]


def train(weights, rows, labels):
    """A client's update: five full-batch gradient steps."""
    trained = {name: torch.tensor(array, requires_grad=True) for name, array in weights.items()}
    inputs, targets = torch.from_numpy(rows), torch.from_numpy(labels)
    for _ in range(5):
        logits = inputs @ trained["weight"].T + trained["bias"]
        loss = torch.nn.functional.cross_entropy(logits, targets)
        gradients = torch.autograd.grad(loss, list(trained.values()))
        with torch.no_grad():
            for parameter, gradient in zip(trained.values(), gradients, strict=True):
                parameter.sub_(gradient)
    return {name: trained[name].detach().numpy() - array for name, array in weights.items()}


@cache
def federate(rule, attack="none", hostile=0, skewed=False):
    """Run it; the first ``hostile`` clients attack."""
    rows, labels = digits()
    weights = {"weight": np.zeros((CLASSES, rows.shape[1]), np.float32), "bias": np.zeros(CLASSES, np.float32)}
    uphill = 0
    for _ in range(ROUNDS):
        updates = []
        for client, shard in enumerate(shards(skewed)):
            lying = attack == "label flip" and client < hostile
            updates.append(train(weights, rows[shard], flip_labels(labels[shard], CLASSES) if lying else labels[shard]))
        sent = ATTACKS[attack](updates[:hostile]) + updates[hostile:]
        step, honest = RULES[rule](sent, KEYS), mean(updates[hostile:], KEYS)
        uphill += sum(float((step[name] * honest[name]).sum()) for name in step) < 0
        weights = SERVER_RULES["fedavg"](weights, step, {}, KEYS)
    guesses = (rows[TRAINED_ON:] @ weights["weight"].T + weights["bias"]).argmax(axis=1)
    return Outcome(float((guesses == labels[TRAINED_ON:]).mean()), uphill)


def loss_of(rule, attack, hostile, skewed=False):
    """Accuracy lost to the attack, against FedAvg without one."""
    return federate("fedavg", skewed=skewed).accuracy - federate(rule, attack, hostile, skewed).accuracy


# --- without an attack --------------------------------------------------------------------------


@pytest.mark.parametrize("rule", RULES)
def test_without_an_attack_every_rule_learns(rule):
    assert federate("fedavg").accuracy > 0.9
    assert abs(loss_of(rule, "none", 0)) < CLOSE
    assert federate(rule).uphill == 0


# --- the mean -----------------------------------------------------------------------------------


@pytest.mark.parametrize("attack", ["times 100", "times -100"])
def test_one_scaled_update_breaks_fedavg(attack):
    assert federate("fedavg", attack, 1).accuracy < BROKEN


@pytest.mark.parametrize("attack", ["sign flip", "label flip"])
def test_one_attacker_without_scaling_hardly_moves_fedavg(attack):
    assert loss_of("fedavg", attack, 1) < CLOSE


def test_fedavg_bends_under_sign_flips_long_before_half():
    """Each cancels an honest client: 3 of 9 leave a third of the step, 4 a ninth, 5 turn it around."""
    found = [federate("fedavg", "sign flip", hostile) for hostile in (1, 3, 4, 5)]
    assert [outcome.uphill for outcome in found] == [0, 0, 0, ROUNDS]
    assert found[0].accuracy > found[1].accuracy > found[2].accuracy > found[3].accuracy
    assert found[2].accuracy < BROKEN


@pytest.mark.parametrize(("attack", "hostile"), [("times -100", 1), ("times 100", 1), ("times 100", 4)])
def test_a_bounded_norm_takes_the_scale_out_of_a_scaled_update(attack, hostile):
    assert loss_of("fedavg, bounded", attack, hostile) < CLOSE
    assert federate("fedavg", attack, hostile).accuracy < BROKEN


def test_a_bounded_norm_leaves_the_direction():
    """What is left of a turned and scaled update is a sign flip, and bends the mean as that does."""
    scaled, flipped = federate("fedavg, bounded", "times -100", 4), federate("fedavg, bounded", "sign flip", 4)
    assert scaled.accuracy == pytest.approx(flipped.accuracy, abs=0.05)
    assert scaled.accuracy < BROKEN


# --- with f attackers the rules hold ------------------------------------------------------------


@pytest.mark.parametrize(
    "attack", ["sign flip", "times 100", "times -100", "collude far", "collude near", "label flip"]
)
@pytest.mark.parametrize("rule", ROBUST_RULES)
def test_a_robust_rule_holds_with_f_attackers(rule, attack):
    assert loss_of(rule, attack, F) < CLOSE
    assert federate(rule, attack, F).uphill == 0


# --- with f + 1 ---------------------------------------------------------------------------------


@pytest.mark.parametrize("attack", ["times 100", "times -100", "collude far"])
@pytest.mark.parametrize("rule", ["trimmed-mean", "multi-krum"])
def test_what_averages_breaks_at_f_plus_1_scaled_updates(rule, attack):
    """One of them is not cut off, and is a hundred times the others."""
    assert federate(rule, attack, F + 1).accuracy < BROKEN


def test_sign_flips_bend_the_trimmed_mean_at_f_plus_1():
    assert loss_of("trimmed-mean", "sign flip", F + 1) > 0.1
    assert federate("trimmed-mean", "sign flip", F + 1).uphill == 0  # slowed, not turned


@pytest.mark.parametrize("attack", ["sign flip", "times 100", "times -100", "collude far", "label flip"])
def test_krum_still_holds_at_f_plus_1_that_stand_apart(attack):
    """Of n = 2f + 3, an honest client still has its n - f - 2 honest neighbours, f + 1 far ones do not."""
    assert loss_of("krum", attack, F + 1) < CLOSE


def test_krum_follows_f_plus_1_colluders_that_stay_near():
    """f zeros and one small distance to an honest client are less than f + 1 honest distances."""
    assert federate("krum", "collude near", F).uphill == 0
    assert federate("krum", "collude near", F + 1).uphill > 0
    assert loss_of("krum", "collude near", F + 1) > 0.1


@pytest.mark.parametrize("attack", ["sign flip", "times -100", "collude far", "collude near", "label flip"])
def test_krum_breaks_at_f_plus_2(attack):
    """5 of 9: honest clients lack a neighbour, and f + 2 equal updates have n - f - 2 at distance 0."""
    assert federate("krum", attack, F + 2).accuracy < BROKEN


def test_one_sign_flip_among_the_averaged_does_not_break_multi_krum():
    assert loss_of("multi-krum", "sign flip", F + 1) < CLOSE
    assert federate("multi-krum", "sign flip", F + 1).uphill == 0


@pytest.mark.parametrize("rule", ["median", "krum", "multi-krum"])
def test_label_flips_are_weak_up_to_half(rule):
    """4 of 9: the plain mean loses far more."""
    assert loss_of(rule, "label flip", F + 1) < CLOSE
    assert loss_of("fedavg", "label flip", F + 1) > 0.15


def test_label_flips_dent_the_trimmed_mean_at_f_plus_1():
    assert 0.04 < loss_of("trimmed-mean", "label flip", F + 1) < loss_of("fedavg", "label flip", F + 1)


# --- the median, which knows no f ---------------------------------------------------------------


@pytest.mark.parametrize(
    "attack", ["sign flip", "times 100", "times -100", "collude far", "collude near", "label flip"]
)
def test_the_median_holds_below_half_and_breaks_from_half(attack):
    """4 of 9 push it to the edge of what honest clients sent, and no further; 5 own it."""
    assert loss_of("median", attack, 4) < 2 * CLOSE
    assert federate("median", attack, 4).uphill == 0
    assert federate("median", attack, 5).accuracy < BROKEN


# --- clients that differ ------------------------------------------------------------------------


def test_the_guarantees_need_clients_that_are_alike():
    """With skewed labels an honest update looks as strange as a hostile one, and f attackers are enough."""
    assert federate("fedavg", skewed=True).accuracy > 0.9
    assert loss_of("krum", "none", 0, skewed=True) > 0.1  # one client's update is no longer everyone's
    assert loss_of("median", "sign flip", F, skewed=True) > 0.1
    assert loss_of("trimmed-mean", "sign flip", F, skewed=True) > 0.1
    assert loss_of("multi-krum", "collude near", F, skewed=True) > 0.2
    # what is far from everyone is still seen
    assert loss_of("multi-krum", "times -100", F, skewed=True) < CLOSE


# --- the attacks themselves ---------------------------------------------------------------------


def test_hand_case_attacks():
    update = {"a": np.float32([1.0, -2.0]), "b": np.float32([[0.5]])}
    flipped, scaled = sign_flip(update), scale(update, -100.0)
    assert (flipped["a"].tolist(), flipped["b"].tolist()) == ([-1.0, 2.0], [[-0.5]])
    assert (scaled["a"].tolist(), scaled["b"].tolist()) == ([-100.0, 200.0], [[-50.0]])
    assert flipped["a"].dtype == scaled["a"].dtype == np.float32
    assert update["a"].tolist() == [1.0, -2.0]


@pytest.mark.parametrize("dtype", [np.int64, np.int32, np.uint8])
def test_hand_case_flipped_labels(dtype):
    found = flip_labels(np.array([0, 1, 2, 2], dtype=dtype), 3)
    assert (found.tolist(), found.dtype) == ([2, 1, 0, 0], dtype)
    assert flip_labels(found, 3).tolist() == [0, 1, 2, 2]
    assert flip_labels(np.array([], dtype=dtype), 2).size == 0


@pytest.mark.parametrize("wrong", [[0, 2], [-1, 0]])
def test_labels_outside_the_classes_are_refused(wrong):
    with pytest.raises(ValueError, match="2 classes are 0 to 1"):
        flip_labels(np.array(wrong), 2)
