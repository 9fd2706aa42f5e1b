"""What a client's examples have spent of their privacy: a file on its own disk, written before anything is sent.

    LEDGER/ledger.jsonl    a line for each round of training, in the order they were begun
    LEDGER/HASH.npy        content keys of the examples that a line with this hash trained on
    LEDGER/last            hash of the last line

An example has spent what all lines together have whose data it was among, whatever rounds, runs and servers they were
of (heterogeneous composition, `common.accounting.spent`); a client, what the example has that has spent most. So a
data file that has grown, or is cut in another way, is no new budget. A line is on disk before the training that it is
about begins: what was killed in between counts as spent. Each line holds a hash of itself and all before it, and a
ledger that does not fit its hashes is never written to or begun anew.
"""

import hashlib
import io
import json
import math
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from filelock import FileLock
from numpy.typing import NDArray

from common.accounting import Steps, spent
from common.store import draft_of, sync_folder, write_atomically

NAME, LAST = "ledger.jsonl", "last"
BUDGET = "its privacy budget is spent"
ROUNDING = 1e-6  # relative: what is calibrated to a budget may reach it


class Declined(Exception):
    """A client will not train; the reason is safe to tell."""


class Spent(NamedTuple):
    """Epsilon of a client's examples: in one run, and ever."""

    run: float
    ever: float


@dataclass(frozen=True)
class Entry:
    """A line of a ledger.

    Attributes:
        time: when it was written, UTC.
        run, round: of what.
        data: hash of the content keys of the examples.
        noise, rate, steps: see `common.accounting.Steps`.
    """

    time: str
    run: str
    round: int
    data: str
    noise: float
    rate: float
    steps: int

    @property
    def table(self) -> Steps:
        return self.noise, self.rate, self.steps

    def line(self, before: str) -> str:
        """As it is written behind the line with this hash."""
        body = json.dumps(self.__dict__, sort_keys=True)
        return json.dumps({**self.__dict__, "hash": _chained(before, body)}, sort_keys=True) + "\n"


class Ledger:
    """The ledger of some examples.

    Args:
        folder: its own; made when first written to.
        keys: (n, 16) uint8 content keys of the examples, one of which is one row; texts that are equal share theirs.
    """

    def __init__(self, folder: Path, keys: NDArray[np.uint8]) -> None:
        self.folder = folder
        self.keys = np.unique(np.asarray(keys), axis=0)
        self.data = data_hash(keys)

    def claim(self, run: str, number: int, steps: Steps, *, limit: float, delta: float, accountant: str) -> Spent:
        """Write down what a round is about to spend; when this returns, it is on disk.

        Args:
            limit: epsilon that the examples may spend in all their life.

        Returns:
            What is spent when the round is over.

        Raises:
            Declined: that would be more than the limit, or the ledger is damaged; nothing is written.
        """
        self.folder.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with FileLock(f"{self.folder}.lock"):
            self._begin()
            entries, last = self._read()
            now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
            noise, rate, count = steps
            entry = Entry(now, run, number, self.data, float(noise), float(rate), count)
            after = self._spent([*entries, entry], run, delta, accountant)
            if after.ever > limit * (1.0 + ROUNDING):
                before = self._spent(entries, run, delta, accountant).ever
                raise Declined(
                    f"{BUDGET}: epsilon is {before:.4g}, this round would make it {after.ever:.4g}, "
                    f"and its limit is {limit:g}"
                )
            self._append(entry, last)
        return after

    def knows_any(self) -> bool:
        """Whether any of these examples was ever trained on. Raises `Declined` when the ledger is damaged."""
        if not self.folder.exists():
            return False
        with FileLock(f"{self.folder}.lock"):
            entries, _ = self._read()
            return any(self._among(name).any() for name in {entry.data for entry in entries})

    def _spent(self, entries: Sequence[Entry], run: str, delta: float, accountant: str) -> Spent:
        held = {name: self._among(name) for name in dict.fromkeys(entry.data for entry in entries)}
        patterns = np.unique(np.stack(list(held.values()), axis=1), axis=0) if held else np.zeros((0, 0), dtype=bool)
        most = Spent(0.0, 0.0)
        for pattern in patterns:
            mine = {name for name, inside in zip(held, pattern, strict=True) if inside}
            ever = [entry.table for entry in entries if entry.data in mine]
            here = [entry.table for entry in entries if entry.data in mine and entry.run == run]
            found = (spent(table, delta=delta, accountant=accountant) for table in (here, ever))
            most = Spent(*map(max, most, found))
        return most

    def _among(self, name: str) -> NDArray[np.bool_]:
        """Of each of our keys whether it is among those that a hash stands for."""
        if name == self.data:
            return np.ones(len(self.keys), dtype=bool)
        try:
            others = np.load(self.folder / f"{name}.npy", allow_pickle=False).reshape(-1, 16)
        except (OSError, ValueError, EOFError):
            others = np.zeros((0, 16), dtype=np.uint8)
        if others.dtype != np.uint8 or data_hash(others) != name:
            raise Declined("its privacy ledger is damaged: what it trained on is not there as it was written")
        return np.isin(_words(self.keys), _words(others))

    def _begin(self) -> None:
        if not self.folder.exists():
            with draft_of(self.folder) as draft:
                write_atomically(draft / NAME, b"")
                write_atomically(draft / LAST, b"")
                sync_folder(draft)
            sync_folder(self.folder.parent)

    def _read(self) -> tuple[list[Entry], str]:
        """All lines, and the hash of the last."""
        try:
            lines = (self.folder / NAME).read_bytes().decode().splitlines(keepends=True)
            promised = (self.folder / LAST).read_bytes().decode()
        except (OSError, UnicodeDecodeError):
            raise Declined("its privacy ledger is damaged: it cannot be read") from None
        entries: list[Entry] = []
        last = before = ""
        for number, line in enumerate(lines, start=1):
            try:
                told = json.loads(line)
                before, last = last, told.pop("hash")
                entry = Entry(**told)
                whole = line == entry.line(before) and _possible(entry)
            except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
                whole = False
            if not whole:
                raise Declined(f"its privacy ledger is damaged: line {number} is not as it was written")
            entries.append(entry)
        if promised not in (last, before):  # one line may have been written and its hash not
            raise Declined("its privacy ledger is damaged: lines are missing at its end")
        return entries, last

    def _append(self, entry: Entry, last: str) -> None:
        target = self.folder / f"{self.data}.npy"
        if not target.exists():
            stream = io.BytesIO()
            np.save(stream, self.keys, allow_pickle=False)
            write_atomically(target, stream.getvalue())
        line = entry.line(last)
        _write_through(self.folder / NAME, line.encode())
        write_atomically(self.folder / LAST, json.loads(line)["hash"].encode())
        sync_folder(self.folder)


def data_hash(keys: NDArray[np.uint8]) -> str:
    """The name of a set of examples."""
    return hashlib.sha256(np.unique(np.asarray(keys), axis=0).tobytes()).hexdigest()


def _chained(before: str, body: str) -> str:
    return hashlib.sha256(f"{before}|{body}".encode()).hexdigest()


def _possible(entry: Entry) -> bool:
    """Whether nothing but a mechanism that can be composed is told of."""
    numbers = all(type(value) in (int, float) and math.isfinite(value) for value in (entry.noise, entry.rate))
    return numbers and entry.noise >= 0 and 0 <= entry.rate <= 1 and type(entry.steps) is int and entry.steps >= 0


def _words(keys: NDArray[np.uint8]) -> NDArray[Any]:
    """(n,) the keys as one value each."""
    return np.ascontiguousarray(keys).view("V16").reshape(-1)


def _write_through(path: Path, data: bytes) -> None:
    """Append, and return when it is on disk; what a full disk leaves of it is taken back."""
    handle = os.open(path, os.O_WRONLY | os.O_APPEND)
    try:
        size = os.fstat(handle).st_size
        try:
            if os.write(handle, data) != len(data):
                raise OSError("the disk is full")
            os.fsync(handle)
        except OSError:
            os.ftruncate(handle, size)
            raise
    finally:
        os.close(handle)
