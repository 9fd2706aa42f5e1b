"""How a student is trained: the parts of its loss and their weights, resolved from the keys for one round."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from common.config import Config
from common.errors import InputError
from common.families import head_count
from common.keys import DistillKeys
from common.models import pair_hidden_layers
from common.slim import Shape

PARTS = ("soft", "hard", "hidden", "cls", "relation", "self", "inner", "mlm")  # of the loss
DEEP = PARTS[2:5]  # need the teacher itself beside the student
INSIDE = PARTS[5:7]  # teach the students inside it
BY_PLACE = ("hidden", "relation")  # means over real positions
BY_WINDOW = ("cls",)  # means over windows; the others over examples
GENERAL = ("soft", "mlm", "hidden")  # the parts of general distillation
Pairs = tuple[tuple[int, int], ...]  # student's layer, teacher's layer


@dataclass(frozen=True)
class Recipe:
    """How a student is trained, resolved for one round.

    Attributes:
        token_budget: padded word pieces per optimiser step.
        micro_budget: padded word pieces that pass at once; 0: the whole batch.
        weights: of the loss's `PARTS`.
        adaptive: where the teacher is wrong the weight of its output goes to the label.
        last_lr: the learning rate falls to this one over the steps; 0: it stays.
        sgd: plain steps along the gradient; else AdamW's.
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
    sgd: bool = False

    @property
    def deep(self) -> bool:
        return any(self.weights[part] > 0 for part in DEEP)

    @property
    def labelled(self) -> bool:
        """Whether labels are read."""
        return self.weights["hard"] > 0 or self.adaptive


def make_recipe(config: Config, round_number: int, shape: Shape, teacher: Any, regression: bool) -> Recipe:
    """The keys of a run as one round's recipe; the learning rate falls over the rounds.

    Args:
        shape: the student's.
        teacher: the teacher's configuration.
    """
    keys, distill = config.client, config.distill
    layers = len(shape.layers), int(teacher.num_hidden_layers)
    passed = _passed(round_number, config.rounds)
    weights = {part: getattr(distill, f"{part}_weight", 0.0) for part in PARTS}  # the task's loss has no "mlm"
    if distill.weighting == "annealed":
        first = distill.general_rounds  # the task's rounds come after these
        over = _passed(max(round_number - first, 1), config.rounds - first)
        weights |= {"soft": weights["soft"] * (1.0 - over), "hard": weights["hard"] + weights["soft"] * over}
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
        sgd=keys.optimizer == "sgd",
        proximal=keys.proximal if config.server.strategy == "fedprox" else 0.0,
    )


def _passed(number: int, rounds: int) -> float:
    """How much of the rounds, counted from 1, has passed when this one begins: from 0 to 1 for the last."""
    return (number - 1) / (rounds - 1) if rounds > 1 else 0.0


def general_recipe(recipe: Recipe, keys: DistillKeys) -> Recipe:
    """A round's recipe for general distillation: nothing of the task's loss, and no label read."""
    weights = {"soft": keys.general_soft_weight, "mlm": keys.general_mlm_weight, "hidden": keys.general_cosine_weight}
    return replace(recipe, weights={**dict.fromkeys(PARTS, 0.0), **weights}, adaptive=False)


def relation_heads(asked: int, shape: Shape, teacher: Any) -> int:
    """How many relation heads both models' widths can be cut into; none asked for: as many as whole heads allow.

    Raises:
        InputError: the number that is asked for does not divide both widths.
    """
    heads = len(shape.heads[0]), head_count(teacher)
    size = int(teacher.hidden_size) // heads[1]
    widths = heads[0] * (shape.head_size or size), heads[1] * size
    if asked and any(width % asked for width in widths):
        raise InputError(
            f"distill.relation-heads = {asked}: the heads of student and teacher are {widths[0]} and {widths[1]} wide "
            f"together; give a divisor of {math.gcd(*widths)}"
        )
    return asked or math.gcd(*heads)
