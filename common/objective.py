"""What a student learns from: a batch of examples on their device, and the parts of the loss on it.

The losses themselves are `common.losses`. For a task that predicts a score, KL and cross-entropy become squared errors.
"""

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
from common.dataset import Split
from common.device import Compute
from common.families import family_of, layers_of
from common.masking import Masking, guess
from common.recipe import BY_PLACE, BY_WINDOW, DEEP, GENERAL, INSIDE, PARTS, Recipe
from common.tokens import Tokens

BEHIND = 2  # special pieces behind a text at most: of words of their own, RoBERTa's pairs have two between their texts


@dataclass(frozen=True)
class Examples:
    """What a student learns from.

    Attributes:
        data: the examples in the student's pieces.
        rows: (n,) row numbers in ``data``.
        soft: (n, num_labels) the teacher's logits of these rows.
        taught: all rows of ``data`` in the teacher's pieces, where those are others.
        shift: (classes,) what is added to the logits under the label's loss, see `common.priors`; None: nothing.
        masking: of general distillation, in which ``soft`` is empty, (n, 0), and `masked` is what is learnt from.
        guessed: the pieces behind the masks, at their places; see `common.masking.Masking.draw`.
    """

    data: Split
    rows: NDArray[np.int64]
    soft: NDArray[np.float32]
    taught: Tokens | None = None
    shift: NDArray[np.float32] | None = None
    masking: Masking | None = None
    guessed: Tokens | None = None


def masked(examples: Examples, rng: np.random.Generator) -> Examples:
    """The examples of general distillation as one epoch shows them: some pieces masked, and no label in them."""
    assert examples.masking is not None
    tokens, guessed = examples.masking.draw(examples.data.tokens.take(examples.rows), rng)
    blind = Split(tokens, labels=np.zeros(0), keys=np.zeros((0, 16), dtype=np.uint8))
    return replace(examples, data=blind, rows=np.arange(len(tokens)), guessed=guessed)


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
        shift: see `Examples`.
        guessed: (windows, length) the pieces behind the masks of general distillation, -1 elsewhere.
        guesses: how many these are.
    """

    inputs: dict[str, Tensor]
    soft: Tensor
    hard: Tensor | None
    taught: dict[str, Tensor]
    positions: int
    places: tuple[Tensor, Tensor, Tensor] | None = None
    pooling: Tensor | None = None
    shift: Tensor | None = None
    guessed: Tensor | None = None
    guesses: int = 0


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
    if examples.guessed is not None:
        assert examples.masking is not None
        taught = {**own, "input_ids": examples.masking.as_teacher_counts(own["input_ids"])}
    elif recipe.deep and examples.taught is not None:
        taught = inputs(examples.taught)
        compared, positions = _aligned(data.tokens, examples.taught, rows, device)
    elif recipe.deep:
        taught = own
    soft = torch.from_numpy(examples.soft[places]).to(device)
    pooling = None if pooling is None else pooling.to(device)
    shift = None if examples.shift is None else torch.from_numpy(examples.shift).to(device)
    batch = Batch(own, soft, hard, taught, positions, compared, pooling, shift)
    if examples.guessed is None:
        return batch
    guessed = examples.guessed.batch(rows)["input_ids"]
    return replace(batch, guessed=guessed.to(device), guesses=int((guessed >= 0).sum()))


def _aligned(
    own: Tokens, taught: Tokens, rows: NDArray[np.int64], device: Any
) -> tuple[tuple[Tensor, Tensor, Tensor], int]:
    """Where the same words begin in both, as far as both hold them, and at how many places that is.

    Of a pair each text may end earlier in one, cut short: what stands behind it is then elsewhere in the other.
    """
    pairs = [_matched(a, b) for a, b in zip(own.words(rows), taught.words(rows), strict=True)]
    found = np.zeros((3, len(rows), max(len(a) for a, _ in pairs)), dtype=np.int64)
    for row, (a, b) in enumerate(pairs):
        found[:, row, : len(a)] = a, b, np.ones_like(a)
    first, second, mask = torch.from_numpy(found).to(device)
    return (first, second, mask), sum(len(a) for a, _ in pairs)


def _matched(
    own: Sequence[NDArray[np.int64]], taught: Sequence[NDArray[np.int64]]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Where the words begin that both hold of a row's texts, given where all of each text's do."""
    sizes = [
        len(a) if len(a) == len(b) else max(min(len(a), len(b)) - BEHIND, min(len(a), len(b), 1))
        for a, b in zip(own, taught, strict=True)
    ]
    mine, theirs = (np.concatenate([part[:size] for part, size in zip(of, sizes, strict=True)]) for of in (own, taught))
    return mine, theirs


def shares_of(parts: Sequence[Batch]) -> list[dict[str, float]]:
    """How much each part of a batch adds to the means over the batch that make up the loss, by `PARTS`.

    A mean over the batch is made of the parts' means, each by its share of what the mean is over.
    """
    sizes = [
        {
            "place": part.positions,
            "window": len(part.inputs["input_ids"]),
            "example": len(part.soft),
            "guess": part.guesses,
        }
        for part in parts
    ]
    totals = {of: sum(size[of] for size in sizes) or 1 for of in sizes[0]}  # perhaps nothing was masked
    over = {name: "place" if name in BY_PLACE else "window" if name in BY_WINDOW else "example" for name in PARTS}
    if parts[0].guessed is not None:
        over |= {"soft": "guess", "mlm": "guess"}
    return [{name: size[of] / totals[of] for name, of in over.items()} for size in sizes]


def objective(parts: Mapping[str, Tensor], batch: Batch, recipe: Recipe, weights: Mapping[str, float]) -> Tensor:
    """The loss, (), from its parts as `parts_of` gives them, with these weights."""
    if batch.guessed is not None:
        return torch.stack([weights[name] * parts[name] for name in GENERAL]).sum()
    loss = torch.stack([weights[name] * part for name, part in parts.items() if name in DEEP]).sum() + _outer(
        parts["soft"], parts["hard"], batch, recipe, weights
    )
    return loss + torch.stack([weights[name] * parts[name] for name in INSIDE]).sum()


def _outer(soft: Tensor, hard: Tensor, batch: Batch, recipe: Recipe, weights: Mapping[str, float]) -> Tensor:
    """The loss on outputs from its two parts, each (batch,)."""
    if not recipe.adaptive:
        return weights["soft"] * soft.mean() + weights["hard"] * hard.mean()
    return each_loss(soft, hard, batch, recipe, weights).mean()


def each_loss(soft: Tensor, hard: Tensor, batch: Batch, recipe: Recipe, weights: Mapping[str, float]) -> Tensor:
    """(batch,) the loss on outputs of each example, which no other example has a part in; its mean is the batch's."""
    on_soft, on_hard = weights["soft"], weights["hard"]
    if not recipe.adaptive:
        return on_soft * soft + on_hard * hard
    assert batch.hard is not None
    trust = _trust(batch.soft, batch.hard, recipe)
    return on_soft * trust * soft + (on_hard + on_soft * (1.0 - trust)) * hard


def _trust(soft: Tensor, hard: Tensor, recipe: Recipe) -> Tensor:
    """(batch,) how right the teacher is, from 0 to 1: its probability of the label; exp(-error^2) for a score.

    For multi-label its probability of what the label says of a class, mean over classes.
    """
    if recipe.regression:
        return torch.exp(-losses.score_error(soft, hard.float()))
    if recipe.multi_label:
        return torch.sigmoid(torch.where(hard > 0, soft, -soft)).mean(dim=-1)
    return torch.softmax(soft, dim=-1).gather(1, hard[:, None]).squeeze(1)


def parts_of(
    model: Any,
    batch: Batch,
    recipe: Recipe,
    compute: Compute,
    *,
    teacher: Any = None,
    smaller: Sequence[Any] = (),
    vocabulary: Tensor | None = None,
    projection: Tensor | None = None,
) -> dict[str, Tensor]:
    """The parts of a student's loss: soft and hard (batch,), the others (); in general distillation all ().

    Args:
        smaller: the students inside it that it teaches; see `common.nested`.
        vocabulary: the word pieces that the rows of its word embedding stand for; None: all.
        projection: (teacher's width, student's width) from its hidden states to the teacher's, TinyBERT's W_h (Jiao et
            al. 2020, https://arxiv.org/abs/1909.10351, equation 8); None: both are equally wide.
    """
    if batch.guessed is not None:
        return _general_parts(model, batch, recipe, compute, teacher)
    own = batch.inputs
    if vocabulary is not None:
        own = {**own, "input_ids": torch.searchsorted(vocabulary, own["input_ids"])}
    related = recipe.relation_pairs if recipe.weights["relation"] > 0 else ()
    with compute.autocast(), _watched(model, {s for s, _ in related}) as ours:
        output = model(**own, output_hidden_states=recipe.deep)
    logits = losses.pooled(output.logits, batch.pooling)
    zero = logits.new_zeros(())
    parts = dict.fromkeys(PARTS, zero)
    parts["soft"], parts["hard"] = output_losses(logits, batch, recipe)
    if smaller:
        with compute.autocast():
            found = [losses.pooled(one(own), batch.pooling) for one in smaller]
        target = replace(batch, soft=logits.detach(), hard=None)
        parts["self"] = torch.stack([output_losses(one, target, recipe)[0].mean() for one in found]).sum()
        outer = [_outer(*output_losses(one, batch, recipe), batch, recipe, recipe.weights) for one in found]
        parts["inner"] = torch.stack(outer).sum()
    if not recipe.deep:
        return parts
    with (
        torch.no_grad(),
        compute.autocast(),
        _watched(teacher, {t for _, t in related}) as theirs,
    ):
        target = teacher(**batch.taught, output_hidden_states=True).hidden_states
    mask = own["attention_mask"] if batch.places is None else batch.places[2]
    # entry 0 of hidden_states is the embedding's output
    pairs = [(output.hidden_states[s + 1].float(), target[t + 1].float()) for s, t in recipe.hidden_pairs]
    if projection is not None:
        pairs = [(a @ projection.T, b) for a, b in pairs]
    if recipe.weights["hidden"] > 0:
        distance = losses.HIDDEN_LOSSES[recipe.hidden_loss]
        parts["hidden"] = torch.stack([distance(*compared(a, b, batch), mask) for a, b in pairs]).mean()
    if recipe.weights["cls"] > 0:
        parts["cls"] = torch.stack([losses.patient(a[:, 0], b[:, 0]) for a, b in pairs]).mean()
    if related:
        relation = partial(losses.relations, mask=mask, heads=recipe.relation_heads)
        found = [
            relation(*compared(a.float(), b.float(), batch))
            for s, t in related
            for a, b in zip(ours[s], theirs[t], strict=True)
        ]
        parts["relation"] = torch.stack(found).mean()
    return parts


def _general_parts(model: Any, batch: Batch, recipe: Recipe, compute: Compute, teacher: Any) -> dict[str, Tensor]:
    """Those of DistilBERT's triple loss, each (): of the student's encoder under its teacher's masked-LM head.

    The student's own head has no part in it, and so no gradient.
    """
    assert batch.guessed is not None
    places = batch.guessed >= 0
    with compute.autocast():
        own = model.base_model(**batch.inputs).last_hidden_state
        logits = guess(teacher, own[places])
    with torch.no_grad(), compute.autocast():
        target = teacher.base_model(**batch.taught).last_hidden_state
        wanted = guess(teacher, target[places])
    parts = dict.fromkeys(PARTS, own.new_zeros((), dtype=torch.float32))
    count = max(batch.guesses, 1)
    parts["soft"] = losses.soft_targets(logits.float(), wanted.float(), recipe.temperature).sum() / count
    parts["mlm"] = losses.hard_labels(logits.float(), batch.guessed[places]).sum() / count
    parts["hidden"] = losses.hidden_cosine(own.float(), target.float(), batch.inputs["attention_mask"])
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
    if hard is None:
        return soft, torch.zeros_like(soft)
    return soft, losses.hard_labels(logits if batch.shift is None else logits + batch.shift, hard)


def compared(own: Tensor, taught: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
    """The two (batch, length, width) at the places where they are compared."""
    if batch.places is None:
        return own, taught
    first, second, _ = batch.places
    return own.gather(1, first[..., None].expand(-1, -1, own.shape[-1])), taught.gather(
        1, second[..., None].expand(-1, -1, taught.shape[-1])
    )


@contextmanager
def _watched(model: Any, layers: set[int]) -> Iterator[dict[int, list[Tensor]]]:
    """Collects queries, keys and values, each (batch, length, width of all heads), of these layers as they pass."""
    found: dict[int, list[Tensor]] = {layer: [] for layer in layers}
    paths = family_of(model).heads if layers else ()

    def note(layer: int, module: Any, given: Any, output: Tensor) -> None:
        found[layer].extend(output.chunk(3 // len(paths), dim=-1))

    hooks = [
        layers_of(model)[layer].get_submodule(path).register_forward_hook(partial(note, layer))
        for layer in layers
        for path in paths
    ]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()
