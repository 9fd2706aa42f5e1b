"""Error feedback: what a compressed update left out is added to the client's next one.

With C a lossy compression, u_t the update of round t and e_t the residual:

    sent_t = C(u_t + e_t),    e_(t+1) = u_t + e_t - sent_t

so that the sum of what was sent is the sum of the updates but for the last residual (Seide et al. 2014,
https://www.isca-archive.org/interspeech_2014/seide14_interspeech.html; EF-SGD, Karimireddy et al. 2019,
https://arxiv.org/abs/1901.09847). A residual is as private as an update and never leaves the client.

A residual may be used only if the update it was left by is in the global model: after a kill, or when a reply was
lost, the newest file on disk can be one that the server never saw. So there is a file for each round, and the server
says which of a client's updates was the last it took, the base.
"""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
import safetensors
import safetensors.torch
import torch
from numpy.typing import NDArray

from common.compression import Parts, Shapes, Update, Wire, compress, decompress
from common.hashing import hash_tensors
from common.store import write_atomically

_WHOLE = re.compile(r"round-(\d+)\.safetensors")
_DRAFT = re.compile(r"\.round-(\d+)\.safetensors\..+")  # of `write_atomically`


class MissingFeedback(Exception):
    """The residual that a client needs is not on disk, or not as it was written."""


class ErrorFeedback:
    """The residuals of a run's clients, as ``FOLDER/CLIENT/round-00005.safetensors``, for their owner's eyes alone.

    Args:
        folder: of one run.
        keep: how many residuals older than the base stay, for a server that goes back to an older checkpoint.
    """

    def __init__(self, folder: Path, keep: int) -> None:
        self.folder = folder
        self.keep = keep

    def load(self, client: int, base: int, shapes: Shapes) -> Update:
        """The residual, float32 arrays of these shapes, that the client's update of round ``base`` left.

        Base 0 says that the server has taken no update of this client: nothing is left out yet, all zeros.

        Raises:
            MissingFeedback: there is no file, or it is damaged, of another client or round, or of other shapes.
        """
        if base == 0:
            return {name: np.zeros(shape, dtype=np.float32) for name, shape in shapes.items()}
        path = self._path(client, base)
        if not path.is_file():
            raise MissingFeedback(f"error feedback of round {base} is missing")
        try:
            with safetensors.safe_open(path, framework="pt") as file:
                given = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
        except Exception as error:  # a damaged header can raise anything
            raise MissingFeedback(f"error feedback of round {base} is damaged ({type(error).__name__})") from None
        if given != _label(client, base, tensors):
            raise MissingFeedback(f"error feedback of round {base} is damaged: its hash is another")
        wanted = {name: (tuple(shape), torch.float32) for name, shape in shapes.items()}
        if {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()} != wanted:
            raise MissingFeedback(f"error feedback of round {base} is of another student")
        return {name: tensors[name].numpy() for name in shapes}

    def save(self, client: int, round_number: int, base: int, residual: Mapping[str, NDArray[np.float32]]) -> None:
        """Write the residual of a round, whole or not at all, then drop what no server can ask for any more.

        ``base`` itself and everything newer stay; of what is older, the newest ``keep`` rounds.

        Raises:
            ValueError: the round is not after its base, whose file it would replace.
        """
        if round_number <= base:
            raise ValueError(f"the residual of round {round_number} cannot come after that of round {base}")
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        tensors = {
            name: torch.from_numpy(np.require(array, np.float32, ["C", "W"])) for name, array in residual.items()
        }
        data = safetensors.torch.save(tensors, metadata=_label(client, round_number, tensors))
        write_atomically(self._path(client, round_number), data)
        self._prune(client, round_number, base)

    def _path(self, client: int, round_number: int) -> Path:
        return self.folder / str(client) / f"round-{round_number:05d}.safetensors"

    def _prune(self, client: int, round_number: int, base: int) -> None:
        paths = list((self.folder / str(client)).iterdir())
        older = sorted((number, path) for number, path in _numbered(paths, _WHOLE) if number < base)
        # a draft of an earlier round is by a process that was killed while it wrote
        drafts = [path for number, path in _numbered(paths, _DRAFT) if number < round_number]
        for path in [*drafts, *(path for _, path in older[: max(len(older) - self.keep, 0)])]:
            path.unlink(missing_ok=True)


def compress_with_feedback(
    update: Mapping[str, NDArray[np.float32]],
    residual: Mapping[str, NDArray[np.float32]],
    wire: Wire,
    rng: np.random.Generator,
) -> tuple[Parts, Update]:
    """What travels of an update and the residual before it, and the residual after it.

    Args:
        update, residual: float32 arrays of the same names and shapes; neither is changed.
        rng: see `common.compression.compress`.

    Raises:
        ValueError: their names or shapes differ.
        NotFinite: their sum cannot be sent.
    """
    shapes = {name: array.shape for name, array in update.items()}
    if {name: array.shape for name, array in residual.items()} != shapes:
        raise ValueError("the residual's names and shapes are not the update's")
    to_send: Update = {name: np.add(update[name], residual[name], dtype=np.float32) for name in update}
    parts = compress(to_send, wire, rng)
    # what the server will make of the parts, not what we meant by them
    sent = decompress(parts, shapes, wire)
    return parts, {name: to_send[name] - sent[name] for name in update}


def _label(client: int, round_number: int, tensors: Mapping[str, torch.Tensor]) -> dict[str, str]:
    # one entry: safetensors writes several in any order, and equal residuals shall be equal files
    return {"residual": f"client {client}, round {round_number}, sha256 {hash_tensors(tensors)}"}


def _numbered(paths: Iterable[Path], pattern: re.Pattern[str]) -> list[tuple[int, Path]]:
    return [(int(match[1]), path) for path in paths if (match := pattern.fullmatch(path.name))]
