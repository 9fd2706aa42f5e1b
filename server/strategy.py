"""The strategy: rounds over clients with stable ids, folded reply by reply into exact sums.

Flower's `Strategy.start` drives the rounds: train, evaluate, validate at the server. Here is what a round
asks for, what enters its sums and what is written down.
"""

import secrets
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy

from common.errors import InputError, RunFailed
from common.hashing import runtime_fingerprint
from common.importance import MOST
from common.keys import KEEPING, PUBLIC
from common.noise import SQUARES
from common.progress import Progress
from common.secure_sum import LEAST
from common.wire import ClientLine, unpack_lines, unpack_sums
from server.aggregation import UpTo
from server.assignment import pick_cohort
from server.averaging import mean_of_last, to_go_on_from
from server.checkpoint import Checkpoint, load_latest, save_checkpoint
from server.client_privacy import ClientPrivacy
from server.consensus import Consensus
from server.edge_exchange import EdgeExchange
from server.exchange import NAMES, Exchange, StreamingGrid
from server.feddf import FedDF
from server.growth import Growth
from server.history import History, client_spread
from server.intake import Intake, Summed
from server.journal import Journal, mean_losses
from server.method import Averaging
from server.noised_scores import NoisedScores, check_counts
from server.phase import Phase
from server.preparation import Federation
from server.privacy_report import spending, told
from server.run_folder import RunFolder
from server.scoring import WHO, TieredScores
from server.secure_sum import MaskedWords, SecureSum, layout_of
from server.student import Width, choose_width, narrow_student, random_width
from server.supplies import files_of
from server.validation import validate

SECURED = ("train", "evaluate", "query.weigh")  # questions whose answers are sums
METHODS: dict[str, type[Averaging]] = {"feddf": FedDF, "fedmd": Consensus, "ds-fl": Consensus}


class FederatedDistillation(Strategy):
    """Runs a prepared federation, from its first round or from its last checkpoint.

    Args:
        nodes: wait for this many nodes before the first round.
        stopped: asked ten times a second; True ends the run with `Interrupted`.
        on_hang: see `Exchange`.
    """

    def __init__(
        self,
        federation: Federation,
        folder: RunFolder,
        progress: Progress,
        *,
        nodes: int,
        stopped: Callable[[], bool],
        on_hang: Callable[[], None] = lambda: None,
    ) -> None:
        self.federation, self.config, self.data = federation, federation.config, federation.data
        self.folder, self.progress, self.nodes = folder, progress, nodes
        self.journal = Journal(federation, folder, quiet=self.config.privacy.unit == "client")
        self.weights = federation.weights()
        self.optimizer: dict[str, Any] = {}
        self.continued = False  # from a checkpoint, perhaps the one before round 1
        self.done = 0  # rounds that this checkpoint holds
        self.cohort: tuple[int, ...] = ()
        self.everyone = False  # of the open scoring phase
        self.taught: set[int] = set()
        self.width: Width | None = None  # heads and neurons that were kept; None: all
        keys = self.config.client
        self.growth = Growth(keys.token_budget, keys.max_token_budget) if keys.grow_batch else None
        self.grid: Any = None
        kind = EdgeExchange if federation.homes else Exchange
        self.exchange = kind(federation, secrets.token_hex(8), folder.path, progress, stopped=stopped, on_hang=on_hang)
        method = METHODS.get(self.config.server.strategy, Averaging)
        self.method = method(federation, progress, self.exchange.tick, folder.add_line)
        secure = self.config.privacy.secure_aggregation
        self.secure = SecureSum(self.exchange, self.config, self.journal.count) if secure else None
        if folder.resumed:
            self._continue()
        if self.method.privacy is not None:
            self._begin_privacy(self.method.privacy)

    def run(self, grid: Grid) -> None:
        """All rounds that are left.

        Raises:
            RunFailed: too many clients were lost, or too few nodes came.
            Interrupted: the user stopped the run.
        """
        exchange = self.exchange
        streaming: Any = StreamingGrid(grid, exchange.tick, exchange.ask_again, exchange.moot)
        try:
            self.exchange.wait_for_nodes(streaming, self.nodes)
            self._narrow(streaming)
            self.start(
                grid=streaming,
                initial_arrays=ArrayRecord(),  # the arrays live here; Flower's copy stays empty
                num_rounds=self.config.rounds - self.done,
                timeout=self.config.server.round_timeout,
                evaluate_fn=self._after_round,
            )
        finally:
            self.exchange.close()

    def _narrow(self, grid: Any) -> None:
        """Before round 1: keep the heads and neurons that the clients say matter most, the same for all of them."""
        if self.continued or not self.config.student.narrows:
            return
        pupil = self.federation.pupil
        if self.config.student.width_selection == "random":
            self._keep(random_width(self.config, pupil.shape))
            return
        cohort = pick_cohort(self.federation.able, self.config.server.cohort, self.config.seed, 0)
        self._teach(0, cohort, grid)
        shapes = {name: np.shape(getattr(pupil.shape, name)) for name in ("heads", "neurons")}
        intake = Summed(shapes, {client: min(size, MOST) for client, size in self.exchange.sizes.items()})
        masked = None if self.secure is None else MaskedWords(layout_of({"update": shapes}))
        messages = self._ask("query.weigh", 0, cohort, grid)
        replies = grid.send_and_receive(messages, timeout=self.config.server.round_timeout)
        phase = self.exchange.collect(grid, replies, (masked or intake).take)
        self.journal.count(phase)
        self._check_losses(phase)
        if self.secure is not None and masked is not None:
            opened = self.secure.open(masked, phase.accepted, grid)
            intake.put(opened.group("update"), opened.lines, opened.examples)
        self._keep(choose_width(self.config, **intake.update()))
        self.journal.note(phase, "weigh", len(intake.lines))

    def _keep(self, width: Width) -> None:
        """Go on with the narrower student."""
        federation, self.width = self.federation, width
        federation.take(narrow_student(self.config, federation.lesson, federation.pupil, width, self.progress))
        self.weights = federation.weights()

    # --- what Flower calls, in this order; it counts rounds from where this process began ---------

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        number, keys = self.done + server_round, self.config.server
        ready = self.federation.drawn_from
        if self.method.privacy is not None:
            known = self.method.privacy.released.has("update", number)
            self.cohort = () if known else self.method.privacy.cohort(ready)
            self.exchange.clip_norm = self.method.privacy.clip_norm
            self.exchange.noise = self.method.privacy.deviation if self.config.privacy.distributed_noise else 0.0
            goal = len(self.cohort)
        else:
            self.cohort = pick_cohort(ready, keys.cohort, self.config.seed, number, keys.over_select)
            goal = min(keys.cohort or len(self.cohort), len(self.cohort))
        self._teach(number, self.cohort, grid)
        self.grid = grid
        return self._ask("train", number, self.cohort, grid, goal=goal)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        number, keys, client = self.done + server_round, self.config.server, self.config.client
        partial = client.max_seconds or client.energy_budget or self.federation.homes  # a device's owner may set limits
        sizes = {one: client.part_of(size) for one, size in self.exchange.sizes.items()}
        sizes = UpTo(sizes) if partial else sizes
        intake, masked, losses, opening = self.method.intake(number, self.weights, sizes), None, None, 0.0
        if self.secure is not None:
            assert isinstance(intake, Summed)
            masked = MaskedWords(layout_of({"update": intake.shapes}))
        phase = self.exchange.collect(self.grid, replies, (masked or intake).take)
        try:
            if self.method.privacy is None:  # else a client that is lost counts as one with nothing to say
                self._check_losses(phase)
            if self.secure is not None and masked is not None and phase.clients:
                assert isinstance(intake, Summed)
                began = time.monotonic()
                opened = self.secure.open(masked, phase.accepted, self.grid)
                opening = time.monotonic() - began  # written down as a stage of its own
                intake.put(opened.group("update"), opened.lines, opened.examples)
                losses = opened.losses
            update = self._released(number) or intake.update()
            phase.ended = time.monotonic() - opening  # training ends when the mean update is there
        except ValueError as error:
            raise RunFailed(f"round {number}: {error}") from None
        finally:
            self.journal.count(phase)
        if phase.surplus:
            self.cohort = tuple(sorted(phase.accepted))
        extra = self._grow(update, intake)
        if keys.wire != "fp32" or keys.strategy in KEEPING:
            self.exchange.feedback.update(dict.fromkeys(phase.accepted, number))
        if self.method.privacy is not None:  # what is not noised is not told
            extra = {"clip_norm": self.exchange.clip_norm, "noise_multiplier": self.method.privacy.noise}
        self.journal.training(phase, intake, losses or mean_losses(intake), extra)
        moved = self.method.step(number, self.weights, update, intake, self.optimizer)
        self.weights = mean_of_last(self.config, number, moved, self.optimizer)
        return None, None

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        number = self.done + server_round
        if not self.config.scores_after(number):
            return ()
        who, last = self.config.server.scores, number == self.config.rounds
        self.everyone = who == "all" or (who == "final" and last)
        clients = tuple(self.exchange.sizes) if self.everyone else self.cohort
        if self.method.privacy is not None and self.config.privacy.scores_share and not self.everyone:
            clients = self.method.privacy.cohort(
                self.data.eligible
            )  # costs add up for draws that know nothing of others
        self._teach(number, clients, grid)
        return self._ask("evaluate", number, clients, grid)

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        number = self.done + server_round
        if not self.config.scores_after(number):
            return None
        intake = self._scores_intake(number)
        masked = None
        if self.secure is not None:
            masked = MaskedWords(layout_of(dict.fromkeys(WHO, intake.shapes)))
        phase = self.exchange.collect(self.grid, replies, (masked or intake).take)
        self.journal.count(phase)
        if self.scores_are_exact:
            self._check_losses(phase)
        spread = None
        if self.secure is not None and masked is not None and phase.clients:
            opened = self.secure.open(masked, phase.accepted, self.grid)
            spread = opened.spread
            try:
                intake.put({who: opened.group(who)["statistics"] for who in WHO}, opened.lines)
            except ValueError as error:
                raise RunFailed(f"round {phase.round}: {error}") from None
        spread = spread or client_spread([line.score for line in intake.lines])
        self.journal.scoring(phase, intake, spread if self.scores_are_exact else {})
        return None

    def summary(self) -> None:
        """Flower asks for a log line here; config.toml says it all."""

    # --- privacy of clients ---------------------------------------------------------------------

    def _begin_privacy(self, privacy: ClientPrivacy) -> None:
        """Take up what the run has spent, and say what it will spend."""
        clip_norm = privacy.clip_norm
        if share := self.config.privacy.scores_share:
            check_counts(self.data.task.score_spec, share)
        privacy.begin(self.done, self.folder.path)
        privacy.clip_norm = clip_norm  # a checkpoint's
        if self.done > len(privacy.ledger.steps("update")):
            where = privacy.ledger.path
            raise InputError(f"{where}: {self.done} rounds were released, and it does not say so; put it back")
        for line in told(privacy, self.done):
            self.progress.line(line)

    def _released(self, number: int) -> dict[str, Any] | None:
        """A round's update that an earlier process has let out."""
        return None if self.method.privacy is None else self.method.privacy.released_before(number)

    def tell_privacy(self) -> None:
        """Bring the history up to what was spent."""
        if self.method.privacy is not None:
            self.journal.history.privacy = spending(self.method.privacy)

    @property
    def scores_are_exact(self) -> bool:
        return self.method.privacy is None or not self.config.privacy.scores_share

    def _scores_intake(self, number: int) -> TieredScores:
        if self.method.privacy is None or self.scores_are_exact:
            return TieredScores(self.data, self.federation.tier_of, len(self.federation.tiers))
        return NoisedScores(self.data, self.method.privacy, number, everyone=self.everyone)

    # --- parts of a round -----------------------------------------------------------------------

    def _supply(self, number: int, clients: Sequence[int], grid: Any) -> None:
        """Send clients on devices of their own the teacher and the student that they do not have yet."""
        federation = self.federation
        models = {federation.teacher.hash: federation.teacher.folder, federation.pupil.hash: federation.pupil.folder}
        for name, folder in models.items():
            lacking = [client for client in clients if name not in federation.held[client]]
            if not lacking:
                continue
            messages = self.exchange.open("query.supply", number, lacking, grid=grid, arrays=files_of(folder), info="")
            replies = grid.send_and_receive(messages, timeout=self.config.server.round_timeout)
            phase = self.exchange.collect(grid, replies, _take_lines)
            self.journal.count(phase)
            for client in phase.accepted:
                federation.held[client].add(name)
            self.journal.note(phase, "supply", len(lacking))

    def _ask(
        self, kind: str, number: int, clients: Sequence[int], grid: Grid, *, goal: int | None = None
    ) -> list[Message]:
        if self.federation.homes:
            self._supply(number, clients, grid)
        if self.secure is not None and kind in SECURED:
            # a drawn cohort may be too few to hide one another: then nobody has anything to say
            few = self.method.privacy is not None and len(clients) < LEAST
            clients = () if few else self.secure.begin(kind.removeprefix("query."), number, clients, grid)
            goal = None
        arrays = self.method.sends(kind, number, self.weights, self.optimizer)
        return self.exchange.open(
            kind, number, clients, grid=grid, arrays=arrays, info=self.journal.latest(), goal=goal
        )

    def _teach(self, number: int, clients: Sequence[int], grid: Grid) -> None:
        """Have the teacher's outputs computed where they may not be on disk: once per client and run."""
        new = [client for client in clients if client not in self.taught]
        if not new:
            return
        messages = self._ask("query.teach", number, new, grid)
        replies = grid.send_and_receive(messages, timeout=self.config.server.round_timeout)
        phase = self.exchange.collect(grid, replies, _take_lines)
        self.journal.count(phase)
        self.taught.update(phase.accepted)
        self.journal.note(phase, "teach", len(new))

    def _after_round(self, server_round: int, arrays: ArrayRecord) -> MetricRecord | None:
        """Score where the round is scored, save the checkpoint, say a line. Round 0: the student as cut."""
        number = self.done + server_round
        self.put_weights_into_student()
        if self.continued and not server_round:
            return None  # the checkpoint that this run continues from has it
        scored = not number or self.config.scores_after(number)
        if scored:
            self._validate(number)
        self.save(number)
        if number:
            found = self.journal.verdict() if scored else self.journal.loss()
            self.progress.line(f"round {number}/{self.config.rounds}{found and ': '}{found}")
        return None

    def _validate(self, number: int) -> None:
        """Score each tier's student on the public validation split."""
        federation = self.federation
        found = [
            validate(tier.model, federation.pupil.data, federation.compute, self.progress, self.exchange.tick)
            for tier in federation.tiers.tiers
        ]
        self.journal.validation(number, found)

    def put_weights_into_student(self) -> None:
        """Bring the modules that are scored and saved up to the round's arrays."""
        arrays = {name: torch.from_numpy(np.array(array)) for name, array in self.weights.items()}
        for tier in range(len(self.federation.tiers)):
            self.federation.tiers.load(tier, arrays)

    # --- checkpoints ----------------------------------------------------------------------------

    def save(self, number: int) -> None:
        """Write the checkpoint of a round."""
        history = self.journal.history
        state = {
            "run": self.exchange.run,
            "history": {**asdict(history), "seconds": self.folder.seconds + history.seconds},
            "taught": sorted(self.taught),
            "feedback": sorted(self.exchange.feedback.items()),
            "journals": self.folder.lengths(),
            "width": self.width,
            "growth": None if self.growth is None else asdict(self.growth),
            "clip_norm": None if self.method.privacy is None else self.method.privacy.clip_norm,
            **self._identity(),
        }
        checkpoint = Checkpoint(number, self.weights, self.optimizer, state)
        save_checkpoint(self.folder.checkpoints, checkpoint, self.config.server.keep_checkpoints)

    def _continue(self) -> None:
        """Take up the last whole checkpoint; without one the run begins anew in its folder."""
        found = load_latest(self.folder.checkpoints, self.federation.final_shapes(), self.progress.line)
        if found is None:
            self.folder.cut_back({})
            self.progress.line("no checkpoint yet: the run begins at round 1")
            return
        if found.state["width"]:
            heads, neurons = found.state["width"]
            self._keep((tuple(map(tuple, heads)), tuple(map(tuple, neurons))))
        for name, now in self._identity().items():
            if found.state.get(name) != now:
                raise InputError(
                    f"{self.folder.path}: the {name} of this run changed since it began "
                    f"({found.state.get(name)}, now {now}); put it back, or start a new run"
                )
        self.continued = True
        self.done, self.weights, self.optimizer = found.round, found.weights, found.optimizer
        if self.done < self.config.rounds:
            self.weights = to_go_on_from(self.weights, self.optimizer)
        self.journal.history = History(**found.state["history"])
        self.taught = set(found.state["taught"])
        self.exchange.run = found.state["run"]
        self.exchange.feedback = dict(found.state["feedback"])
        if self.growth is not None:
            self.growth = Growth(**found.state["growth"])
            self.exchange.token_budget = self.growth.budget
        if self.method.privacy is not None:
            self.method.privacy.clip_norm = found.state["clip_norm"]
        self.folder.cut_back(found.state["journals"])
        self.progress.line(f"continues after round {self.done}")

    def _identity(self) -> dict[str, Any]:
        """What the bits depend on besides the keys."""
        teacher = self.federation.teacher
        found: dict[str, Any] = {
            "data": self.data.key,
            "teacher": teacher.hash,
            "student": self.federation.pupil.hash,
            "device": self.federation.compute.name,
            "runtime": runtime_fingerprint(teacher.folder, self.config.runtime.threads),
        }
        if self.federation.masked is not None:
            found["masked-LM teacher"] = self.federation.masked.hash
        if self.config.server.strategy in PUBLIC:  # a server that trains uses threads of its own
            found["threads"] = torch.get_num_threads()
        return found

    # --- what follows from a phase --------------------------------------------------------------

    def _check_losses(self, phase: Phase) -> None:
        allowed = self.config.server.max_lost_fraction
        if phase.missing and (not phase.accepted or phase.missing > allowed * phase.goal):
            client, what = phase.losses()[0]
            raise RunFailed(
                f"round {phase.round} {NAMES[phase.kind]}: {phase.missing} of {phase.goal} clients lost, more than "
                f"server.max-lost-fraction = {allowed} allows; the first: client {client} {what}"
            )

    def _grow(self, update: dict[str, Any], intake: Intake) -> dict[str, Any]:
        """Set the next round's token budget, where it grows; what the round's metrics line says of it."""
        if self.growth is None:
            return {}
        square = float(update.pop(SQUARES)[0])
        told = self.growth.note(update, square, len(intake.lines), intake.examples)
        self.exchange.token_budget = self.growth.budget
        return told


def _take_lines(content: RecordDict, clients: frozenset[int]) -> tuple[list[ClientLine], dict[int, str]]:
    """The clients' lines, where nothing else is expected."""
    unpack_sums(content, {})
    return unpack_lines(content, clients), {}
