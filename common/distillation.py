"""Distillation: how a student learns from its teacher's outputs and inner states, on one process's examples.

Knowledge distillation after Hinton et al. 2015 (https://arxiv.org/abs/1503.02531): AdamW on the weighted sum of the
losses in `common.losses`, in token-budget batches. For a task that predicts a score, KL and cross-entropy become
squared errors. Clients train with it on their own text, the server on public text; the steps are `begin`, `step` and
`learn`.

A batch may pass in parts, whose gradients are added up before the optimiser's step (Ott et al. 2018, section 3.2,
https://arxiv.org/abs/1806.00187), each weighted so that the sum is the gradient of the whole batch. The word budgets
are apart: ``token_budget`` says what the student learns from at once, ``micro_budget`` what is in memory at once.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from common import losses
from common.batches import cut, token_budget_batches
from common.config import Config
from common.dataset import Split
from common.device import Compute, is_out_of_memory
from common.errors import InputError
from common.families import family_of, head_count, layers_of
from common.models import pair_hidden_layers, set_training
from common.seeding import generator, seed_for
from common.slim import Shape
from common.tokens import Tokens

PARTS = ("soft", "hard", "hidden", "cls", "relation", "self")  # of the loss
DEEP = PARTS[2:5]  # need the teacher itself beside the student
BY_PLACE = ("hidden", "relation")  # means over real positions
BY_WINDOW = ("cls",)  # means over windows; the others over examples
Pairs = tuple[tuple[int, int], ...]  # student's layer, teacher's layer


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


@dataclass(frozen=True)
class Examples:
    """What a student learns from.

    Attributes:
        data: the examples in the student's pieces.
        rows: (n,) row numbers in ``data``.
        soft: (n, num_labels) the teacher's logits of these rows.
        taught: all rows of ``data`` in the teacher's pieces, where those are others.
    """

    data: Split
    rows: NDArray[np.int64]
    soft: NDArray[np.float32]
    taught: Tokens | None = None


@dataclass(frozen=True)
class Recipe:
    """How a student is trained, resolved for one round.

    Attributes:
        token_budget: padded word pieces per optimiser step.
        micro_budget: padded word pieces that pass at once; 0: the whole batch.
        weights: of the loss's `PARTS`.
        adaptive: where the teacher is wrong the weight of its output goes to the label.
        last_lr: the learning rate falls to this one over the steps; 0: it stays.
    """

    epochs: int
    lr: float
    weight_decay: float
    clip_norm: float
    token_budget: int
    temperature: float
    weights: Mapping[str, float]
    adaptive: bool
    hidden_loss: str
    hidden_pairs: Pairs
    relation_pairs: Pairs
    relation_heads: int
    regression: bool
    multi_label: bool = False
    proximal: float = 0.0
    last_lr: float = 0.0
    micro_budget: int = 0

    @property
    def deep(self) -> bool:
        return any(self.weights[part] > 0 for part in DEEP)

    @property
    def labelled(self) -> bool:
        """Whether labels are read."""
        return self.weights["hard"] > 0 or self.adaptive


@dataclass
class Room:
    """What a device has room for.

    Attributes:
        pieces: padded word pieces that pass at once; halved when memory runs out.
    """

    pieces: int


@dataclass(frozen=True)
class Batch:
    """Examples on their device: a batch, or a part of one.

    Attributes:
        inputs: the student's, a row for each window of the examples.
        soft: (batch, num_labels) the teacher's logits.
        hard: (batch,) labels, (batch, classes) for multi-label, or None when they are not read.
        taught: the teacher's inputs, for losses on inner states.
        positions: at how many positions the inner states are compared.
        places: where the two are compared: (batch, positions) in the student's and in the teacher's inputs, and a
            mask of these; None: everywhere.
        pooling: (batch, windows) what makes the examples' logits of the windows'; None: each has one.
    """

    inputs: dict[str, Tensor]
    soft: Tensor
    hard: Tensor | None
    taught: dict[str, Tensor]
    positions: int
    places: tuple[Tensor, Tensor, Tensor] | None = None
    pooling: Tensor | None = None


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


def make_recipe(config: Config, round_number: int, shape: Shape, teacher: Any, regression: bool) -> Recipe:
    """The keys of a run as one round's recipe; the learning rate falls over the rounds.

    Args:
        shape: the student's.
        teacher: the teacher's configuration.
    """
    keys, distill = config.client, config.distill
    layers = len(shape.layers), int(teacher.num_hidden_layers)
    passed = (round_number - 1) / (config.rounds - 1) if config.rounds > 1 else 0.0
    weights = {part: getattr(distill, f"{part}_weight") for part in PARTS}
    if distill.weighting == "annealed":
        weights |= {"soft": weights["soft"] * (1.0 - passed), "hard": weights["hard"] + weights["soft"] * passed}
    return Recipe(
        epochs=keys.epochs,
        lr=keys.lr * (1.0 - 0.9 * passed if keys.lr_decay == "linear" else 1.0),
        weight_decay=keys.weight_decay,
        clip_norm=keys.clip_norm,
        token_budget=keys.token_budget,
        micro_budget=keys.micro_budget if keys.micro_budget > 0 else keys.token_budget,
        temperature=distill.temperature,
        weights=weights,
        adaptive=distill.weighting == "adaptive",
        hidden_loss=distill.hidden_loss,
        hidden_pairs=pair_hidden_layers(distill.hidden_layers, *layers),
        relation_pairs=pair_hidden_layers(distill.relation_layers, *layers, "relation-layers"),
        relation_heads=relation_heads(distill.relation_heads, shape, teacher),
        regression=regression,
        multi_label=config.data.multi_label,
        proximal=keys.proximal if config.server.strategy == "fedprox" else 0.0,
    )


def relation_heads(asked: int, shape: Shape, teacher: Any) -> int:
    """How many relation heads both models' widths can be cut into; none asked for: as many as whole heads allow.

    Raises:
        InputError: the number that is asked for does not divide both widths.
    """
    heads = len(shape.heads[0]), head_count(teacher)
    size = int(teacher.hidden_size) // heads[1]
    if asked and any(count * size % asked for count in heads):
        raise InputError(
            f"distill.relation-heads = {asked}: student and teacher have {heads[0]} and {heads[1]} heads of width "
            f"{size}; give a divisor of {math.gcd(*heads) * size}"
        )
    return asked or math.gcd(*heads)


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
    state.student.optimizer.step()


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
) -> list[Tensor]:
    """`set_gradients` for the examples at some places, the shortest first; in smaller parts when memory runs out.

    Args:
        room: see `learn`.
        lengths: word pieces of each of the examples.
    """
    while True:
        budget = recipe.micro_budget if room is None else room.pieces
        cuts = cut(places, lengths, budget) if budget else [places]
        parts = [batch_of(examples, part, recipe, compute) for part in cuts]
        try:
            return set_gradients(state, parts, recipe=recipe, compute=compute, teacher=teacher)
        except (RuntimeError, MemoryError) as error:
            if room is None or len(parts) == len(places) or not is_out_of_memory(error):
                raise
        # out here the error is gone, and with it what it held
        state.student.optimizer.zero_grad(set_to_none=True)
        room.pieces = max(part.inputs["input_ids"].numel() for part in parts) // 2
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
        found = _parts(state, batch, recipe, compute, teacher)
        loss = torch.stack([weights[name] * part for name, part in found.items() if name in DEEP]).sum() + _outer(
            found["soft"], found["hard"], batch, recipe, weights
        )
        if state.student.smaller:
            loss = loss + weights["self"] * found["self"]
        loss.backward()
        told = torch.stack([loss, *(found[name].mean() for name in PARTS)]).detach().double()
        totals.append(told * told.new_tensor([examples, *(examples * shares[name] for name in PARTS)]))
    return totals


def shares_of(parts: Sequence[Batch]) -> list[dict[str, float]]:
    """How much each part of a batch adds to the means over the batch that make up the loss, by `PARTS`.

    A mean over the batch is made of the parts' means, each by its share of what the mean is over.
    """
    sizes = [
        {"place": part.positions, "window": len(part.inputs["input_ids"]), "example": len(part.soft)} for part in parts
    ]
    totals = {of: sum(size[of] for size in sizes) for of in sizes[0]}
    over = {name: "place" if name in BY_PLACE else "window" if name in BY_WINDOW else "example" for name in PARTS}
    return [{name: size[of] / totals[of] for name, of in over.items()} for size in sizes]


def _outer(soft: Tensor, hard: Tensor, batch: Batch, recipe: Recipe, weights: Mapping[str, float]) -> Tensor:
    """The loss on outputs from its two parts, each (batch,)."""
    on_soft, on_hard = weights["soft"], weights["hard"]
    if not recipe.adaptive:
        return on_soft * soft.mean() + on_hard * hard.mean()
    assert batch.hard is not None
    trust = _trust(batch.soft, batch.hard, recipe)
    return (on_soft * trust * soft + (on_hard + on_soft * (1.0 - trust)) * hard).mean()


def _trust(soft: Tensor, hard: Tensor, recipe: Recipe) -> Tensor:
    """(batch,) how right the teacher is, from 0 to 1: its probability of the label; exp(-error^2) for a score.

    For multi-label its probability of what the label says of a class, mean over classes.
    """
    if recipe.regression:
        return torch.exp(-losses.score_error(soft, hard.float()))
    if recipe.multi_label:
        return torch.sigmoid(torch.where(hard > 0, soft, -soft)).mean(dim=-1)
    return torch.softmax(soft, dim=-1).gather(1, hard[:, None]).squeeze(1)


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
    advance: Any = lambda amount: None,
) -> Learning:
    """Train from these weights, all epochs.

    Args:
        who: (round, client); with the seed they determine every random choice.
        teacher: the model, for losses on inner states.
        room: takes the place of the recipe's ``micro_budget``, and shrinks when memory runs out.
        advance: told how many more examples are done.
    """
    torch.manual_seed(seed_for(seed, "dropout", *who))
    data, rows = examples.data, examples.rows
    state = begin(student, weights, recipe, data.tokens.vocabulary(rows) if student.words else None)
    lengths = data.tokens.lengths(rows)
    batches = [
        places
        for epoch in range(recipe.epochs)
        for places in token_budget_batches(lengths, recipe.token_budget, generator(seed, "batches", *who, epoch))
    ]
    try:
        for number, places in enumerate(batches):
            if recipe.last_lr:
                passed = number / max(len(batches) - 1, 1)
                student.optimizer.param_groups[0]["lr"] = recipe.lr + (recipe.last_lr - recipe.lr) * passed
            told = set_gradients_in(
                room, state, examples, places, lengths, recipe=recipe, compute=compute, teacher=teacher
            )
            step(state, told, len(places), recipe)
            advance(len(places))
    finally:
        restore(student)
    return state


def batch_of(examples: Examples, places: NDArray[np.int64], recipe: Recipe, compute: Compute) -> Batch:
    """The examples at some places of ``rows``, on their device."""
    data, rows, device = examples.data, examples.rows[places], compute.device

    def inputs(tokens: Tokens) -> dict[str, Tensor]:
        return {name: tensor.to(device) for name, tensor in tokens.batch(rows).items()}

    # when they are not needed, labels are not even read: a client may have none
    hard = torch.from_numpy(np.asarray(data.labels[rows])).to(device) if recipe.labelled else None
    own, taught, compared = inputs(data.tokens), {}, None
    pooling = data.tokens.pooling(rows)
    positions = int(data.tokens.widths(data.tokens.windows(rows)[0]).sum())
    if recipe.deep and examples.taught is not None:
        taught = inputs(examples.taught)
        compared, positions = _aligned(data.tokens, examples.taught, rows, device)
    elif recipe.deep:
        taught = own
    soft = torch.from_numpy(examples.soft[places]).to(device)
    pooling = None if pooling is None else pooling.to(device)
    return Batch(own, soft, hard, taught, positions, compared, pooling)


def _aligned(
    own: Tokens, taught: Tokens, rows: NDArray[np.int64], device: Any
) -> tuple[tuple[Tensor, Tensor, Tensor], int]:
    """Where the same words begin in both, as far as both hold them, and at how many places that is.

    A text cut short may end earlier in one.
    """
    pairs = [(a, b, min(len(a), len(b))) for a, b in zip(own.words(rows), taught.words(rows), strict=True)]
    shape = len(rows), max(size for *_, size in pairs)
    found = np.zeros((3, *shape), dtype=np.int64)
    for row, (a, b, size) in enumerate(pairs):
        found[0, row, :size], found[1, row, :size], found[2, row, :size] = a[:size], b[:size], 1
    first, second, mask = torch.from_numpy(found).to(device)
    return (first, second, mask), sum(size for *_, size in pairs)


# --- the parts of the loss -----------------------------------------------------------------------


def _parts(state: Learning, batch: Batch, recipe: Recipe, compute: Compute, teacher: Any) -> dict[str, Tensor]:
    """Soft and hard (batch,), the others ()."""
    own = batch.inputs
    if state.vocabulary is not None:
        own = {**own, "input_ids": torch.searchsorted(state.vocabulary, own["input_ids"])}
    related = recipe.weights["relation"] > 0
    with compute.autocast(), _watched(state.student.model, [s for s, _ in recipe.relation_pairs] * related) as ours:
        output = state.student.model(**own, output_hidden_states=recipe.deep)
    logits = losses.pooled(output.logits, batch.pooling)
    zero = logits.new_zeros(())
    parts = dict.fromkeys(PARTS, zero)
    parts["soft"], parts["hard"] = output_losses(logits, batch, recipe)
    if state.student.smaller:
        with compute.autocast():
            found = [losses.pooled(one(own), batch.pooling) for one in state.student.smaller]
        target = replace(batch, soft=logits.detach(), hard=None)
        parts["self"] = torch.stack([output_losses(one, target, recipe)[0].mean() for one in found]).sum()
    if not recipe.deep:
        return parts
    with (
        torch.no_grad(),
        compute.autocast(),
        _watched(teacher, [t for _, t in recipe.relation_pairs] * related) as theirs,
    ):
        target = teacher(**batch.taught, output_hidden_states=True).hidden_states
    mask = own["attention_mask"] if batch.places is None else batch.places[2]
    # entry 0 of hidden_states is the embedding's output
    pairs = [(output.hidden_states[s + 1].float(), target[t + 1].float()) for s, t in recipe.hidden_pairs]
    if recipe.weights["hidden"] > 0:
        distance = losses.HIDDEN_LOSSES[recipe.hidden_loss]
        parts["hidden"] = torch.stack([distance(*compared(a, b, batch), mask) for a, b in pairs]).mean()
    if recipe.weights["cls"] > 0:
        parts["cls"] = torch.stack([losses.patient(a[:, 0], b[:, 0]) for a, b in pairs]).mean()
    if related:
        relation = partial(losses.relations, mask=mask, heads=recipe.relation_heads)
        found = [relation(*compared(a.float(), b.float(), batch)) for a, b in zip(ours, theirs, strict=True)]
        parts["relation"] = torch.stack(found).mean()
    return parts


def output_losses(logits: Tensor, batch: Batch, recipe: Recipe) -> tuple[Tensor, Tensor]:
    """The soft and the hard loss of each example, (batch,)."""
    hard = batch.hard
    if recipe.regression:
        soft = losses.score_error(logits, batch.soft)
        return soft, torch.zeros_like(soft) if hard is None else losses.score_error(logits, hard.float())
    if recipe.multi_label:
        soft = losses.soft_multi_label(logits, batch.soft, recipe.temperature)
        return soft, torch.zeros_like(soft) if hard is None else losses.hard_multi_label(logits, hard)
    soft = losses.soft_targets(logits, batch.soft, recipe.temperature)
    return soft, torch.zeros_like(soft) if hard is None else losses.hard_labels(logits, hard)


def compared(own: Tensor, taught: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
    """The two (batch, length, width) at the places where they are compared."""
    if batch.places is None:
        return own, taught
    first, second, _ = batch.places
    return own.gather(1, first[..., None].expand(-1, -1, own.shape[-1])), taught.gather(
        1, second[..., None].expand(-1, -1, taught.shape[-1])
    )


@contextmanager
def _watched(model: Any, layers: list[int]) -> Iterator[list[Tensor]]:
    """Collects queries, keys and values, each (batch, length, width of all heads), of these layers as they pass."""
    found: list[Tensor] = []
    paths = family_of(model).heads if layers else ()

    def note(module: Any, given: Any, output: Tensor) -> None:
        found.extend(output.chunk(3 // len(paths), dim=-1))

    products = [layers_of(model)[layer].get_submodule(path) for layer in layers for path in paths]
    hooks = [product.register_forward_hook(note) for product in products]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()
