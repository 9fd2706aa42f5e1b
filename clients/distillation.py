"""Local distillation: what one client does with the student in one round.

Knowledge distillation after Hinton et al. 2015 (https://arxiv.org/abs/1503.02531): AdamW on

    soft-weight * T^2 KL(teacher || student) + hard-weight * CE(label, student) + hidden-weight * d(hidden states)

over the client's own training examples, in token-budget batches. For a task that predicts a score, KL and
cross-entropy become squared errors. The three steps are `client_init`, `client_step` and `client_final`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from common import losses
from common.batches import token_budget_batches
from common.config import Config
from common.dataset import Split
from common.device import Compute
from common.fixed_point import Rows
from common.models import set_training
from common.seeding import generator, seed_for

LossParts = dict[str, Tensor]


@dataclass(frozen=True)
class Student:
    """What stays in a process from client to client.

    Attributes:
        model: the student.
        trained: those of its weights that are trained, by name.
        optimizer: their AdamW.
        updates: where the differences that training makes are put, by name.
        words: name of the word embedding where it is trained, else empty.
    """

    model: Any
    trained: dict[str, torch.nn.Parameter]
    optimizer: torch.optim.AdamW
    updates: dict[str, Tensor]
    words: str

    @classmethod
    def of(cls, model: Any, trained: dict[str, torch.nn.Parameter]) -> "Student":
        table = model.get_input_embeddings().weight
        words = next((name for name, parameter in trained.items() if parameter is table), "")
        updates = {name: torch.empty_like(parameter) for name, parameter in trained.items() if name != words}
        return cls(model, trained, torch.optim.AdamW(trained.values(), fused=True), updates, words)


@dataclass(frozen=True)
class TrainingShard:
    """One client's training examples.

    Attributes:
        rows: (n,) row numbers in ``data``.
        soft: (n, num_labels) the teacher's logits of these rows.
    """

    data: Split
    rows: NDArray[np.int64]
    soft: NDArray[np.float32]


@dataclass(frozen=True)
class Recipe:
    """How a client trains, resolved for one round."""

    epochs: int
    lr: float
    weight_decay: float
    clip_norm: float
    token_budget: int
    temperature: float
    soft_weight: float
    hard_weight: float
    hidden_weight: float
    hidden_loss: str
    hidden_pairs: tuple[tuple[int, int], ...]
    regression: bool
    proximal: float = 0.0


@dataclass
class ClientState:
    """What training needs and what it adds up.

    Attributes:
        trained: the weights under training by name.
        start: what they were; the update is the difference.
        vocabulary: (v,) ascending word pieces that the rows of the word embedding under training stand for.
        totals: (4,) summed loss and its soft, hard and hidden parts, weighted by examples.
        seen: examples passed so far, all epochs.
    """

    student: Student
    trained: dict[str, torch.nn.Parameter]
    start: dict[str, Tensor]
    vocabulary: Tensor | None
    totals: Tensor
    seen: int = 0


@dataclass(frozen=True)
class ClientUpdate:
    """A finished client's part of the sums.

    Attributes:
        arrays: the update, trained minus received weights, float32 by parameter name; of the word embedding
            the rows of the client's own word pieces. They last until the next client.
        examples: the weight, the client's number of training examples.
        losses: mean loss, and its soft, hard and hidden parts.
    """

    arrays: dict[str, NDArray[np.float32] | Rows]
    examples: int
    losses: tuple[float, float, float, float] = field(default=(0.0, 0.0, 0.0, 0.0))


def make_recipe(
    config: Config, round_number: int, hidden_pairs: tuple[tuple[int, int], ...], regression: bool
) -> Recipe:
    """The keys of a run as one round's recipe; the learning rate falls over the rounds."""
    keys, distill = config.client, config.distill
    falling = keys.lr_decay == "linear" and config.rounds > 1
    share = 1.0 - 0.9 * (round_number - 1) / (config.rounds - 1) if falling else 1.0
    return Recipe(
        epochs=keys.epochs,
        lr=keys.lr * share,
        weight_decay=keys.weight_decay,
        clip_norm=keys.clip_norm,
        token_budget=keys.token_budget,
        temperature=distill.temperature,
        soft_weight=distill.soft_weight,
        hard_weight=distill.hard_weight,
        hidden_weight=distill.hidden_weight,
        hidden_loss=distill.hidden_loss,
        hidden_pairs=hidden_pairs,
        regression=regression,
        proximal=keys.proximal if config.server.strategy == "fedprox" else 0.0,
    )


def client_init(
    student: Student, weights: dict[str, Tensor], recipe: Recipe, vocabulary: NDArray[np.int64] | None = None
) -> ClientState:
    """Put the round's weights into the resident student and its optimiser back to its beginning, in place.

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
    set_training(student.model)
    device = next(iter(weights.values())).device
    return ClientState(student, trained, start, pieces, torch.zeros(4, dtype=torch.float64, device=device))


def client_step(
    state: ClientState,
    inputs: dict[str, Tensor],
    soft: Tensor,
    hard: Tensor | None,
    *,
    recipe: Recipe,
    compute: Compute,
    teacher: Any = None,
) -> None:
    """One optimiser step on one batch.

    Args:
        soft: (batch, num_labels) the teacher's logits.
        hard: (batch,) labels, or None when they have no weight.
        teacher: the model itself, needed only for a loss on hidden states.
    """
    deep = recipe.hidden_weight > 0
    own = inputs
    if state.vocabulary is not None:
        own = {**inputs, "input_ids": torch.searchsorted(state.vocabulary, inputs["input_ids"])}
    with compute.autocast():
        output = state.student.model(**own, output_hidden_states=deep)
    parts = _label_losses(output.logits.float(), soft, hard, recipe)
    if deep:
        with torch.no_grad(), compute.autocast():
            target = teacher(**inputs, output_hidden_states=True).hidden_states
        parts["hidden"] = _hidden_loss(output.hidden_states, target, inputs["attention_mask"], recipe)
    loss = (
        recipe.soft_weight * parts["soft"] + recipe.hard_weight * parts["hard"] + recipe.hidden_weight * parts["hidden"]
    )
    state.student.optimizer.zero_grad(set_to_none=True)
    loss.backward()
    if recipe.proximal > 0:
        pull_back(state, recipe.proximal)
    if recipe.clip_norm > 0:
        torch.nn.utils.clip_grad_norm_(list(state.trained.values()), recipe.clip_norm)
    state.student.optimizer.step()
    size = len(soft)
    state.totals += torch.stack([loss, parts["soft"], parts["hard"], parts["hidden"]]).detach().double() * size
    state.seen += size


def pull_back(state: ClientState, mu: float) -> None:
    """Add the gradient of mu/2 |w - w_round|^2, FedProx's pull (Li et al. 2020, https://arxiv.org/abs/1812.06127)."""
    for name, parameter in state.trained.items():
        if parameter.grad is not None:
            parameter.grad.add_(parameter.detach() - state.start[name], alpha=mu)


def client_final(state: ClientState, examples: int) -> ClientUpdate:
    """The difference that training has made."""
    student = state.student
    arrays: dict[str, NDArray[np.float32] | Rows] = {}
    with torch.no_grad():
        for name, parameter in state.trained.items():
            if name == student.words and state.vocabulary is not None:
                rows = (parameter - state.start[name]).cpu().numpy()
                arrays[name] = Rows(state.vocabulary.cpu().numpy(), rows)
            else:
                out = student.updates.get(name)
                arrays[name] = torch.sub(parameter, state.start[name], out=out).cpu().numpy()
    loss, soft, hard, hidden = (state.totals / max(state.seen, 1)).tolist()
    return ClientUpdate(arrays, examples, (loss, soft, hard, hidden))


def restore(student: Student) -> None:
    """Put the whole word embedding back: scoring reads any word."""
    if student.words:
        student.model.get_input_embeddings().weight = student.trained[student.words]


def distil(
    student: Student,
    weights: dict[str, Tensor],
    shard: TrainingShard,
    *,
    recipe: Recipe,
    compute: Compute,
    seed: int,
    who: tuple[int, int],
    teacher: Any = None,
) -> ClientUpdate:
    """Train one client from the round's weights and return its update.

    Args:
        who: (round, client); with the seed they determine every random choice.
        teacher: the model, for a loss on hidden states.
    """
    torch.manual_seed(seed_for(seed, "dropout", *who))
    data = shard.data
    state = client_init(student, weights, recipe, data.tokens.vocabulary(shard.rows) if student.words else None)
    try:
        _train(state, shard, recipe=recipe, compute=compute, seed=seed, who=who, teacher=teacher)
    finally:
        restore(student)
    return client_final(state, len(shard.rows))


def _train(
    state: ClientState, shard: TrainingShard, *, recipe: Recipe, compute: Compute, seed: int, who: tuple[int, int],
    teacher: Any,
) -> None:  # fmt: skip
    """All epochs over one client's examples."""
    data, device = shard.data, compute.device
    lengths = data.tokens.lengths(shard.rows)
    targets = torch.from_numpy(shard.soft.copy())
    for epoch in range(recipe.epochs):
        for places in token_budget_batches(lengths, recipe.token_budget, generator(seed, "batches", *who, epoch)):
            batch = shard.rows[places]
            # with no weight on them, labels are not even read: a client may have none
            hard = torch.from_numpy(np.asarray(data.labels[batch])).to(device) if recipe.hard_weight > 0 else None
            inputs = {name: tensor.to(device) for name, tensor in data.tokens.batch(batch).items()}
            soft = targets[places].to(device)
            client_step(state, inputs, soft, hard, recipe=recipe, compute=compute, teacher=teacher)


def _label_losses(logits: Tensor, soft: Tensor, hard: Tensor | None, recipe: Recipe) -> LossParts:
    zero = logits.new_zeros(())
    if recipe.regression:
        return {
            "soft": losses.score_error(logits, soft),
            "hard": zero if hard is None else losses.score_error(logits, hard.float()),
            "hidden": zero,
        }
    return {
        "soft": losses.soft_targets(logits, soft, recipe.temperature),
        "hard": zero if hard is None else losses.hard_labels(logits, hard),
        "hidden": zero,
    }


def _hidden_loss(student: Sequence[Tensor], teacher: Sequence[Tensor], mask: Tensor, recipe: Recipe) -> Tensor:
    distance = losses.HIDDEN_LOSSES[recipe.hidden_loss]
    # entry 0 of hidden_states is the embedding's output
    parts = [distance(student[s + 1].float(), teacher[t + 1].float(), mask) for s, t in recipe.hidden_pairs]
    return torch.stack(parts).mean()
