"""The teacher's outputs, computed once per example and kept on disk.

A row is found by what the output depends on: the teacher's weights, the tokenizer, the length limit, the
precision (together the ``space``) and the example's content, never its position. SQLite lets several workers
read and add rows at once and survives a kill. Outputs are float32 and computed in fixed shapes
(`common.inference`), so a cold and a warm cache give the same bits.
"""

import socket
import sqlite3
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
from filelock import FileLock
from numpy.typing import NDArray

Compute = Callable[[NDArray[np.int64]], NDArray[np.float32]]
WAIT_SECONDS = 60.0


class TeacherCache:
    """Logits of one teacher on disk.

    Args:
        folder: where the files of all teachers lie.
        space: hash of the teacher and of everything else its outputs depend on.
        width: number of logits per example.
    """

    def __init__(self, folder: Path, space: str, width: int) -> None:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)  # outputs on private text
        self.width = width
        space = f"{space}-{socket.gethostname()}"  # WAL needs memory that all who use the file share
        with FileLock(folder / f"{space}.lock"):  # SQLite does not wait when two processes switch to WAL at once
            self.database = sqlite3.connect(folder / f"{space}.sqlite", timeout=WAIT_SECONDS, isolation_level=None)
            self.database.execute("PRAGMA journal_mode=WAL")
            self.database.execute("PRAGMA synchronous=NORMAL")
            self.database.execute(
                "CREATE TABLE IF NOT EXISTS outputs (example BLOB PRIMARY KEY, logits BLOB NOT NULL) WITHOUT ROWID"
            )

    def outputs(self, keys: NDArray[np.uint8], compute: Compute) -> NDArray[np.float32]:
        """(n, width) logits of the examples with these (n, 16) content keys.

        ``compute(positions)`` gives the logits of the examples at some positions; it is called once, for
        the distinct examples that are not on disk, and what it returns is stored.
        """
        names = [row.tobytes() for row in keys]
        found = self._read(names)
        missing = {name: place for place, name in enumerate(names) if name not in found}
        if missing:
            places = np.asarray(sorted(missing.values()), dtype=np.int64)
            fresh = compute(places)
            added = {names[place]: row.tobytes() for place, row in zip(places, fresh, strict=True)}
            self._write(added)
            found.update(added)
        rows = b"".join(found[name] for name in names)
        return np.frombuffer(rows, dtype=np.float32).reshape(len(names), self.width)

    def _read(self, names: list[bytes]) -> dict[bytes, bytes]:
        found: dict[bytes, bytes] = {}
        for chunk in _chunks(names, 900):
            marks = ",".join("?" * len(chunk))
            query = f"SELECT example, logits FROM outputs WHERE example IN ({marks})"  # noqa: S608 (marks only)
            found.update(row for row in self.database.execute(query, chunk) if len(row[1]) == 4 * self.width)
        return found

    def _write(self, rows: dict[bytes, bytes]) -> None:
        self.database.execute("BEGIN IMMEDIATE")
        try:
            self.database.executemany("INSERT OR REPLACE INTO outputs VALUES (?, ?)", rows.items())
            self.database.execute("COMMIT")
        except BaseException:
            self.database.execute("ROLLBACK")
            raise


def _chunks(names: list[bytes], size: int) -> Iterable[list[bytes]]:
    return (names[start : start + size] for start in range(0, len(names), size))
