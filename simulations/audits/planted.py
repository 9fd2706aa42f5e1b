"""Examples that an attack plants: more rows behind the training data of a prepared federation.

A client that is given such a row trains on it as on its own; see `simulations.laboratory.Apprentice`.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from common.corpus import Table
from common.dataset import FederatedDataset, Split, load_tokenizer
from common.errors import InputError
from common.texts import Texts
from common.tokens import Tokens, tokenize
from simulations.laboratory import Laboratory

Columns = tuple[list[str], ...]  # the texts of some examples, a list for each text column


def plant(lab: Laboratory, texts: Columns, labels: NDArray[np.int64]) -> NDArray[np.int64]:
    """The (n,) rows of n new examples, behind those that are there."""
    worker, federation = lab.worker, lab.federation
    first = len(worker.data.train)
    worker.data = _longer(worker.data, texts, labels, Path(federation.teacher.folder))
    if worker.pupil.taught is None:
        own, taught = worker.data, None
    else:
        own = _longer(worker.pupil.data, texts, labels, worker.pupil.folder)
        taught = worker.data.train.tokens
    worker.pupil = replace(worker.pupil, data=own, taught=taught)
    federation.pupil = replace(federation.pupil, data=own, taught=taught)
    return np.arange(first, len(own.train))


def texts_of(split: Split, rows: NDArray[np.int64]) -> Columns:
    return tuple(column.take(rows) for column in split.texts)


def joined(first: Tokens, second: Tokens) -> Tokens:
    """The examples of both, in memory; of one tokenizer."""
    several = None
    if first.first is not None or second.first is not None:
        starts, more = (np.arange(len(each) + 1) if each.first is None else each.first for each in (first, second))
        several = np.concatenate([starts, more[1:] + starts[-1]])
    return Tokens(
        np.concatenate([first.ids, second.ids]),
        np.concatenate([first.offsets, second.offsets[1:] + first.offsets[-1]]),
        np.concatenate([first.starts, second.starts]),
        np.concatenate([first.second, second.second]),
        first.pad,
        first.typed,
        several,
    )


def _longer(data: FederatedDataset, texts: Columns, labels: NDArray[np.int64], folder: Path) -> FederatedDataset:
    """The data with more rows, cut by the tokenizer in this folder."""
    old = data.train
    tokens = tokenize(
        texts, load_tokenizer(folder), data.max_length, lambda count: None, windows=data.windows, stride=data.stride
    )
    columns = tuple(Texts.of([*column.all(), *new]) for column, new in zip(old.texts, texts, strict=True))
    keys = Table(texts, labels).keys()
    train = Split(
        joined(old.tokens, tokens),
        np.concatenate([old.labels, labels.astype(old.labels.dtype)]),
        np.concatenate([old.keys, keys]),
        columns,
    )
    return replace(data, train=train)


def rarest_word(data: FederatedDataset, tokenizer: Any) -> str:
    """The word that is one piece of a tokenizer and that public text, in these pieces, holds least often.

    Of equally rare ones that with the highest number: vocabularies are mostly sorted by how common a piece is.

    Raises:
        InputError: no piece is a word.
    """
    counts = np.bincount(data.train.tokens.pieces(np.asarray(data.public)), minlength=len(tokenizer))
    for piece in np.lexsort((-np.arange(len(counts)), counts)).tolist():
        word = tokenizer.decode([piece]).strip()
        if len(word) > 1 and word.isascii() and word.isalpha() and piece_of(word, tokenizer) == piece:
            return str(word)
    raise InputError("the student's vocabulary has no whole word to attack with")


def piece_of(word: str, tokenizer: Any) -> int | None:
    """The one piece that a word inside a text is; None: it is several, or unknown."""
    without, read = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in ("a a", f"a {word} a"))
    known = len(read) == len(without) + 1 and read[1] != tokenizer.unk_token_id
    return int(read[1]) if known else None
