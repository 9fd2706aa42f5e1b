"""The server's part of learning by outputs alone (fedmd, ds-fl; see `common.consensus`).

What the server remembers from round to round, beside its own student, is the last consensus: (texts, num_labels), in
the checkpoint as ``consensus``. Which of a client's students on its disk is the one whose votes were counted it says
with each question (`common.wire.Instruction.feedback`).
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from common.consensus import consensus, temperature
from server.ensemble import distil_from, rows_of_round
from server.intake import Chances, Intake, Votes
from server.method import Averaging, Memory, Weights
from server.rules import MeanUpdate


class Consensus(Averaging):
    """Outputs on public text travel; the server's student learns from their consensus."""

    def sends(self, kind: str, number: int, weights: Weights, memory: Memory) -> Mapping[str, NDArray[Any]]:
        if kind != "train" or "consensus" not in memory:
            return {}
        return {"consensus": memory["consensus"].astype(np.float32)}

    def intake(self, number: int, weights: Weights, sizes: Mapping[int, int]) -> Intake:
        task, rows = self.federation.data.task, rows_of_round(self.federation, number)
        shapes = {"votes": (len(rows), task.num_labels)}
        if self.config.server.strategy == "fedmd":
            return Votes(shapes, sizes)
        return Chances(shapes, sizes, whole=not task.multi_label)

    def step(self, number: int, weights: Weights, update: MeanUpdate, intake: Intake, memory: Memory) -> Weights:
        multi_label = self.federation.data.task.multi_label
        target = consensus(self.config.server.strategy, update["votes"], multi_label=multi_label)
        memory["consensus"] = target.astype(np.float64)
        rows = rows_of_round(self.federation, number)
        learnt, loss = distil_from(
            self.federation, weights, rows, target,
            number=number, temperature=temperature(self.config), progress=self.progress, tick=self.tick,
        )  # fmt: skip
        clients = len(intake.lines)
        self.tell({"round": number, "phase": "fuse", "clients": clients, "examples": len(rows), "loss": loss})
        return learnt
