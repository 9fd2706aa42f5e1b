"""What the student that is attacked is worth: its score on public validation text, trained on all examples."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from common.progress import Progress
from simulations.audits.attack import Row
from simulations.laboratory import Laboratory


@dataclass(frozen=True)
class Utility:
    """No attack: what a defence costs."""

    name: ClassVar[str] = "utility"
    paper: ClassVar[str] = ""

    def run(self, lab: Laboratory, progress: Progress) -> Iterator[Row]:
        metric = lab.data.task.headline
        found = lab.scores(lab.train())
        yield {"measure": f"{metric} on validation", "success": found[metric], **found}
