"""What clients say and what they say together, by hand."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from common.config import from_flat
from common.consensus import consensus, temperature, vote
from common.errors import InputError
from common.losses import soft_targets

LOGITS = np.log(np.array([[[0.8, 0.2], [0.5, 0.5]], [[0.4, 0.6], [0.3, 0.7]]])).astype(np.float32) + np.float32(3)


def test_fedmd_says_logits_and_means_them():
    votes = [vote("fedmd", logits) for logits in LOGITS]
    assert all((said == logits).all() for said, logits in zip(votes, LOGITS, strict=True))
    mean = np.mean([said.astype(np.float64) for said in votes], axis=0)
    np.testing.assert_allclose(consensus("fedmd", mean)[0], [3 + np.log(0.32**0.5), 3 + np.log(0.12**0.5)], rtol=1e-6)


def test_ds_fl_says_probabilities_and_sharpens_their_mean():
    votes = [vote("ds-fl", logits) for logits in LOGITS]
    np.testing.assert_allclose(votes, [[[0.8, 0.2], [0.5, 0.5]], [[0.4, 0.6], [0.3, 0.7]]], rtol=1e-6)
    mean = np.mean([said.astype(np.float64) for said in votes], axis=0)  # 0.6, 0.4 and 0.4, 0.6
    np.testing.assert_allclose(consensus("ds-fl", mean), [[6.0, 4.0], [4.0, 6.0]], rtol=1e-6)
    sharp = torch.softmax(torch.from_numpy(consensus("ds-fl", mean)), -1)
    np.testing.assert_allclose(sharp[0], [1 / (1 + np.exp(-2)), 1 / (1 + np.exp(2))], rtol=1e-6)


def test_where_any_number_of_classes_is_right_each_is_a_question_with_two_answers():
    logits = np.log(np.array([[[0.8 / 0.2, 1.0]], [[0.4 / 0.6, 0.3 / 0.7]]])).astype(np.float32)
    votes = [vote("ds-fl", said, multi_label=True) for said in logits]
    np.testing.assert_allclose(votes, [[[0.8, 0.5]], [[0.4, 0.3]]], rtol=1e-6)
    mean = np.mean([said.astype(np.float64) for said in votes], axis=0)  # 0.6 and 0.4: (2 p - 1) / 0.1 is 2 and -2
    target = consensus("ds-fl", mean, multi_label=True)
    np.testing.assert_allclose(target, [[2.0, -2.0]], rtol=1e-5)
    both = torch.softmax(torch.tensor([0.6, 0.4]) / 0.1, -1)  # the entropy reduction of yes and no
    assert float(torch.sigmoid(torch.from_numpy(target))[0, 0]) == pytest.approx(float(both[0]), rel=1e-5)
    assert (vote("fedmd", logits[0], multi_label=True) == logits[0]).all()


def test_votes_of_large_logits_are_whole():
    large = np.array([[1e4, 0.0, -1e4]], np.float32)
    assert vote("ds-fl", large).tolist() == [[1.0, 0.0, 0.0]]
    assert vote("ds-fl", large, multi_label=True).tolist() == [[1.0, 0.5, 0.0]]


def test_learning_from_a_ds_fl_consensus_has_the_gradient_of_cross_entropy_with_it():
    """Equation 12 of the paper, whatever distill.temperature says."""
    config = from_flat({"server.strategy": "ds-fl", "distill.temperature": 4.0})
    target = torch.from_numpy(consensus("ds-fl", np.array([[0.6, 0.4]])))
    for loss in (
        lambda own: soft_targets(own, target, temperature(config)),
        lambda own: F.cross_entropy(own, torch.softmax(target, -1)),
    ):
        own = torch.tensor([[0.3, -0.2]], requires_grad=True)
        loss(own).backward()
        expected = torch.softmax(own, -1) - torch.softmax(target, -1)
        np.testing.assert_allclose(own.grad, expected.detach(), rtol=1e-5)
    assert temperature(from_flat({"server.strategy": "fedmd", "distill.temperature": 4.0})) == 4.0


@pytest.mark.parametrize("strategy", ["fedmd", "ds-fl"])
@pytest.mark.parametrize(
    ("keys", "told"),
    [
        ({"server.wire": "int8"}, "server.wire = 'int8': with server.strategy = "),
        ({"server.packing": "off"}, "server.packing = 'off': with server.strategy = "),
        ({"server.norm-bound": 1.0}, "server.norm-bound = 1.0: with server.strategy = "),
        ({"server.lr": 0.5}, "server.lr = 0.5: with server.strategy = "),
        ({"server.warmup-rounds": 1, "rounds": 2}, "server.warmup-rounds = 1: with server.strategy = "),
        ({"server.lr-decay": "linear"}, "server.lr-decay = 'linear': with server.strategy = "),
        ({"data.public-fraction": 0.0}, "data.public-fraction = 0.0: server.strategy = "),
    ],
)
def test_keys_of_updates_are_refused_where_none_travel(strategy, keys, told):
    with pytest.raises(InputError) as refusal:
        from_flat({"server.strategy": strategy, **keys})
    assert str(refusal.value).startswith(told + repr(strategy))


@pytest.mark.parametrize("strategy", ["fedmd", "ds-fl"])
@pytest.mark.parametrize("narrowed", [{"student.heads": 4}, {"student.neurons": 64}, {"student.tiers": "1/0/16@0.5"}])
def test_how_much_heads_matter_on_private_text_is_not_told_where_only_votes_travel(strategy, narrowed):
    with pytest.raises(InputError, match=rf"^student\.width-selection = 'importance': .*'{strategy}'.*give 'random'$"):
        from_flat({"server.strategy": strategy, **narrowed})
    from_flat({"server.strategy": strategy, **narrowed, "student.width-selection": "random"})
    from_flat({"server.strategy": strategy, "student.tiers": "1/0/0@0.5"})


def test_scores_have_no_probabilities_to_average():
    from_flat({"task": "stsb", "server.strategy": "fedmd"})
    with pytest.raises(InputError, match=r"ds-fl.*stsb has none"):
        from_flat({"task": "stsb", "server.strategy": "ds-fl"})
