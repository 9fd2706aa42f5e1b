"""What an export is tried on: the run's public validation split, or texts that the program makes."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from common.config import Config
from common.corpus import labelled
from common.dataset import FederatedDataset, prepare_dataset
from common.errors import InputError
from common.progress import Progress
from common.store import cache_folder
from common.tasks import GLUE, TOY, Task, text_task
from common.tokens import Tokens, tokenize
from common.toy import toy_corpus

VALIDATION, MADE = "the public validation split", "texts made by the program"
COUNT = 512  # of texts made
SENTENCES = 12  # in the long ones


@dataclass(frozen=True)
class Trial:
    """Texts that an export and its student both read.

    Attributes:
        columns: one or two columns of n texts.
        tokens: the same as training cuts them into the student's pieces.
        labels: (n, ...) as in `common.corpus.Table`; None: there are none to score with.
        source: where the texts are from.
    """

    task: Task
    columns: tuple[list[str], ...]
    tokens: Tokens
    labels: NDArray[Any] | None
    source: str

    def __len__(self) -> int:
        return len(self.tokens)

    def texts(self, rows: NDArray[np.int64]) -> tuple[list[str], ...]:
        return tuple([column[row] for row in rows.tolist()] for column in self.columns)

    def spread(self, count: int) -> NDArray[np.int64]:
        """At most so many rows, from the shortest to the longest."""
        places = np.linspace(0, len(self) - 1, min(count, len(self))).astype(np.int64)
        return np.argsort(self.tokens.lengths(np.arange(len(self))), kind="stable")[places]


def find_trial(config: Config, tokenizer_folder: Path, student: Any, tokenizer: Any, progress: Progress) -> Trial:
    """The run's labelled validation text; where that is not at hand, texts that the program makes.

    Args:
        tokenizer_folder: the tokenizer that the run's data were prepared with, or any other: the cut is the same.
        tokenizer: the student's.
    """
    cache = cache_folder(config.runtime.cache)
    try:
        data = prepare_dataset(config, tokenizer_folder, cache, progress)
        _check_classes(data.task, student)
    except InputError as error:
        progress.line(f"no validation text is at hand: {error}")
        task, columns, labels = _task(config, student), None, None
    else:
        task, (columns, labels) = data.task, _validation(data)
        if columns is None:
            progress.line("no validation text is at hand: the run has none with labels")
    source = MADE if columns is None else VALIDATION
    columns = columns or _made(len(task.text_columns))
    return Trial(task, columns, tokens_of(config, tokenizer, columns, progress), labels, source)


def tokens_of(config: Config, tokenizer: Any, columns: tuple[list[str], ...], progress: Progress) -> Tokens:
    """Texts as training cuts them."""
    keys = config.data
    with progress.step("tokenise", len(columns[0])) as step:
        return tokenize(columns, tokenizer, keys.max_length, step.advance, windows=keys.windows, stride=keys.stride)


def _validation(data: FederatedDataset) -> tuple[tuple[list[str], ...] | None, NDArray[Any] | None]:
    """Texts and labels of the headline split."""
    for split in data.validation.values():
        rows = np.flatnonzero(labelled(np.asarray(split.labels)))
        return (tuple(each.take(rows) for each in split.texts), split.labels[rows]) if len(rows) else (None, None)
    return None, None


def _check_classes(task: Task, student: Any) -> None:
    """Raise `InputError` when a file was written over since, and its classes are others than those learnt.

    A teacher that came with its head may have other names for the same classes: then none of them are the task's.
    """
    learnt = [str(student.config.id2label[number]).lower() for number in range(student.config.num_labels)]
    there = [name.lower() for name in task.labels]
    if len(learnt) != task.num_labels or (learnt != there and {*learnt} & {*there}):
        raise InputError("data.source has other classes by now than those that the student learnt")


def _task(config: Config, student: Any) -> Task:
    """The task of a run whose data are not at hand."""
    if config.task == TOY.name:
        return TOY
    if config.task in GLUE:
        return GLUE[config.task]
    labels = tuple(str(student.config.id2label[number]) for number in range(student.config.num_labels))
    names = tuple(name.strip() for name in (config.data.text_columns or "text").split(","))
    return text_task(names, labels, config.data.label_column, config.data.multi_label)


def _made(count: int) -> tuple[list[str], ...]:
    """Columns of sentences, every fourth text made of several."""
    sentences = toy_corpus(0)["validation"]["sentence"][:COUNT]
    texts = [
        " ".join(sentences[place : place + SENTENCES]) if place % 4 == 0 else text
        for place, text in enumerate(sentences)
    ]
    return (texts,) if count == 1 else (texts, texts[::-1])
