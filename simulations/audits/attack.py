"""What every attack of `fedistill audit` is: a class with options, a paper, and rows of figures.

An attack is a frozen dataclass whose fields are its options, with defaults (``-o NAME.OPTION=VALUE``). To add one:
a module with the class, a line in `simulations.audits`, a test.
"""

from collections.abc import Iterator
from typing import ClassVar, Protocol

from common.progress import Progress
from common.section import Scalar
from simulations.laboratory import Laboratory

EPSILON = "epsilon at least"  # the one measure that is no share
MASKED = "privacy.secure-aggregation = true: no client's own update can be put in or looked at"  # a note

Row = dict[str, Scalar | None]
"""One line of figures, flat. The audit adds ``arm``, ``seed`` and ``attack``. The names that its table reads, all but
``success`` may be left out:

    variant         which of the attack's ways, or what it was measured on; with the attack's name it names a line
    measure         what ``success`` is, in a few words: TPR at 0.1 % FPR; a share, unless it is `EPSILON`
    success         the attack's success; None: it cannot be tried here, and ``note`` says why
    low, high       its 95 % interval
    chance          what guessing without the model reaches: where ``low`` is above it, the attack got through;
                    without ``low`` nobody knows, but for where ``success`` is not above it

Every other name is a figure, or a setting of the attack, that goes to the Parquet file alone.
"""


class Attack(Protocol):
    """An attack with its options.

    Attributes:
        name: in ``--attack``, in rows, in names of files.
        paper: its address.
    """

    name: ClassVar[str]
    paper: ClassVar[str]

    def run(self, lab: Laboratory, progress: Progress) -> Iterator[Row]:
        """Attack the federation of a laboratory.

        What takes long may be kept in ``lab.folder``, so that an audit that was stopped goes on there; it is the
        attack's own (None: nothing is kept).
        """
