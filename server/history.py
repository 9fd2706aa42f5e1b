"""What a run has measured so far, and the summary of it."""

import math
import platform
import resource
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any

import numpy as np

from common.hashing import hash_tensors
from common.models import count_parameters
from common.slim import Shape
from server.preparation import Federation
from server.privacy_report import privacy_block
from server.scoring import tier_rows

PACKAGES = ("fedistill", "flwr", "ray", "torch", "transformers", "datasets", "flwr-datasets", "numpy")


@dataclass
class History:
    """Sums over the rounds and the latest scores.

    Attributes:
        losses: mean loss of the last round and its parts; empty where clients do not tell.
        retried: clients that were lost at first and answered from another node.
        seconds: time of earlier processes of this run, up to the checkpoint that it was continued from.
        student, teacher: federated scores of the last evaluation, over the same examples.
        validation: the student's scores on the public validation split, the latest.
        scored: after which round these scores were taken, ``federated`` and ``validation``.
        tier_student, tier_teacher, tier_validation: the same of each tier, the smallest first.
        privacy: what the run has spent and on what, see `server.privacy_report`; empty: nothing is protected.
    """

    rounds: int = 0
    examples: int = 0
    train_seconds: float = 0.0
    bytes_up: int = 0
    bytes_down: int = 0
    failed: int = 0
    rejected: int = 0
    late: int = 0
    retried: int = 0
    seconds: float = 0.0
    losses: dict[str, float] = field(default_factory=dict)
    student: dict[str, float] = field(default_factory=dict)
    teacher: dict[str, float] = field(default_factory=dict)
    validation: dict[str, float] = field(default_factory=dict)
    spread: dict[str, float] = field(default_factory=dict)
    tier_student: list[dict[str, float]] = field(default_factory=list)
    tier_teacher: list[dict[str, float]] = field(default_factory=list)
    tier_validation: list[dict[str, float]] = field(default_factory=list)
    scored: dict[str, int] = field(default_factory=dict)
    privacy: dict[str, Any] = field(default_factory=dict)


def retention(student: dict[str, float], teacher: dict[str, float], metric: str) -> float:
    """Student's score over the teacher's; NaN where it means nothing (no score, or a teacher at 0 or below)."""
    above, below = student.get(metric, math.nan), teacher.get(metric, math.nan)
    return above / below if below > 0 else math.nan


def client_spread(scores: Sequence[float | None]) -> dict[str, float]:
    """How a headline score differs between clients: where the worst tenth ends, deviation, mean, how many.

    Only clients whose own score is defined count (a matthews correlation needs both classes, say).
    """
    found = np.asarray([score for score in scores if score is not None])
    if not len(found):
        return {"clients": 0}
    return {
        "worst_decile": float(np.quantile(found, 0.1)),
        "std": float(found.std()),
        "mean": float(found.mean()),
        "clients": len(found),
    }


def summarise(federation: Federation, history: History, status: str, seconds: float) -> dict[str, Any]:
    """The contents of summary.json; ``seconds`` is the time of this process, preparation included."""
    data, metric = federation.data, federation.data.task.headline
    student_size, teacher_size = count_parameters(federation.student), count_parameters(federation.lesson.model)
    teacher = {
        "params": teacher_size,
        "shape": whole_figures(federation.lesson.model.config),
        "federated": history.teacher,
        "validation": federation.lesson.validation,
        "fine_tuned_on": federation.teacher.fine_tuned_on,
    }
    student = {
        "params": student_size,
        "params_ratio": student_size / teacher_size,
        "shape": shape_figures(federation.pupil.shape),
        "federated": history.student,
        "validation": history.validation,
    }
    return {
        "status": status,
        "task": data.task.name,
        "metric": metric,
        "seed": federation.config.seed,
        "rounds": history.rounds,
        "clients": data.clients,
        "clients_left_out": data.clients - len(data.eligible),
        "cohort": min(federation.config.server.cohort or data.clients, len(federation.drawn_from)),
        "teacher": teacher,
        "student": student,
        "tiers": _tiers(federation, history),
        "retention": {
            "federated": retention(history.student, history.teacher, metric),
            "validation": retention(history.validation, federation.lesson.validation, metric),
        },
        "scored": history.scored,
        "spread": history.spread,
        "privacy": privacy_block(federation, history),
        "cost": _cost(history, history.seconds + seconds),
        "faults": {
            "failed": history.failed,
            "rejected": history.rejected,
            "late": history.late,
            "retried": history.retried,
        },
        "student_sha256": hash_tensors(federation.student.state_dict()),
        "versions": _versions(),
    }


def _tiers(federation: Federation, history: History) -> list[dict[str, Any]]:
    """Each tier with its scores, and the teacher's on its clients' text; none without tiers."""
    rows = tier_rows(federation)
    if not rows:
        return []
    nothing: list[dict[str, float]] = [{} for _ in rows]
    found: dict[str, list[Any]] = {
        "federated": history.tier_student or nothing,
        "teacher": history.tier_teacher or nothing,
        "validation": history.tier_validation or nothing,
        "sha256": [hash_tensors(tier.model.state_dict()) for tier in federation.tiers.tiers],
    }
    return [{**row, **{name: each[n] for name, each in found.items()}} for n, row in enumerate(rows)]


def shape_figures(shape: Shape) -> dict[str, Any]:
    """Sizes, of each layer what all have."""
    return {
        "layers": list(shape.layers),
        "heads": len(shape.heads[0]),
        "neurons": len(shape.neurons[0]),
        "pieces": shape.pieces,
        "rank": shape.rank,
    }


def whole_figures(config: Any) -> dict[str, Any]:
    """The same of a model with this configuration, and the width of its layers."""
    whole = Shape.whole(config, tuple(range(int(config.num_hidden_layers))))
    return {**shape_figures(whole), "hidden": int(config.hidden_size)}


def unprepared_summary(config: Any, status: str) -> dict[str, Any]:
    """The summary of a run that ended before its federation was ready."""
    return {
        "status": status,
        "task": config.task,
        "seed": config.seed,
        "rounds": 0,
        "clients": config.data.clients,
        "versions": _versions(),
    }


def _cost(history: History, seconds: float) -> dict[str, Any]:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1024 if sys.platform != "darwin" else 1024**2)
    return {
        "wall_s": seconds,
        "train_s": history.train_seconds,
        "examples": history.examples,
        "examples_per_s": history.examples / history.train_seconds if history.train_seconds else 0.0,
        "bytes_up": history.bytes_up,
        "bytes_down": history.bytes_down,
        "peak_rss_mb": peak,
    }


def _versions() -> dict[str, str]:
    return {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}}
