"""What a client keeps on its own disk from one of its rounds to the next, for its owner's eyes alone.

State may be used only if the server has taken what the client sent with it: after a kill, or when a reply was lost, the
newest file on disk can be one that the server never heard of. So there is a file for each round, whole or absent, and
the server says which of a client's answers was the last it took, the base.
"""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import ClassVar

import numpy as np
import safetensors
import safetensors.torch
import torch
from numpy.typing import NDArray

from common.compression import Shapes, Update
from common.hashing import hash_tensors
from common.store import write_atomically

_WHOLE = re.compile(r"round-(\d+)\.safetensors")
_DRAFT = re.compile(r"\.round-(\d+)\.safetensors\..+")  # of `write_atomically`


class MissingState(Exception):
    """What a client needs is not on disk, or not as it was written."""


class RoundFiles:
    """float32 arrays of a run's clients, as ``FOLDER/CLIENT/round-00005.safetensors``.

    Args:
        folder: of one run.
        keep: how many files older than the base stay, for a server that goes back to an older checkpoint.
    """

    what: ClassVar[str] = "state"  # in messages
    label: ClassVar[str] = "state"  # in the file's header
    missing: ClassVar[type[MissingState]] = MissingState

    def __init__(self, folder: Path, keep: int) -> None:
        self.folder = folder
        self.keep = keep

    def load(self, client: int, base: int, shapes: Shapes) -> Update:
        """The arrays, of these shapes, that the client wrote in round ``base``.

        Raises:
            MissingState: there is no file, or it is damaged, of another client or round, or of other shapes.
        """
        path, name = self._path(client, base), f"{self.what} of round {base}"
        if not path.is_file():
            raise self.missing(f"{name} is missing")
        try:
            with safetensors.safe_open(path, framework="pt") as file:
                given = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
        except Exception as error:  # a damaged header can raise anything
            raise self.missing(f"{name} is damaged ({type(error).__name__})") from None
        if given != self._label(client, base, tensors):
            raise self.missing(f"{name} is damaged: its hash is another")
        wanted = {part: (tuple(shape), torch.float32) for part, shape in shapes.items()}
        if {part: (tuple(tensor.shape), tensor.dtype) for part, tensor in tensors.items()} != wanted:
            raise self.missing(f"{name} is of another student")
        return {part: tensors[part].numpy() for part in shapes}

    def save(self, client: int, round_number: int, base: int, arrays: Mapping[str, NDArray[np.float32]]) -> None:
        """Write the arrays of a round, whole or not at all, then drop what no server can ask for any more.

        ``base`` itself and everything newer stay; of what is older, the newest ``keep`` rounds.

        Raises:
            ValueError: the round is not after its base, whose file it would replace.
        """
        if round_number <= base:
            raise ValueError(f"the {self.label} of round {round_number} cannot come after that of round {base}")
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        tensors = {name: torch.from_numpy(np.require(array, np.float32, ["C", "W"])) for name, array in arrays.items()}
        data = safetensors.torch.save(tensors, metadata=self._label(client, round_number, tensors))
        write_atomically(self._path(client, round_number), data)
        self._prune(client, round_number, base)

    def _path(self, client: int, round_number: int) -> Path:
        return self.folder / str(client) / f"round-{round_number:05d}.safetensors"

    def _label(self, client: int, round_number: int, tensors: Mapping[str, torch.Tensor]) -> dict[str, str]:
        # one entry: safetensors writes several in any order, and equal arrays shall be equal files
        return {self.label: f"client {client}, round {round_number}, sha256 {hash_tensors(tensors)}"}

    def _prune(self, client: int, round_number: int, base: int) -> None:
        paths = list((self.folder / str(client)).iterdir())
        older = sorted((number, path) for number, path in _numbered(paths, _WHOLE) if number < base)
        # a draft of an earlier round is by a process that was killed while it wrote
        drafts = [path for number, path in _numbered(paths, _DRAFT) if number < round_number]
        for path in [*drafts, *(path for _, path in older[: max(len(older) - self.keep, 0)])]:
            path.unlink(missing_ok=True)


def _numbered(paths: Iterable[Path], pattern: re.Pattern[str]) -> list[tuple[int, Path]]:
    return [(int(match[1]), path) for path in paths if (match := pattern.fullmatch(path.name))]
