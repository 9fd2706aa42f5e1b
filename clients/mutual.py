"""FedKD's mutual distillation (Wu et al. 2022, https://www.nature.com/articles/s41467-022-29763-x).

Each client has a mentor, a large model that never leaves its disk, and the mentee, the shared student. On each batch
both learn, from the label and from each other. With m and s their logits, y the labels, L the loss on labels, KL that
of `common.losses.soft_targets` and H the distance of their hidden states, each a mean over the batch:

    D        = L(m, y) + L(s, y)
    mentor:    hard L(m, y) + (soft KL(s || m) + hidden H(s, m)) / D
    mentee:    hard L(s, y) + (soft KL(m || s) + hidden H(m, s)) / D

with distill.hard-weight, soft-weight and hidden-weight; all 1 in the paper. D is an adaptive weight, not a term to be
made small: the less right the two are, the less they teach. Neither the weight nor the other's outputs get a gradient.

Unlike the paper: both are cut from one teacher and equally wide, so that hidden states are compared as they are,
without a learnt matrix between; attention maps are not compared; KL has a temperature (distill.temperature; 1 there);
the server sends the mentee whole. hidden-loss = "mse" is the paper's distance.

The mentee's update travels by the wire ``svd``, which is FedKD's (`common.compression`). The mentor is a file for each
of the last rounds in which the client took part (`clients.round_files`), of its trained weights in float32. It starts
as client.mentor-layers of the shared teacher; its embeddings stay the teacher's.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from clients.distillation import ClientUpdate, client_final
from clients.round_files import RoundFiles
from clients.worker import Worker
from common.batches import cut, token_budget_batches
from common.config import Config
from common.device import Compute
from common.distillation import Learning, Student, begin, learnt, restore
from common.losses import HIDDEN_LOSSES, pooled
from common.models import choose_layers, freeze_embeddings
from common.objective import Batch, Examples, batch_of, compared, output_losses, shares_of
from common.recipe import Recipe, make_recipe
from common.seeding import generator, seed_for
from common.slim import Shape, cut_student
from common.wire import Instruction

Pair = tuple[Batch, Batch]  # the same examples as the mentee and as the mentor reads them
SMALLEST = 1e-6  # of D: two models that are surely right have nothing to divide by


class Mentors(RoundFiles):
    """The mentors of a run's clients."""

    what: ClassVar[str] = "mentor"
    label: ClassVar[str] = "mentor"


class MutualWorker(Worker):
    """Works for clients that have a mentor each."""

    def __init__(self, config: Config, **needs: str) -> None:
        super().__init__(config, **needs)
        have = int(self.teacher.config.num_hidden_layers)
        layers = choose_layers("spaced", config.client.mentor_layers or have, have)
        model = cut_student(self.teacher, Shape.whole(self.teacher.config, layers), dropout=config.student.dropout)
        model.to(self.compute.device)
        self.mentor = Student.of(model, freeze_embeddings(model, train_embeddings=False))
        self.prepared = {name: parameter.detach().clone() for name, parameter in self.mentor.trained.items()}

    def _train_one(self, received: dict[str, Any], instruction: Instruction, client: int, base: int) -> ClientUpdate:
        number, examples = instruction.round, self._examples(client)
        store = Mentors(self.cache / "mentors" / instruction.run, self.config.server.keep_checkpoints)
        before = self.prepared
        if base:
            shapes = {name: tuple(tensor.shape) for name, tensor in self.prepared.items()}
            loaded = store.load(client, base, shapes)
            before = {name: torch.from_numpy(array).to(self.compute.device) for name, array in loaded.items()}
        mentee, mentor = learn_together(
            (self.students[0], received), (self.mentor, before), examples,
            recipe=self._recipe(number), compute=self.compute, seed=self.config.seed, who=(number, client),
        )  # fmt: skip
        after = {name: tensor.cpu().numpy() for name, tensor in learnt(mentor, before).items()}
        store.save(client, number, base, after)
        return client_final(mentee, len(examples.rows))

    def _recipe(self, round_number: int) -> Recipe:
        mentor, regression = self.mentor.model.config, self.data.task.regression
        return make_recipe(self.config, round_number, self.pupil.shape, mentor, regression)


def learn_together(
    mentee: tuple[Student, dict[str, Tensor]],
    mentor: tuple[Student, dict[str, Tensor]],
    examples: Examples,
    *,
    recipe: Recipe,
    compute: Compute,
    seed: int,
    who: tuple[int, int],
) -> tuple[Learning, Learning]:
    """Train both from their weights, all epochs, in the batches of `common.distillation.learn`.

    Args:
        mentee, mentor: each the resident model and the weights it starts from.
        examples: their ``soft`` is not used.
        who: (round, client); with the seed they determine every random choice.
    """
    torch.manual_seed(seed_for(seed, "dropout", *who))
    tokens, rows = examples.data.tokens, examples.rows
    states = begin(*mentee, recipe, tokens.vocabulary(rows) if mentee[0].words else None), begin(*mentor, recipe)
    theirs, lengths = as_mentor_reads(examples), tokens.lengths(rows)
    try:
        for epoch in range(recipe.epochs):
            rng = generator(seed, "batches", *who, epoch)
            for places in token_budget_batches(lengths, recipe.token_budget, rng):
                parts = cut(places, lengths, recipe.micro_budget) if recipe.micro_budget else [places]
                passing = [
                    (batch_of(examples, part, recipe, compute), batch_of(theirs, part, recipe, compute))
                    for part in parts
                ]
                step_together(*states, passing, recipe=recipe, compute=compute)
    finally:
        restore(mentee[0])
    return states


def as_mentor_reads(examples: Examples) -> Examples:
    """The same in the teacher's pieces, in which a mentor reads."""
    if examples.taught is None:
        return examples
    return replace(examples, data=replace(examples.data, tokens=examples.taught), taught=None)


def step_together(
    mentee: Learning, mentor: Learning, parts: Sequence[Pair], *, recipe: Recipe, compute: Compute
) -> None:  # fmt: skip
    """One optimiser step of both on one batch, in its parts.

    D is that of the whole batch. Where that has several parts it is found by a pass of its own, without gradients: with
    dropout it is then of other draws.
    """
    states = mentee, mentor
    shares = shares_of([own for own, _ in parts])
    examples = sum(len(own.soft) for own, _ in parts)
    both = task_losses(states, parts, recipe, compute) if len(parts) > 1 else None
    for state in states:
        state.student.optimizer.zero_grad(set_to_none=True)
    for pair, share in zip(parts, shares, strict=True):
        losses = part_losses(states, pair, recipe, compute)
        divisor = (losses[0]["hard"] + losses[1]["hard"]).detach() if both is None else both
        weights = {name: recipe.weights[name] * share[name] for name in share}
        found = [mutual_loss(**part, both=divisor, weights=weights) for part in losses]
        torch.stack(found).sum().backward()  # no term has a gradient in both
        nothing = torch.zeros_like(divisor)
        told = torch.stack([found[0], *(losses[0].get(name, nothing) for name in share)]).detach().double()
        mentee.totals += told * told.new_tensor([examples, *(examples * part for part in share.values())])
    mentee.seen += examples
    for state in states:
        if recipe.clip_norm > 0:
            torch.nn.utils.clip_grad_norm_(list(state.trained.values()), recipe.clip_norm)
        state.student.optimizer.step()


@torch.no_grad()
def task_losses(states: Sequence[Learning], parts: Sequence[Pair], recipe: Recipe, compute: Compute) -> Tensor:
    """D of a batch, (): the two models' losses on labels, each a mean over the batch, added up."""
    found = [
        output_losses(_said(state, batch, recipe, compute)[0], batch, recipe)[1]
        for pair in parts
        for state, batch in zip(states, pair, strict=True)
    ]
    return torch.cat(found).sum() / sum(len(own.soft) for own, _ in parts)


def part_losses(states: Sequence[Learning], pair: Pair, recipe: Recipe, compute: Compute) -> list[dict[str, Tensor]]:
    """The parts of the mentee's and of the mentor's loss on some examples, each ()."""
    batch = pair[0]
    (first, inside), (second, beside) = (
        _said(state, own, recipe, compute) for state, own in zip(states, pair, strict=True)
    )
    logits = first, second
    mask = batch.inputs["attention_mask"] if batch.places is None else batch.places[2]
    pairs = [
        compared(inside[s + 1].float(), beside[t + 1].float(), batch) for s, t in recipe.hidden_pairs * recipe.deep
    ]
    distance = HIDDEN_LOSSES[recipe.hidden_loss]
    found = []
    for mine, other in ((0, 1), (1, 0)):
        soft, hard = output_losses(logits[mine], replace(batch, soft=logits[other].detach()), recipe)
        far = [distance(states[mine], states[other].detach(), mask) for states in pairs] or [soft.new_zeros(())]
        found.append({"soft": soft.mean(), "hard": hard.mean(), "hidden": torch.stack(far).mean()})
    return found


def _said(state: Learning, batch: Batch, recipe: Recipe, compute: Compute) -> tuple[Tensor, tuple[Tensor, ...]]:
    """(examples, classes) a model's logits, and (windows, length, hidden) of each of its layers where they are read."""
    inputs = batch.inputs
    if state.vocabulary is not None:
        inputs = {**inputs, "input_ids": torch.searchsorted(state.vocabulary, inputs["input_ids"])}
    with compute.autocast():
        output = state.student.model(**inputs, output_hidden_states=recipe.deep)
    return pooled(output.logits, batch.pooling), output.hidden_states or ()


def mutual_loss(
    *, soft: Tensor, hard: Tensor, hidden: Tensor, both: Tensor, weights: Mapping[str, float]
) -> Tensor:  # fmt: skip
    """One model's loss, (), from its parts; ``both``: the two models' losses on labels added up."""
    mutual = weights["soft"] * soft + weights["hidden"] * hidden
    return weights["hard"] * hard + mutual / both.clamp_min(SMALLEST)
