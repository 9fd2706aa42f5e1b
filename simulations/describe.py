"""``fedistill describe``: what a run would do, without running it.

Data are read and cut (and tokenised, once, as the run would). The student's size and the bytes follow from the shapes.
Time is an estimate: a short probe measures this machine (`clients.device_profile`), and the run's arithmetic
(`common.cost`) is divided by what that found. What happens once is told apart from what every round takes.
"""

import copy
import json
import math
import sys
import textwrap
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from clients.device_profile import Line, probe
from common.config import Config
from common.cost import PADDING, Work
from common.dataset import FederatedDataset, prepare_dataset
from common.errors import InputError
from common.keys import AT_CLIENTS, VOTING
from common.models import choose_layers
from common.nested import Tiers
from common.progress import Progress
from common.public_text import load_public_text
from common.size import Size, forward_flops, size_of, training_flops
from common.slim import Shape, build
from common.store import cache_folder
from server.history import shape_figures
from server.lesson import check_clients, public_texts
from server.masked import prepare_masked_teacher
from server.origin import KEY, check_first_piece, find_origin, has_own_pieces
from server.preparation import check_windows, mentor_layers
from server.provisioning import run_shape, teacher_config
from server.report.words import size as weight
from server.shards import label_counts
from server.teacher import (
    TeacherSource,
    check_head,
    check_labels,
    check_length,
    find_teacher,
    labelled_rows,
    tuned_folder,
)
from server.tiered import check_tiers
from simulations.display import console_on, progress_for
from simulations.planned_privacy import planned_privacy
from simulations.runtime import worker_count
from simulations.table import Row, Sheet, show

VOTES = "outputs on public text travel, no weights"
SHOWN, CLASSES = 8, 4  # clients and classes that the screen has room for
START_SECONDS = 15.0  # libraries, Ray and its workers, on an idle laptop


@dataclass(frozen=True)
class Bytes:
    """Of a round in the mean, in a simulation's messages; and for one client on a device of its own.

    Up it is at most so much where `server.wire` is topk or svd.

    Attributes:
        down, up: training, and the scoring of the cohort in rounds that are scored; a last round that everybody scores
            sends no more here.
    """

    down: int
    up: int
    client_down: int
    client_up: int


@dataclass(frozen=True)
class Times:
    """Estimated seconds: before round 1, of a round, of the whole run."""

    start: float
    fine_tuning: float
    once: float
    round: float
    total: float


def describe(config: Config, *, as_json: bool = False) -> None:
    """Print what a run with these keys would do.

    Raises:
        InputError: the run would be refused.
    """
    console = console_on(sys.stdout)
    progress = progress_for(console_on(sys.stderr) if as_json else console)
    found = examine(config, progress)
    if as_json:
        print(json.dumps(found, indent=2))
        return
    for line in lines(found):
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    show(console, shard_sheet(found))


def examine(config: Config, progress: Progress) -> dict[str, Any]:
    """Everything that is told, as JSON has it."""
    if config.data.private == AT_CLIENTS:
        raise InputError(f"data.private = {AT_CLIENTS!r}: the private texts are with the clients, and not described")
    source = find_teacher(config.teacher.model)
    check_length(source, config.data.max_length)
    check_windows(config)
    text = load_public_text(config)
    data = prepare_dataset(config, source.folder, cache_folder(config.runtime.cache), progress)
    check_clients(config, data)
    public_texts(config, data, text, progress)
    check_head(source, data.task, len(labelled_rows(data, data.public)))
    origin = find_origin(config) or source
    whole, teacher = _model_config(config, origin, data), _model_config(config, source, data)
    layers = choose_layers(config.student.layer_selection, config.student.layers, origin.layers)
    teacher_size = size_of(teacher, Shape.whole(teacher, tuple(range(source.layers))))
    beside = copy.deepcopy(teacher)  # the student, while it learns
    beside.num_hidden_layers = mentor_layers(config, source.layers)
    shape = run_shape(config, origin, whole, layers, teacher_parameters=teacher_size.parameters, beside=beside)
    _check_origin(config, source, origin, data, (teacher, whole))
    check_tiers(config, shape, teacher, data)
    if config.distill.general_rounds:
        prepare_masked_teacher(source)
    size = size_of(whole, shape, config.student.train_embeddings)
    trained = _trained(config, whole, shape, int(teacher.hidden_size))
    names, counts = label_counts(data)
    cached = bool(source.head) or tuned_folder(
        config, source, data, labelled_rows(data, data.public), cache_folder(config.runtime.cache)
    ).is_dir()  # fmt: skip
    speed = probe(config, progress).training
    sent = bytes_of(config, trained, len(data.eligible))
    cohort = config.server.cohort or len(data.eligible)
    return {
        "task": data.task.name,
        "metric": data.task.headline,
        "seed": config.seed,
        "rounds": config.rounds,
        "clients": data.clients,
        "eligible": len(data.eligible),
        "cohort": cohort,
        "workers": worker_count(config),
        "public": len(data.public),
        "validation": {name: len(split) for name, split in data.validation.items()},
        "ends": data.told_of_ends(),
        "shards": {
            "classes": names,
            "counts": counts.tolist(),
            "train": data.train_sizes.tolist(),
            "held_out": data.heldout_sizes.tolist(),
        },
        "teacher": {
            "model": config.teacher.model,
            "parameters": teacher_size.parameters,
            "fine_tuned": not source.head,
            "there": cached,
        },
        "student": {
            "parameters": size.parameters,
            "ratio": size.parameters / teacher_size.parameters,
            "sent": trained,
            **shape_figures(shape),
        },
        "bytes_per_round": None if sent is None else asdict(sent),
        "seconds": asdict(times(config, data, size, teacher_size, speed, tune=not cached)),
        "not_counted": not_counted(config),
        "privacy": planned_privacy(config, data, trained),
    }


def _model_config(config: Config, source: TeacherSource, data: FederatedDataset) -> Any:
    """The configuration of a model once it has the task's head."""
    found = teacher_config(config, source)
    found.num_labels = data.task.num_labels
    return found


def _check_origin(
    config: Config, source: TeacherSource, origin: TeacherSource, data: FederatedDataset, plans: tuple[Any, Any]
) -> None:
    """Raise `InputError` where the origin has a head for another task, or states would be compared that cannot be.

    Args:
        plans: the configurations of the teacher and of the origin.
    """
    with torch.device("meta"):
        model, cut = (build(plan, Shape.whole(plan, tuple(range(plan.num_hidden_layers)))) for plan in plans)
    check_first_piece(config, model, "this teacher")
    if config.student.model:
        check_labels(origin, data.task, KEY)
        has_own_pieces(config, cut, origin.folder, source.folder)


def _trained(config: Config, whole: Any, shape: Shape, taught: int) -> int:
    """Weights that travel, the smaller tiers' exits and a projection among them."""
    plan = copy.deepcopy(whole)
    plan.num_hidden_layers, plan.vocab_size = len(shape.layers), shape.pieces
    with torch.device("meta"):
        student = build(plan, shape)
        return sum(math.prod(array) for array in Tiers(config, student, shape, taught).shapes.values())


def bytes_of(config: Config, trained: int, eligible: int) -> Bytes | None:
    """What the messages of a round weigh in the mean; None where it is outputs that travel, or parts of the student.

    A worker gets the student once for all of its clients, to train, and again to score. It sends one exact sum, or each
    client's own update where these are not added up.
    """
    keys = config.server
    if keys.strategy in VOTING or config.student.sizes:
        return None
    asked = min(math.ceil(round((keys.cohort or eligible) * keys.over_select, 6)), eligible)
    scored = eligible if keys.scores == "all" else min(keys.cohort or eligible, eligible)
    nodes, work = worker_count(config), Work.of(config)
    single = asked > (keys.cohort or asked)  # a message for each client
    questions = (asked if single else min(nodes, asked)) + work.scored * min(nodes, scored)
    own = round(work.entry_bytes * trained)
    answers = (asked if single else min(nodes, asked)) if work.packed else asked
    return Bytes(round(4 * trained * questions), own * answers, round(work.down_bytes(trained)), own)


def times(
    config: Config, data: FederatedDataset, size: Size, teacher: Size, speed: Line, *, tune: bool
) -> Times:  # fmt: skip
    """Arithmetic over speed, shared by the workers."""
    tokens = data.train.tokens
    private = np.asarray(data.shards.order)
    length = max(round(float(tokens.lengths(private).mean()) * PADDING), 1) if len(private) else 1
    cores = max(worker_count(config), 1)
    cohort = (config.server.cohort or len(data.eligible)) / max(len(data.eligible), 1)

    def forward(one: Size, rows: float) -> float:
        return rows * forward_flops(one, 1, length) / speed.rate

    def train(one: Size, rows: float, budget: int) -> float:
        steps = math.ceil(rows * length / budget)
        return rows * training_flops(one, 1, length) / speed.rate + steps * one.layers * speed.layer_s

    work, client = Work.of(config), config.client
    seen = np.array([client.part_of(int(size)) for size in data.train_sizes])
    each = [train(size, client.epochs * int(n), work.passing) for n in seen if n]
    training = sum(each) * cohort
    if work.deep:
        training += forward(teacher, client.epochs * float(seen.sum()) * cohort)
    held = float(data.heldout_sizes.sum()) * (1.0 if config.server.scores == "all" else cohort)
    public = sum(len(split) for split in data.validation.values())
    a_round = training / cores + work.scored * (forward(size, held) / cores + forward(size, public))
    a_round = max(a_round, max(each, default=0.0))  # the largest client is one worker's
    keys, rows = config.teacher, float(len(data.public))
    tuning = train(teacher, keys.epochs * rows, keys.token_budget) if tune else 0.0
    budget = config.student.warm_token_budget or client.token_budget
    warm = train(size, config.student.warm_epochs * rows, budget) if config.student.warm_epochs else 0.0
    once = warm + forward(teacher, len(private)) / cores + forward(teacher, public)
    total = START_SECONDS + tuning + once + config.rounds * a_round
    return Times(START_SECONDS, tuning, once, a_round, total)


def not_counted(config: Config) -> list[str]:
    """Keys whose time is not in the estimate."""
    keys = {
        "student.general-epochs": config.student.general_epochs,
        "distill.general-rounds": config.distill.general_rounds,
        "student.tiers": config.student.tiers,
        "student.heads": config.student.narrows,
        "privacy.unit": config.privacy.unit == "example",
        "privacy.secure-aggregation": config.privacy.secure_aggregation,
        "server.public-epochs": config.server.strategy in ("feddf", *VOTING),
        "client.mentor-layers": config.server.strategy == "fedkd",
    }
    return [key for key, given in keys.items() if given]


# --- on screen -----------------------------------------------------------------------------------


def lines(found: Mapping[str, Any]) -> list[str]:
    """The description in lines of at most 80 characters."""
    teacher, student, sent, seconds = (found[name] for name in ("teacher", "student", "bytes_per_round", "seconds"))
    left = found["clients"] - found["eligible"]
    note = f", {left} left out with too few examples" if left else ""
    about = f", about {spoken(seconds['fine_tuning'])}" if seconds["fine_tuning"] else ""
    tuned = "used as it is" if not teacher["fine_tuned"] else "fine-tuned before, in the cache"
    if not teacher["there"]:
        tuned = f"will be fine-tuned on {found['public']:,} public examples{about}"
    rank = f" of rank {student['rank']}" if student["rank"] else ""
    told = [
        f"task      {found['task']}, scored by {found['metric']}, seed {found['seed']}",
        f"clients   {found['clients']}{note}; {found['cohort']} a round, {found['rounds']} rounds",
        *([f"text      {found['ends']}"] if found["ends"] else []),
        f"teacher   {teacher['model']}, {teacher['parameters']:,} parameters;",
        f"          {tuned}",
        f"student   layers {', '.join(map(str, student['layers']))}; {student['heads']} heads, "
        f"{student['neurons']:,} neurons, {student['pieces']:,} word pieces{rank};",
        f"          {student['parameters']:,} parameters, {student['ratio']:.1%} of its teacher's; "
        f"{student['sent']:,} of them travel",
    ]
    if sent is None:
        what = "each tier's part of the student travels" if "student.tiers" in found["not_counted"] else VOTES
        told.append(f"a round   {what}; their bytes are not predicted")
    else:
        told += [
            f"a round   {weight(sent['down'])} down, {weight(sent['up'])} up "
            f"between the server and {found['workers']} workers;",
            f"          {weight(sent['client_down'])} down, {weight(sent['client_up'])} up for a client on a device of "
            "its own",
        ]
    told += [f"privacy   {words.removeprefix('privacy ')}" for words in found["privacy"]]
    told.append(f"time      about {spoken(seconds['total'])}, an estimate for this machine as it is now:")
    told.append(
        f"          {spoken(seconds['start'] + seconds['once'] + seconds['fine_tuning'])} before round 1, "
        f"then {spoken(seconds['round'])} a round"
    )
    if found["not_counted"]:
        told.append(f"          not counted: what {', '.join(found['not_counted'])} adds")
    wrapped = [textwrap.wrap(line, 80, subsequent_indent=" " * 10, break_on_hyphens=False) for line in told]
    return [part for parts in wrapped for part in parts] + [""]


def spoken(seconds: float) -> str:
    """``8 s``, ``3 min``, ``2.5 h``."""
    if seconds < 100:
        return f"{seconds:.1f} s" if seconds < 9.95 else f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def shard_sheet(found: Mapping[str, Any]) -> Sheet:
    """Sizes and label mix of the largest clients to the smallest; of many, some."""
    shards = found["shards"]
    counts, names = np.asarray(shards["counts"]), shards["classes"]
    sizes = np.asarray(shards["train"]) + np.asarray(shards["held_out"])
    order = np.argsort(-sizes, kind="stable")
    places = np.unique(np.linspace(0, len(order) - 1, min(SHOWN, len(order))).round().astype(int))
    shown = names[:CLASSES] if len(names) > CLASSES else names
    rows: list[Row] = []
    for client in order[places]:
        whole = max(int(sizes[client]), 1)
        share = [f"{counts[client][number] / whole:.0%}" for number in range(len(shown))]
        rows.append((str(client), f"{shards['train'][client]:,}", f"{shards['held_out'][client]:,}", *share))
    total = counts.sum(axis=0)
    every = [f"{total[number] / max(sizes.sum(), 1):.0%}" for number in range(len(shown))]
    rows.append(("all", f"{sum(shards['train']):,}", f"{sum(shards['held_out']):,}", *every))
    few = f"{len(places)} of {len(sizes)} clients, " if len(places) < len(sizes) else ""
    notes = [f"{len(names) - len(shown)} more classes are in --json."] if len(shown) < len(names) else []
    return Sheet(f"shards: {few}the largest first", ("client", "train", "held out", *shown), [rows], notes, width=14)
