"""Losses against hand-computed values, SciPy and bare formulas."""

import math

import numpy as np
import pytest
import torch
from scipy.special import softmax
from scipy.stats import entropy

from common.losses import HIDDEN_LOSSES, hard_labels, hidden_cosine, hidden_mse, score_error, soft_targets


def logits(seed, rows=6, classes=3, size=2.0):
    return size * torch.randn(rows, classes, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_soft_targets_hand_case():
    """Teacher (3/4, 1/4), student (1/2, 1/2): KL = 3/4 ln 3/2 + 1/4 ln 1/2."""
    teacher = torch.tensor([[math.log(3.0), 0.0]], dtype=torch.float64)
    student = torch.zeros(1, 2, dtype=torch.float64)
    assert soft_targets(student, teacher, 1.0).item() == pytest.approx(0.75 * math.log(1.5) + 0.25 * math.log(0.5))


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0, 7.5])
def test_soft_targets_are_scipys_relative_entropy_times_t_squared(temperature):
    student, teacher = logits(0), logits(1)
    p, q = softmax(teacher.numpy() / temperature, axis=1), softmax(student.numpy() / temperature, axis=1)
    expected = temperature**2 * entropy(p, q, axis=1)
    assert soft_targets(student, teacher, temperature).tolist() == pytest.approx(expected.tolist(), rel=1e-12)


def test_the_size_of_the_gradient_hardly_moves_with_the_temperature():
    norms = []
    for temperature in (1.0, 2.0, 4.0, 20.0):
        student = logits(0, size=0.1).requires_grad_()
        soft_targets(student, logits(1, size=0.1), temperature).mean().backward()
        norms.append(student.grad.norm().item())
    assert max(norms) / min(norms) < 1.05


def test_a_student_that_equals_its_teacher_has_no_loss():
    same, mask = torch.randn(4, 5, 8), torch.ones(4, 5)
    assert soft_targets(logits(2), logits(2), 3.0).tolist() == pytest.approx([0.0] * 6, abs=1e-15)
    assert score_error(same[..., 0, 0], same[..., 0, 0]).tolist() == [0.0] * 4
    for distance in HIDDEN_LOSSES.values():
        assert distance(same, same, mask).item() == pytest.approx(0.0, abs=1e-6)


def test_soft_targets_stay_finite_for_extreme_logits():
    student = torch.tensor([[1e4, -1e4]], requires_grad=True)
    loss = soft_targets(student, torch.tensor([[-1e4, 1e4]]), 1.0)
    loss.backward()
    assert loss.item() == pytest.approx(2e4)
    assert student.grad.tolist() == [[1.0, -1.0]]


def test_hard_labels_are_minus_log_of_the_true_class():
    probabilities = torch.tensor([[0.5, 0.25, 0.25], [0.1, 0.1, 0.8]])
    expected = [-math.log(0.25), -math.log(0.8)]
    assert hard_labels(probabilities.log(), torch.tensor([1, 2])).tolist() == pytest.approx(expected)


def test_score_error_takes_columns_and_vectors():
    scores = torch.tensor([[1.0], [3.0]])
    assert score_error(scores, torch.tensor([2.0, 5.0])).tolist() == [1.0, 4.0]
    assert score_error(scores, torch.tensor([[2.0], [5.0]])).tolist() == [1.0, 4.0]


def test_hidden_hand_cases():
    student = torch.tensor([[[1.0, 0.0], [0.0, 2.0], [9.0, 9.0]]])
    teacher = torch.tensor([[[0.0, 3.0], [0.0, 1.0], [-9.0, 5.0]]])
    mask = torch.tensor([[1, 1, 0]])
    assert hidden_cosine(student, teacher, mask).item() == pytest.approx((1.0 + 0.0) / 2)
    assert hidden_mse(student, teacher, mask).item() == pytest.approx((10 / 2 + 1 / 2) / 2)


@pytest.mark.parametrize("name", HIDDEN_LOSSES)
def test_hidden_losses_ignore_padding_and_weigh_pieces_equally(name):
    rng = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, 3, 6, 8, generator=rng)
    mask = (torch.arange(6) < torch.tensor([[6], [2], [4]])).long()
    loss = HIDDEN_LOSSES[name](student, teacher, mask)
    noise = torch.where(mask[..., None] == 1, student, 1e3 * torch.randn(3, 6, 8, generator=rng))
    assert HIDDEN_LOSSES[name](noise, teacher, mask).item() == pytest.approx(loss.item(), rel=1e-6)
    a, b = student[mask == 1].numpy(), teacher[mask == 1].numpy()
    if name == "cosine":
        expected = 1 - (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
    else:
        expected = ((a - b) ** 2).mean(1)
    assert loss.item() == pytest.approx(expected.mean(), rel=1e-5)
