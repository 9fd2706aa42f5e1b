"""The loss threshold of Yeom et al. 2018, https://arxiv.org/abs/1709.01604 (Adversary 2).

    score(x, y) = log p_y(x) = - cross-entropy

No reference models. It cannot tell an easy example from a learnt one, so it is bad where it counts, at small
false-positive rates; it is here because everybody compares with it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from simulations.audits.membership import Floats, Membership, log_confidence
from simulations.audits.shadows import Answers


@dataclass(frozen=True)
class LossThreshold(Membership):
    name: ClassVar[str] = "loss"
    paper: ClassVar[str] = "https://arxiv.org/abs/1709.01604"

    def scores(self, answers: Answers) -> Mapping[str, Floats]:
        return {"": log_confidence(answers.logits, answers.labels)}
