"""DP-SGD: steps of local distillation that hide whether any one example is among a client's.

    L_t ~ each of the n examples by itself with probability q = min(1, L / n)
    g_t = (sum over x in L_t of g(x) min(1, C / |g(x)|) + sigma C N(0, I)) / (q n)

Abadi et al. 2016 (https://arxiv.org/abs/1607.00133), with Poisson lots as their accounting assumes (Ponomareva et al.
2023, https://arxiv.org/abs/2303.00654, section 5). g(x) is the gradient of one example's loss with respect to all
weights under training. Its norm is measured without ever holding it, by ghost clipping (Goodfellow 2015,
https://arxiv.org/abs/1510.01799; Li et al. 2022, https://arxiv.org/abs/2110.05679) of Opacus; a second pass back, each
loss weighted, gives the clipped sum. A lot passes in parts, and gets its noise once. An empty lot is a step on noise
alone: to leave it out would tell that it was empty.

What follows works on the noised gradient, and so costs nothing: any optimiser, weight decay, FedProx's pull, the
server. Lots and noise are drawn from 256 bits of the operating system's entropy, and never from the run's seed: whoever
knows it could take the noise away again.
"""

import math
import secrets
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from common.accounting import Steps
from common.device import Compute
from common.distillation import Learning
from common.objective import Batch, each_loss, parts_of
from common.recipe import Recipe


@dataclass(frozen=True)
class Lots:
    """How a client draws them.

    Attributes:
        size: wished mean number of examples.
        count: examples of the client.
    """

    size: int
    count: int

    @property
    def rate(self) -> float:
        """Chance of an example to be in a lot."""
        return min(1.0, self.size / self.count)

    @property
    def steps(self) -> int:
        """Of an epoch."""
        return math.ceil(self.count / self.size)


def fresh_generator() -> np.random.Generator:
    """A generator that nobody can have again."""
    return np.random.default_rng(secrets.randbits(256))


class PrivateSteps:
    """Lots and gradients of one client in one round; see `common.distillation.Private`.

    Args:
        noise: its deviation in clip norms.
        rng: for tests alone.

    Attributes:
        done: steps made.
    """

    def __init__(self, lots: Lots, *, noise: float, clip_norm: float, rng: np.random.Generator | None = None) -> None:
        self.plan, self.noise, self.clip_norm = lots, noise, clip_norm
        self.rng = fresh_generator() if rng is None else rng
        self.done = 0

    @property
    def seen(self) -> int:
        """Examples that the steps made stand for; how many were really drawn is nobody's business."""
        return math.ceil(self.done * self.plan.rate * self.plan.count)

    def spending(self, epochs: int) -> Steps:
        """What all steps of these epochs are to the accountant."""
        return self.noise, self.plan.rate, self.plan.steps * epochs

    def lots(self, lengths: NDArray[np.int64], epochs: int) -> list[tuple[int, NDArray[np.int64]]]:
        """The epoch and the places of each step's examples, the shortest first."""
        order = np.argsort(lengths, kind="stable")
        return [
            (epoch, order[self.rng.random(len(order)) < self.plan.rate])
            for epoch in range(epochs)
            for _ in range(self.plan.steps)
        ]

    def set_gradients(self, state: Learning, parts: Sequence[Batch], *, recipe: Recipe, compute: Compute) -> None:
        """Set the gradients to the noised mean of the lot that the parts make up."""
        weights = list(state.trained.values())
        sums = [torch.zeros_like(weight) for weight in weights]
        for batch in parts:
            found = clipped_sum(
                state.student.model, weights, batch, recipe=recipe, compute=compute, clip_norm=self.clip_norm
            )
            for total, part in zip(sums, found, strict=True):
                total.add_(part)
        for weight, total in zip(weights, sums, strict=True):
            if self.noise > 0:
                drawn = self.rng.standard_normal(tuple(total.shape)) * (self.noise * self.clip_norm)
                total.add_(torch.from_numpy(drawn).to(total))
            weight.grad = total.div_(self.plan.rate * self.plan.count)
        self.done += 1


def clipped_sum(
    model: Any,
    weights: Sequence[torch.nn.Parameter],
    batch: Batch,
    *,
    recipe: Recipe,
    compute: Compute,
    clip_norm: float,
) -> list[Tensor]:
    """The sum over a batch of each example's gradient, scaled down to a norm; one that is not finite counts as zero.

    Args:
        batch: of examples with one row each.
    """
    with _watched(model) as watch:
        found = parts_of(model, batch, recipe, compute)
        each = each_loss(found["soft"], found["hard"], batch, recipe, recipe.weights)
        torch.autograd.grad(each.sum(), weights, retain_graph=True)
        norms = watch.get_norm_sample().detach()
        watch.disable_hooks()
        fine = norms.isfinite()
        if fine.all():
            return list(torch.autograd.grad((each * (clip_norm / norms).clamp(max=1.0)).sum(), weights))
    if not fine.any():
        return [torch.zeros_like(weight) for weight in weights]
    # what one example does must not show in what becomes of the others
    rest = _only(batch, fine)
    return clipped_sum(model, weights, rest, recipe=recipe, compute=compute, clip_norm=clip_norm)


@contextmanager
def _watched(model: Any) -> Iterator[Any]:
    """Opacus, as long as it is to note norms; afterwards the model is as it was."""
    from opacus.grad_sample import GradSampleModuleFastGradientClipping

    watch = GradSampleModuleFastGradientClipping(model, loss_reduction="sum", use_ghost_clipping=True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # frozen embeddings: the first layer's inputs need no gradient
            yield watch
    finally:
        watch.remove_hooks()
        for thing in (*model.modules(), *model.parameters()):
            for name in ("activations", "max_batch_len", "_norm_sample", "_forward_counter", "grad_sample"):
                if name in vars(thing):
                    delattr(thing, name)


def _only(batch: Batch, keep: Tensor) -> Batch:
    """Some examples of a batch of single rows."""
    inputs = {name: tensor[keep] for name, tensor in batch.inputs.items()}
    hard = None if batch.hard is None else batch.hard[keep]
    return replace(batch, inputs=inputs, soft=batch.soft[keep], hard=hard)
