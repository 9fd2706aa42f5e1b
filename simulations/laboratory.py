"""A federation in one process and without Flower, for whoever has to train many: attacks, and what defences cost.

The client's code is the worker's and the server's is the intake and the method of the real thing; only the messages
are missing. A round here gives the bits of a round there.
"""

import secrets
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from clients.consensus import ConsensusWorker
from clients.worker import Worker
from common.config import Config
from common.errors import InputError
from common.importance import MOST
from common.inference import predict
from common.keys import FUSED, VOTING
from common.progress import Progress, Silent
from common.wire import ClientLine, Instruction, pack_reply
from server.assignment import pick_cohort
from server.averaging import mean_of_last
from server.clipped import ClippedEach
from server.intake import Intake, Kept, Streamed, Summed
from server.method import Averaging
from server.preparation import Federation, prepare
from server.student import choose_width, narrow_student, random_width
from server.validation import validate

Weights = dict[str, NDArray[np.float32]]
Rows = Mapping[int, NDArray[np.int64]]
THREADS = torch.get_num_threads()  # of the server's process in a run: this one's, until a worker begins
Watch = Callable[[int, Weights, Intake], None]  # told of a round's number, the weights it began from, what came in


class Apprentice(Worker):
    """A worker whose clients can be given other examples to train on than their own.

    Attributes:
        rows: of the training data, by client; a client that is not named has its own.
    """

    def __init__(self, config: Config, **needs: str) -> None:
        super().__init__(config, **needs)
        self.rows: Rows = {}

    def _rows_of(self, client: int) -> NDArray[np.int64]:
        rows = self.rows.get(client)
        return super()._rows_of(client) if rows is None else rows


class Voter(Apprentice, ConsensusWorker):
    """The same where clients answer with outputs on public text."""


def worker_of(config: Config) -> type[Apprentice]:
    return Voter if config.server.strategy in VOTING else Apprentice


def _check_rounds(config: Config) -> None:
    """Raise `InputError` for what would be trained as other rounds than the run's."""
    strategy, distill = config.server.strategy, config.distill
    if strategy in (*FUSED, "fedkd"):
        told, right = f"server.strategy = {strategy!r}", "server.strategy = 'fedavg'"
    elif distill.general_rounds:
        told, right = f"distill.general-rounds = {distill.general_rounds}", "0"
    elif config.client.grow_batch:
        told, right = "client.grow-batch = true", "false"
    else:
        return
    raise InputError(f"{told}: an audit's federation has no such rounds, and would be of another one; give {right}")


def keeping(intake: Intake) -> Intake:
    """The same way of taking replies; each client's own update, where it arrives, is kept."""
    if isinstance(intake, ClippedEach):
        intake.kept = {}
    if type(intake) is not Streamed:
        return intake
    return Kept(intake.keys, intake.wire, intake.shapes, intake.sizes, squares=intake.squares)


def updates_of(intake: Intake) -> dict[int, Weights]:
    """Each client's own update, by client in ascending order; empty: the server does not get that."""
    kept: Any = getattr(intake, "kept", None) or {}
    own = {client: kept[client] for client in sorted(kept)}
    return {client: one[1] if isinstance(one, tuple) else one for client, one in own.items()}  # of rules that compare


class Laboratory:
    """A prepared federation and its one worker.

    Args:
        config: with server.packing = "off" each client's own update is in the intake, in ``kept``.
        folder: where an attack keeps what it can go on from.
        worker: a kind of worker whose clients do something of their own; None: the run's.

    Raises:
        InputError: the run's rounds are not of the kind that a laboratory makes.
    """

    def __init__(
        self, config: Config, progress: Progress, folder: Path | None = None, worker: type[Apprentice] | None = None
    ) -> None:
        _check_rounds(config)
        self.progress, self.folder = progress, folder
        torch.set_num_threads(THREADS)  # which a teacher's bits depend on
        self.federation: Federation = prepare(config, progress)
        self.config = config = self.federation.config
        if config.student.narrows:
            self._narrow()
        self.start = self.federation.weights()  # of its module, which answers for other weights later
        self.worker = (worker or worker_of(config))(config, **self._needs())
        self.method = Averaging(self.federation, progress, lambda: None, lambda line: None)
        self._begin()

    def _begin(self) -> None:
        self.run, self._ledgers = secrets.token_hex(8), TemporaryDirectory()
        self.worker.ledgers = Path(self._ledgers.name)

    def _narrow(self) -> None:
        """Keep the heads and neurons that the strategy would keep before round 1."""
        federation, config = self.federation, self.config
        if config.student.width_selection == "random":
            width = random_width(config, federation.pupil.shape)
        else:
            cohort = pick_cohort(federation.able, config.server.cohort, config.seed, 0)
            shapes = {name: np.shape(getattr(federation.pupil.shape, name)) for name in ("heads", "neurons")}
            intake = Summed(shapes, {client: min(len(self.data.shard(client).train), MOST) for client in cohort})
            groups, lines = Apprentice(config, **self._needs()).weigh(cohort, lambda count: None)
            intake.take(pack_reply(groups, lines), frozenset(cohort))
            width = choose_width(config, **intake.update())
        federation.take(narrow_student(config, federation.lesson, federation.pupil, width, self.progress))

    @property
    def data(self) -> Any:
        return self.federation.data

    def train(self, rows: Rows | None = None, *, watch: Watch = lambda number, weights, intake: None) -> Weights:
        """The weights after all rounds.

        Args:
            rows: (k,) of the training data, what each client trains on; see `Apprentice`.

        Raises:
            InputError: clients answer with outputs, which no update is made of.
        """
        weights, memory = self.start, {}  # type: ignore[var-annotated]
        if self.method.privacy is not None:
            self.method.privacy.begin()
        for number in range(1, self.config.rounds + 1):
            before = weights
            intake = self.round(number, weights, rows)
            moved = self.method.step(number, weights, intake.update(), intake, memory)
            weights = mean_of_last(self.config, number, moved, memory)
            watch(number, before, intake)
        return weights

    def round(self, number: int, weights: Weights, rows: Rows | None = None) -> Intake:
        """One round's replies, taken in.

        Raises:
            InputError: as `train`.
        """
        if (strategy := self.config.server.strategy) in VOTING:
            raise InputError(
                f"server.strategy = {strategy!r}: no weights travel, and this audit is of updates; give the votes "
                "attack alone, or server.strategy = 'fedavg'"
            )
        cohort = self._cohort(number)
        self.worker.rows = rows or {}
        cohort = tuple(client for client in cohort if len(self.worker.rows.get(client, (0,))))
        sizes = {client: self.config.client.part_of(len(self.worker._rows_of(client))) for client in cohort}
        intake = keeping(self.method.intake(number, weights, sizes))
        if cohort:
            self.take(intake, *self.answer(number, weights, cohort))
        return intake

    def take(self, intake: Intake, groups: Any, lines: list[ClientLine]) -> None:
        """Hand a worker's answer over.

        Raises:
            RuntimeError: the server would not have it; what is measured then is another federation.
        """
        _, refused = intake.take(pack_reply(groups, lines), frozenset(line.client for line in lines))
        if refused:
            raise RuntimeError(f"the server refused a client's update: {next(iter(refused.values()))}")

    def answer(self, number: int, weights: Weights, cohort: Sequence[int]) -> tuple[Any, list[ClientLine]]:
        """What the worker sends for these clients; round 1 begins a life in which nothing has been spent yet."""
        if number == 1:
            self._begin()
        return self.worker.train(weights, self._instruction(number, cohort), lambda count: None)

    def logits(self, weights: Weights, rows: NDArray[np.int64]) -> NDArray[np.float32]:
        """(len(rows), num_labels) what a student with these weights answers to rows of the training data."""
        tokens = self.federation.pupil.data.train.tokens
        return predict(self._student(weights), tokens, rows, self.federation.compute)

    def scores(self, weights: Weights) -> dict[str, float]:
        """Scores on the public validation text of a student with these weights."""
        federation = self.federation
        return validate(self._student(weights), federation.pupil.data, federation.compute, Silent())

    def _student(self, weights: Weights) -> Any:
        tiers = self.federation.tiers
        return tiers.load(len(tiers) - 1, {name: torch.from_numpy(np.array(array)) for name, array in weights.items()})

    def _cohort(self, number: int) -> tuple[int, ...]:
        if self.method.privacy is not None:
            return self.method.privacy.cohort(self.data.eligible)
        return pick_cohort(self.data.eligible, self.config.server.cohort, self.config.seed, number)

    def _needs(self) -> dict[str, Any]:
        federation = self.federation
        return {
            "teacher": str(federation.teacher.folder),
            "teacher_hash": federation.teacher.hash,
            "dataset": federation.data.key,
            "student": federation.pupil.key,
            "student_hash": federation.pupil.hash,
        }

    def _instruction(self, number: int, clients: Sequence[int]) -> Instruction:
        clip_norm = 0.0 if self.method.privacy is None else self.method.privacy.clip_norm
        return Instruction(
            run=self.run, round=number, config="", clients=tuple(clients), feedback=(0,) * len(clients),
            clip_norm=clip_norm, **self._needs(),
        )  # fmt: skip
