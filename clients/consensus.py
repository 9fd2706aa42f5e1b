"""The client's part of learning by outputs alone (fedmd, ds-fl; see `common.consensus`).

A client's student lives on its own disk and nowhere else: a file of its trained weights for each of the last rounds in
which it took part (`clients.round_files`). Scores are of that student on the client's held-out text. With
`student.tiers` the students differ in shape.
"""

from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray

from clients.distillation import ClientUpdate, client_final
from clients.round_files import RoundFiles
from clients.worker import ClientRefused, Finished, Groups, Scored, Worker
from common.config import Config
from common.consensus import temperature, vote
from common.distillation import Learning, learn, learnt
from common.inference import predict
from common.objective import Examples
from common.public import public_recipe, public_rows
from common.pupil import load_exits
from common.recipe import Recipe
from common.seeding import seed_for
from common.wire import ClientLine, Instruction, Shapes


class OwnStudents(RoundFiles):
    """The students of a run's clients."""

    what: ClassVar[str] = "own student"
    label: ClassVar[str] = "student"


class Vote(ClientUpdate):
    """A client's part of the sum of votes: one, however much text it has."""

    @property
    def weight(self) -> int:
        return 1


class ConsensusWorker(Worker):
    """Works for clients that share no weights."""

    def __init__(self, config: Config, **needs: str) -> None:
        super().__init__(config, **needs)
        start = {name: weight.clone() for name, weight in (self.tiers.initial() | load_exits(self.pupil)).items()}
        self.prepared = [self.tiers.part(tier, start) for tier in range(len(self.tiers))]
        self._students: dict[int, tuple[str, int]] = {}  # client -> run and round of its student

    def expects(self, kind: str, instruction: Instruction) -> Shapes:
        if kind != "train" or instruction.round == 1:
            return {}
        return {"consensus": (len(self._rows(instruction.round - 1)), self.data.task.num_labels)}

    def totals(self, tier: int, round_number: int) -> Shapes:
        return {"votes": (len(self._rows(round_number)), self.data.task.num_labels)}

    def _sum(self, tier: int) -> str:
        return "update"  # what students of any shape say adds up

    def evaluate(
        self, arrays: dict[str, NDArray[np.float32]], instruction: Instruction, finished: Finished
    ) -> tuple[Groups, list[ClientLine]]:
        bases = zip(instruction.clients, instruction.feedback, strict=True)
        self._students = {client: (instruction.run, base) for client, base in bases}
        return super().evaluate(arrays, instruction, finished)

    def _score(self, clients: Sequence[int], tier: int) -> list[Scored]:
        found = []
        for client in clients:
            self.tiers.load(tier, self._own(*self._students[client], client))
            found += super()._score([client], tier)
        return found

    def _starting(self, tier: int, tensors: dict[str, Any]) -> dict[str, Any]:
        return tensors  # outputs, the same for all

    def _train_one(self, received: dict[str, Any], instruction: Instruction, client: int, base: int) -> ClientUpdate:
        """Digest, revisit, vote; the student is on disk before its vote leaves."""
        number, examples = instruction.round, self._examples(client)
        weights = self._own(instruction.run, base, client)
        if received:
            weights = self._digest(weights, received["consensus"], number, client)
        recipe = self._tier_recipe(number, client)
        state = self._learn(weights, examples, recipe, self.config.seed, (number, client))
        weights = learnt(state, weights)
        model = self.tiers.load(int(self.tier_of[client]), weights)
        logits = predict(model, self.pupil.data.train.tokens, self._rows(number), self.compute)
        store = self._store(instruction.run)
        store.save(client, number, base, {name: tensor.cpu().numpy() for name, tensor in weights.items()})
        losses = client_final(state, len(examples.rows)).losses
        votes = vote(self.config.server.strategy, logits, multi_label=self.data.task.multi_label)
        return Vote({"votes": votes}, len(examples.rows), losses)

    def _digest(self, weights: dict[str, Any], consensus: Any, number: int, client: int) -> dict[str, Any]:
        rows = self._rows(number - 1)
        if not torch.isfinite(consensus).all():
            raise ClientRefused("the consensus is not finite")
        recipe = public_recipe(self._tier_recipe(number, client), self.config.server, temperature(self.config))
        examples = Examples(self.pupil.data.train, rows, consensus.cpu().numpy(), self.pupil.taught)
        state = self._learn(weights, examples, recipe, seed_for(self.config.seed, "digest"), (number, client))
        return {name: tensor.clone() for name, tensor in learnt(state, weights).items()}

    def _learn(
        self, weights: dict[str, Any], examples: Examples, recipe: Any, seed: int, who: tuple[int, int]
    ) -> Learning:
        return learn(
            self.students[int(self.tier_of[who[1]])], weights, examples,
            recipe=recipe, compute=self.compute, seed=seed, who=who, teacher=self.teacher,
        )  # fmt: skip

    def _own(self, run: str, base: int, client: int) -> dict[str, Any]:
        """The weights of the client's student as it was when the server last took its vote; at first as prepared."""
        tier = int(self.tier_of[client])
        if base == 0:
            return self.prepared[tier]
        found = self._store(run).load(client, base, self.tiers[tier].held)
        return {name: torch.from_numpy(array).to(self.compute.device) for name, array in found.items()}

    def _tier_recipe(self, round_number: int, client: int) -> Recipe:
        asked, teacher = self.config.distill.relation_heads, self.teacher.config
        return self.tiers.recipe(int(self.tier_of[client]), self._recipe(round_number), asked, teacher)

    def _store(self, run: str) -> OwnStudents:
        return OwnStudents(self.cache / "own-students" / run, self.config.server.keep_checkpoints)

    def _rows(self, round_number: int) -> NDArray[np.int64]:
        return public_rows(self.data.public, self.config.server.public_sample, self.config.seed, round_number)
