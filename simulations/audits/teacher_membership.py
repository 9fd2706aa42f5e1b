"""The teacher as a target: it has seen public text alone, so of private text there is nothing to find.

The loss threshold of `simulations.audits.loss_threshold` on the teacher's outputs. ``private``: members of the clients'
halves against the others, at chance because no private text has reached the teacher. ``public``: what it was fine-tuned
on against private text, which is not.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from common.corpus import labelled
from common.progress import Progress
from simulations.audits.attack import Row
from simulations.audits.halves import draw_halves
from simulations.audits.membership import log_confidence, membership_row
from simulations.laboratory import Laboratory


@dataclass(frozen=True)
class TeacherMembership:
    name: ClassVar[str] = "teacher"
    paper: ClassVar[str] = "https://arxiv.org/abs/1709.01604"

    def run(self, lab: Laboratory, progress: Progress) -> Iterator[Row]:
        halves = draw_halves(lab.data, 1, 0, lab.config.seed)
        labels = np.asarray(lab.data.train.labels)
        public = np.asarray(lab.data.public)
        public = public[labelled(labels[public])]
        rows = np.concatenate([halves.rows, public])
        scores = log_confidence(lab.worker.teacher_logits(rows)[None], labels[rows])
        cut = len(halves.rows)
        yield membership_row(lab, self.name, "private", scores[:, :cut], halves.inside)
        yield membership_row(lab, self.name, "public", scores, (np.arange(len(rows)) >= cut)[None])
