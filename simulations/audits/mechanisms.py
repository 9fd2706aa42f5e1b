"""This program's own mechanisms, one step at a time, for canaries of any shape: the code that protects real clients.

Of unit client: the Poisson cohort, the server's intake of own updates with their clip, noise and public denominator.

Of unit example: the Poisson lots and steps of DP-SGD. A canary becomes the gradient of an example x by a student that
is linear in it, logits (0, <w, x>) at w = 0 and label 1, whose loss has the gradient -x / 2.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers.modeling_outputs import SequenceClassifierOutput

from clients.private_steps import Lots, PrivateSteps
from common.compression import compress, wire_for
from common.config import Config
from common.device import Compute
from common.distillation import Learning, Student
from common.objective import Batch
from common.recipe import PARTS, Recipe
from common.wire import ClientLine, own_update, pack_reply
from server.client_privacy import ClientPrivacy
from server.clipped import clipped_intake
from simulations.audits.canaries import Contribution, Shapes

RECIPE = Recipe(
    epochs=1, lr=1.0, weight_decay=0.0, clip_norm=0.0, token_budget=64, temperature=1.0,
    weights={**dict.fromkeys(PARTS, 0.0), "hard": 1.0}, adaptive=False, hidden_loss="cosine", hidden_pairs=(),
    relation_pairs=(), relation_heads=0, regression=False,
)  # fmt: skip


class ClientMechanism:
    """Rounds under `privacy.unit = "client"`.

    Args:
        config: each client's own update travels; as many rounds as will be asked for.
        clients: that there could be.
    """

    def __init__(self, config: Config, shapes: Shapes, clients: int) -> None:
        self.shapes, self.privacy, self.done = shapes, ClientPrivacy(config, clients, shapes), 0
        self.privacy.begin()

    def __call__(self, contributions: Sequence[Contribution], examples: Sequence[int]) -> Mapping[str, NDArray[Any]]:
        self.done += 1
        wire = wire_for(self.privacy.config.server, self.done, self.privacy.config.rounds)
        intake = clipped_intake(self.privacy, self.shapes, dict(enumerate(examples)), self.done)
        for client in self.privacy.cohort(range(len(contributions))):
            parts = compress(contributions[client], wire, np.random.default_rng())
            reply = pack_reply({own_update(client): parts}, [ClientLine(client, examples[client], 0.0)])
            _, refused = intake.take(reply, frozenset([client]))
            if refused:
                raise ValueError(f"a canary was refused: {refused[client]}")
        return intake.update()


class ExampleMechanism:
    """Steps under `privacy.unit = "example"`."""

    def __init__(self, steps: PrivateSteps, shapes: Shapes) -> None:
        self.steps, self.model = steps, _Linear(shapes)
        trained = dict(self.model.named_parameters())
        student = Student(self.model, trained, torch.optim.AdamW(trained.values()), {}, "")
        self.state = Learning(student, trained, {}, None, torch.zeros(1 + len(PARTS)))

    def __call__(self, contributions: Sequence[Contribution], examples: Sequence[int]) -> Mapping[str, NDArray[Any]]:
        _, places = self.steps.lots(np.ones(len(contributions), dtype=np.int64), 1)[0]
        compute = Compute(torch.device("cpu"), bf16=False)
        self.steps.set_gradients(
            self.state, [_batch([contributions[place] for place in places])] if len(places) else [],
            recipe=RECIPE, compute=compute,
        )  # fmt: skip
        shapes = self.model.shapes
        gradients = [-weight.grad.numpy() for weight in self.model.parameters() if weight.grad is not None]
        return {name: part.reshape(shapes[name]) for name, part in zip(shapes, gradients, strict=True)}


def lots_of(rate: float, canaries: int) -> Lots:
    """Lots of about this rate among so many."""
    return Lots(max(round(rate * canaries), 1), canaries)


class _Linear(nn.Module):
    """Logits 0 and <w, x>, with a layer for each array."""

    def __init__(self, shapes: Shapes) -> None:
        super().__init__()
        self.shapes = shapes
        sizes = [int(np.prod(shape)) for shape in shapes.values()]
        self.layers = nn.ModuleList([nn.Linear(size, 1, bias=False) for size in sizes])
        with torch.no_grad():
            for weight in self.parameters():
                weight.zero_()

    def forward(self, *, output_hidden_states: bool = False, **arrays: Tensor) -> SequenceClassifierOutput:
        score = torch.stack([layer(array) for layer, array in zip(self.layers, arrays.values(), strict=True)]).sum(0)
        return SequenceClassifierOutput(logits=torch.cat([torch.zeros_like(score), score], dim=1))


def _batch(contributions: Sequence[Contribution]) -> Batch:
    """Examples whose gradients are minus half the contributions."""
    count = len(contributions)
    inputs = {
        f"array_{place}": torch.from_numpy(np.stack([each[name].reshape(-1) for each in contributions]))
        for place, name in enumerate(contributions[0])
    }
    return Batch(inputs, torch.zeros(count, 2), torch.ones(count, dtype=torch.int64), {}, 0)
