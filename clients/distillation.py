"""Local distillation: what one client does with the student in one round, and what of it leaves the client."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from clients.private_steps import PrivateSteps
from common.device import Compute
from common.distillation import Learning, Room, Student, learn
from common.fixed_point import Rows
from common.objective import Examples
from common.recipe import PARTS, Recipe


@dataclass(frozen=True)
class ClientUpdate:
    """A finished client's part of the sums.

    Attributes:
        arrays: the update, trained minus received weights, float32 by parameter name; of the word embedding
            the rows of the client's own word pieces. They last until the next client.
        examples: how many of the client's examples it has trained on: all, unless it ran out of time or energy.
        losses: mean loss, and its parts by name; nothing of private steps, whose noise they do not have.
        spent: what its line says of privacy.
    """

    arrays: dict[str, NDArray[np.float32] | Rows]
    examples: int
    losses: dict[str, Any] = field(default_factory=dict)
    spent: dict[str, Any] = field(default_factory=dict)

    @property
    def weight(self) -> int:
        """Its weight in the sum."""
        return self.examples


def distil(
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
    private: PrivateSteps | None = None,
    spent: Callable[[], bool] = lambda: False,
) -> ClientUpdate:
    """Train one client from the round's weights and return its update; arguments as of `common.distillation.learn`."""
    state = learn(
        student, weights, examples, recipe=recipe, compute=compute, seed=seed, who=who, teacher=teacher, room=room,
        private=private, spent=spent,
    )  # fmt: skip
    if private is not None:
        return replace(client_final(state, min(private.seen, len(examples.rows))), losses={})
    return client_final(state, min(state.seen, len(examples.rows)))


def client_final(state: Learning, examples: int) -> ClientUpdate:
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
    found = (state.totals / max(state.seen, 1)).tolist()
    names = ("loss", *(f"{part}_loss" for part in PARTS))
    return ClientUpdate(arrays, examples, dict(zip(names, found, strict=True)))
