"""The strategy: FedAvg over clients with stable ids, folded reply by reply into exact sums.

Flower's `Strategy.start` drives the rounds: train, evaluate, validate at the server. Here is what a round
asks for, what enters its sums and what is written down.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy

from common.errors import RunFailed
from common.metrics import check_statistics, scores, statistics_length
from common.progress import Progress
from common.wire import ClientLine
from server.aggregation import SERVER_RULES, Rejected, RunningSum
from server.assignment import pick_cohort
from server.exchange import Exchange, Phase, StreamingGrid
from server.history import History, client_spread, retention
from server.preparation import Federation
from server.run_folder import RunFolder
from server.validation import validate

LOSSES = ("loss", "soft_loss", "hard_loss", "hidden_loss")


class FederatedDistillation(Strategy):
    """Runs a prepared federation.

    Args:
        nodes: wait for this many nodes before round 1.
        stopped: asked ten times a second; True ends the run with `Interrupted`.
    """

    def __init__(
        self,
        federation: Federation,
        folder: RunFolder,
        progress: Progress,
        *,
        nodes: int,
        stopped: Callable[[], bool],
    ) -> None:
        self.federation, self.config, self.data = federation, federation.config, federation.data
        self.folder, self.progress, self.nodes = folder, progress, nodes
        self.exchange = Exchange(federation, folder.path / ".finished-clients", progress, stopped)
        self.history = History()
        self.weights = federation.weights
        self.cohort: tuple[int, ...] = ()
        self.taught: set[int] = set()

    def run(self, grid: Grid) -> None:
        """All rounds.

        Raises:
            RunFailed: too many clients were lost, or too few nodes came.
            Interrupted: the user stopped the run.
        """
        streaming: Any = StreamingGrid(grid, self.exchange.tick)
        try:
            self.exchange.wait_for_nodes(streaming, self.nodes)
            self.start(
                grid=streaming,
                initial_arrays=ArrayRecord(),  # the arrays live here; Flower's copy stays empty
                num_rounds=self.config.rounds,
                timeout=self.config.server.round_timeout,
                evaluate_fn=self._after_round,
            )
        finally:
            self.exchange.close()

    # --- what Flower calls, in this order -------------------------------------------------------

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        self.cohort = pick_cohort(self.data.eligible, self.config.server.cohort, self.config.seed, server_round)
        self._teach(server_round, self.cohort, grid)
        return self._ask("train", "train", server_round, self.cohort, grid)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        shapes = {name: array.shape for name, array in self.weights.items()}
        total = RunningSum.zeros(shapes)
        sizes = self.exchange.sizes
        phase = self.exchange.collect(
            replies, {"update": shapes}, lambda sums, lines: total.fold(sums["update"], lines, sizes)
        )
        self._count(phase)
        self._check_losses(phase)
        total.lines.sort(key=lambda line: line.client)
        self.weights = SERVER_RULES[self.config.server.strategy](self.weights, total, self.config.server.lr)
        self._record_training(phase, total)
        return None, None

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        scored, last = self.config.server.scores, server_round == self.config.rounds
        everyone = scored == "all" or (scored == "final" and last)
        clients = tuple(self.exchange.sizes) if everyone else self.cohort
        self._teach(server_round, clients, grid)
        return self._ask("score", "evaluate", server_round, clients, grid)

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        spec = self.data.task.score_spec
        shapes = {"statistics": (statistics_length(spec),)}
        totals = {who: RunningSum.zeros(shapes) for who in ("student", "teacher")}
        held = {client: len(self.data.shard(client).heldout) for client in self.exchange.sizes}
        found: list[ClientLine] = []

        def fold(sums: dict[str, dict[str, Any]], lines: list[ClientLine]) -> None:
            scored = [line for line in lines if not line.problem and held[line.client]]
            most = sum(held[line.client] for line in scored)
            for who in totals:
                check_statistics(spec, sums[who]["statistics"])
                if scores(spec, sums[who]["statistics"])["n"] > most:
                    raise Rejected(f"statistics of more than the {most} examples that its clients hold out")
            for who, total in totals.items():
                total.fold(sums[who], scored, held)
            found.extend(scored)

        phase = self.exchange.collect(replies, {"student": shapes, "teacher": shapes}, fold)
        self._count(phase)
        self._check_losses(phase)
        found.sort(key=lambda line: line.client)
        self._record_scores(phase, {who: total.totals["statistics"] for who, total in totals.items()}, found)
        return None

    def summary(self) -> None:
        """Flower asks for a log line here; config.toml says it all."""

    # --- parts of a round -----------------------------------------------------------------------

    def _ask(self, name: str, kind: str, server_round: int, clients: Sequence[int], grid: Grid) -> list[Message]:
        arrays = {} if kind.startswith("query") else self.weights
        return self.exchange.open(
            name, kind, server_round, clients, nodes=grid.get_node_ids(), arrays=arrays, info=self._latest()
        )

    def _teach(self, server_round: int, clients: Sequence[int], grid: Grid) -> None:
        """Have the teacher's outputs computed where they may not be on disk: once per client and run."""
        new = [client for client in clients if client not in self.taught]
        if not new:
            return
        messages = self._ask("teacher outputs", "query.teach", server_round, new, grid)
        replies = grid.send_and_receive(messages, timeout=self.config.server.round_timeout)
        phase = self.exchange.collect(replies, {}, lambda sums, lines: None)
        self._count(phase)
        self.taught.update(set(new) - {client for client, _ in phase.losses()})
        line = {"round": server_round, "phase": "teach", "clients": len(new), **phase.accounting()}
        self.folder.add_line(line)

    def _after_round(self, server_round: int, arrays: ArrayRecord) -> MetricRecord | None:
        """Score on the public validation split, save the checkpoint, say a line. Round 0: the student as cut."""
        self.put_weights_into_student()
        history = self.history
        history.validation = validate(
            self.federation.student, self.data, self.federation.compute, self.progress, self.exchange.tick
        )
        self.folder.add_line({"round": server_round, "phase": "validation", "student": history.validation})
        self.folder.save_checkpoint(server_round, self.weights, self.config.server.keep_checkpoints)
        if server_round:
            self.progress.line(f"round {server_round}/{self.config.rounds}: {self._verdict()}")
        return None

    def put_weights_into_student(self) -> None:
        """Bring the module that is scored and saved up to the round's arrays."""
        parameters = dict(self.federation.student.named_parameters())
        with torch.no_grad():
            for name, array in self.weights.items():
                parameters[name].copy_(torch.from_numpy(np.array(array)))

    # --- what is written down -------------------------------------------------------------------

    def _count(self, phase: Phase) -> None:
        history = self.history
        history.failed += len(phase.failed)
        history.rejected += len(phase.rejected)
        history.late += len(phase.late)
        history.bytes_up += phase.bytes_up
        history.bytes_down += phase.bytes_down

    def _check_losses(self, phase: Phase) -> None:
        allowed = self.config.server.max_lost_fraction
        if phase.lost == len(phase.clients) or phase.lost > allowed * len(phase.clients):
            client, what = phase.losses()[0]
            raise RunFailed(
                f"round {phase.round} {phase.name}: {phase.lost} of {len(phase.clients)} clients lost, more than "
                f"server.max-lost-fraction = {allowed} allows; the first: client {client} {what}"
            )

    def _record_training(self, phase: Phase, total: RunningSum) -> None:
        history = self.history
        history.rounds = phase.round
        history.examples += total.weight * self.config.client.epochs
        history.train_seconds += phase.seconds
        history.losses = {
            name: sum((getattr(line, name) or 0.0) * line.examples for line in total.lines) / total.weight
            for name in LOSSES
        }
        line = {"round": phase.round, "phase": "train", "clients": len(total.lines), "examples": total.weight}
        busy = sum(line.seconds for line in total.lines)
        self.folder.add_line({**line, **history.losses, "client_seconds": busy, **phase.accounting()})

    def _record_scores(self, phase: Phase, statistics: dict[str, Any], lines: list[ClientLine]) -> None:
        history, spec = self.history, self.data.task.score_spec
        history.student = scores(spec, statistics["student"])
        history.teacher = scores(spec, statistics["teacher"])
        history.spread = client_spread([line.score for line in lines])
        share = retention(history.student, history.teacher, self.data.task.headline)
        line = {"round": phase.round, "phase": "evaluate", "clients": len(lines)}
        line |= {"student": history.student, "teacher": history.teacher, "retention": share, "spread": history.spread}
        self.folder.add_line({**line, **phase.accounting()})

    def _latest(self) -> str:
        """Loss and score so far, short enough to stand beside a bar."""
        history, metric = self.history, self.data.task.headline
        parts = [f"loss {history.losses['loss']:.4f}"] if history.losses else []
        if history.student:
            parts.append(f"{metric} {history.student[metric]:.4f}")
        return ", ".join(parts)

    def _verdict(self) -> str:
        """What is said after a round: in 80 columns, the share of the teacher's score kept, and validation."""
        history, metric = self.history, self.data.task.headline
        share = retention(history.student, history.teacher, metric)
        kept = "" if math.isnan(share) else f" ({share:.1%} kept)"
        public = f", validation {history.validation[metric]:.4f}" if metric in history.validation else ""
        return f"{self._latest()}{kept}{public}"
