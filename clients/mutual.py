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
without a learnt matrix between; attention maps are not compared; KL has a temperature (distill.temperature; 1 there).

The mentee's update travels by the wire ``svd``, which is FedKD's (`common.compression`). The mentor is a file for each
of the last rounds in which the client took part (`clients.round_files`), of its trained weights in float32. It starts
as client.mentor-layers of the shared teacher; its embeddings stay the teacher's.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from clients.distillation import ClientUpdate, client_final
from clients.round_files import RoundFiles
from clients.worker import Worker
from common.batches import token_budget_batches
from common.config import Config
from common.device import Compute
from common.distillation import (
    Batch,
    Examples,
    Learning,
    Recipe,
    Student,
    batch_of,
    begin,
    compared,
    learnt,
    make_recipe,
    output_losses,
    restore,
)
from common.losses import HIDDEN_LOSSES
from common.models import choose_layers, freeze_embeddings
from common.seeding import generator, seed_for
from common.slim import Shape, cut_student
from common.wire import Instruction

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
            (self.student, received), (self.mentor, before), examples,
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
    try:
        for epoch in range(recipe.epochs):
            rng = generator(seed, "batches", *who, epoch)
            for places in token_budget_batches(tokens.lengths(rows), recipe.token_budget, rng):
                batch = batch_of(examples, places, recipe, compute)
                step_together(*states, _with_mentors_inputs(batch, examples, places), recipe=recipe, compute=compute)
    finally:
        restore(mentee[0])
    return states


def step_together(mentee: Learning, mentor: Learning, batch: Batch, *, recipe: Recipe, compute: Compute) -> None:
    """One optimiser step of both on one batch, whose ``taught`` are the mentor's inputs."""
    own = batch.inputs
    if mentee.vocabulary is not None:
        own = {**own, "input_ids": torch.searchsorted(mentee.vocabulary, own["input_ids"])}
    outputs = []
    for state, inputs in ((mentee, own), (mentor, batch.taught)):
        with compute.autocast():
            outputs.append(state.student.model(**inputs, output_hidden_states=recipe.deep))
    logits = [output.logits.float() for output in outputs]
    mask = own["attention_mask"] if batch.places is None else batch.places[2]
    parts = []
    for mine, other in ((0, 1), (1, 0)):
        soft, hard = output_losses(logits[mine], replace(batch, soft=logits[other].detach()), recipe)
        hidden = logits[0].new_zeros(())
        if recipe.deep:
            first, second = (output.hidden_states for output in outputs)
            pairs = [compared(first[s + 1].float(), second[t + 1].float(), batch) for s, t in recipe.hidden_pairs]
            distance = HIDDEN_LOSSES[recipe.hidden_loss]
            hidden = torch.stack([distance(pair[mine], pair[other].detach(), mask) for pair in pairs]).mean()
        parts.append({"soft": soft.mean(), "hard": hard.mean(), "hidden": hidden})
    both = (parts[0]["hard"] + parts[1]["hard"]).detach()
    found = [mutual_loss(**part, both=both, weights=recipe.weights) for part in parts]
    for state in (mentee, mentor):
        state.student.optimizer.zero_grad(set_to_none=True)
    torch.stack(found).sum().backward()  # no term has a gradient in both
    for state in (mentee, mentor):
        if recipe.clip_norm > 0:
            torch.nn.utils.clip_grad_norm_(list(state.trained.values()), recipe.clip_norm)
        state.student.optimizer.step()
    size, nothing = len(logits[0]), torch.zeros_like(both)
    own_parts = [found[0], *(parts[0].get(name, nothing) for name in recipe.weights)]
    mentee.totals += torch.stack(own_parts).detach().double() * size
    mentee.seen += size


def mutual_loss(
    *, soft: Tensor, hard: Tensor, hidden: Tensor, both: Tensor, weights: Mapping[str, float]
) -> Tensor:  # fmt: skip
    """One model's loss, (), from its parts; ``both``: the two models' losses on labels added up."""
    mutual = weights["soft"] * soft + weights["hidden"] * hidden
    return weights["hard"] * hard + mutual / both.clamp_min(SMALLEST)


def _with_mentors_inputs(batch: Batch, examples: Examples, places: Any) -> Batch:
    """The mentor cuts text as the teacher does."""
    if batch.taught:
        return batch
    if examples.taught is None:
        return replace(batch, taught=batch.inputs)
    device = batch.soft.device
    tensors = examples.taught.batch(np.asarray(examples.rows[places]))
    return replace(batch, taught={name: tensor.to(device) for name, tensor in tensors.items()})
