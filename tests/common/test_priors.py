"""A client's own shares of the classes, taken out of the label's loss."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from common.config import from_flat
from common.errors import InputError
from common.objective import Batch, output_losses
from common.priors import prior_shift
from tests.scene import RECIPE


def test_the_shift_is_the_log_of_the_shares_each_class_counted_once_more():
    own, public = np.array([1, 1, 1, 1, 1, 1, -1]), np.array([0, 1, 1, -1])
    expected = [np.log((1 / 8) / (2 / 5)), np.log((7 / 8) / (3 / 5))]
    assert prior_shift(own, public, 2).tolist() == pytest.approx(expected)


def test_without_public_labels_all_classes_are_as_frequent():
    assert prior_shift(np.array([0]), np.array([-1, -1]), 3).tolist() == pytest.approx(np.log([1.5, 0.75, 0.75]))


def test_it_is_added_under_the_labels_loss_alone():
    logits, soft = torch.tensor([[0.3, -0.2], [1.0, 0.5]]), torch.tensor([[0.1, 0.0], [0.0, 2.0]])
    plain = Batch({}, soft, torch.tensor([0, 1]), {}, 2)
    shift = torch.tensor([0.5, -1.0])
    on_soft, on_hard = output_losses(logits, replace(plain, shift=shift), RECIPE)
    assert torch.equal(on_soft, output_losses(logits, plain, RECIPE)[0])
    expected = -torch.log_softmax(logits + shift, -1)[torch.arange(2), plain.hard]
    torch.testing.assert_close(on_hard, expected)


def test_a_student_of_a_skewed_client_learns_what_it_would_from_balanced_labels():
    """One feature without meaning: what is learnt is the intercept, the log odds of public labels, not the client's."""
    own = np.array([1] * 90 + [0] * 10)
    shift = torch.from_numpy(prior_shift(own, np.array([0, 1] * 500), 2))
    logits = torch.zeros(2, requires_grad=True)
    optimizer = torch.optim.LBFGS([logits], max_iter=100)

    def loss():
        optimizer.zero_grad()
        batch = Batch({}, torch.zeros(len(own), 2), torch.from_numpy(own), {}, 1, shift=shift)
        found = output_losses(logits.expand(len(own), 2), batch, RECIPE)[1].mean()
        found.backward()
        return found

    optimizer.step(loss)
    # nearly even, where the labels alone would say log 9: each class is counted once more than it is there
    assert float(logits.detach() @ torch.tensor([-1.0, 1.0])) == pytest.approx(np.log(9) - np.log(91 / 11), abs=1e-3)


def test_it_needs_one_class_per_example():
    with pytest.raises(InputError, match=r"distill\.prior-correction = true: task = stsb has no one class per example"):
        from_flat({"task": "stsb", "distill.prior-correction": True})


def test_it_needs_a_label_that_has_weight():
    with pytest.raises(InputError, match=r"it is about the label's loss, and distill\.hard-weight = 0\.0"):
        from_flat({"distill.prior-correction": True, "distill.hard-weight": 0.0})
    from_flat({"distill.prior-correction": True, "distill.hard-weight": 0.0, "distill.weighting": "adaptive"})
