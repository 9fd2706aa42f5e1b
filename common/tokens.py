"""Tokenised text as flat arrays that processes map into memory instead of loading."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

CHUNK = 4096
PARTS = ("ids", "offsets", "starts", "second")  # the arrays, in the order of the fields


@dataclass(frozen=True)
class Tokens:
    """n tokenised examples.

    Attributes:
        ids: (total,) int32 word-piece numbers, examples one after the other.
        offsets: (n + 1,) int64 where each example starts.
        starts: (total,) bool where a word begins; special pieces are words of their own.
        second: (n,) int32 position at which token type 1 starts (the length when there is none).
        pad: the padding piece's number.
        typed: whether the model takes ``token_type_ids``.
    """

    ids: NDArray[np.int32]
    offsets: NDArray[np.int64]
    starts: NDArray[np.bool_]
    second: NDArray[np.int32]
    pad: int
    typed: bool

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def lengths(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        return np.asarray(self.offsets[rows + 1] - self.offsets[rows])

    def batch(self, rows: NDArray[np.int64], length: int = 0) -> dict[str, torch.Tensor]:
        """The model's inputs for some rows, each (len(rows), length) int64, padded at the right.

        ``length`` 0 means the longest of the rows.
        """
        lengths = self.lengths(rows)
        width = length or int(lengths.max())
        place = np.arange(width)
        real = place < lengths[:, None]
        flat = np.where(real, self.offsets[rows][:, None] + place, 0)
        inputs = {
            "input_ids": np.where(real, self.ids[flat], self.pad).astype(np.int64),
            "attention_mask": real.astype(np.int64),
        }
        if self.typed:
            inputs["token_type_ids"] = (real & (place >= self.second[rows][:, None])).astype(np.int64)
        return {name: torch.from_numpy(array) for name, array in inputs.items()}

    def vocabulary(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """Ascending numbers of the pieces in some rows, and of all up to the padding's, which keeps its number."""
        spans = [self.ids[self.offsets[row] : self.offsets[row + 1]] for row in rows]
        return np.unique(np.concatenate([np.arange(self.pad + 1), *spans])).astype(np.int64)

    def words(self, rows: NDArray[np.int64]) -> list[NDArray[np.int64]]:
        """For each row the positions at which its words begin."""
        spans = [self.starts[self.offsets[row] : self.offsets[row + 1]] for row in rows]
        return [np.flatnonzero(span) for span in spans]

    def save(self, folder: Path, name: str) -> None:
        for part in PARTS:
            np.save(folder / f"{name}.{part}.npy", getattr(self, part))

    @classmethod
    def open(cls, folder: Path, name: str, pad: int, typed: bool) -> "Tokens":
        """Map saved arrays into memory; nothing is read until it is used."""
        ids, offsets, starts, second = (np.load(folder / f"{name}.{part}.npy", mmap_mode="r") for part in PARTS)
        return cls(ids, offsets, starts, second, pad, typed)


def tokenize(texts: tuple[list[str], ...], tokenizer: Any, max_length: int, advance: Callable[[int], None]) -> Tokens:
    """Tokenise single texts or pairs, truncated to ``max_length`` pieces (the longer of a pair first)."""
    typed = "token_type_ids" in tokenizer.model_input_names
    ids: list[NDArray[np.int32]] = []
    starts: list[NDArray[np.bool_]] = []
    lengths: list[int] = []
    second: list[int] = []
    for start in range(0, len(texts[0]), CHUNK):
        columns = [column[start : start + CHUNK] for column in texts]
        encoded = tokenizer(*columns, truncation=True, max_length=max_length, return_token_type_ids=typed)
        for row, pieces in enumerate(encoded["input_ids"]):
            ids.append(np.asarray(pieces, dtype=np.int32))
            starts.append(_starts(encoded.encodings[row].word_ids, encoded.encodings[row].sequence_ids))
            lengths.append(len(pieces))
            types = encoded["token_type_ids"][row] if typed else []
            second.append(types.index(1) if 1 in types else len(pieces))
        advance(len(columns[0]))
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    return Tokens(
        np.concatenate(ids), offsets, np.concatenate(starts), np.asarray(second, dtype=np.int32),
        tokenizer.pad_token_id, typed,
    )  # fmt: skip


def _starts(words: list[int | None], sequences: list[int | None]) -> NDArray[np.bool_]:
    """(pieces,) whether each piece is the first of its word; special ones, of no word, are."""
    whole = list(zip(words, sequences, strict=True))
    return np.asarray(
        [word is None or place == 0 or whole[place - 1] != whole[place] for place, (word, _) in enumerate(whole)]
    )
