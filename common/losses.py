"""Distillation losses, each with its formula and source. To add one, add a function and a key for its weight."""

import torch.nn.functional as F
from torch import Tensor


def soft_targets(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """T^2 * KL(softmax(teacher / T) || softmax(student / T)), mean over the batch.

    Hinton et al. 2015 (https://arxiv.org/abs/1503.02531): the factor T^2 keeps the size of the gradient when
    the temperature changes.

    Args:
        student, teacher: (batch, classes) logits.
    """
    log_student = F.log_softmax(student / temperature, dim=-1)
    log_teacher = F.log_softmax(teacher / temperature, dim=-1)
    return F.kl_div(log_student, log_teacher, reduction="batchmean", log_target=True) * temperature**2


def hard_labels(student: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of (batch, classes) logits with (batch,) int64 classes."""
    return F.cross_entropy(student, labels)


def score_error(student: Tensor, target: Tensor) -> Tensor:
    """Mean squared error of (batch, 1) scores with (batch, 1) or (batch,) targets: soft or hard, for STS-B."""
    return F.mse_loss(student.reshape(-1), target.reshape(-1))


def hidden_cosine(student: Tensor, teacher: Tensor, mask: Tensor) -> Tensor:
    """1 - cosine of hidden states, mean over real word pieces.

    Sanh et al. 2019, DistilBERT (https://arxiv.org/abs/1910.01108).

    Args:
        student, teacher: (batch, length, hidden).
        mask: (batch, length), 1 for real pieces.
    """
    distance = 1.0 - F.cosine_similarity(student, teacher, dim=-1)
    return (distance * mask).sum() / mask.sum()


def hidden_mse(student: Tensor, teacher: Tensor, mask: Tensor) -> Tensor:
    """Mean squared error of hidden states over real word pieces.

    Jiao et al. 2020, TinyBERT (https://arxiv.org/abs/1909.10351); shapes as in `hidden_cosine`.
    """
    distance = (student - teacher).square().mean(dim=-1)
    return (distance * mask).sum() / mask.sum()


HIDDEN_LOSSES = {"cosine": hidden_cosine, "mse": hidden_mse}
