"""A column of texts as flat arrays that processes map into memory instead of loading."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Texts:
    """n texts.

    Attributes:
        data: (total,) uint8 their UTF-8 bytes, one after the other.
        offsets: (n + 1,) int64 where each starts.
    """

    data: NDArray[np.uint8]
    offsets: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @classmethod
    def of(cls, texts: Sequence[str]) -> "Texts":
        encoded = [text.encode() for text in texts]
        offsets = np.concatenate([[0], np.cumsum([len(text) for text in encoded])]).astype(np.int64)
        return cls(np.frombuffer(b"".join(encoded), dtype=np.uint8), offsets)

    def take(self, rows: NDArray[np.int64]) -> list[str]:
        spans = zip(self.offsets[rows].tolist(), self.offsets[rows + 1].tolist(), strict=True)
        return [self.data[start:end].tobytes().decode() for start, end in spans]

    def all(self) -> list[str]:
        return self.take(np.arange(len(self)))

    def save(self, folder: Path, name: str) -> None:
        for part in ("data", "offsets"):
            np.save(folder / f"{name}.text-{part}.npy", getattr(self, part))

    @classmethod
    def open(cls, folder: Path, name: str) -> "Texts":
        """Map saved arrays into memory; nothing is read until it is used."""
        return cls(*(np.load(folder / f"{name}.text-{part}.npy", mmap_mode="r") for part in ("data", "offsets")))
