"""What a run writes down as it goes: a line in metrics.jsonl and costs.jsonl per phase, and its history."""

import math
from typing import Any

from common.metrics import scores
from common.wire import LOSSES, SPENT
from server.history import History, retention
from server.intake import Intake
from server.phase import Phase
from server.preparation import Federation
from server.privacy_report import spending_of_examples
from server.run_folder import RunFolder
from server.scoring import TieredScores, tier_rows


class Journal:
    """The lines and the history of one run.

    Args:
        quiet: clients are hidden: of who was in a phase, of losses and of faults nothing is told.
    """

    def __init__(self, federation: Federation, folder: RunFolder, *, quiet: bool) -> None:
        self.federation, self.folder, self.quiet = federation, folder, quiet
        self.config, self.task = federation.config, federation.data.task
        self.history = History()

    def count(self, phase: Phase) -> None:
        """Add what a phase has cost and lost."""
        history = self.history
        history.failed += len(phase.failed)
        history.rejected += len(phase.rejected)
        history.late += len(phase.late)
        history.retried += len(phase.recovered)
        history.bytes_up += phase.bytes_up
        history.bytes_down += phase.bytes_down
        self.folder.add_costs(phase.costs())

    def note(self, phase: Phase, what: str, clients: int) -> None:
        """A phase that only prepares clients for others."""
        if not self.quiet:
            self.folder.add_line({"round": phase.round, "phase": what, "clients": clients, **phase.faults()})

    def training(self, phase: Phase, intake: Intake, losses: dict[str, float], told: dict[str, Any]) -> None:
        """The end of a round's training.

        Args:
            losses: means over the sum's examples.
            told: what else the line says.
        """
        history = self.history
        history.rounds = phase.round
        history.examples += intake.examples * self.config.client.epochs
        history.train_seconds += phase.seconds
        line: dict[str, Any] = {"round": phase.round, "phase": "train"}
        if not self.quiet:
            line |= {"clients": len(intake.lines), "examples": intake.examples}
            if self.config.privacy.unit == "example":  # losses are of private examples, and have no noise
                history.privacy = spending_of_examples(self.config.privacy, history.privacy, intake.lines)
                line |= {name: history.privacy[name] for name in SPENT}
            else:
                history.losses = losses
            told = {**history.losses, **told, **phase.faults()}
        self.folder.add_line({**line, **told})

    def scoring(self, phase: Phase, found: TieredScores, spread: dict[str, float]) -> None:
        """A round's federated scores.

        Args:
            spread: of clients' own scores; empty where those are not told.
        """
        history, spec = self.history, self.task.score_spec
        history.student = scores(spec, found.together("student"))
        history.teacher = scores(spec, found.together("teacher"))
        history.tier_student = [scores(spec, statistics) for statistics in found.by_tier("student")]
        history.tier_teacher = [scores(spec, statistics) for statistics in found.by_tier("teacher")]
        history.spread, history.scored["federated"] = spread, phase.round
        share = retention(history.student, history.teacher, self.task.headline)
        line: dict[str, Any] = {"round": phase.round, "phase": "evaluate"}
        line |= {"student": history.student, "teacher": history.teacher, "retention": share}
        if not self.quiet:
            line |= {"clients": len(found.lines), "spread": history.spread, **phase.faults()}
        self.folder.add_line({**line, **self._by_tier("federated", history.tier_student)})

    def validation(self, number: int, found: list[dict[str, float]]) -> None:
        """Scores on the public validation split, of each tier's student, the smallest first."""
        self.history.tier_validation, self.history.validation = found, found[-1]
        self.history.scored["validation"] = number
        line = {"round": number, "phase": "validation", "student": found[-1]}
        self.folder.add_line({**line, **self._by_tier("validation", found)})

    def _by_tier(self, where: str, found: list[dict[str, float]]) -> dict[str, Any]:
        """The part of a metrics line that only runs with tiers have."""
        rows = tier_rows(self.federation)
        return {"tiers": [{**row, where: one} for row, one in zip(rows, found, strict=True)]} if rows else {}

    def loss(self) -> str:
        """The last round's; empty where it is not told."""
        losses = self.history.losses
        return f"loss {losses['loss']:.4f}" if losses else ""

    def latest(self) -> str:
        """Loss and score so far, short enough to stand beside a bar."""
        history, metric = self.history, self.task.headline
        parts = [loss] if (loss := self.loss()) else []
        if history.student:
            parts.append(f"{metric} {history.student[metric]:.4f}")
        return ", ".join(parts)

    def verdict(self) -> str:
        """What is said after a round: in 80 columns, the share of the teacher's score kept, and validation."""
        history, metric = self.history, self.task.headline
        share = retention(history.student, history.teacher, metric)
        kept = "" if math.isnan(share) else f" ({share:.1%} kept)"
        public = f", validation {history.validation[metric]:.4f}" if metric in history.validation else ""
        return f"{self.latest()}{kept}{public}"


def mean_losses(intake: Intake) -> dict[str, float]:
    """Over the examples of all clients in the sum; none where nobody is."""
    if not intake.examples:
        return {}
    lines = sorted(intake.lines, key=lambda line: line.client)
    return {
        name: sum((getattr(line, name) or 0.0) * line.examples for line in lines) / intake.examples for name in LOSSES
    }
