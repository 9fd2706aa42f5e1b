"""Checkpoints: everything a run needs to continue as if it had never stopped.

One folder per round, ``round-00003/``, with the student's trained arrays, the server optimiser's memory, the
run's state as JSON and the SHA-256 of each (``sha256sum -c SHA256SUMS`` checks them). The folder is filled under
another name, synced to disk and renamed: a kill or a full disk leaves the one before untouched.
"""

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
from numpy.typing import NDArray

from common.errors import InputError
from common.hashing import hash_file
from common.store import sync_folder

SUMS = "SHA256SUMS"


@dataclass(frozen=True)
class Checkpoint:
    """A run after a round.

    Attributes:
        weights: the student's trained arrays, float32.
        optimizer: the server rule's memory, float64; may be empty.
        state: what else the run knows, as JSON can hold it.
    """

    round: int
    weights: dict[str, NDArray[np.float32]]
    optimizer: dict[str, NDArray[np.float64]]
    state: dict[str, Any]


class Damaged(Exception):
    """A checkpoint is not what was written; the message names the file."""


def checkpoint_folder(folder: Path, round_number: int) -> Path:
    return folder / f"round-{round_number:05d}"


def save_checkpoint(folder: Path, checkpoint: Checkpoint, keep: int) -> None:
    """Write a checkpoint and forget all but the last ``keep``.

    Raises:
        OSError: it could not be written whole; the earlier ones are as they were.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for abandoned in folder.glob(".round-*"):  # by a run that was killed while it wrote
        shutil.rmtree(abandoned, ignore_errors=True)
    target = checkpoint_folder(folder, checkpoint.round)
    draft = Path(tempfile.mkdtemp(dir=folder, prefix=f".{target.name}."))
    try:
        _write(draft / "student.safetensors", safetensors.numpy.save(checkpoint.weights))
        _write(draft / "optimizer.safetensors", safetensors.numpy.save(checkpoint.optimizer))
        _write(draft / "state.json", json.dumps({"round": checkpoint.round, **checkpoint.state}).encode())
        sums = [f"{hash_file(path)}  {path.name}\n" for path in sorted(draft.iterdir())]
        _write(draft / SUMS, "".join(sums).encode())
        draft.chmod(0o755)
        sync_folder(draft)
        if target.exists():  # a damaged one, whose round was done again
            shutil.rmtree(target)
        draft.rename(target)
        sync_folder(folder)
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        raise
    found = checkpoints(folder)
    place = found.index(target) + 1
    for old in found[place:] + found[: max(place - keep, 0)]:  # later ones are damaged: the run went on from before
        shutil.rmtree(old)


def checkpoints(folder: Path) -> list[Path]:
    """Checkpoint folders, oldest round first; by number, because round-100000 sorts before round-99999."""
    found = [path for path in folder.glob("round-*") if path.name[6:].isdecimal()]
    return sorted(found, key=lambda path: int(path.name[6:]))


def load_latest(folder: Path, shapes: Mapping[str, tuple[int, ...]], warn: Callable[[str], None]) -> Checkpoint | None:
    """The last whole checkpoint, or None when there is none; ``warn`` hears of each damaged one.

    Raises:
        InputError: as `load_checkpoint`.
    """
    for path in reversed(checkpoints(folder)):
        try:
            return load_checkpoint(path, shapes)
        except Damaged as error:
            warn(f"{path}: damaged and left out: {error}")
    return None


def load_checkpoint(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> Checkpoint:
    """Read and check one checkpoint; ``shapes`` are those the student's arrays must have.

    Raises:
        Damaged: a file is not there or not what was written.
        InputError: it is whole, and of a student of another shape.
    """
    try:
        lines = [line.split("  ", 1) for line in (path / SUMS).read_text().splitlines()]
        written = {name: digest for digest, name in lines}
        for name in ("student.safetensors", "optimizer.safetensors", "state.json"):
            if hash_file(path / name) != written.get(name):
                raise Damaged(f"{name} is not what was written")
        weights = safetensors.numpy.load_file(path / "student.safetensors")
        optimizer = safetensors.numpy.load_file(path / "optimizer.safetensors")
        state = json.loads((path / "state.json").read_text())
    except OSError as error:
        raise Damaged(f"{Path(error.filename or path).name}: {error.strerror}") from None
    except ValueError:
        raise Damaged(f"{SUMS} is not readable") from None
    if {name: array.shape for name, array in weights.items()} != dict(shapes):
        raise InputError(
            f"{path}: whole, and of a student of another shape: the data, the teacher or student.model of this run "
            "changed since it began; put it back, or start a new run"
        )
    return Checkpoint(int(state["round"]), weights, optimizer, state)


def _write(path: Path, data: bytes) -> None:
    try:
        with path.open("wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
    except OSError as error:  # of a full disk it names no file
        raise OSError(error.errno, error.strerror, str(path)) from None
