"""Nested students: the models of a mixed federation's tiers, as beginnings of one set of shared arrays.

A tier's model is a plain slim student: the first layers of the whole one, the first heads and neurons of each. Its
arrays are beginnings of the shared ones (HeteroFL, Diao et al. 2021, https://arxiv.org/abs/2010.01264). In mode
``nested`` each smaller depth has an exit of its own, the last layer's norm and the task's head, kept among the shared
arrays as ``exits.DEPTH.NAME``; and who trains a larger student trains those inside it along, on the loss on outputs as
its own, and on its own outputs (DepthFL, Kim et al. 2023, https://openreview.net/forum?id=pf8RIZTMU58; in-place
distillation, Yu and Huang 2019, https://arxiv.org/abs/1903.05134). Without tiers there is one, the whole student under
its own names.

A student less or more wide than its teacher, whose hidden states are compared with that one's, trains a projection
between them along, which is among the shared arrays too.
"""

import copy
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call

from common.config import Config
from common.distillation import PROJECTION, Student
from common.families import family_of, is_exit, side_by_side
from common.models import freeze_embeddings
from common.recipe import Recipe, relation_heads
from common.seeding import generator
from common.slim import Shape, beginning, build

Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Tier:
    """One size of student.

    Attributes:
        names: of the shared array that each trained weight of the model is a beginning of.
        held: shapes of all that its clients train, by the shared arrays' names: its own, and the exits inside it.
        sent: shapes of what a device gets that works for this tier and smaller ones.
    """

    shape: Shape
    model: Any
    names: Mapping[str, str]
    held: Shapes
    sent: Shapes


@dataclass(frozen=True)
class Inner:
    """A smaller student that computes with the beginnings of a larger one's weights.

    Attributes:
        model: gives the structure, and the weights that are not trained.
        weights: the larger one's, by the name of the smaller one's own that each stands for.
    """

    model: Any
    weights: Mapping[str, nn.Parameter]

    def __call__(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """(batch, num_labels) logits; gradients flow into the larger student's weights."""
        views = {
            name: beginning(self.weights[name], own.shape, side_by_side(self.model, name)).reshape(own.shape)
            for name, own in self.model.named_parameters()
            if name in self.weights
        }
        logits: Tensor = functional_call(self.model, views, kwargs=dict(inputs)).logits
        return logits


class Tiers:
    """The students of all tiers, smallest first, the whole one last.

    Args:
        whole: the whole student; the others are made where it lies and share its embeddings.
        shape: its shape.
        taught: the teacher's hidden width; 0: as the student's.

    Attributes:
        teaches: whether who trains a larger student trains those inside it, too.
        shapes: of all shared arrays.
        fused: of each of them how many products stand side by side in its last dimension.
    """

    def __init__(self, config: Config, whole: Any, shape: Shape, taught: int = 0) -> None:
        keys, self.seed = config.student, config.seed
        nested = keys.tier_mode == "nested"
        self.teaches = config.teaches_inside
        shapes = [shape.beginning(size.layers, size.heads, size.neurons) for size in keys.sizes]
        models = [*(_smaller(whole, one) for one in shapes), whole]
        self.shapes: Shapes = {}
        self.fused: dict[str, int] = {}
        self.tiers: list[Tier] = []
        exits: Shapes = {}
        for one, model in zip([*shapes, shape], models, strict=True):
            trained = freeze_embeddings(model, keys.train_embeddings)
            own_exit = nested and len(one.layers) < len(shape.layers)
            names = {
                name: f"exits.{len(one.layers)}.{name}" if own_exit and is_exit(model, name) else name
                for name in trained
            }
            own = {shared: tuple(trained[name].shape) for name, shared in names.items()}
            self.shapes |= own
            held = {**own, **exits} if self.teaches else own
            self.tiers.append(Tier(one, model, names, held, dict(self.shapes)))
            self.fused |= {shared: side_by_side(model, name) for name, shared in names.items()}
            if own_exit:
                exits |= {shared: own[shared] for name, shared in names.items() if shared != name}

        width = int(whole.config.hidden_size)
        if taught not in (0, width) and config.distill.hidden_weight + config.distill.cls_weight > 0:
            for shapes_of in (self.shapes, self.tiers[-1].held, self.tiers[-1].sent):
                shapes_of[PROJECTION] = (taught, width)
            self.fused[PROJECTION] = 1

    def __len__(self) -> int:
        return len(self.tiers)

    def __getitem__(self, tier: int) -> Tier:
        return self.tiers[tier]

    def initial(self) -> dict[str, Tensor]:
        """The shared arrays before training: an exit of a smaller student begins as a copy of what the whole has.

        A projection begins as any of torch's linear products does, drawn from the run's seed.
        """
        whole = dict(self.tiers[-1].model.named_parameters())
        start = {name: whole[name] for name in self.tiers[-1].names}
        for tier in self.tiers[:-1]:
            start |= {shared: whole[name] for name, shared in tier.names.items() if shared not in start}
        if PROJECTION in self.shapes:
            taught, width = self.shapes[PROJECTION]
            drawn = generator(self.seed, PROJECTION).uniform(-(width**-0.5), width**-0.5, (taught, width))
            start[PROJECTION] = torch.from_numpy(drawn.astype(np.float32)).to(self.tiers[-1].model.device)
        return {name: weight.detach() for name, weight in start.items()}

    def part(self, tier: int, arrays: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What a tier holds of the shared arrays, or of what is sent of them; the whole of one is that array itself."""
        return {name: part.contiguous() for name, part in self.cut(arrays, self.tiers[tier].held).items()}

    def cut(self, arrays: Mapping[str, Any], shapes: Shapes) -> dict[str, Any]:
        """Beginnings of these shapes, views where they can be."""
        return {name: beginning(arrays[name], shape, self.fused[name]).reshape(shape) for name, shape in shapes.items()}

    def load(self, tier: int, arrays: Mapping[str, Tensor]) -> Any:
        """The tier's model, with these weights."""
        found, held = self.tiers[tier], self.part(tier, arrays)
        own = dict(found.model.named_parameters())
        with torch.no_grad():
            for name, shared in found.names.items():
                own[name].copy_(held[shared])
        return found.model

    def student(self, tier: int) -> Student:
        """The tier's model as it is trained, with the smaller students inside it that it teaches."""
        found = self.tiers[tier]
        own = dict(found.model.named_parameters())
        trained = {shared: own[name] for name, shared in found.names.items()}
        device = next(iter(own.values())).device
        for name, shape in found.held.items():
            if name not in trained:
                trained[name] = nn.Parameter(torch.empty(shape, device=device))
        shapes = {one.shape: one for one in self.tiers[:tier] if self.teaches and one.shape != found.shape}
        inner = shapes.values()  # tiers of one size are one student
        smaller = [Inner(one.model, {name: trained[shared] for name, shared in one.names.items()}) for one in inner]
        return Student.of(found.model, trained, tuple(smaller))

    def recipe(self, tier: int, recipe: Recipe, asked_heads: int, teacher: Any) -> Recipe:
        """The whole student's recipe for a tier: its layers keep the partners that they have in the whole one.

        Args:
            asked_heads: the key ``distill.relation-heads``.
            teacher: the teacher's configuration.

        Raises:
            InputError: the relation heads that are asked for do not divide the tier's width.
        """
        shape = self.tiers[tier].shape
        hidden = tuple(pair for pair in recipe.hidden_pairs if pair[0] < len(shape.layers))
        relation = tuple(pair for pair in recipe.relation_pairs if pair[0] < len(shape.layers))
        without = (() if hidden else ("hidden", "cls")) + (() if relation else ("relation",))
        return replace(
            recipe,
            weights={**recipe.weights, **dict.fromkeys(without, 0.0)},
            hidden_pairs=hidden,
            relation_pairs=relation,
            relation_heads=relation_heads(asked_heads, shape, teacher),
        )


def _smaller(whole: Any, shape: Shape) -> Any:
    """An empty student of a smaller shape around the whole one's embeddings."""
    config = copy.deepcopy(whole.config)
    config.num_hidden_layers = len(shape.layers)
    with torch.device(whole.device):
        model = build(config, shape)
    for path in family_of(whole).embeddings:
        parent, _, name = path.rpartition(".")
        if hasattr(whole.get_submodule(parent), name):  # ELECTRA projects only where widths differ
            setattr(model.get_submodule(parent), name, whole.get_submodule(path))
    return model.eval()
