"""What a run has spent: one line for each noised sum, on disk before anything of that sum is let out.

What is released lies in the run's folder before it is let out, and a run that is killed before its next checkpoint
takes it from there. Where it is not there yet, the round is done again, with another cohort and other noise: the
ledger, which is never cut back, counts that as a second release.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
from numpy.typing import NDArray
from safetensors import safe_open

from common.accounting import Steps
from common.errors import InputError
from common.store import sync_folder, write_atomically

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
            sync_folder(self.path.parent)

    def steps(self, what: str) -> list[Steps]:
        """The charges of a kind as `common.accounting` takes them."""
        return [(one.noise, one.rate, 1) for one in self.charges if one.what == what]


class Released:
    """The last noised sum of each kind, on disk.

    Args:
        folder: the run's; None: nothing is kept.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder

    def keep(self, what: str, number: int, arrays: Mapping[str, NDArray[Any]]) -> None:
        """Keep what a round has released instead of what an earlier one has."""
        if self.folder is not None:
            whole = {name: np.asarray(array) for name, array in arrays.items()}
            write_atomically(self._path(what), safetensors.numpy.save(whole, {"round": str(number)}))

    def has(self, what: str, number: int) -> bool:
        """Whether a round's is there."""
        if self.folder is None or not self._path(what).exists():
            return False
        with safe_open(self._path(what), "numpy") as file:
            return bool(file.metadata()["round"] == str(number))

    def find(self, what: str, number: int) -> dict[str, NDArray[Any]] | None:
        """A round's, where it is there."""
        return safetensors.numpy.load_file(self._path(what)) if self.has(what, number) else None

    def _path(self, what: str) -> Path:
        assert self.folder is not None
        return self.folder / f"released-{what}.safetensors"


def _read(path: Path) -> list[Charge]:
    whole, _, torn = path.read_text().rpartition("\n")
    if torn:  # a process was killed while it wrote, so nothing of that sum was released
        with path.open("r+b") as stream:
            stream.truncate(len((whole + "\n").encode()) if whole else 0)
    try:
        return [Charge(**json.loads(line)) for line in whole.splitlines()]
    except (ValueError, TypeError):
        raise InputError(f"{path}: not a ledger of what the run has spent; put it back as it was") from None
