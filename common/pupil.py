"""A student that is ready to be trained: its slim form in the cache, with the tokenizer that it reads with."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from common.dataset import FederatedDataset, in_pieces_of
from common.hashing import hash_tensors
from common.progress import Progress, Silent
from common.slim import Shape, load_slim, save_slim
from common.tokens import Tokens

EXITS = "exits.safetensors"  # in the folder of a prepared student


@dataclass(frozen=True)
class Pupil:
    """A prepared student.

    Attributes:
        folder: its slim form and its tokenizer, under the cache's ``students``.
        hash: of its weights.
        model: the same as a module.
        data: the federation's data in its own pieces.
        taught: the train table in the teacher's pieces, where those are others.
    """

    folder: Path
    hash: str
    model: Any
    shape: Shape
    data: FederatedDataset
    taught: Tokens | None

    @property
    def key(self) -> str:
        return self.folder.name


def save_pupil(model: Any, shape: Shape, folder: Path, *, own_pieces: bool) -> None:
    """Write a student beside its tokenizer."""
    save_slim(model, shape, folder)
    note = {"hash": hash_tensors(model.state_dict()), "own_pieces": own_pieces}
    (folder / "fedistill.json").write_text(json.dumps(note))


def open_pupil(folder: Path, data: FederatedDataset, cache: Path, progress: Progress | None = None) -> Pupil:
    """Open a prepared student and the data as it reads them.

    Raises:
        FileNotFoundError: it is not in this machine's cache.
        ValueError: its weights are not those that were prepared.
    """
    note = json.loads((folder / "fedistill.json").read_text())
    model, shape = load_slim(folder)
    if hash_tensors(model.state_dict()) != note["hash"]:
        raise ValueError("the student's weights are not those that were prepared")
    if not note["own_pieces"]:
        return Pupil(folder, note["hash"], model, shape, data, None)
    own = in_pieces_of(folder, data, cache, progress or Silent())
    return Pupil(folder, note["hash"], model, shape, own, data.train.tokens)


def load_exits(pupil: Pupil) -> dict[str, Tensor]:
    """Those that were warmed up with a prepared student; else none: they begin as copies of its own."""
    return load_file(pupil.folder / EXITS) if (pupil.folder / EXITS).exists() else {}
