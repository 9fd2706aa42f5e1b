"""Canaries among the clients' texts: a lower bound on epsilon from one training of the student.

Steinke, Nasr, Jagielski 2023, https://arxiv.org/abs/2305.08846, section 6, in inputs: texts that nobody would write,
of words of public text drawn alike, with labels drawn by lot. Each is in by a fair coin, behind its client's own.

    score = ln p(label | text) of the final student, less that of the student it began as

`simulations.audits.one_run` says what guesses by the score prove. Who guesses sees only the final student.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray
from scipy.special import log_softmax

from common.errors import InputError
from common.progress import Progress
from common.seeding import generator
from server.intake import Intake
from simulations.audits.attack import Row
from simulations.audits.one_run import check_canaries, judge, rows_of
from simulations.audits.planted import plant
from simulations.laboratory import Laboratory, Weights


@dataclass(frozen=True)
class ExampleCanaries:
    """See the module.

    Attributes:
        canaries: how many could be there, dealt out to the clients.
        words: of each.
        examples: of each client's own, at most; 0: all.
    """

    name: ClassVar[str] = "example-canaries"
    paper: ClassVar[str] = "https://arxiv.org/abs/2305.08846"

    canaries: int = 400
    words: int = 12
    examples: int = 0

    def run(self, lab: Laboratory, progress: Progress) -> Iterator[Row]:
        check_canaries(self.name, self.canaries)
        data, rng = lab.data, generator(lab.config.seed, self.name)
        if data.task.regression or data.task.multi_label:
            raise InputError(f"task = {data.task.name!r}: example canaries are of tasks whose examples have one class")
        labels = rng.integers(0, data.task.num_labels, self.canaries)
        planted = plant(lab, self._texts(lab, rng), labels)
        inside = rng.random(self.canaries) < 0.5
        owners = rng.permutation(np.resize(data.eligible, self.canaries))
        rows = {
            int(client): np.concatenate([self._own(lab, int(client)), planted[inside & (owners == client)]])
            for client in data.eligible
        }
        spent = [0.0]
        with progress.step("train with canaries", lab.config.rounds) as step:

            def watch(number: int, weights: Weights, intake: Intake) -> None:
                spent.extend(line.epsilon for line in intake.lines if line.epsilon is not None)
                step.advance()

            end = lab.train(rows, watch=watch)
        scores = certainty(lab, end, planted, labels) - certainty(lab, lab.start, planted, labels)
        found, keys = judge(scores, inside, delta=lab.config.privacy.delta), lab.config.privacy
        claimed = max(spent) if lab.method.privacy is None else lab.method.privacy.epsilon
        yield from rows_of("unit example", found, claimed, normal=False, told={"unit": keys.unit})

    def _own(self, lab: Laboratory, client: int) -> NDArray[np.int64]:
        rows = lab.data.shard(client).train
        return np.asarray(rows[: self.examples or len(rows)])

    def _texts(self, lab: Laboratory, rng: np.random.Generator) -> tuple[list[str], ...]:
        train, public = lab.data.train, np.asarray(lab.data.public)
        words = sorted({word for column in train.texts for text in column.take(public) for word in text.split()})
        if not words:
            raise InputError("data.public-fraction: example canaries are made of words of public text; give some")
        return tuple([" ".join(rng.choice(words, self.words)) for _ in range(self.canaries)] for _ in train.texts)


def certainty(
    lab: Laboratory, weights: Weights, rows: NDArray[np.int64], labels: NDArray[np.int64]
) -> NDArray[np.float64]:
    """(n,) logarithm of the probability that a student gives each row's label."""
    chances = log_softmax(lab.logits(weights, rows).astype(np.float64), axis=1)
    return np.asarray(chances[np.arange(len(rows)), labels])
