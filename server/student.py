"""The student before round 1: its shape chosen, cut from the teacher, warmed up on public text, kept in the cache.

Like the teacher it is known by what it depends on, and is there for the next run of the same keys. Workers open it
by its key and compare its weights with the hash.
"""

import copy
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file

from common.config import Config
from common.dataset import load_tokenizer, tokenizer_hash
from common.errors import InputError
from common.families import embedding_width, head_count, neuron_count
from common.hashing import hash_json, runtime_fingerprint
from common.models import choose_layers, count_parameters
from common.progress import Progress
from common.pupil import EXITS, Pupil, load_exits, open_pupil, save_pupil
from common.recipe import relation_heads
from common.seeding import generator, seed_for
from common.slim import Numbers, Shape, cut_student, narrow
from common.store import build_folder, cache_folder
from common.tokens import tokenize
from common.vocabulary import choose_pieces, save_trimmed
from server.fitting import fitting_pieces
from server.lesson import Lesson
from server.origin import Origin, check_first_piece
from server.tiered import check_tiers
from server.warm_start import warm_key, warm_up, warms

Width = tuple[Numbers, Numbers]  # heads and neurons kept of each layer


@dataclass(frozen=True)
class Plan:
    """A student that is to be made.

    Attributes:
        depends: what it depends on besides its shape and its teacher.
        cut: given a folder, writes the tokenizer there and returns the module as it is before the warm start.
        own_pieces: whether it cuts text in another way than the teacher.
        final: whether these are its last heads and neurons: the smaller students inside it are warmed up then, too.
        learnt: of what learns beside it what was learnt before.
    """

    shape: Shape
    depends: dict[str, Any]
    cut: Callable[[Path], Any]
    own_pieces: bool
    final: bool
    learnt: Mapping[str, torch.Tensor] = field(default_factory=dict)


def prepare_student(config: Config, lesson: Lesson, origin: Origin, progress: Progress) -> Pupil:
    """Cut the student from its origin and warm it up, or open it where that was done before.

    Raises:
        InputError: a key asks for more than the teacher has.
    """
    keys, model, teacher = config.student, origin.model, lesson.model.config
    check_first_piece(config, lesson.model, "this teacher")
    layers = choose_layers(keys.layer_selection, keys.layers, model.config.num_hidden_layers)
    tokenizer = load_tokenizer(origin.folder)
    pieces = _pieces(config, lesson, origin, layers, progress)
    shape = replace(
        Shape.whole(model.config, layers),
        pieces=len(pieces) or model.config.vocab_size,
        rank=keys.embedding_rank,
        head_size=origin.head_size,
    )
    check_width(config, shape, model.config, origin.name)
    relation_heads(config.distill.relation_heads, narrowed(config, shape), teacher)
    check_tiers(config, narrowed(config, shape), teacher, lesson.data)

    def cut(folder: Path) -> Any:
        torch.manual_seed(seed_for(config.seed, "student"))
        if pieces:
            save_trimmed(origin.folder, pieces, folder)
        else:
            tokenizer.save_pretrained(folder)
        return cut_student(model, shape, pieces=pieces, dropout=keys.dropout, random=keys.layer_selection == "random")

    depends = {"pieces": pieces, "random": keys.layer_selection == "random", "origin": origin.key}
    own_pieces = bool(pieces) or origin.own_pieces
    return _made(config, lesson, progress, Plan(shape, depends, cut, own_pieces, not keys.narrows))


def narrow_student(config: Config, lesson: Lesson, wide: Pupil, width: Width, progress: Progress) -> Pupil:
    """Keep these heads and neurons of each layer, and warm the student up again."""
    heads, neurons = width

    def cut(folder: Path) -> Any:
        load_tokenizer(wide.folder).save_pretrained(folder)
        student = copy.deepcopy(wide.model).to("cpu")
        narrow(student, heads, neurons)
        return student

    learnt = load_exits(wide)
    depends = {"wide": wide.key, "heads": heads, "neurons": neurons, **({"learnt": sorted(learnt)} if learnt else {})}
    shape = replace(wide.shape, heads=heads, neurons=neurons)
    plan = Plan(shape, depends, cut, wide.taught is not None, final=True, learnt=learnt)
    return _made(config, lesson, progress, plan)


def choose_width(config: Config, heads: NDArray[np.float64], neurons: NDArray[np.float64]) -> Width:
    """For each layer the heads and neurons that matter most, (layers, number), the most important first."""
    return _best(heads, config.student.heads), _best(neurons, config.student.neurons)


def random_width(config: Config, shape: Shape) -> Width:
    """The control: any heads and neurons matter."""
    rng = generator(config.seed, "width")
    return choose_width(config, *(rng.random((len(part), len(part[0]))) for part in (shape.heads, shape.neurons)))


def check_width(config: Config, shape: Shape, whole: Any, name_of_whole: str = "the teacher") -> None:
    """Raise `InputError` unless the student is no larger in any direction than the model that it is cut from.

    Args:
        whole: that one's configuration.
    """
    keys = config.student
    for name, asked, most in (
        ("heads", keys.heads, head_count(whole)),
        ("neurons", keys.neurons, neuron_count(whole)),
        ("embedding-rank", keys.embedding_rank, min(embedding_width(whole), shape.pieces)),
    ):
        if asked > most:
            raise InputError(f"student.{name} = {asked}: {name_of_whole} has {most}; give at most that, or 0 for all")


def narrowed(config: Config, shape: Shape) -> Shape:
    """The shape with as many heads and neurons as the student will have, whichever these are."""
    return shape.beginning(len(shape.layers), config.student.heads, config.student.neurons)


def _best(importance: NDArray[np.float64], keep: int) -> Numbers:
    """For each layer its most important parts, first the most important; among equals the lower number."""
    order = np.argsort(-importance, axis=1, kind="stable")
    return tuple(tuple(row[: keep or None].tolist()) for row in order)


def _pieces(config: Config, lesson: Lesson, origin: Origin, layers: tuple[int, ...], progress: Progress) -> list[int]:
    """The numbers that the student's pieces have in what it is cut from; none: all of them."""
    model, tokenizer, keys = origin.model, load_tokenizer(origin.folder), config.student
    keep = keys.vocabulary
    if keys.target_ratio:
        keep = fitting_pieces(config, model, layers, tokenizer, count_parameters(lesson.model))
    if not keep:
        return []
    counts = np.bincount(origin.tokens.pieces(np.asarray(lesson.data.public)), minlength=model.config.vocab_size)
    if lesson.text:
        with progress.step("tokenise the public texts", len(lesson.text)) as step:
            more = tokenize((list(lesson.text),), tokenizer, lesson.data.max_length, step.advance)
        counts += np.bincount(more.ids, minlength=len(counts))
    return choose_pieces(tokenizer, counts, keep)


def _made(config: Config, lesson: Lesson, progress: Progress, plan: Plan) -> Pupil:
    """Make the student in the cache unless it is there, and open it."""
    data, teacher, cache = lesson.data, lesson.teacher, cache_folder(config.runtime.cache)
    warm = any(warms(config, lesson, final=plan.final))
    key = hash_json(
        {
            "teacher": teacher.hash,
            "tokenizer": tokenizer_hash(teacher.folder),
            "dropout": config.student.dropout,
            "seed": config.seed,
            **plan.depends,
            "shape": asdict(plan.shape),
            "warm": warm_key(config, lesson, final=plan.final) if warm else None,
            **runtime_fingerprint(teacher.folder, torch.get_num_threads()),
        }
    )[:32]
    target = cache / "students" / key
    with build_folder(target) as draft:
        if draft is not None:
            save_pupil(plan.cut(draft), plan.shape, draft, own_pieces=plan.own_pieces)
            if warm:
                pupil = open_pupil(draft, data, cache, progress)
                exits = warm_up(config, lesson, pupil, progress, final=plan.final, learnt_before=plan.learnt)
                if exits:
                    save_file(exits, draft / EXITS)
                save_pupil(pupil.model, plan.shape, draft, own_pieces=plan.own_pieces)
    return open_pupil(target, data, cache, progress)
