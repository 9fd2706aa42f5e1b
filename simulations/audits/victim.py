"""What a server sees of a client: its update, made by the client's own code, after what defends it.

The server is honest and curious. It knows the model that it sent, the recipe, how many examples a client has, the
public text, and what is defended how; it does not know the private text. Under secure aggregation it sees the mean over
the cohort and nothing else.
"""

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from clients.distillation import distil
from common.dataset import load_tokenizer
from common.device import Compute
from common.distillation import Student
from common.families import family_of, side_by_side
from common.fixed_point import Rows
from common.models import freeze_embeddings
from common.objective import Examples
from common.recipe import Recipe, make_recipe
from common.seeding import generator
from simulations.laboratory import Laboratory

Update = dict[str, NDArray[np.float32]]
WHOLE = 1 << 30  # a word budget that any batch is within: each epoch is one step


@dataclass(frozen=True)
class Setting:
    """How a victim trains, and what defends it.

    Attributes:
        examples: that each client has; all of them are a batch.
        steps: local ones.
        clip: norm that each client's update is scaled down to; 0: it is not.
        noise: its deviation in each number of the sum, in clip norms.
        cohort: clients in the sum that the server sees; 1: it sees the client's own update.
    """

    examples: int = 1
    steps: int = 1
    optimizer: str = "sgd"
    embeddings: str = "trained"
    precision: str = "fp32"
    clip: float = 0.0
    noise: float = 0.0
    cohort: int = 1

    def __str__(self) -> str:
        """What is other than in FedSGD on one example."""
        usual = Setting()
        told = {
            "examples": f"{self.examples} examples",
            "steps": f"{self.steps} steps",
            "optimizer": self.optimizer,
            "embeddings": f"{self.embeddings} embeddings",
            "precision": self.precision,
            "clip": f"clip {self.clip:g}",
            "noise": f"noise {self.noise:g}",
            "cohort": f"sum of {self.cohort}",
        }
        other = [told[one.name] for one in fields(self) if getattr(self, one.name) != getattr(usual, one.name)]
        return ", ".join(other) or "one SGD step"


@dataclass(frozen=True)
class Seen:
    """An update as the server sees it, and what it knows beside.

    Attributes:
        model: the student with the weights that the round began from.
        update: dense arrays by name, the mean over the cohort.
        recipe: the client's.
        examples: of one client.
        steps: local ones.
        cohort: clients that the update is the mean of.
        deviation: of the noise in each number; 0: there is none.
        clipped: whether updates were scaled down to a norm, nobody says by how much.
    """

    model: Any
    update: Update
    recipe: Recipe
    compute: Compute
    examples: int
    steps: int = 1
    cohort: int = 1
    deviation: float = 0.0
    clipped: bool = False

    @property
    def texts(self) -> int:
        """How many the update is made of."""
        return self.examples * self.cohort

    @property
    def decay(self) -> float:
        """Share of every weight that its decay has taken, before any scaling down."""
        return 1.0 - float((1.0 - self.recipe.lr * self.recipe.weight_decay) ** self.steps)

    @cached_property
    def factor(self) -> float:
        """What the update was scaled by, 0 to 1, in the mean over the cohort.

        A bias b of all keys adds the same to every score of a query, so that it has no gradient: of SGD its update is
        -factor decay b. Where that tells nothing (noise, other optimisers, no such bias), 1.
        """
        if not self.clipped or self.deviation or not self.recipe.sgd:
            return 1.0
        moved, biases = (np.concatenate(parts) for parts in zip(*self._key_biases(), strict=True))
        found = -float(moved @ biases) / max(self.decay * float(biases @ biases), 1e-30)
        return min(found, 1.0) if found > 0 else 1.0

    def _key_biases(self) -> Iterator[tuple[NDArray[np.float64], NDArray[np.float64]]]:
        """The update and the value of each layer's bias of keys, and first of none."""
        yield np.zeros(0), np.zeros(0)
        paths = family_of(self.model).heads
        ends = tuple(f".{path}.bias" for path in paths[len(paths) // 2 : len(paths) // 2 + 1])
        for name in self.update:
            if name.endswith(ends):
                pair = self.update[name], self.model.get_parameter(name).detach().numpy()
                width = len(pair[0]) // side_by_side(self.model, name)
                keys = slice(width, 2 * width) if len(paths) == 1 else slice(None)
                yield pair[0][keys].astype(np.float64), pair[1][keys].astype(np.float64)

    def descent(self, name: str) -> Tensor:
        """What gradients have done to an array, float64: the update without the weight decay, which the server knows,
        and as it was before it was scaled down, see `factor`."""
        weight = self.model.get_parameter(name).detach().double()
        found: Tensor = torch.from_numpy(self.update[name]).double() / self.factor + self.decay * weight
        return found

    def gradient(self, name: str) -> Tensor:
        """The mean gradient, if all steps were SGD's and small: minus descent / (lr steps)."""
        return self.descent(name) / (-self.recipe.lr * self.steps)


class Victims:
    """Clients of a laboratory, each with a few of its own examples.

    Attributes:
        tokenizer: the student's.
        special: its pieces that stand for no text.
        lr: of an SGD step; an AdamW step has the federation's.
    """

    def __init__(self, lab: Laboratory, lr: float) -> None:
        self.lab, self.lr = lab, lr
        self.data = lab.federation.pupil.data
        self.tokens = self.data.train.tokens
        self.tokenizer = load_tokenizer(lab.federation.pupil.folder)
        self.special = np.unique(np.array([*self.tokenizer.all_special_ids, self.tokens.pad], dtype=np.int64))
        self.students = {kind: self._student(kind == "trained") for kind in ("trained", "frozen")}

    def _student(self, embeddings: bool) -> Student:
        """One of its own: the laboratory's goes on to be trained."""
        model = copy.deepcopy(self.lab.federation.student).cpu()
        with torch.no_grad():
            for name, weight in self.lab.start.items():
                if name in dict(model.named_parameters()):
                    model.get_parameter(name).copy_(torch.from_numpy(weight))
        return Student.of(model, freeze_embeddings(model, embeddings))

    def rows(self, client: int, examples: int) -> NDArray[np.int64]:
        """Some of a client's examples, the same ones in every setting; fewer where it has fewer."""
        own = self.data.shard(client).train
        order = generator(self.lab.config.seed, "victim", client).permutation(len(own))
        return np.sort(own[order[:examples]])

    def clients(self, count: int) -> list[int]:
        """That many clients, drawn."""
        able = self.data.eligible
        order = generator(self.lab.config.seed, "victims").permutation(len(able))
        return [int(client) for client in able[order[:count]]]

    def recipe(self, setting: Setting) -> Recipe:
        federation = self.lab.federation
        recipe = make_recipe(
            self.lab.config, 1, federation.pupil.shape, self.lab.worker.teacher.config, self.data.task.regression
        )
        sgd = setting.optimizer == "sgd"
        return replace(
            recipe, sgd=sgd, lr=self.lr if sgd else recipe.lr, epochs=setting.steps, token_budget=WHOLE, micro_budget=0,
            clip_norm=0.0,
        )  # fmt: skip

    def seen(self, setting: Setting, client: int) -> Seen:
        """What the server sees of a client; under secure aggregation the next ones are in the sum too."""
        recipe, compute = self.recipe(setting), Compute(torch.device("cpu"), bf16=setting.precision == "bf16")
        student = self.students[setting.embeddings]
        weights = {name: weight.detach().clone() for name, weight in student.trained.items()}
        able = [int(one) for one in self.data.eligible]
        first = able.index(client)
        cohort = [able[(first + place) % len(able)] for place in range(min(setting.cohort, len(able)))]
        updates = []
        for one in cohort:
            examples = self._examples(self.rows(one, setting.examples))
            update = distil(
                student, weights, examples, recipe=recipe, compute=compute, seed=self.lab.config.seed, who=(1, one),
                teacher=self.lab.worker.teacher,
            )  # fmt: skip
            updates.append(dense(update.arrays, {name: tuple(weight.shape) for name, weight in weights.items()}))
        with torch.no_grad():  # the model as the server sent it
            for name, parameter in student.trained.items():
                parameter.copy_(weights[name])
        rng = generator(self.lab.config.seed, "noise", client)
        mean, deviation = clip_and_noise(updates, setting.clip, setting.noise, rng)
        return Seen(
            student.model, mean, recipe, compute, setting.examples, setting.steps, len(cohort), deviation,
            clipped=setting.clip > 0,
        )  # fmt: skip

    def _examples(self, rows: NDArray[np.int64]) -> Examples:
        pupil = self.lab.federation.pupil
        return Examples(self.data.train, rows, self.lab.worker.teacher_logits(rows), pupil.taught)


def dense(arrays: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> Update:
    """Copies of a client's arrays, whole."""
    return {
        name: array.dense(shapes[name]) if isinstance(array, Rows) else np.array(array, dtype=np.float32)
        for name, array in arrays.items()
    }


def clip_and_noise(
    updates: Sequence[Update], clip: float, multiplier: float, rng: np.random.Generator
) -> tuple[Update, float]:
    """The mean of updates, each scaled down to a norm, plus N(0, (multiplier clip / clients)^2) in each number.

    The Gaussian mechanism of McMahan et al. 2018, https://arxiv.org/abs/1710.06963.

    Args:
        clip: of the norm over all arrays; 0: nothing is clipped, and no noise added.

    Returns:
        The mean, and the deviation of the noise in it.
    """
    total = {name: np.zeros_like(array) for name, array in updates[0].items()}
    for update in updates:
        norm = float(np.sqrt(sum(float(np.square(array, dtype=np.float64).sum()) for array in update.values())))
        factor = np.float32(min(1.0, clip / norm) if clip > 0 and norm > 0 else 1.0)
        for name, array in update.items():
            total[name] += array * factor
    deviation = multiplier * clip / len(updates)
    mean = {name: array / np.float32(len(updates)) for name, array in total.items()}
    if deviation > 0:
        for array in mean.values():
            array += rng.standard_normal(array.shape, dtype=np.float32) * np.float32(deviation)  # noqa: PLW2901
    return mean, deviation
