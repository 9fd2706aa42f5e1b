"""The strategy: FedAvg over clients with stable ids, folded reply by reply into exact sums.

Flower's `Strategy.start` drives the rounds: train, evaluate, validate at the server. Here is what a round
sends, what it accepts and what it writes down. A reply that fails a check is refused, counted and named,
and the round goes on.
"""

import json
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy

from common.errors import Interrupted, RunFailed
from common.metrics import check_statistics, scores, statistics_length
from common.progress import Progress, Step
from common.wire import (
    NOT_FINITE,
    ClientLine,
    Instruction,
    Shapes,
    message_bytes,
    pack,
    unpack_reply,
)
from server.aggregation import SERVER_RULES, Rejected, RunningSum
from server.assignment import assign, pick_cohort
from server.history import History, client_spread, retention
from server.preparation import Federation
from server.run_folder import RunFolder
from server.validation import validate

POLL_SECONDS = 0.1
Fold = Callable[[dict[str, dict[str, Any]], list[ClientLine]], None]


@dataclass
class Phase:
    """One exchange with the nodes: what was asked, what came back, what was lost.

    Attributes:
        sent: message and the clients it names.
        failed, rejected: client id and reason.
        answered: clients whose node replied.
    """

    name: str
    round: int
    clients: tuple[int, ...]
    sent: list[tuple[Message, tuple[int, ...]]]
    display: AbstractContextManager[Step]
    step: Step
    began: float = field(default_factory=time.monotonic)
    answered: set[int] = field(default_factory=set)
    failed: dict[int, str] = field(default_factory=dict)
    rejected: dict[int, str] = field(default_factory=dict)
    bytes_up: int = 0
    bytes_down: int = 0

    @property
    def late(self) -> list[int]:
        return sorted(set(self.clients) - self.answered)


class StreamingGrid:
    """A Flower grid whose replies can be folded in as they come, instead of all at once at the end."""

    def __init__(self, grid: Grid, tick: Callable[[], None]) -> None:
        self.grid, self.tick = grid, tick

    def get_node_ids(self) -> list[int]:
        return list(self.grid.get_node_ids())

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterator[Message]:
        """Push messages and yield each reply when it arrives, until all are in or time is up."""
        waiting = set(self.grid.push_messages(list(messages)))
        end = time.monotonic() + (timeout if timeout is not None else float("inf"))
        while waiting and time.monotonic() < end:
            self.tick()
            for reply in self.grid.pull_messages(waiting):
                if reply.metadata.reply_to_message_id in waiting:
                    waiting.discard(reply.metadata.reply_to_message_id)
                    yield reply
            if waiting:
                time.sleep(POLL_SECONDS)


class FederatedDistillation(Strategy):
    """Runs a prepared federation.

    Args:
        nodes: wait for this many nodes before round 1.
        stopped: asked every tenth of a second; True ends the run with `Interrupted`.
    """

    def __init__(
        self, federation: Federation, folder: RunFolder, progress: Progress, *, nodes: int, stopped: Callable[[], bool]
    ) -> None:
        self.federation, self.folder, self.progress = federation, folder, progress
        self.config, self.data = federation.config, federation.data
        self.nodes, self.stopped = nodes, stopped
        self.history = History()
        self.weights = federation.weights
        self.taught: set[int] = set()
        self.cohort: tuple[int, ...] = ()
        self.phase: Phase | None = None
        self.scoreboard = folder.path / ".finished-clients"
        self.sizes = {int(client): int(self.data.train_sizes[client]) for client in self.data.eligible}

    # --- what Flower calls ----------------------------------------------------------------------

    def run(self, grid: Grid) -> None:
        """All rounds.

        Raises:
            RunFailed: too many clients were lost, or no node came.
            Interrupted: the user stopped the run.
        """
        streaming: Any = StreamingGrid(grid, self._tick)
        try:
            self._wait_for_nodes(streaming)
            self.start(
                grid=streaming,
                initial_arrays=ArrayRecord(dict.fromkeys(())),
                num_rounds=self.config.rounds,
                timeout=self.config.server.round_timeout,
                evaluate_fn=self._after_round,
            )
        finally:
            if self.phase is not None:
                self.phase.display.__exit__(None, None, None)
            self.scoreboard.unlink(missing_ok=True)

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        self.cohort = pick_cohort(self.data.eligible, self.config.server.cohort, self.config.seed, server_round)
        self._teach(server_round, self.cohort, grid)
        return self._ask("train", "train", server_round, self.cohort, grid=grid, arrays=self.weights)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        shapes = {name: array.shape for name, array in self.weights.items()}
        total = RunningSum.zeros(shapes)
        phase = self._collect(
            replies, {"update": shapes}, lambda sums, lines: total.fold(sums["update"], lines, self.sizes)
        )
        self._check_losses(phase)
        self.weights = SERVER_RULES[self.config.server.strategy](self.weights, total, self.config.server.lr)
        self._record_training(phase, total)
        return None, None  # the arrays live here; Flower's copy stays empty

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        last = server_round == self.config.rounds
        everyone = self.config.server.scores == "all" or (self.config.server.scores == "final" and last)
        clients = tuple(self.sizes) if everyone else self.cohort
        self._teach(server_round, clients, grid)
        return self._ask("score", "evaluate", server_round, clients, grid=grid, arrays=self.weights)

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        shapes = {"statistics": (statistics_length(self.data.task.score_spec),)}
        totals = {who: RunningSum.zeros(shapes) for who in ("student", "teacher")}
        held = {client: len(self.data.shard(client).heldout) for client in self.sizes}
        found: list[ClientLine] = []

        def fold(sums: dict[str, dict[str, Any]], lines: list[ClientLine]) -> None:
            scored = [line for line in lines if not line.problem and held[line.client]]
            for who, total in totals.items():
                check_statistics(self.data.task.score_spec, sums[who]["statistics"])
                if scored:
                    total.fold(sums[who], scored, held)
            found.extend(line for line in lines if not line.problem)

        phase = self._collect(replies, {"student": shapes, "teacher": shapes}, fold)
        self._record_scores(phase, totals, found)
        return None

    def summary(self) -> None:
        """Flower asks for a log line here; config.toml says it all."""

    # --- one exchange ---------------------------------------------------------------------------

    def _ask(
        self, name: str, kind: str, server_round: int, clients: Sequence[int], *, grid: Grid, arrays: Any
    ) -> list[Message]:
        """Messages of one phase, one per node; opens its progress step."""
        lists = assign(clients, self.sizes, sorted(grid.get_node_ids()))
        self.scoreboard.write_bytes(b"")
        sent = []
        for node, chosen in lists.items():
            content = pack(self._instruction(server_round, chosen), arrays)
            sent.append((Message(content, dst_node_id=node, message_type=kind), chosen))
        display = self.progress.step(f"round {server_round}/{self.config.rounds}: {name}", len(clients))
        self.phase = Phase(name, server_round, tuple(clients), sent, display, display.__enter__())
        self.phase.step.info(self._latest())
        self.phase.bytes_down = sum(message_bytes(message) for message, _ in sent)
        self._shown = 0
        return [message for message, _ in sent]

    def _collect(self, replies: Iterable[Message], expected: dict[str, Shapes], fold: Fold) -> Phase:
        """Check each reply as it comes and fold it in; what fails a check is noted and left out."""
        phase = self.phase
        assert phase is not None
        for reply in replies:
            asked = {message.metadata.message_id: clients for message, clients in phase.sent}
            clients = asked[reply.metadata.reply_to_message_id]
            phase.answered.update(clients)
            if reply.has_error():
                phase.failed.update(dict.fromkeys(clients, _reason(reply)))
                continue
            phase.bytes_up += message_bytes(reply)
            try:
                sums, lines = unpack_reply(reply.content, expected, frozenset(clients))
                fold(sums, lines)
            except (Rejected, ValueError, OverflowError) as error:
                phase.rejected.update(dict.fromkeys(clients, str(error)))
                continue
            for line in lines:
                if line.problem:
                    (phase.rejected if line.problem == NOT_FINITE else phase.failed)[line.client] = line.problem
        phase.display.__exit__(None, None, None)
        self.phase = None
        self._note_losses(phase)
        return phase

    def _teach(self, server_round: int, clients: Sequence[int], grid: Grid) -> None:
        """Have the teacher's outputs computed where they are not known yet: once per client and run."""
        new = [client for client in clients if client not in self.taught]
        if not new:
            return
        messages = self._ask("teacher outputs", "query.teach", server_round, new, grid=grid, arrays={})
        phase = self._collect(
            grid.send_and_receive(messages, timeout=self.config.server.round_timeout), {}, lambda sums, lines: None
        )
        self.taught.update(set(new) - set(phase.failed) - set(phase.late))
        line = {"round": server_round, "phase": "teach", "clients": len(new), "seconds": time.monotonic() - phase.began}
        self.folder.add_line(line)

    def _instruction(self, server_round: int, clients: tuple[int, ...]) -> Instruction:
        teacher = self.federation.teacher
        return Instruction(
            round=server_round,
            config=json.dumps(self.config.flat(), sort_keys=True),
            clients=clients,
            teacher=str(teacher.folder.resolve()),
            teacher_hash=teacher.hash,
            dataset=self.data.key,
            scoreboard=str(self.scoreboard),
        )

    def _wait_for_nodes(self, grid: Any) -> None:
        end = time.monotonic() + self.config.server.round_timeout
        while len(grid.get_node_ids()) < self.nodes:
            self._tick()
            if time.monotonic() > end:
                raise RunFailed(f"{len(grid.get_node_ids())} nodes came; the run waits for {self.nodes}")
            time.sleep(POLL_SECONDS)

    def _tick(self) -> None:
        if self.stopped():
            raise Interrupted
        if self.phase is not None and self.scoreboard.exists():
            done = self.scoreboard.stat().st_size
            if done > self._shown:
                self.phase.step.advance(done - self._shown)
                self._shown = done

    # --- what is written down -------------------------------------------------------------------

    def _note_losses(self, phase: Phase) -> None:
        history = self.history
        history.failed += len(phase.failed)
        history.rejected += len(phase.rejected)
        history.late += len(phase.late)
        history.bytes_up += phase.bytes_up
        history.bytes_down += phase.bytes_down
        problems = [("failed", phase.failed), ("rejected", phase.rejected), ("late", dict.fromkeys(phase.late, ""))]
        for what, clients in problems:
            for client, reason in clients.items():
                self.progress.line(f"round {phase.round}: client {client} {what}{f': {reason}' if reason else ''}")

    def _check_losses(self, phase: Phase) -> None:
        lost = len(phase.failed) + len(phase.rejected) + len(phase.late)
        if lost > self.config.server.max_lost_fraction * len(phase.clients) or lost == len(phase.clients):
            reasons = sorted({*phase.failed.values(), *phase.rejected.values(), *(["no reply"] if phase.late else [])})
            raise RunFailed(
                f"round {phase.round}: {lost} of {len(phase.clients)} clients lost ({'; '.join(reasons)[:300]})"
            )

    def _record_training(self, phase: Phase, total: RunningSum) -> None:
        seconds = time.monotonic() - phase.began
        self.history.rounds = phase.round
        self.history.examples += total.weight * self.config.client.epochs
        self.history.train_seconds += seconds
        self.losses = {
            name: sum((getattr(line, name) or 0.0) * line.examples for line in total.lines) / total.weight
            for name in ("loss", "soft_loss", "hard_loss", "hidden_loss")
        }
        self.folder.add_line(
            {
                "round": phase.round,
                "phase": "train",
                "clients": len(total.lines),
                "examples": total.weight,
                **self.losses,
                "seconds": seconds,
                "client_seconds": sum(line.seconds for line in total.lines),
                **_accounting(phase),
            }
        )

    def _record_scores(self, phase: Phase, totals: dict[str, RunningSum], lines: list[ClientLine]) -> None:
        history, spec = self.history, self.data.task.score_spec
        found = {who: scores(spec, total.totals["statistics"]) for who, total in totals.items()}
        history.student, history.teacher = found["student"], found["teacher"]
        history.spread = client_spread([line.score for line in lines])
        self.folder.add_line(
            {
                "round": phase.round,
                "phase": "evaluate",
                "clients": len(lines),
                **found,
                "retention": retention(history.student, history.teacher, self.data.task.headline),
                "spread": history.spread,
                "seconds": time.monotonic() - phase.began,
                **_accounting(phase),
            }
        )

    def _after_round(self, server_round: int, arrays: ArrayRecord) -> MetricRecord | None:
        """Score on the public validation split, save the checkpoint, say a line. Round 0: the cut student."""
        self.put_weights_into_student()
        began = time.monotonic()
        self.history.validation = validate(self.federation.student, self.data, self.federation.compute)
        seconds = time.monotonic() - began
        line = {"round": server_round, "phase": "validation", "student": self.history.validation, "seconds": seconds}
        self.folder.add_line(line)
        self.folder.save_checkpoint(server_round, self.weights, self.config.server.keep_checkpoints)
        if server_round:
            self.progress.line(f"round {server_round}/{self.config.rounds}: {self._latest()}")
        return None

    def put_weights_into_student(self) -> None:
        with torch.no_grad():
            parameters = dict(self.federation.student.named_parameters())
            for name, array in self.weights.items():
                parameters[name].copy_(torch.from_numpy(np.array(array)))

    def _latest(self) -> str:
        """Loss and scores so far, short enough for one line."""
        metric, parts = self.data.task.headline, []
        if self.history.rounds:
            parts.append(f"loss {self.losses['loss']:.4f}")
        if self.history.student:
            share = retention(self.history.student, self.history.teacher, metric)
            parts.append(f"{metric} {self.history.student[metric]:.4f}, {share:.1%} of the teacher")
        if metric in self.history.validation:
            parts.append(f"validation {self.history.validation[metric]:.4f}")
        return ", ".join(parts)


def _accounting(phase: Phase) -> dict[str, Any]:
    return {
        "bytes_up": phase.bytes_up,
        "bytes_down": phase.bytes_down,
        "failed": sorted(phase.failed),
        "rejected": sorted(phase.rejected),
        "late": phase.late,
    }


def _reason(reply: Message) -> str:
    """A node's error, cut short: our own clients put no private text there, others might."""
    reason = reply.error.reason or ""
    kind = reason.rsplit(":<'", 1)[-1].removesuffix("'>").splitlines()[0] if reason.strip() else "no reason given"
    return kind[:120]
