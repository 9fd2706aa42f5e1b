"""DP-SGD: steps of local distillation that hide whether any one example is among a client's.

    L_t ~ each of the n examples by itself with probability q = min(1, L / n)
    g_t = (sum over x in L_t of g(x) min(1, C / |g(x)|) + sigma C N(0, I)) / (q n)

Abadi et al. 2016 (https://arxiv.org/abs/1607.00133), with Poisson lots as their accounting assumes (Ponomareva et al.
2023, https://arxiv.org/abs/2303.00654, section 5). g(x) is the gradient of one example's loss with respect to all
weights under training. Of a matrix product it is never held: its norm follows from the product's inputs and the slopes
of its outputs (ghost clipping, Goodfellow 2015, https://arxiv.org/abs/1510.01799; Li et al. 2022,
https://arxiv.org/abs/2110.05679; by Opacus), and of the same two, once the slopes are weighted, the clipped sum is one
product more: one pass back is enough (book-keeping, Bu et al. 2023, https://arxiv.org/abs/2210.00038). A lot passes in
parts, and gets its noise once. An empty lot is a step on noise alone: to leave it out would tell that it was empty.

What follows works on the noised gradient, and so costs nothing: any optimiser, weight decay, FedProx's pull, the
server. Lots and noise are drawn from 256 bits of the operating system's entropy, and never from the run's seed: whoever
knows it could take the noise away again.
"""

import math
import secrets
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

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
    with _noted(model) as calls:
        found = parts_of(model, batch, recipe, compute)
    each = each_loss(found["soft"], found["hard"], batch, recipe, recipe.weights)
    slopes = torch.autograd.grad(each.sum(), [call.output for call in calls], allow_unused=True)
    used = [(call, slope) for call, slope in zip(calls, slopes, strict=True) if slope is not None]
    norms = torch.stack([norm for call, slope in used for norm in call.norms(slope)]).norm(dim=0)
    fine = norms.isfinite()  # what one example does must not show in what becomes of the others
    factors = (clip_norm / norms[fine]).clamp(max=1.0)
    sums = dict(pair for call, slope in used for pair in call.sums(slope[fine], fine, factors))
    return [sums[weight] if weight in sums else torch.zeros_like(weight) for weight in weights]


@dataclass(frozen=True)
class Call:
    """What a module with weights under training did in a pass forward.

    Attributes:
        given, output: (examples, ..., width) each.
    """

    module: Any
    given: Tensor
    output: Tensor

    def norms(self, slope: Tensor) -> list[Tensor]:
        """(examples,) norms of each example's gradient with respect to each weight, from that of the output."""
        from opacus.grad_sample import GradSampleModuleFastGradientClipping as Opacus

        if self._is_product:
            return list(Opacus.NORM_SAMPLERS[nn.Linear](self.module, [self.given], slope).values())
        return [each.flatten(1).norm(dim=1) for each in self._gradients(slope).values()]

    def sums(self, slope: Tensor, kept: Tensor, factors: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Each weight with the weighted sum of some examples' gradients.

        Args:
            slope: of those that are kept.
        """
        weighted = slope * factors.view(-1, *[1] * (slope.dim() - 1))
        call = replace(self, given=self.given[kept])
        if not self._is_product:
            yield from ((weight, each.sum(dim=0)) for weight, each in call._gradients(weighted).items())
            return
        rows, columns = call.given.flatten(0, -2), weighted.flatten(0, -2)
        turned = not isinstance(self.module, nn.Linear)  # GPT-2's: its matrix is (in, out)
        yield self.module.weight, rows.T @ columns if turned else columns.T @ rows
        if self.module.bias is not None:
            yield self.module.bias, columns.sum(dim=0)

    @property
    def _is_product(self) -> bool:
        from transformers.pytorch_utils import Conv1D

        return isinstance(self.module, nn.Linear | Conv1D)

    def _gradients(self, slope: Tensor) -> dict[Tensor, Tensor]:
        """(examples, *shape) of each weight; of modules whose weights are few."""
        from opacus.grad_sample import GradSampleModule

        found: dict[Tensor, Tensor] = GradSampleModule.GRAD_SAMPLERS[type(self.module)](
            self.module, [self.given], slope
        )
        return found


@contextmanager
def _noted(model: Any) -> Iterator[list[Call]]:
    """What the modules with weights under training do meanwhile.

    Raises:
        ValueError: a weight is used twice, so that an example's gradients would have to be added up before their norm;
            or a module's output has other axes than examples, pieces and width.
    """
    calls: list[Call] = []
    weights: set[int] = set()

    def note(module: Any, given: tuple[Tensor, ...], output: Tensor) -> None:
        own = {id(weight) for weight in module.parameters(recurse=False)}
        if own & weights:
            raise ValueError(f"a weight of a {type(module).__name__} is used twice in a pass forward")
        if output.dim() not in (2, 3):
            raise ValueError(
                f"a {type(module).__name__} has {output.dim()} dimensions; give (examples, [pieces,] width)"
            )
        weights.update(own)
        calls.append(Call(module, given[0].detach(), output))

    trained = [module for module in model.modules() if any(w.requires_grad for w in module.parameters(recurse=False))]
    hooks = [module.register_forward_hook(note) for module in trained]
    try:
        yield calls
    finally:
        for hook in hooks:
            hook.remove()
