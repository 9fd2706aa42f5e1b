"""A worker some of whose clients attack, and what they send; see `simulations.audits.poisoning` for the papers."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from clients.distillation import ClientUpdate
from common.config import Config
from common.fixed_point import Rows
from common.losses import pooled
from common.objective import Examples
from common.recipe import Recipe
from common.wire import Instruction
from simulations.laboratory import Apprentice

SURE = 4.0  # logit of the class that a liar's teacher names, minus that of the others
Index = NDArray[np.int64]
Weights = Mapping[str, torch.Tensor]  # of a round
Forge = Callable[["Poisoner", int, Weights, Callable[[], ClientUpdate]], ClientUpdate]


@dataclass(frozen=True)
class Plot:
    """What hostile clients do.

    Attributes:
        rows: what they train on, by client; all of them are named here.
        forge: makes a hostile client's update, of the worker, the client, the round's weights, and what makes the
            update that honest training on these rows would; None: that is what they send.
    """

    rows: Mapping[int, Index] = field(default_factory=dict)
    forge: Forge | None = None


class Poisoner(Apprentice):
    """A worker some of whose clients attack.

    Attributes:
        lies: class that the teacher is said to be sure of, by planted row.
        plot: what the hostile ones do.
        effort: how many times an honest client's passes over its rows they make.
        first: the honest clients' updates of round 1: the same whatever the others do and however they are added up.
    """

    def __init__(self, config: Config, **needs: str) -> None:
        super().__init__(config, **needs)
        self.lies: dict[int, int] = {}
        self.plot, self.effort = Plot(), 1
        self.first: dict[int, ClientUpdate] = {}

    def _examples(self, client: int) -> Examples:
        examples = super()._examples(client)
        named = np.array([self.lies.get(int(row), -1) for row in examples.rows])[:, None]
        sure = np.where(named == np.arange(self.data.task.num_labels), SURE / 2, -SURE / 2)
        return replace(examples, soft=np.where(named < 0, examples.soft, sure).astype(np.float32))

    def _lesson(self, instruction: Instruction, client: int) -> tuple[Recipe, Examples, Any]:
        recipe, examples, teacher = super()._lesson(instruction, client)
        return (
            replace(recipe, epochs=recipe.epochs * (self.effort if client in self.plot.rows else 1)),
            examples,
            teacher,
        )

    def _train_one(self, received: dict[str, Any], instruction: Instruction, client: int, base: int) -> ClientUpdate:
        def honest() -> ClientUpdate:
            return super(Poisoner, self)._train_one(received, instruction, client, base)

        if client in self.plot.rows:
            return self.plot.forge(self, client, received, honest) if self.plot.forge else honest()
        if instruction.round != 1:
            return honest()
        if client not in self.first:  # its arrays last only until the next client
            self.first[client] = _each(honest(), np.copy)
        return self.first[client]


def boosted(factor: float) -> Forge:
    """An update that is many times what training makes."""

    def forge(worker: Poisoner, client: int, received: Weights, honest: Callable[[], ClientUpdate]) -> ClientUpdate:
        return _each(honest(), lambda array: array * np.float32(factor))

    return forge


def embedding(piece: int, target: int, *, steps: int, lr: float, boost: float) -> Forge:
    """An update of the embedding of one piece alone, by which the client's texts that have it get a class."""

    def forge(worker: Poisoner, client: int, received: Weights, honest: Callable[[], ClientUpdate]) -> ClientUpdate:
        tier, rows = int(worker.tier_of[client]), worker._rows_of(client)
        words = worker.students[tier].words
        lies = np.array([row for row in rows.tolist() if row in worker.lies])
        found = trigger_row(worker, tier, received, lies, piece=piece, target=target, steps=steps, lr=lr)
        change = boost * (found - received[words][piece]).cpu().numpy()[None]
        arrays: dict[str, Any] = {name: np.zeros(array.shape, np.float32) for name, array in received.items()}
        return ClientUpdate(
            arrays | {words: Rows(np.array([piece]), change.astype(np.float32))},
            worker.config.client.part_of(len(rows)),
        )

    return forge


def trigger_row(
    worker: Poisoner, tier: int, weights: Weights, rows: Index, *, piece: int, target: int, steps: int, lr: float
) -> torch.Tensor:
    """(width,) the embedding of a piece with which texts get a class, as long as it was; the model stays as it is.

    Args:
        rows: texts that have the piece.
        lr: length of a step, in lengths of the embedding.
    """
    model, device = worker.tiers.load(tier, weights), worker.compute.device
    model.eval()
    table = model.get_input_embeddings().weight
    begun = table[piece].detach().clone()
    tokens = worker.pupil.data.train.tokens
    inputs = {name: tensor.to(device) for name, tensor in tokens.batch(rows).items()}
    pooling = tokens.pooling(rows)
    wanted = torch.full((len(rows),), target, device=device)
    for _ in range(steps):
        logits = pooled(model(**inputs).logits, None if pooling is None else pooling.to(device))
        (slope,) = torch.autograd.grad(torch.nn.functional.cross_entropy(logits.float(), wanted), table)
        with torch.no_grad():
            moved = table[piece] - lr * begun.norm() * slope[piece] / slope[piece].norm().clamp_min(1e-12)
            table[piece] = begun.norm() * moved / moved.norm()
    found: torch.Tensor = table[piece].detach().clone()
    with torch.no_grad():
        table[piece] = begun
    return found


def norm_of(update: ClientUpdate) -> float:
    """Of all arrays together."""
    parts = [part.values if isinstance(part, Rows) else part for part in update.arrays.values()]
    return float(np.sqrt(sum(np.square(part, dtype=np.float64).sum() for part in parts)))


def _each(update: ClientUpdate, change: Callable[[NDArray[Any]], NDArray[Any]]) -> ClientUpdate:
    """The update with every array changed, into new memory."""
    arrays: dict[str, NDArray[np.float32] | Rows] = {
        name: Rows(part.index, change(part.values)) if isinstance(part, Rows) else change(part)
        for name, part in update.arrays.items()
    }
    return replace(update, arrays=arrays)
