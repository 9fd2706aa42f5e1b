"""Membership inference: was this example among those that the student was trained on?

The attacker holds the student and asks it about one example. What all these attacks share is here: the signals they
read from its logits, and the figures of their scores. Each model of `simulations.audits.shadows` is a target once; the
others are its references, the target itself never.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from common.progress import Progress
from common.store import write_atomically
from simulations.audits.attack import Row
from simulations.audits.rates import FPRS, auc, roc, tpr_at
from simulations.audits.shadows import Answers, answers_of
from simulations.laboratory import Laboratory

Floats = NDArray[np.float64]
MEASURE = "TPR at 0.1 % FPR"


@dataclass(frozen=True)
class Membership(ABC):
    """An attack on the models' answers.

    Attributes:
        models: how many are trained, K; the attacks that ask for the same share them.
        examples: about how many examples are under attack; 0: all that the clients train on.
    """

    name: ClassVar[str]
    paper: ClassVar[str]
    models: int = 16
    examples: int = 0

    @abstractmethod
    def scores(self, answers: Answers) -> Mapping[str, Floats]:
        """By variant (K, n), how likely each example is each target's member; NaN: no reference tells."""

    def run(self, lab: Laboratory, progress: Progress) -> Iterator[Row]:
        answers = answers_of(lab, self.models, self.examples, progress)
        for variant, scores in self.scores(answers).items():
            yield membership_row(lab, self.name, variant, scores, answers.inside, models=self.models)


def log_softmax(logits: NDArray[np.float32]) -> Floats:
    """The logarithms of the classes' probabilities, over the last axis."""
    high = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    return np.asarray(high - np.log(np.exp(high).sum(axis=-1, keepdims=True)))


def log_confidence(logits: NDArray[np.float32], labels: NDArray[np.int64]) -> Floats:
    """(K, n) log p_y of (K, n, classes) logits: minus the cross-entropy."""
    return np.asarray(log_softmax(logits)[:, np.arange(len(labels)), labels])


def scaled_confidence(logits: NDArray[np.float32], labels: NDArray[np.int64]) -> Floats:
    """(K, n) log(p_y / (1 - p_y)) = z_y - log sum_(c != y) exp z_c, as it is without rounding in p."""
    own = np.arange(len(labels)), labels
    rest = logits.astype(np.float64)
    asked = rest[:, *own].copy()
    rest[:, *own] = -np.inf
    high = rest.max(axis=-1)
    return np.asarray(asked - high - np.log(np.exp(rest - high[..., None]).sum(axis=-1)))


def references(inside: NDArray[np.bool_], target: int) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """(K, n) each: the models other than the target that hold an example, and those that do not."""
    other = np.arange(len(inside))[:, None] != target
    return inside & other, ~inside & other


def mean_where(values: Floats, chosen: NDArray[np.bool_]) -> Floats:
    """(n,) mean over the chosen models; NaN where there is none."""
    count = chosen.sum(axis=0)
    return np.where(count > 0, np.where(chosen, values, 0.0).sum(axis=0) / np.maximum(count, 1), np.nan)


def membership_row(
    lab: Laboratory, attack: str, variant: str, scores: Floats, inside: NDArray[np.bool_], **settings: int | float
) -> Row:
    """The figures of an attack's scores, all targets together; its ROC goes to the laboratory's folder."""
    known = np.isfinite(scores)
    members, others = scores[known & inside], scores[known & ~inside]
    if not len(members) or not len(others):
        return {"variant": variant, "measure": MEASURE, "success": None, "note": "too few models to compare with"}
    strict = tpr_at(members, others, FPRS[-1])
    row: Row = {
        "variant": variant,
        "measure": MEASURE,
        "success": strict.tpr,
        "low": strict.low,
        "high": strict.high,
        "chance": strict.chance,
        "members": len(members),
        "others": len(others),
        "auc": auc(members, others),
        **settings,
    }
    for asked in FPRS:
        rate = tpr_at(members, others, asked)
        name = f"at-{asked:g}"
        row |= {f"tpr-{name}": rate.tpr, f"low-{name}": rate.low, f"high-{name}": rate.high, f"fpr-{name}": rate.fpr}
    if lab.folder is not None:
        keep_roc(lab, f"{attack} {variant}".strip(), members, others)
    return row


def keep_roc(lab: Laboratory, name: str, members: Floats, others: Floats) -> None:
    """Leave the points at which a ROC turns, for the plot, in roc/NAME.csv."""
    assert lab.folder is not None
    fpr, tpr = roc(members, others)
    turns = np.append(np.diff(fpr) > 0, True)  # of each false-positive rate the highest
    lines = [f"{x:.6g},{y:.6g}" for x, y in zip(fpr[turns], tpr[turns], strict=True)]
    write_atomically(lab.folder / "roc" / f"{name}.csv", ("\n".join(["fpr,tpr", *lines]) + "\n").encode())
