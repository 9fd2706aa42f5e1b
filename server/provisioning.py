"""Which student each device gets: the largest, of a lattice below the run's student, that keeps to all its budgets.

The lattice is depth x heads x neurons, nested: a smaller student has the first layers of a larger one, and of each
layer the first heads and neurons, which stand in order of importance. Like HeteroFL's (Diao et al. 2021,
https://arxiv.org/abs/2010.01264) and DepthFL's (Kim et al. 2023) sub-models, each is a part of the one that the server
keeps. What stands for quality is the number of parameters: a stated proxy, blind to which of them matter.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from common.config import Config, changed
from common.cost import Cost, Work, predict_cost
from common.dataset import load_tokenizer
from common.devices import DeviceProfile
from common.errors import InputError
from common.families import head_count
from common.keys import KEEPING
from common.models import choose_layers, count_parameters
from common.recipe import make_recipe
from common.size import Size, size_of
from common.slim import Shape, build
from common.tasks import GLUE
from common.vocabulary import choose_pieces
from server.fitting import fit_width, fitting_pieces
from server.origin import KEY
from server.student import check_width, narrowed
from server.teacher import TeacherSource
from server.tiered import check_sizes

QUARTERS = (4, 3, 2, 1)  # of the run's heads and neurons


@dataclass(frozen=True)
class Candidate:
    """A student of the lattice."""

    shape: Shape
    size: Size

    @property
    def name(self) -> str:
        """Layers/heads/neurons."""
        return f"{self.size.layers}/{self.size.heads[0]}/{self.size.neurons[0]}"


@dataclass(frozen=True)
class Refusal:
    """A student that a device cannot have, and the first budget that it breaks."""

    candidate: Candidate
    cost: Cost
    reason: str


@dataclass(frozen=True)
class Choice:
    """What a device gets.

    Attributes:
        best: None when not even the smallest student keeps to its budgets.
        cost: of the best.
        refused: every larger one, the largest first.
    """

    profile: DeviceProfile
    best: Candidate | None
    cost: Cost | None
    refused: tuple[Refusal, ...]


@dataclass(frozen=True)
class Lattice:
    """The students to choose from, most parameters first, and their teacher.

    Attributes:
        plan: the teacher's configuration.
    """

    students: tuple[Candidate, ...]
    teacher: Size
    plan: Any


@dataclass(frozen=True)
class Together:
    """How devices with different students learn together.

    Attributes:
        keys: `student.tiers` and `student.tier-of`; empty where one student fits all, and where they cannot.
        refused: why they cannot; empty: they can, or need not.
    """

    keys: dict[str, str]
    refused: str


def make_lattice(config: Config, source: TeacherSource) -> Lattice:
    """The run's student and all smaller ones that its losses can train; no weights are loaded.

    Raises:
        InputError: a key asks for more than the teacher has.
    """
    if config.student.tiers:
        raise InputError(
            f"student.tiers = {config.student.tiers!r}: the tiers are what is looked for here; leave them out, and "
            "take them from what each device gets"
        )
    if config.server.strategy in KEEPING:
        raise InputError(
            f"server.strategy = {config.server.strategy!r}: its clients keep a model of their own, whose costs are not "
            "predicted; give a strategy whose clients send their student's update"
        )
    for key, found in (
        (f"student.model = {config.student.model!r}", config.student.model),
        (f"distill.general-rounds = {config.distill.general_rounds}", config.distill.general_rounds),
        (f"privacy.unit = {config.privacy.unit!r}", config.privacy.unit == "example"),
        ("privacy.secure-aggregation = true", config.privacy.secure_aggregation),
    ):
        if found:
            raise InputError(f"{key}: what it costs a device is not predicted; leave it out here")
    teacher = teacher_config(config, source)
    layers = choose_layers(config.student.layer_selection, config.student.layers, source.layers)
    top = run_shape(config, source, teacher, layers)
    trains = config.student.train_embeddings
    students = [
        Candidate(shape, size_of(teacher, shape, trains))
        for shape in nested_shapes(top)
        if shape == top or _trainable(config, shape, teacher)
    ]
    students.sort(key=lambda student: (-student.size.parameters, -student.size.layers))
    whole = Shape.whole(teacher, tuple(range(source.layers)))
    return Lattice(tuple(students), size_of(teacher, whole), teacher)


def teacher_config(config: Config, source: TeacherSource) -> Any:
    """The configuration that the teacher will have: a bare encoder gets the task's head, of two labels if unknown."""
    from transformers import AutoConfig

    found = AutoConfig.from_pretrained(source.folder, local_files_only=True, trust_remote_code=False)
    if not source.head:
        found.num_labels = GLUE[config.task].num_labels if config.task in GLUE else 2
    return found


def run_shape(
    config: Config,
    source: TeacherSource,
    whole: Any,
    layers: tuple[int, ...],
    *,
    teacher_parameters: int = 0,
    beside: Any = None,
) -> Shape:
    """The shape of the run's own student; which pieces, heads and neurons it keeps does not matter here.

    Args:
        source, whole: what it is cut from, and the configuration of that.
        teacher_parameters: the teacher's, where the student is cut from another model; 0: it is cut from the teacher.
        beside: the configuration of what the student learns from; None: of what it is cut from.
    """
    keys, shape = config.student, Shape.whole(whole, layers)
    pieces = shape.pieces
    if keys.vocabulary:
        counts = np.zeros(pieces, dtype=np.int64)
        pieces = len(choose_pieces(load_tokenizer(source.folder), counts, keys.vocabulary))
    elif keys.target_ratio:
        with torch.device("meta"):
            model = build(whole, Shape.whole(whole, tuple(range(source.layers))))
        teacher = teacher_parameters or count_parameters(model)
        config = fit_width(config, model, layers, teacher)
        pieces = fitting_pieces(config, model, layers, load_tokenizer(source.folder), teacher) or pieces
    own = bool(keys.model)  # then its heads may be of another width than the teacher's
    shape = replace(
        shape, pieces=pieces, rank=keys.embedding_rank, head_size=whole.hidden_size // head_count(whole) if own else 0
    )
    check_width(config, shape, whole, KEY if own else "the teacher")
    # whether its losses can train it
    make_recipe(config, 1, narrowed(config, shape), beside or whole, regression=False)
    return narrowed(config, shape)


def nested_shapes(top: Shape) -> list[Shape]:
    """Every depth, with 4, 3, 2 and 1 quarters of the heads and of the neurons."""
    heads, neurons = _quarters(len(top.heads[0])), _quarters(len(top.neurons[0]))
    return [
        Shape(
            top.layers[:depth],
            tuple(kept[:some] for kept in top.heads[:depth]),
            tuple(kept[:width] for kept in top.neurons[:depth]),
            top.pieces,
            top.rank,
        )
        for depth in range(len(top.layers), 0, -1)
        for some in heads
        for width in neurons
    ]


def _quarters(whole: int) -> list[int]:
    return list(dict.fromkeys(max(whole * part // 4, 1) for part in QUARTERS))


def _trainable(config: Config, shape: Shape, teacher: Any) -> bool:
    """Whether the losses' layer pairs and relation heads exist in this student."""
    try:
        make_recipe(config, 1, shape, teacher, regression=False)
    except InputError:
        return False
    return True


def choose_student(lattice: Lattice, profile: DeviceProfile, work: Work) -> Choice:
    """The first student, from the largest on, that breaks no budget of the device."""
    refused: list[Refusal] = []
    for student in lattice.students:
        cost = predict_cost(student.size, lattice.teacher, profile, work)
        reason = broken_budget(cost, profile)
        if not reason:
            return Choice(profile, student, cost, tuple(refused))
        refused.append(Refusal(student, cost, reason))
    return Choice(profile, None, None, tuple(refused))


def fit_tiers(lattice: Lattice, choices: Mapping[str, Choice], work: Work) -> dict[str, Candidate]:
    """The student of each device in one mixed federation, where each lies inside the next larger one.

    From the device with the largest student on, each gets the largest that keeps to its budgets and lies inside the
    student before. Then what the others' students cost it is added, those inside its own above all. While that breaks
    a device's budget, the one with the smallest student, which the others train along, loses it for good, and all are
    looked for again. Without devices that none fits.
    """

    def fits(name: str, student: Candidate, tiers: Sequence[Size] = ()) -> bool:
        profile = choices[name].profile
        return not broken_budget(predict_cost(student.size, lattice.teacher, profile, work, tiers), profile)

    place = {student.name: number for number, student in enumerate(lattice.students)}
    fitting = {name: [student for student in lattice.students if fits(name, student)] for name in choices}
    while True:
        found = _inside_one_another(fitting, place)
        tiers = list(dict.fromkeys(student.size for student in (lattice.students[0], *found.values())))
        broken = [name for name, student in found.items() if not fits(name, student, tiers)]
        if not broken:
            return {name: found[name] for name in choices if name in found}
        smallest = max(broken, key=lambda name: place[found[name].name])
        fitting[smallest].remove(found[smallest])


def _inside_one_another(fitting: Mapping[str, Sequence[Candidate]], place: Mapping[str, int]) -> dict[str, Candidate]:
    """Of the students that fit each device, largest first, the first that lies inside those of larger devices."""
    found: dict[str, Candidate] = {}
    above: Candidate | None = None
    for name in sorted((name for name in fitting if fitting[name]), key=lambda name: place[fitting[name][0].name]):
        inside = next((one for one in fitting[name] if above is None or _lies_inside(one, above)), None)
        if inside is not None:
            found[name] = above = inside
    return found


def tiers_together(config: Config, lattice: Lattice, devices: Sequence[Candidate]) -> Together:
    """The keys for clients with these students, in this order, or why they cannot learn together."""
    whole = lattice.students[0]
    held = [student.name for student in reversed(lattice.students) if student in devices and student != whole]
    if not held:
        return Together({}, "")
    # as tiers that are drawn: how many clients hold each is not said yet
    drawn = ",".join(f"{name}@{1 / (len(held) + 1):.3f}" for name in held)
    try:
        check_sizes(changed(config, {"student.tiers": drawn}), whole.shape, lattice.plan, regression=False)
    except InputError as error:
        return Together({}, str(error).replace(f"student.tiers = {drawn!r}", "student.tiers"))
    if whole not in devices:
        return Together(
            {},
            f"no device holds the run's own student {whole.name} beside the others': to learn together, give "
            f"student.layers, heads and neurons of {held[-1]}",
        )
    names = [*held, whole.name]
    own = ",".join(str(1 + names.index(student.name)) for student in devices)
    return Together({"student.tiers": ",".join(held), "student.tier-of": own}, "")


def _lies_inside(small: Candidate, large: Candidate) -> bool:
    own, other = ((one.size.layers, one.size.heads[0], one.size.neurons[0]) for one in (small, large))
    return all(a <= b for a, b in zip(own, other, strict=True))


def broken_budget(cost: Cost, profile: DeviceProfile) -> str:
    """The first budget that a student breaks, with figures; empty: none."""
    budgets: Sequence[tuple[str, float, float, str]] = (
        ("memory", max(cost.training_mb, cost.inference_mb), profile.memory_mb, "MB"),
        ("latency", cost.latency_ms, profile.latency_ms, "ms"),
        ("round", cost.round_s, profile.max_seconds, "s"),
        ("energy", cost.energy_j, profile.energy_j, "J"),
    )
    for name, needed, budget, unit in budgets:
        if needed > budget:
            return f"{name} {_apart(needed, budget)} {unit} > {_apart(budget, needed)} {unit}"
    return ""


def _apart(value: float, other: float) -> str:
    """With as many digits as tell it from the other, three at least."""
    digits = 3
    while digits < 17 and f"{value:.{digits}g}" == f"{other:.{digits}g}":
        digits += 1
    return f"{float(f'{value:.{digits}g}'):,.15g}"
