"""FedDF: ensemble distillation for model fusion (Lin et al. 2020, https://arxiv.org/abs/2006.07242, Algorithm 1).

With w_k the models of the round's cohort S and f(w, x) a model's logits on a public text x:

    w_0 = sum_k n_k w_k / sum_k n_k                                      FedAvg
    t(x) = 1/|S| sum_k f(w_k, x)                                         the ensemble: all clients count the same
    w_(j+1) = w_j - eta grad T^2 KL(softmax(t(x) / T) || softmax(f(w_j, x) / T))

The public text is the federation's public split; its labels are not read. T is distill.temperature (1 in the paper).
For a task of several labels there is a KL for each of them, and for one that predicts a score a squared error. A step
is AdamW's, where the paper has Adam; over a round's steps eta falls to a tenth (`common.public`).

A client's model is what the server can know of it: the round's weights plus the update as it arrived, whatever the
wire left out. The cohort's updates are kept until the round's end, in float32: memory of one student for each client
of the cohort (its trained weights), beside the logits, 8 bytes each for client x public example x label.
"""

import numpy as np
from numpy.typing import NDArray

from server.ensemble import distil_from, outputs_of, rows_of_round, ticking
from server.intake import Intake, Kept
from server.method import Averaging, Memory, Weights
from server.rules import MeanUpdate


def ensemble(logits: NDArray[np.float64]) -> NDArray[np.float32]:
    """(rows, num_labels) mean of the clients' logits, (clients, rows, num_labels); their order decides the bits."""
    return np.asarray(logits.sum(axis=0) / len(logits), dtype=np.float32)


class FedDF(Averaging):
    """FedAvg, then the average learns from the ensemble of those it was made of."""

    def step(self, number: int, weights: Weights, update: MeanUpdate, intake: Intake, memory: Memory) -> Weights:
        assert isinstance(intake, Kept)
        average = super().step(number, weights, update, intake, memory)
        federation, rounds = self.federation, self.config.rounds
        rows, clients = rows_of_round(federation, number), sorted(intake.kept)
        name = f"round {number}/{rounds} outputs of {len(clients)} clients' students"
        models = ({part: weights[part] + intake.kept[client][part] for part in weights} for client in clients)
        with self.progress.step(name, len(clients) * len(rows)) as bar:
            soft = ensemble(outputs_of(federation, models, rows, ticking(bar, self.tick)))
        fused, loss = distil_from(
            federation, average, rows, soft,
            number=number, temperature=self.config.distill.temperature, progress=self.progress, tick=self.tick,
        )  # fmt: skip
        self.tell({"round": number, "phase": "fuse", "clients": len(clients), "examples": len(rows), "loss": loss})
        return fused
