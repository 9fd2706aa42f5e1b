"""What a run has spent: one line for each noised sum, on disk before anything of that sum is let out.

A run that is killed between a release and its next checkpoint does that round again, with another cohort and other
noise: that is a second release, and the ledger, which is never cut back, counts it as one.
"""

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

from common.accounting import Steps
from common.errors import InputError

LEDGER = "privacy.jsonl"  # in a run's folder


@dataclass(frozen=True)
class Charge:
    """One noised sum.

    Attributes:
        round: the round that it belongs to.
        what: update or scores.
        noise: its noise multiplier: deviation of the noise over sensitivity, of all that it releases together.
        rate: the chance of each client to be in it.
    """

    round: int
    what: str
    noise: float
    rate: float


class Ledger:
    """The charges of a run.

    Args:
        path: the file that holds them; None: they are only remembered.

    Raises:
        InputError: the file is not a ledger.
    """

    def __init__(self, path: Path | None = None) -> None:
        self.path = path
        self.charges: list[Charge] = []
        if path is not None and path.exists():
            self.charges = _read(path)

    def charge(self, charge: Charge) -> None:
        """Note a charge; when this returns it is on disk.

        Raises:
            OSError: it is not; nothing may be released.
        """
        self.charges.append(charge)
        if self.path is None:
            return
        new = not self.path.exists()
        with self.path.open("a") as stream:
            stream.write(json.dumps(asdict(charge)) + "\n")
            stream.flush()
            os.fsync(stream.fileno())
        if new:
            _sync(self.path.parent)

    def steps(self, what: str) -> list[Steps]:
        """The charges of a kind as `common.accounting` takes them."""
        return [(one.noise, one.rate, 1) for one in self.charges if one.what == what]


def _read(path: Path) -> list[Charge]:
    whole, _, torn = path.read_text().rpartition("\n")
    if torn:  # a process was killed while it wrote, so nothing of that sum was released
        with path.open("r+b") as stream:
            stream.truncate(len((whole + "\n").encode()) if whole else 0)
    try:
        return [Charge(**json.loads(line)) for line in whole.splitlines()]
    except (ValueError, TypeError):
        raise InputError(f"{path}: not a ledger of what the run has spent; put it back as it was") from None


def _sync(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
