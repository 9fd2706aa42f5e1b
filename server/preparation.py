"""From keys to a federation that is ready for round 1: data, teacher, student.

Everything that can be wrong with the input is found here, before a worker starts.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from common.config import Config
from common.dataset import FederatedDataset, prepare_dataset
from common.device import Compute, choose_compute
from common.errors import InputError
from common.models import (
    choose_layers,
    count_parameters,
    cut_student,
    freeze_embeddings,
    load_teacher,
    pair_hidden_layers,
)
from common.progress import Progress
from common.store import cache_folder
from server.robust import check_byzantine
from server.teacher import Teacher, TeacherSource, check_head, check_length, find_teacher, prepare_teacher
from server.validation import validate


@dataclass(frozen=True)
class Federation:
    """What a run starts from.

    Attributes:
        weights: the student's trained arrays by name, float32, as they travel.
        student: the same student as a module; the server scores and saves with it.
        teacher_validation: the teacher's scores on the public validation split.
    """

    config: Config
    data: FederatedDataset
    teacher: Teacher
    teacher_parameters: int
    teacher_validation: dict[str, float]
    student: Any
    layers: tuple[int, ...]
    weights: dict[str, NDArray[np.float32]]
    compute: Compute


@dataclass(frozen=True)
class Lesson:
    """The data of a run and a teacher that fits it, with the model and its scores on public validation."""

    data: FederatedDataset
    teacher: Teacher
    model: Any
    validation: dict[str, float]
    compute: Compute


def prepare_lesson(config: Config, source: TeacherSource, progress: Progress) -> Lesson:
    """Read and cut the data, take or fine-tune the teacher, score it.

    Raises:
        InputError: a key, a file or the combination of both is wrong.
    """
    compute = choose_compute(config.runtime.device, config.client.precision)
    check_length(source, config.data.max_length)
    cache = cache_folder(config.runtime.cache)
    data = prepare_dataset(config, source.folder, cache, progress)
    check_clients(config, data)
    check_head(source, data.task, len(data.public))
    teacher = prepare_teacher(config, source, data, cache, progress)
    model = load_teacher(teacher.folder).to(compute.device)
    return Lesson(data, teacher, model, validate(model, data, compute, progress), compute)


def prepare(config: Config, progress: Progress) -> Federation:
    """Everything up to round 1: the lesson, and the student cut from its teacher.

    Raises:
        InputError: a key, a file or the combination of both is wrong.
    """
    source = find_teacher(config.teacher.model)
    layers = choose_layers(config.student.layer_selection, config.student.layers, source.layers)
    pair_hidden_layers(config.distill.hidden_layers, len(layers), source.layers)
    lesson = prepare_lesson(config, source, progress)
    model = lesson.model.to("cpu")
    student = cut_student(model, layers, config.student.dropout)
    trained = freeze_embeddings(student, config.student.train_embeddings)
    weights = {name: parameter.detach().numpy().copy() for name, parameter in trained.items()}
    return Federation(
        config=config,
        data=lesson.data,
        teacher=lesson.teacher,
        teacher_parameters=count_parameters(model),
        teacher_validation=lesson.validation,
        student=student.to(lesson.compute.device),
        layers=layers,
        weights=weights,
        compute=lesson.compute,
    )


def check_clients(config: Config, data: FederatedDataset) -> None:
    """Raise `InputError` when the cohort is larger than the clients that take part, or too small for the rule."""
    ready = len(data.eligible)
    if config.server.cohort > ready:
        raise InputError(
            f"server.cohort = {config.server.cohort}: {ready} of {data.clients} clients hold data.min-examples = "
            f"{config.data.min_examples} private examples; give a smaller cohort, fewer clients or a smaller minimum"
        )
    check_byzantine(config.server.strategy, config.server.cohort or ready, config.server.byzantine)
