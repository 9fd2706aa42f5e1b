"""From keys to a federation that is ready for round 1: data, teacher, student.

Everything that can be wrong with the input is found here, before a worker starts.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from common.config import Config
from common.corpus import Corpus
from common.dataset import FederatedDataset
from common.device import Compute
from common.errors import InputError
from common.keys import AT_CLIENTS
from common.models import choose_layers, count_parameters, pair_hidden_layers
from common.nested import Tiers
from common.progress import Progress
from common.pupil import Pupil, load_exits
from common.recipe import DEEP
from common.slim import Shape, build
from server.fitting import fit_width
from server.lesson import Lesson, prepare_lesson
from server.masked import MaskedTeacher, prepare_masked_teacher
from server.origin import find_origin, open_origin
from server.student import narrowed, prepare_student
from server.teacher import Teacher, find_teacher


@dataclass
class Federation:
    """What a run starts from.

    Attributes:
        config: the run's keys, with the heads and neurons that `student.target-ratio` has chosen.
        pupil: the student as it starts; the server scores and saves with its module.
        masked: the teacher of general rounds, where there are some.
        tiers: it and the smaller ones inside it.
        tier_of: (clients,) the tier that each client holds.
        homes: the Flower node of each client where every client has a device of its own; empty: any node can work
            for any client.
        held: hashes of the models that these devices have, by client.
        struck_off: ids of clients that may not take part any more.
    """

    config: Config
    lesson: Lesson
    pupil: Pupil
    masked: MaskedTeacher | None = None
    homes: Mapping[int, int] = field(default_factory=dict)
    held: dict[int, set[str]] = field(default_factory=dict)
    struck_off: Callable[[], set[int]] = set
    tiers: Tiers = field(init=False)
    tier_of: NDArray[np.int64] = field(init=False)

    def __post_init__(self) -> None:
        self.tier_of = self.config.tier_of(self.data.clients)
        self.take(self.pupil)

    def take(self, pupil: Pupil) -> None:
        """Go on with this student, where models run."""
        pupil.model.to(self.compute.device)
        self.pupil, self.tiers = pupil, self._tiers(pupil.model, pupil.shape)

    def _tiers(self, student: Any, shape: Shape) -> Tiers:
        return Tiers(self.config, student, shape, int(self.lesson.model.config.hidden_size))

    @property
    def data(self) -> FederatedDataset:
        return self.lesson.data

    @property
    def teacher(self) -> Teacher:
        return self.lesson.teacher

    @property
    def compute(self) -> Compute:
        return self.lesson.compute

    @property
    def student(self) -> Any:
        return self.pupil.model

    @property
    def able(self) -> NDArray[np.int64]:
        """Ids of the clients that take part and hold the whole student."""
        shape, sizes = narrowed(self.config, self.pupil.shape), self.config.student.sizes
        fit = [shape.beginning(size.layers, size.heads, size.neurons) == shape for size in sizes]
        whole = np.flatnonzero([*fit, True])
        return np.asarray(self.data.eligible[np.isin(self.tier_of[self.data.eligible], whole)])

    @property
    def drawn_from(self) -> NDArray[np.int64]:
        """Ids of the clients that a round's cohort is drawn from."""
        return self.able if self.config.student.tier_mode == "exclusive" else self.data.eligible

    def weights(self) -> dict[str, NDArray[np.float32]]:
        """The trained arrays by name, float32, as they travel: the student's, and the smaller ones' exits."""
        start = self.tiers.initial() | load_exits(self.pupil)
        return {name: weight.cpu().numpy().copy() for name, weight in start.items()}

    def final_student(self) -> Any:
        """An empty student of the width that the keys ask for, and that this one gets before round 1."""
        with torch.device("meta"):
            return build(self.student.config, narrowed(self.config, self.pupil.shape))

    def final_shapes(self) -> dict[str, tuple[int, ...]]:
        """Of the arrays that are trained then."""
        return self._tiers(self.final_student(), narrowed(self.config, self.pupil.shape)).shapes


def prepare(config: Config, progress: Progress, corpus: Corpus | None = None) -> Federation:
    """Everything up to round 1: the lesson, and the student cut from its teacher.

    Args:
        corpus: the data; None: read them as the keys say.

    Raises:
        InputError: a key, a file or the combination of both is wrong.
    """
    if config.data.private == AT_CLIENTS and corpus is None:
        raise InputError(
            f"data.private = {AT_CLIENTS!r}: the private texts are with the clients; use `fedistill edge run`"
        )
    with progress.step("find the models", None):  # a first time they come from the hub
        source = find_teacher(config.teacher.model)
        have = (find_origin(config) or source).layers
    layers = choose_layers(config.student.layer_selection, config.student.layers, have)
    for key in ("hidden-layers", "relation-layers"):
        pairs = getattr(config.distill, key.replace("-", "_"))
        pair_hidden_layers(pairs, len(layers), mentor_layers(config, source.layers), key)
    check_windows(config)
    masked = prepare_masked_teacher(source) if config.distill.general_rounds else None
    lesson = prepare_lesson(config, source, progress, corpus)
    origin = open_origin(config, lesson, progress)
    config = fit_width(config, origin.model, layers, count_parameters(lesson.model))
    pupil = prepare_student(config, lesson, origin, progress)
    lesson.model.to("cpu")
    return Federation(config, lesson, pupil, masked)


def mentor_layers(config: Config, have: int) -> int:
    """Layers of the model that a student has beside it while it learns: a mentor's, or all of the teacher's.

    Raises:
        InputError: the teacher has fewer.
    """
    asked = config.client.mentor_layers
    if config.server.strategy != "fedkd" or not asked:
        return have
    if asked > have:
        raise InputError(f"client.mentor-layers = {asked}: the teacher has {have} layers; give at most that, or 0")
    return asked


def check_windows(config: Config) -> None:
    """Raise `InputError` where inner states of windows would be compared that hold other parts of a text."""
    weights = [f"{part}-weight" for part in DEEP if getattr(config.distill, f"{part}_weight") > 0]
    trimmed = [key for key in ("vocabulary", "target-ratio", "model") if getattr(config.student, key.replace("-", "_"))]
    if config.data.windows > 1 and weights and trimmed:
        raise InputError(
            f"data.windows = {config.data.windows}: with student.{trimmed[0]} the student may cut a text into other "
            f"windows than the teacher, and distill.{weights[0]} compares them; set that to 0, or give 1"
        )
