"""How many examples of each class a client has, from the gradient of the head's bias.

With logits z = W h + b the mean gradient of b over a batch of B is

    g = 1/B sum over i of dL_i/dz_i,        for cross-entropy  dL_i/dz_i = p_i - onehot(y_i),

so that of one example the class is where g is negative (iDLG, Zhao et al. 2020, https://arxiv.org/abs/2001.02610), for
any weights. Of a batch, B g = sum of p_i - counts: what the p_i add up to is not known, but what examples of a class
have on the average and how they scatter is seen on labelled public text (LLG* of Wainakh et al. 2021,
https://arxiv.org/abs/2105.09369). The answer is the most likely vector of counts under a normal distribution with these
moments and the public shares of the classes. It is exact while the p_i are alike, as of a head that has just begun.

The loss is the client's own, soft targets included: the server has the teacher.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from common.device import Compute
from common.families import family_of
from common.inference import predict
from common.objective import Batch, Examples, objective, output_losses
from common.recipe import PARTS, Recipe

FLOOR = 1e-6  # variance of a mean signal that rounding makes


@dataclass(frozen=True)
class Signals:
    """dL/dz of public examples, by class.

    Attributes:
        mean: (classes, outputs).
        scatter: (classes, outputs, outputs) covariance.
        shares: (classes,) of the public examples.
    """

    mean: NDArray[np.float64]
    scatter: NDArray[np.float64]
    shares: NDArray[np.float64]

    @classmethod
    def of(cls, signals: NDArray[np.float64], labels: NDArray[np.int64], classes: int) -> "Signals":
        """Args: signals: (n, outputs)."""
        width = signals.shape[1]
        mean, scatter = np.zeros((classes, width)), np.zeros((classes, width, width))
        for label in range(classes):
            own = signals[labels == label]
            if len(own):
                mean[label] = own.mean(axis=0)
                scatter[label] = np.cov(own.T, bias=True).reshape(width, width)
        shares = (np.bincount(labels, minlength=classes) + 1.0) / (len(labels) + classes)
        return cls(mean, scatter, shares)


def signals_of(model: Any, examples: Examples, recipe: Recipe, compute: Compute) -> NDArray[np.float64]:
    """(n, outputs) the gradient of each example's loss by its logits."""
    logits = torch.from_numpy(predict(model, examples.data.tokens, examples.rows, compute)).requires_grad_()
    labels = torch.from_numpy(np.array(examples.data.labels[examples.rows]))
    batch = Batch({}, torch.from_numpy(examples.soft.copy()), labels, {}, 0)
    zero = logits.new_zeros(())
    soft, hard = output_losses(logits, batch, recipe)
    parts = {**dict.fromkeys(PARTS, zero), "soft": soft, "hard": hard}
    loss = objective(parts, batch, recipe, recipe.weights) * len(logits)
    return torch.autograd.grad(loss, logits)[0].double().numpy()


def head_bias(model: Any, update: Mapping[str, Any]) -> str:
    """Name of the bias that is added last; empty: the head has none, or it was not sent."""
    found = [name for name in update if name.startswith(f"{family_of(model).classifier}.") and name.endswith("bias")]
    return found[-1] if found else ""


def count_labels(gradient: NDArray[np.float64], examples: int, known: Signals) -> NDArray[np.int64]:
    """(classes,) the most likely counts, that add up to ``examples``.

    One example at a time moves to another class, as long as that makes them likelier.

    Args:
        gradient: (outputs,) the mean over the batch.
    """
    total = np.asarray(gradient, dtype=np.float64) * examples
    best = shared_out(known.shares, examples)
    found = _likelihood(best, total, known)
    while True:
        moves = [
            moved
            for source in np.flatnonzero(best)
            for target in range(len(best))
            for size in {1, max(int(best[source]) // 2, 1)}
            if source != target and (moved := _moved(best, int(source), target, size)) is not None
        ]
        likely = [_likelihood(one, total, known) for one in moves]
        if not moves or max(likely) <= found:
            return best
        best, found = moves[int(np.argmax(likely))], max(likely)


def _moved(counts: NDArray[np.int64], source: int, target: int, size: int) -> NDArray[np.int64]:
    moved = counts.copy()
    moved[source] -= size
    moved[target] += size
    return moved


def shared_out(shares: NDArray[np.float64], count: int) -> NDArray[np.int64]:
    """The counts nearest to some shares, by largest remainder."""
    exact = shares / shares.sum() * count
    counts = np.floor(exact).astype(np.int64)
    counts[np.argsort(counts - exact)[: count - int(counts.sum())]] += 1
    return np.asarray(counts)


def _likelihood(counts: NDArray[np.int64], total: NDArray[np.float64], known: Signals) -> float:
    """Log of how likely the counts are, but for a constant."""
    left = total - counts @ known.mean
    spread = np.tensordot(counts, known.scatter, axes=1) + counts.sum() * FLOOR * np.eye(len(total))
    _, size = np.linalg.slogdet(spread)
    drawn = sum(n * math.log(share) - math.lgamma(n + 1) for n, share in zip(counts, known.shares, strict=True))
    return float(-0.5 * (left @ np.linalg.solve(spread, left) + size) + drawn)


def label_error(found: NDArray[np.int64], truth: NDArray[np.int64]) -> float:
    """Share of the examples that the counts put into a wrong class."""
    return float(np.abs(found - truth).sum() / 2 / max(int(truth.sum()), 1))
