"""Reading text: GLUE from a folder or the hub, the program's own corpus, or a user's file.

Everything a user can get wrong in data is found here, before a worker starts. A message names the file, the
column and the row, never the text or the label: both may be private.
"""

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from common.config import Config
from common.errors import InputError
from common.files import READERS, Columns, clean, column, read_columns, read_public
from common.hub import fetch_folder
from common.keys import AT_CLIENTS, DataKeys
from common.seeding import generator
from common.tasks import GLUE, TOY, Task, text_task
from common.toy import toy_corpus

GLUE_HUB = "nyu-mll/glue"
MAX_CLASSES = 256
Cell = tuple[str, ...] | None  # of the label column: class names; None: unlabelled


@dataclass(frozen=True)
class Table:
    """Examples in their original order.

    Attributes:
        texts: one list of strings per text column, all of the same length n.
        labels: (n,) int64 classes with -1 for unlabelled, or float64 scores with NaN for unlabelled; for multi-label
            (n, classes) int8, 1 for a class that the example has, and a row of -1 for unlabelled.
        owners: (n,) values of ``data.partition-by``, or None.
    """

    texts: tuple[list[str], ...]
    labels: NDArray[Any]
    owners: list[str] | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, index: NDArray[np.int64]) -> "Table":
        rows = index.tolist()
        texts = tuple([column[i] for i in rows] for column in self.texts)
        owners = None if self.owners is None else [self.owners[i] for i in rows]
        return Table(texts, self.labels[index], owners)

    def keys(self) -> NDArray[np.uint8]:
        """(n, 16) content hash of each example: the same text has the same key wherever it stands."""
        rows = [
            # with their lengths: ("a b", "c") is not ("a", "b c"), whatever stands between
            hashlib.blake2b("".join(f"{len(text)}:{text}" for text in row).encode(), digest_size=16).digest()
            for row in zip(*self.texts, strict=True)
        ]
        return np.frombuffer(b"".join(rows), dtype=np.uint8).reshape(-1, 16)

    def fingerprint(self) -> str:
        digest = hashlib.sha256(self.keys().tobytes() + np.ascontiguousarray(self.labels).tobytes())
        digest.update("\x1f".join(self.owners or []).encode())
        return digest.hexdigest()


@dataclass(frozen=True)
class Corpus:
    """A task with its tables.

    Attributes:
        train: cut into public and private by the keys; all public where ``data.private`` says whose the rest is.
        validation: public validation tables; empty for a file without one.
        private: the clients' own tables by id, there.
        sizes: or what clients on devices of their own have said of theirs: train and held-out examples by id.
    """

    task: Task
    train: Table
    validation: dict[str, Table]
    private: Mapping[int, Table] = field(default_factory=dict)
    sizes: Mapping[int, tuple[int, int]] = field(default_factory=dict)


def load_corpus(config: Config) -> Corpus:
    """Read and check the text a run needs.

    Raises:
        InputError: a file, column, row or key is wrong.
    """
    if config.task == "toy":
        corpus = _toy(config)
    elif config.task == "text":
        corpus = _file(config)
    else:
        corpus = _glue(config)
    _check_labels(corpus.train, config, config.data.source)
    if config.data.private and config.data.private != AT_CLIENTS:
        corpus = replace(corpus, private=_private_tables(config, corpus.task))
    if config.data.limit and config.data.limit < len(corpus.train):
        chosen = generator(config.seed, "limit").permutation(len(corpus.train))[: config.data.limit]
        corpus = replace(corpus, train=corpus.train.take(np.sort(chosen)))
    return corpus


def own_table(path: Path, task: Task, config: Config) -> Table:
    """One client's file of private examples.

    Raises:
        InputError: it is not there, cannot be read, or does not fit the task.
    """
    if not path.is_file():
        raise InputError(f"{path}: no such file; give a CSV, JSONL or Parquet file")
    columns, where = read_columns(path), str(path)
    texts = _texts(columns, task.text_columns, where, strict=task.name == "text")
    values = column(columns, task.label_column, where)
    if task.name == "text":
        cells = _cells(values, config.data, where)
        labels = _file_labels(cells, task.labels, where, task.multi_label)
    else:
        labels = _glue_labels(values, task, where, gaps=True)
    table = Table(texts, labels)
    _check_labels(table, config, where)
    return table


def _private_tables(config: Config, task: Task) -> dict[int, Table]:
    """The tables in the folder ``data.private``, numbered in the order of their files' names."""
    told = f"data.private = {config.data.private!r}"
    folder = Path(config.data.private).expanduser()
    if not folder.is_dir():
        raise InputError(f"{told}: no such folder; give one with a file for each client")
    files = [path for path in folder.iterdir() if path.is_file() and path.suffix.lower() in READERS]
    # as people count: client-2 before client-10
    files.sort(key=lambda path: [part.zfill(20) if part.isdigit() else part for part in re.split(r"(\d+)", path.name)])
    if not files:
        raise InputError(f"{told}: no file of examples in it; give one for each client ({', '.join(READERS)})")
    if config.data.clients not in (0, len(files)):
        raise InputError(
            f"data.clients = {config.data.clients}: data.private holds {len(files)} files; give 0 or {len(files)}"
        )
    return {client: own_table(path, task, config) for client, path in enumerate(files)}


def _check_labels(table: Table, config: Config, where: str) -> None:
    """Raise `InputError` for an example without a label where labels are learnt from."""
    unlabelled = ~labelled(table.labels)
    if unlabelled.any() and (config.distill.hard_weight > 0 or config.distill.weighting != "constant"):
        row = int(np.flatnonzero(unlabelled)[0]) + 1
        raise InputError(
            f"{where}: row {row} has no label; give one, or set distill.hard-weight = 0 and "
            "distill.weighting = 'constant' to learn from the teacher alone"
        )


def joined(tables: Sequence[Table]) -> Table:
    """Several tables as one, in their order; whose rows are whose is not kept."""
    columns = tuple(
        [text for column in each for text in column] for each in zip(*[one.texts for one in tables], strict=True)
    )
    return Table(columns, np.concatenate([one.labels for one in tables]))


def _toy(config: Config) -> Corpus:
    tables = {}
    for split, columns in toy_corpus(config.seed).items():
        labels = np.asarray(columns["label"], dtype=np.int64)
        owners = None
        if config.data.partition == "natural" and not config.data.private:
            given: Columns = {name: partial(list, values) for name, values in columns.items()}
            owners = _owners(given, config.data.partition_by, f"task = {config.task}")
        tables[split] = Table((columns["sentence"],), labels, owners)
    return Corpus(TOY, tables["train"], {"validation": tables["validation"]})


def _glue(config: Config) -> Corpus:
    task = GLUE[config.task]
    if config.data.source:
        folder = Path(config.data.source).expanduser()
        if not folder.is_dir():
            raise InputError(f"data.source = {config.data.source!r}: no such folder; give one laid out like {GLUE_HUB}")
    else:
        folder = fetch_folder(GLUE_HUB, "dataset", (f"{task.name}/*",), "data.source")
    if not (folder / task.name).is_dir():
        found = ", ".join(sorted(path.name for path in folder.iterdir() if path.is_dir())) or "no folder"
        raise InputError(f"data.source = {str(folder)!r}: no folder {task.name} for task = {task.name}; found {found}")
    train = _read_glue(folder / task.name, "train", task, config)
    validation = {split: _read_glue(folder / task.name, split, task, None) for split in task.validation}
    return Corpus(task, train, validation)


def _read_glue(folder: Path, split: str, task: Task, config: Config | None) -> Table:
    files = sorted(folder.glob(f"{split}-*.parquet"))
    if not files:
        raise InputError(f"{folder}: no {split}-*.parquet; the layout of {GLUE_HUB} has it")
    columns = read_public(files)
    where = f"{folder}/{split}"
    texts = _texts(columns, task.text_columns, where, strict=False)
    owners = None
    if config is not None and config.data.partition == "natural" and not config.data.private:
        owners = _owners(columns, config.data.partition_by, where)
    return Table(texts, _glue_labels(column(columns, task.label_column, where), task, where), owners)


def _glue_labels(values: Sequence[Any], task: Task, where: str, *, gaps: bool = False) -> NDArray[Any]:
    """Class numbers or scores.

    Args:
        gaps: whether an empty cell is an example without a label; see `Table`.
    """
    highest = 5 if task.regression else task.num_labels - 1
    labels = np.full(len(values), np.nan)
    for row, value in enumerate(values):
        if gaps and not _label_text(value):
            continue
        try:
            labels[row] = float(value)
        except (TypeError, ValueError):
            raise InputError(f"{where}: row {row + 1} of the column {task.label_column} is no number") from None
        if not 0 <= labels[row] <= highest or not (task.regression or labels[row].is_integer()):
            raise InputError(f"{where}: row {row + 1}: the label is outside 0 to {highest}")
    return labels if task.regression else np.where(np.isnan(labels), -1, labels).astype(np.int64)


def _file(config: Config) -> Corpus:
    data = config.data
    names = tuple(name.strip() for name in (data.text_columns or "text").split(",") if name.strip())
    if not 1 <= len(names) <= 2:
        raise InputError(f"data.text-columns = {data.text_columns!r}: give one column, or two with a comma between")
    train = _read_file("data.source", data.source)
    texts = _texts(train, names, data.source, strict=True)
    cells = _cells(column(train, data.label_column, data.source), data, data.source)
    classes = _classes({name for cell in cells for name in cell or ()}, data.label_column)
    natural = data.partition == "natural" and not data.private
    owners = _owners(train, data.partition_by, data.source) if natural else None
    table = Table(texts, _file_labels(cells, classes, data.source, data.multi_label), owners)
    validation = {}
    if data.validation:
        other = _read_file("data.validation", data.validation)
        cells = _cells(column(other, data.label_column, data.validation), data, data.validation)
        labels = _file_labels(cells, classes, data.validation, data.multi_label)
        validation = {"validation": Table(_texts(other, names, data.validation, strict=True), labels)}
    return Corpus(text_task(names, classes, data.label_column, data.multi_label), table, validation)


def _read_file(key: str, name: str) -> Columns:
    path = Path(name).expanduser()
    if not path.is_file():
        raise InputError(f"{key} = {name!r}: no such file; give a CSV, JSONL or Parquet file")
    return read_columns(path)


def _owners(columns: Columns, name: str, where: str) -> list[str]:
    owners = [_label_text(value) for value in column(columns, name, f"data.partition-by: {where}")]
    if "" in owners:
        raise InputError(f"{where}: row {owners.index('') + 1} has no value in {name}, the column of its client")
    return owners


def _texts(columns: Columns, names: tuple[str, ...], where: str, strict: bool) -> tuple[list[str], ...]:
    """The text columns as stripped strings.

    GLUE's own QQP holds a few pairs with one empty question, so only ``strict`` refuses those; an example
    with no text at all is always refused.
    """
    texts = tuple([_text(value) for value in column(columns, name, where)] for name in names)
    if not texts[0]:
        raise InputError(f"{where}: no rows")
    for number, row in enumerate(zip(*texts, strict=True), start=1):
        if not any(row) or (strict and not all(row)):
            raise InputError(f"{where}: row {number} has no text in {' or '.join(names)}; remove the row or fill it")
    return texts


def _text(value: Any) -> str:
    return clean(value) if isinstance(value, str) else ""


def _label_text(value: Any) -> str:
    if value is None or (isinstance(value, float) and np.isnan(value)):
        return ""
    if isinstance(value, float) and value.is_integer():
        value = int(value)  # a Parquet column of classes with gaps reads back as floats
    return _text(str(value))


def _cells(values: list[Any], data: DataKeys, where: str) -> list[Cell]:
    """The class names in each cell of the label column."""
    if not data.multi_label:
        for row, value in enumerate(values, start=1):
            if isinstance(value, list | dict):
                raise InputError(f"{where}: row {row} has several labels; set data.multi-label = true, or give one")
        return [(text,) if (text := _label_text(value)) else None for value in values]
    return [_names(value, data.label_separator) for value in values]


def _names(value: Any, separator: str) -> Cell:
    """Names between separators, or those of a list in JSON or Parquet; a separator alone or an empty list: no class."""
    if not isinstance(value, list):
        text = _label_text(value)
        if not text:
            return None
        value = text.split(separator)
    return tuple(name for name in map(_label_text, value) if name)


def _classes(found: set[str], column: str) -> tuple[str, ...]:
    if not 2 <= len(found) <= MAX_CLASSES:
        raise InputError(
            f"data.label-column = {column!r}: {len(found)} different values; a class column has 2 to {MAX_CLASSES}"
        )
    if all(value.isdecimal() for value in found):
        return tuple(sorted(found, key=lambda value: (int(value), value)))
    return tuple(sorted(found))


def _file_labels(cells: list[Cell], classes: tuple[str, ...], where: str, multi_label: bool) -> NDArray[Any]:
    number = {name: i for i, name in enumerate(classes)}
    for row, cell in enumerate(cells, start=1):
        if not number.keys() >= set(cell or ()):
            raise InputError(f"{where}: row {row}: the label is none of the {len(classes)} classes of data.source")
    if not multi_label:
        return np.asarray([-1 if cell is None else number[cell[0]] for cell in cells], dtype=np.int64)
    labels = np.zeros((len(cells), len(classes)), dtype=np.int8)
    for row, cell in enumerate(cells):
        if cell is None:
            labels[row] = -1
        else:
            labels[row, [number[name] for name in cell]] = 1
    return labels


def labelled(labels: NDArray[Any]) -> NDArray[np.bool_]:
    """(n,) where there is a label: scores use NaN for none, classes -1, multi-label a row of -1."""
    if labels.ndim == 2:
        labels = labels[:, 0]
    return np.asarray(~np.isnan(labels) if labels.dtype.kind == "f" else labels >= 0)
