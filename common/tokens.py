"""Tokenised text as flat arrays that processes map into memory instead of loading.

A text that is longer than the model may be cut into several windows. Each goes through the model by itself, and the
logits of the example are the mean of its windows' logits, wherever logits are made: in training, whose loss is one per
example with gradients through the mean, in the teacher's outputs and in scoring.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from common.errors import InputError

CHUNK = 4096
PARTS = ("ids", "offsets", "starts", "second")  # the arrays, in the order of the fields
MORE = ("first", "cut")  # and these, where there are any


@dataclass(frozen=True)
class Tokens:
    """n tokenised examples of w windows in all.

    Attributes:
        ids: (total,) int32 word-piece numbers, windows one after the other, those of an example together.
        offsets: (w + 1,) int64 where each window starts.
        starts: (total,) bool where a word begins; special pieces are words of their own.
        second: (w,) int32 position at which the second text starts, and token type 1 with it (the length when there is
            none).
        pad: the padding piece's number.
        typed: whether the model takes ``token_type_ids``.
        first: (n + 1,) int64 the first window of each example; None: each has one.
        cut: (n,) bool whether an example is longer than its windows, and its end not here; None: nobody has looked.
    """

    ids: NDArray[np.int32]
    offsets: NDArray[np.int64]
    starts: NDArray[np.bool_]
    second: NDArray[np.int32]
    pad: int
    typed: bool
    first: NDArray[np.int64] | None = None
    cut: NDArray[np.bool_] | None = None

    def __len__(self) -> int:
        return len(self.offsets if self.first is None else self.first) - 1

    def windows(self, rows: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The windows of some rows, one row after the other, and (len(rows),) how many each has."""
        if self.first is None:
            return rows, np.ones(len(rows), dtype=np.int64)
        first, counts = self.first[rows], self.first[rows + 1] - self.first[rows]
        before = np.cumsum(counts) - counts
        return np.repeat(first - before, counts) + np.arange(counts.sum()), np.asarray(counts)

    def widths(self, windows: NDArray[np.int64]) -> NDArray[np.int64]:
        """Word pieces of each window."""
        return np.asarray(self.offsets[windows + 1] - self.offsets[windows])

    def lengths(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """Word pieces that each row takes in a batch: its windows, all as wide as the widest."""
        windows, counts = self.windows(rows)
        widths = self.widths(windows)
        if self.first is None or not len(rows):
            return widths
        return np.asarray(counts * np.maximum.reduceat(widths, np.cumsum(counts) - counts))

    def batch(self, rows: NDArray[np.int64], length: int = 0) -> dict[str, torch.Tensor]:
        """The model's inputs for all windows of some rows, see `window_batch`; `pooling` makes rows of its logits."""
        return self.window_batch(self.windows(rows)[0], length)

    def pooling(self, rows: NDArray[np.int64]) -> torch.Tensor | None:
        """(len(rows), windows) float32 weights of the mean over each row's windows; None: each has one."""
        counts = self.windows(rows)[1]
        if counts.sum() == len(rows):
            return None
        owners = np.repeat(np.arange(len(rows)), counts)
        return torch.from_numpy((owners == np.arange(len(rows))[:, None]) / counts[:, None]).float()

    def window_batch(self, windows: NDArray[np.int64], length: int = 0) -> dict[str, torch.Tensor]:
        """The model's inputs for some windows, each (len(windows), length) int64, padded at the right.

        ``length`` 0 means the longest of the windows.
        """
        lengths = self.widths(windows)
        width = length or max(int(lengths.max()), 1)  # a model without special pieces finds none in an empty text
        place = np.arange(width)
        real = place < lengths[:, None]
        flat = np.where(real, self.offsets[windows][:, None] + place, 0)
        inputs = {
            "input_ids": np.where(real, self.ids[flat], self.pad).astype(np.int64),
            "attention_mask": real.astype(np.int64),
        }
        if self.typed:
            inputs["token_type_ids"] = (real & (place >= self.second[windows][:, None])).astype(np.int64)
        return {name: torch.from_numpy(array) for name, array in inputs.items()}

    def vocabulary(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """Ascending numbers of the pieces in some rows, and of all up to the padding's, which keeps its number."""
        return np.unique(np.concatenate([np.arange(self.pad + 1), self.pieces(rows)])).astype(np.int64)

    def pieces(self, rows: NDArray[np.int64]) -> NDArray[np.int32]:
        """The word pieces of some rows, one after the other; what neighbouring windows share is there in each."""
        windows = self.windows(rows)[0]
        spans = [self.ids[self.offsets[window] : self.offsets[window + 1]] for window in windows]
        return np.concatenate([np.zeros(0, dtype=np.int32), *spans])

    def words(self, rows: NDArray[np.int64]) -> list[tuple[NDArray[np.int64], ...]]:
        """For each row, of one window, the positions at which words begin: of its first text and of its second."""
        found = []
        for row in rows:
            places = np.flatnonzero(self.starts[self.offsets[row] : self.offsets[row + 1]])
            found.append(tuple(np.split(places, [np.searchsorted(places, self.second[row])])))
        return found

    def take(self, rows: NDArray[np.int64]) -> "Tokens":
        """These rows alone, in memory."""
        windows, counts = self.windows(rows)
        widths = self.widths(windows)
        offsets = np.concatenate([[0], np.cumsum(widths)]).astype(np.int64)
        flat = np.repeat(self.offsets[windows] - offsets[:-1], widths) + np.arange(offsets[-1])
        first = None if self.first is None else np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
        cut = None if self.cut is None else self.cut[rows]
        ids, starts, second = self.ids[flat], self.starts[flat], self.second[windows]
        return Tokens(ids, offsets, starts, second, self.pad, self.typed, first, cut)

    def owners(self) -> NDArray[np.int64]:
        """(total,) the example of each word piece."""
        windows, counts = self.windows(np.arange(len(self)))
        return np.repeat(np.repeat(np.arange(len(self)), counts), self.widths(windows))

    def save(self, folder: Path, name: str) -> None:
        for part in (*PARTS, *MORE):
            if getattr(self, part) is not None:
                np.save(folder / f"{name}.{part}.npy", getattr(self, part))

    @classmethod
    def open(cls, folder: Path, name: str, pad: int, typed: bool) -> "Tokens":
        """Map saved arrays into memory; nothing is read until it is used."""
        ids, offsets, starts, second = (np.load(folder / f"{name}.{part}.npy", mmap_mode="r") for part in PARTS)
        files = [folder / f"{name}.{part}.npy" for part in MORE]
        first, cut = (np.load(file, mmap_mode="r") if file.is_file() else None for file in files)
        return cls(ids, offsets, starts, second, pad, typed, first, cut)


def check_stride(tokenizer: Any, max_length: int, windows: int, stride: int) -> None:
    """Raise `InputError` when neighbouring windows would share all they can hold."""
    room = max_length - tokenizer.num_special_tokens_to_add(pair=False)
    if windows > 1 and stride >= room:
        raise InputError(
            f"data.stride = {stride}: a window of data.max-length = {max_length} has room for {room} pieces of text; "
            "give less than that"
        )


def tokenize(
    texts: tuple[list[str], ...],
    tokenizer: Any,
    max_length: int,
    advance: Callable[[int], None],
    *,
    windows: int = 1,
    stride: int = 0,
) -> Tokens:
    """Tokenise single texts or pairs, truncated to ``max_length`` pieces (the longer of a pair first).

    Of a single text the first ``windows`` windows of that length are kept; neighbours share ``stride`` pieces. What is
    longer is marked in ``cut``.
    """
    typed = "token_type_ids" in tokenizer.model_input_names
    ids: list[NDArray[np.int32]] = []
    starts: list[NDArray[np.bool_]] = []
    lengths: list[int] = []
    second: list[int] = []
    counts: list[int] = []
    cut: list[bool] = []
    more = {"return_overflowing_tokens": True, "stride": stride} if windows > 1 else {}
    for start in range(0, len(texts[0]), CHUNK):
        columns = [column[start : start + CHUNK] for column in texts]
        encoded = tokenizer(*columns, truncation=True, max_length=max_length, return_token_type_ids=typed, **more)
        rows = encoded["overflow_to_sample_mapping"] if more else list(range(len(columns[0])))
        kept = _first_windows(rows, windows)
        counts += np.bincount(np.asarray(rows)[kept]).tolist()
        # an example's first window has what is behind it, to its end
        cut += [len(encoded.encodings[place].overflowing) >= windows for place in _first_windows(rows, 1)]
        for row in kept:
            pieces = encoded["input_ids"][row]
            ids.append(np.asarray(pieces, dtype=np.int32))
            starts.append(_starts(encoded.encodings[row].word_ids, encoded.encodings[row].sequence_ids))
            lengths.append(len(pieces))
            texts_of = encoded["token_type_ids"][row] if typed else encoded.encodings[row].sequence_ids
            second.append(texts_of.index(1) if 1 in texts_of else len(pieces))
        advance(len(columns[0]))
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    first = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64) if any(count > 1 for count in counts) else None
    return Tokens(
        np.concatenate(ids), offsets, np.concatenate(starts), np.asarray(second, dtype=np.int32),
        tokenizer.pad_token_id, typed, first, np.asarray(cut, dtype=np.bool_),
    )  # fmt: skip


def _first_windows(owners: list[int], most: int) -> list[int]:
    """Which windows are kept, from the example that each is of: of every example the first ones."""
    return [place for place, owner in enumerate(owners) if place < most or owners[place - most] != owner]


def _starts(words: list[int | None], sequences: list[int | None]) -> NDArray[np.bool_]:
    """(pieces,) whether each piece is the first of its word; special ones, of no word, are."""
    whole = list(zip(words, sequences, strict=True))
    return np.asarray(
        [word is None or place == 0 or whole[place - 1] != whole[place] for place, (word, _) in enumerate(whole)]
    )
