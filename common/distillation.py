"""Distillation: how a student learns from its teacher's outputs and inner states, on one process's examples.

Knowledge distillation after Hinton et al. 2015 (https://arxiv.org/abs/1503.02531): AdamW on the weighted sum of the
losses in `common.losses`, in token-budget batches. For a task that predicts a score, KL and cross-entropy become
squared errors. Clients train with it on their own text, the server on public text; the steps are `begin`, `step` and
`learn`.

A batch may pass in parts, whose gradients are added up before the optimiser's step (Ott et al. 2018, section 3.2,
https://arxiv.org/abs/1806.00187), each weighted so that the sum is the gradient of the whole batch. The word budgets
are apart: ``token_budget`` says what the student learns from at once, ``micro_budget`` what is in memory at once.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from common.batches import cut, token_budget_batches
from common.device import Compute, is_out_of_memory
from common.models import set_training
from common.objective import Batch, Examples, batch_of, masked, objective, parts_of, shares_of
from common.recipe import PARTS, Recipe
from common.seeding import generator, seed_for

PROJECTION = "projection"  # among the trained weights: see `common.objective.parts_of`


@dataclass(frozen=True)
class Student:
    """What stays in a process from client to client.

    Attributes:
        model: the student.
        trained: those of its weights that are trained, by name.
        optimizer: their AdamW.
        updates: where the differences that training makes are put, by name.
        words: name of the word embedding where it is trained, else empty.
        smaller: the students inside it that it teaches; see `common.nested`.
    """

    model: Any
    trained: dict[str, torch.nn.Parameter]
    optimizer: torch.optim.AdamW
    updates: dict[str, Tensor]
    words: str
    smaller: tuple[Any, ...] = ()

    @classmethod
    def of(cls, model: Any, trained: dict[str, torch.nn.Parameter], smaller: tuple[Any, ...] = ()) -> "Student":
        table = model.get_input_embeddings().weight
        words = next((name for name, parameter in trained.items() if parameter is table), "")
        updates = {name: torch.empty_like(parameter) for name, parameter in trained.items() if name != words}
        return cls(model, trained, torch.optim.AdamW(trained.values(), fused=True), updates, words, smaller)


@dataclass
class Room:
    """What a device has room for.

    Attributes:
        pieces: padded word pieces that pass at once; halved when memory runs out.
    """

    pieces: int


@dataclass
class Learning:
    """What training needs and what it adds up.

    Attributes:
        trained: the weights under training by name.
        start: what they were; the update is the difference.
        vocabulary: (v,) ascending word pieces that the rows of the word embedding under training stand for.
        totals: (1 + parts,) summed loss and its `PARTS`, weighted by examples.
        seen: examples passed so far, all epochs.
    """

    student: Student
    trained: dict[str, torch.nn.Parameter]
    start: dict[str, Tensor]
    vocabulary: Tensor | None
    totals: Tensor
    seen: int = 0


class Private(Protocol):
    """Steps that hide whether an example is there; nothing is told of their loss."""

    def lots(self, lengths: NDArray[np.int64], epochs: int) -> list[tuple[int, NDArray[np.int64]]]:
        """The epoch and the places of each step's examples, the shortest first; perhaps none."""

    def set_gradients(self, state: Learning, parts: Sequence[Batch], *, recipe: Recipe, compute: Compute) -> None:
        """As `set_gradients`."""


def begin(
    student: Student, weights: dict[str, Tensor], recipe: Recipe, vocabulary: NDArray[np.int64] | None = None
) -> Learning:
    """Put the weights into the resident student and its optimiser back to its beginning, in place.

    A word embedding under training is cut to the rows of ``vocabulary``: the others get no gradient, and most of
    a model this small is rows of words that one client's text does not hold.
    """
    trained, start, pieces = student.trained, weights, None
    if student.words and vocabulary is not None:
        pieces = torch.from_numpy(vocabulary).to(weights[student.words].device)
        start = {**weights, student.words: weights[student.words][pieces]}
        trained = {**trained, student.words: torch.nn.Parameter(start[student.words].clone())}
        student.model.get_input_embeddings().weight = trained[student.words]
    optimizer = student.optimizer
    for gone in set(optimizer.state) - set(trained.values()):
        del optimizer.state[gone]
    with torch.no_grad():
        for name, parameter in trained.items():
            parameter.copy_(start[name])
        for memory in optimizer.state.values():
            for tensor in memory.values():
                tensor.zero_()
    optimizer.param_groups[0].update(params=list(trained.values()), lr=recipe.lr, weight_decay=recipe.weight_decay)
    optimizer.zero_grad(set_to_none=True)
    for model in (student.model, *(one.model for one in student.smaller)):
        set_training(model)
    device = next(iter(weights.values())).device
    totals = torch.zeros(1 + len(PARTS), dtype=torch.float64, device=device)
    return Learning(student, trained, start, pieces, totals)


def step(state: Learning, told: Sequence[Tensor], count: int, recipe: Recipe) -> None:
    """One optimiser step along the gradients of a batch of ``count`` examples; ``told`` is of `set_gradients`."""
    for found in told:
        state.totals += found
    state.seen += count
    if recipe.proximal > 0:
        pull_back(state, recipe.proximal)
    if recipe.clip_norm > 0:
        torch.nn.utils.clip_grad_norm_(list(state.trained.values()), recipe.clip_norm)
    if recipe.sgd:
        descend(list(state.trained.values()), recipe.lr, recipe.weight_decay)
    else:
        state.student.optimizer.step()


def descend(weights: Sequence[torch.nn.Parameter], lr: float, decay: float) -> None:
    """w <- (1 - lr decay) w - lr gradient, in place: what clients do in Reddi et al. 2021, Algorithm 2."""
    with torch.no_grad():
        for weight in weights:
            if weight.grad is not None:
                weight.mul_(1.0 - lr * decay).add_(weight.grad, alpha=-lr)


def set_gradients_in(
    room: Room | None,
    state: Learning,
    examples: Examples,
    places: NDArray[np.int64],
    lengths: NDArray[np.int64],
    *,
    recipe: Recipe,
    compute: Compute,
    teacher: Any = None,
    private: "Private | None" = None,
) -> list[Tensor]:
    """`set_gradients` for the examples at some places, the shortest first; in smaller parts when memory runs out.

    Args:
        room: see `learn`.
        lengths: word pieces of each of the examples.
        private: see `learn`.
    """
    while True:
        budget = recipe.micro_budget if room is None else room.pieces
        cuts = cut(places, lengths, budget) if budget or not len(places) else [places]
        parts = [batch_of(examples, part, recipe, compute) for part in cuts]
        try:
            if private is not None:
                private.set_gradients(state, parts, recipe=recipe, compute=compute)
                return []
            return set_gradients(state, parts, recipe=recipe, compute=compute, teacher=teacher)
        except (RuntimeError, MemoryError) as error:
            if room is None or len(parts) == len(places) or not is_out_of_memory(error):
                raise
        # out here the error is gone, and with it what it held
        state.student.optimizer.zero_grad(set_to_none=True)
        # an example alone cannot be cut, however large it is
        room.pieces = max(part.inputs["input_ids"].numel() for part in parts if len(part.soft) > 1) // 2
        if compute.device.type == "cuda":
            torch.cuda.empty_cache()


def set_gradients(
    state: Learning, parts: Sequence[Batch], *, recipe: Recipe, compute: Compute, teacher: Any = None
) -> list[Tensor]:
    """Set the gradients to those of the batch that the parts make up.

    But for rounding they do not depend on how it is cut, unless the student has dropout: that is drawn part by part.

    Returns:
        Of each part what it adds to `Learning.totals`.
    """
    examples = sum(len(part.soft) for part in parts)
    state.student.optimizer.zero_grad(set_to_none=True)
    totals = []
    for batch, shares in zip(parts, shares_of(parts), strict=True):
        weights = {name: recipe.weights[name] * share for name, share in shares.items()}
        found = parts_of(
            state.student.model, batch, recipe, compute,
            teacher=teacher, smaller=state.student.smaller, vocabulary=state.vocabulary,
            projection=state.trained.get(PROJECTION),
        )  # fmt: skip
        loss = objective(found, batch, recipe, weights)
        loss.backward()
        told = torch.stack([loss, *(found[name].mean() for name in PARTS)]).detach().double()
        totals.append(told * told.new_tensor([examples, *(examples * shares[name] for name in PARTS)]))
    return totals


def pull_back(state: Learning, mu: float) -> None:
    """Add the gradient of mu/2 |w - w_round|^2, FedProx's pull (Li et al. 2020, https://arxiv.org/abs/1812.06127)."""
    for name, parameter in state.trained.items():
        if parameter.grad is not None:
            parameter.grad.add_(parameter.detach() - state.start[name], alpha=mu)


def restore(student: Student) -> None:
    """Put the whole word embedding back: scoring reads any word."""
    if student.words:
        student.model.get_input_embeddings().weight = student.trained[student.words]


def learnt(state: Learning, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """All trained weights after learning from ``weights``; of a word embedding the rows that were not trained too."""
    found = {name: parameter.detach() for name, parameter in state.trained.items()}
    if state.vocabulary is not None:
        words = state.student.words
        found[words] = weights[words].index_copy(0, state.vocabulary, found[words])
    return found


def learn(
    student: Student,
    weights: dict[str, Tensor],
    examples: Examples,
    *,
    recipe: Recipe,
    compute: Compute,
    seed: int,
    who: tuple[int, int],
    teacher: Any = None,
    room: Room | None = None,
    private: Private | None = None,
    advance: Any = lambda amount: None,
    spent: Callable[[], bool] = lambda: False,
) -> Learning:
    """Train from these weights, all epochs.

    Args:
        who: (round, client); with the seed they determine every random choice.
        teacher: the model, for losses on inner states; for general distillation that with the masked-LM head.
        room: takes the place of the recipe's ``micro_budget``, and shrinks when memory runs out.
        private: takes the place of batches and gradients.
        advance: told how many more examples are done.
        spent: asked after every step whether to stop there.
    """
    torch.manual_seed(seed_for(seed, "dropout", *who))
    data, rows = examples.data, examples.rows
    state = begin(student, weights, recipe, data.tokens.vocabulary(rows) if student.words else None)
    lengths = data.tokens.lengths(rows)
    batches = [
        (epoch, places)
        for epoch in range(recipe.epochs)
        for places in token_budget_batches(lengths, recipe.token_budget, generator(seed, "batches", *who, epoch))
    ] if private is None else private.lots(lengths, recipe.epochs)  # fmt: skip
    shown, shown_in = examples, -1
    try:
        for number, (epoch, places) in enumerate(batches):
            if recipe.last_lr:
                passed = number / max(len(batches) - 1, 1)
                student.optimizer.param_groups[0]["lr"] = recipe.lr + (recipe.last_lr - recipe.lr) * passed
            if examples.masking is not None and epoch != shown_in:
                shown, shown_in = masked(examples, generator(seed, "masks", *who, epoch)), epoch
            told = set_gradients_in(
                room, state, shown, places, lengths, recipe=recipe, compute=compute, teacher=teacher, private=private
            )
            step(state, told, len(places), recipe)
            advance(len(places))
            if spent():
                break
    finally:
        restore(student)
    return state
