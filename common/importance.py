"""How much each attention head and each neuron of a student matters for the distillation.

A gate of 1 multiplies every head's output and every neuron. What the loss would change by if the gate closed is, to
first order, the gradient of the gate; its absolute value, taken for each example before they are added, is the
importance (Michel et al. 2019, https://arxiv.org/abs/1905.10650, equation 2; for neurons Molchanov et al. 2017,
https://arxiv.org/abs/1611.06440). The loss is the student's own distillation loss: the whole teacher's would be 0, with
a gradient of 0.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from common.batches import token_budget_batches
from common.device import Compute
from common.families import family_of, head_count, layers_of
from common.losses import pooled
from common.objective import Examples, batch_of, each_loss, output_losses
from common.recipe import Recipe
from common.seeding import generator

MOST = 256  # examples of a client that are looked at: an estimate
ROOM = 4096  # padded word pieces at once at most: no device that trains may be lost here, where nothing is halved


def importance(
    model: Any, examples: Examples, *, recipe: Recipe, compute: Compute, seed: int, client: int
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Mean importance over some of a client's examples: (layers, heads) and (layers, neurons).

    The loss is that on outputs: soft targets, and labels where they have weight, weighted as for training.
    """
    rows = chosen(len(examples.rows), seed, client)
    lengths = examples.data.tokens.lengths(examples.rows[rows])
    budget = min(recipe.token_budget, recipe.micro_budget or recipe.token_budget, ROOM)
    totals: list[NDArray[np.float64]] = []
    model.eval()
    for places in token_budget_batches(lengths, budget, generator(seed, "importance", client, 1)):
        batch = batch_of(examples, rows[places], recipe, compute)
        with _gated(model) as gated, compute.autocast():
            logits = model(**batch.inputs).logits
        soft, hard = output_losses(pooled(logits, batch.pooling), batch, recipe)
        loss = each_loss(soft, hard, batch, recipe, recipe.weights).sum()
        grads = torch.autograd.grad(loss, gated)
        sums = [
            _per_gate(state, grad, model, place, batch.pooling)
            for place, (state, grad) in enumerate(zip(gated, grads, strict=True))
        ]
        totals = [a + b for a, b in zip(totals, sums, strict=True)] if totals else sums
    mean = [(total / len(rows)).astype(np.float32) for total in totals]
    return np.stack(mean[0::2]), np.stack(mean[1::2])


def chosen(count: int, seed: int, client: int) -> NDArray[np.int64]:
    """Which of a client's examples are looked at."""
    return np.sort(generator(seed, "importance", client, 0).permutation(count)[:MOST])


@contextmanager
def _gated(model: Any) -> Iterator[list[Tensor]]:
    """Collects what goes into each layer's product that mixes heads, then into the one that mixes neurons."""
    found: list[Tensor] = []
    family = family_of(model)

    def note(module: Any, given: tuple[Tensor, ...]) -> None:
        # of frozen weights it has no gradient yet
        found.append(given[0] if given[0].requires_grad else given[0].requires_grad_())

    products = [layer.get_submodule(path) for layer in layers_of(model) for path in (family.mix, family.down)]
    hooks = [product.register_forward_pre_hook(note) for product in products]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def _per_gate(state: Tensor, grad: Tensor, model: Any, place: int, pooling: Tensor | None) -> NDArray[np.float64]:
    """Summed absolute gradients of the gates on (windows, length, width): of heads, or one for each column."""
    product = (state.detach().float() * grad.float()).sum(dim=1)
    if pooling is not None:  # a gate is an example's: it acts on all its windows
        product = (pooling > 0).float() @ product
    if place % 2 == 0:
        product = product.unflatten(-1, (-1, int(model.config.hidden_size) // head_count(model.config))).sum(dim=-1)
    return product.abs().sum(dim=0).double().cpu().numpy()
