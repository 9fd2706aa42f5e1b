"""Distillation losses, each with its formula and source. To add one, add a function and a key for its weight.

Those on outputs give one number per example, (batch,), because examples may weigh differently; those on inner states
give one number, and take the windows of an example that has several as examples. A teacher and a student that cut text
into different pieces are compared word by word, at each word's first piece: `common.objective` gathers these before
it calls.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def pooled(logits: Tensor, pooling: Tensor | None) -> Tensor:
    """(examples, classes) float32: the mean over each example's windows, see `common.tokens.Tokens.pooling`.

    Args:
        logits: (windows, classes).
    """
    return logits.float() if pooling is None else pooling @ logits.float()


def soft_targets(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """T^2 * KL(softmax(teacher / T) || softmax(student / T)) of each example.

    Hinton et al. 2015 (https://arxiv.org/abs/1503.02531): the factor T^2 keeps the size of the gradient when
    the temperature changes.

    Args:
        student, teacher: (batch, classes) logits.
    """
    log_student = F.log_softmax(student / temperature, dim=-1)
    log_teacher = F.log_softmax(teacher / temperature, dim=-1)
    return F.kl_div(log_student, log_teacher, reduction="none", log_target=True).sum(dim=-1) * temperature**2


def hard_labels(student: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of (batch, classes) logits with (batch,) int64 classes."""
    return F.cross_entropy(student, labels, reduction="none")


def soft_multi_label(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """T^2 * mean over classes of KL(Bernoulli(p) || Bernoulli(q)), p = sigmoid(teacher / T), q = sigmoid(student / T).

    For examples that have any number of the classes: each class is a question of its own, with the two answers
    distilled as `soft_targets` distils many. Yang et al. 2023 (https://arxiv.org/abs/2308.06453), with
    the factor of Hinton et al. and, as in `hard_multi_label`, the mean over classes for their sum.

    Args:
        student, teacher: (batch, classes) logits.
    """
    own, other = student / temperature, teacher / temperature
    yes, no = torch.sigmoid(other), torch.sigmoid(-other)
    distance = yes * (F.logsigmoid(other) - F.logsigmoid(own)) + no * (F.logsigmoid(-other) - F.logsigmoid(-own))
    return distance.mean(dim=-1) * temperature**2


def hard_multi_label(student: Tensor, labels: Tensor) -> Tensor:
    """Binary cross-entropy of (batch, classes) logits with labels of 0 and 1, mean over classes."""
    return F.binary_cross_entropy_with_logits(student, labels.to(student.dtype), reduction="none").mean(dim=-1)


def score_error(student: Tensor, target: Tensor) -> Tensor:
    """Squared error of (batch, 1) scores with (batch, 1) or (batch,) targets: soft or hard, for STS-B."""
    return F.mse_loss(student.reshape(-1), target.reshape(-1), reduction="none")


def hidden_cosine(student: Tensor, teacher: Tensor, mask: Tensor) -> Tensor:
    """1 - cosine of hidden states, mean over real positions.

    Sanh et al. 2019, DistilBERT (https://arxiv.org/abs/1910.01108).

    Args:
        student, teacher: (batch, length, hidden).
        mask: (batch, length), 1 for real positions.
    """
    distance = 1.0 - F.cosine_similarity(student, teacher, dim=-1)
    return (distance * mask).sum() / mask.sum()


def hidden_mse(student: Tensor, teacher: Tensor, mask: Tensor) -> Tensor:
    """Mean squared error of hidden states over real positions.

    Jiao et al. 2020, TinyBERT (https://arxiv.org/abs/1909.10351); shapes as in `hidden_cosine`.
    """
    distance = (student - teacher).square().mean(dim=-1)
    return (distance * mask).sum() / mask.sum()


def patient(student: Tensor, teacher: Tensor) -> Tensor:
    """Squared distance of the normalised states of the first piece, [CLS], mean over the batch.

    Sun et al. 2019, patient knowledge distillation (https://arxiv.org/abs/1908.09355), equation 7.

    Args:
        student, teacher: (batch, hidden).
    """
    return (F.normalize(student, dim=-1) - F.normalize(teacher, dim=-1)).square().sum(dim=-1).mean()


def relations(student: Tensor, teacher: Tensor, mask: Tensor, heads: int) -> Tensor:
    """KL(R(teacher) || R(student)), mean over heads and real positions, with R(X) = softmax(X X^T / sqrt(d)).

    Wang et al. 2021, MiniLMv2 (https://arxiv.org/abs/2012.15828), for the queries, keys or values of one layer: all
    heads side by side are cut anew into ``heads`` relation heads of width d, so that the models' own heads may differ.

    Args:
        student: (batch, length, width of the student's heads).
        teacher: (batch, length, width of the teacher's heads).
        mask: (batch, length), 1 for real positions.
    """
    logs = []
    for states in (student, teacher):
        split = states.unflatten(-1, (heads, -1)).transpose(1, 2)
        scores = split @ split.transpose(-1, -2) / split.shape[-1] ** 0.5
        logs.append(
            F.log_softmax(scores.masked_fill(mask[:, None, None, :] == 0, torch.finfo(scores.dtype).min), dim=-1)
        )
    distance = F.kl_div(logs[0], logs[1], reduction="none", log_target=True).sum(dim=-1)
    return (distance * mask[:, None, :]).sum() / (heads * mask.sum())


HIDDEN_LOSSES = {"cosine": hidden_cosine, "mse": hidden_mse}
