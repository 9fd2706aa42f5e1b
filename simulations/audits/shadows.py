"""Models trained on halves of the same data: the targets of membership attacks, and each other's references.

Every one is a whole federation in a process of the machine's own, a few at a time; what each answers is a file in the
laboratory's folder, so that an audit that was stopped trains only those that are missing.
"""

import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from common.config import from_flat
from common.progress import Progress, Silent
from common.section import Scalar
from common.store import write_atomically
from simulations.audits.halves import Halves, draw_halves
from simulations.laboratory import Laboratory
from simulations.pool import pool, processes

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Answers:
    """What K models say.

    Attributes:
        inside: (K, n) which model was trained on which example.
        logits, labels: (K, n, classes) and (n,) of the examples.
        population, population_labels: (K, m, classes) and (m,) of examples that none was trained on.
    """

    inside: NDArray[np.bool_]
    logits: NDArray[np.float32]
    labels: NDArray[np.int64]
    population: NDArray[np.float32]
    population_labels: NDArray[np.int64]


def answers_of(lab: Laboratory, models: int, examples: int, progress: Progress) -> Answers:
    """Train the models that are not in the laboratory's folder yet, and read what all of them say.

    Args:
        examples: see `draw_halves`.

    Raises:
        InputError: the task has no classes to be sure of.
        RunFailed: a process ended.
    """
    halves = draw_halves(lab.data, models, examples, lab.config.seed)
    with _folder_of(lab, examples) as folder:
        missing = [model for model in range(models) if not _file(folder, model).is_file()]
        with progress.step("models on halves of the data", len(missing)) as step:
            for _ in _train_all(lab, examples, missing, models, folder):
                step.advance()
        said = [_read(_file(folder, model)) for model in range(models)]
    logits = np.stack(said)
    labels, cut = np.asarray(lab.data.train.labels), len(halves.rows)
    return Answers(halves.inside, logits[:, :cut], labels[halves.rows], logits[:, cut:], labels[halves.population])


def train_one(lab: Laboratory, halves: Halves, model: int) -> NDArray[np.float32]:
    """(n + m, classes) what a model says of the examples under attack, then of the population."""
    weights = lab.train(halves.trained(model))
    return lab.logits(weights, np.concatenate([halves.rows, halves.population]))


def _train_all(lab: Laboratory, examples: int, missing: Sequence[int], models: int, folder: Path) -> Iterator[int]:
    """Each model once its file is written."""
    count = min(processes(lab.config), len(missing))
    if count < 2:
        halves = draw_halves(lab.data, models, examples, lab.config.seed)
        for model in missing:
            _write(_file(folder, model), train_one(lab, halves, model))
            yield model
        return
    flat = tuple(lab.config.flat().items())
    with pool(count) as workers:
        for job in as_completed([workers.submit(_train_there, flat, examples, models, m, folder) for m in missing]):
            yield job.result()


def _train_there(flat: tuple[tuple[str, Scalar], ...], examples: int, models: int, model: int, folder: Path) -> int:
    lab, halves = _laboratory(flat, examples, models)
    _write(_file(folder, model), train_one(lab, halves, model))
    return model


@cache
def _laboratory(flat: tuple[tuple[str, Scalar], ...], examples: int, models: int) -> tuple[Laboratory, Halves]:
    """This process's own."""
    lab = Laboratory(from_flat(dict(flat)), Silent())
    return lab, draw_halves(lab.data, models, examples, lab.config.seed)


@contextmanager
def _folder_of(lab: Laboratory, examples: int) -> Iterator[Path]:
    if lab.folder is None:
        with tempfile.TemporaryDirectory(prefix="fedistill-audit-") as folder:
            yield Path(folder)
        return
    yield lab.folder / f"halves-{examples or 'all'}"


def _file(folder: Path, model: int) -> Path:
    return folder / f"model-{model}.npz"


def _write(path: Path, logits: NDArray[np.float32]) -> None:
    content = BytesIO()
    np.savez(content, logits=logits)
    write_atomically(path, content.getvalue())


def _read(path: Path) -> Any:
    with np.load(path, allow_pickle=False) as found:
        return found["logits"]
