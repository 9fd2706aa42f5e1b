"""The warm start: before round 1 the student learns on public text, where a server may see it.

First on all public text there is, without labels, from the teacher's hidden states and outputs (Jiao et al. 2020,
https://arxiv.org/abs/1909.10351, call it general distillation): what a cut takes from a model is mended best on much
text, of whatever kind. Then on the task's own public split, as clients will learn.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from common.config import Config
from common.corpus import labelled
from common.dataset import Split, load_tokenizer
from common.distillation import learn, learnt
from common.hashing import hash_json
from common.inference import predict
from common.keys import AUTO_BUDGET
from common.nested import Tiers
from common.objective import Examples
from common.probe import find_room
from common.progress import Progress
from common.public_text import LOST, MOVED, in_pairs
from common.pupil import Pupil
from common.recipe import INSIDE, Recipe, make_recipe
from common.seeding import generator
from common.tokens import Tokens, tokenize
from server.lesson import Lesson

WARM = (0, -1)  # round and client of the warm start: what its random choices come from
WARM_GENERAL = (0, -2)

DECAY, CLIP = 0.01, 1.0  # AdamW's, and the gradient's norm at most, as where a teacher is fine-tuned


def warms(config: Config, lesson: Lesson, *, final: bool) -> tuple[bool, bool]:
    """Whether the student learns on all public text, and whether on the public split.

    All text waits until the student has its ``final`` heads and neurons.
    """
    keys, split = config.student, len(lesson.data.public) > 0
    return final and keys.general_epochs > 0 and (split or len(lesson.text) > 0), keys.warm_epochs > 0 and split


def warm_key(config: Config, lesson: Lesson, *, final: bool) -> dict[str, Any]:
    """What a warm start depends on besides the student."""
    data = lesson.data
    public = np.asarray(data.public)
    keys = config.student
    general = [keys.general_epochs, hash_json(lesson.text), *([LOST, MOVED] if _reads_pairs(lesson) else [])]
    return {
        "keys": [keys.warm_epochs, keys.warm_lr, keys.train_embeddings],
        "general": general if final and keys.general_epochs else None,
        "tiers": keys.tiers if final and keys.tier_mode == "nested" and keys.tiers else None,  # else it is alone
        "distill": config.distill.model_dump(exclude={"prior_correction"}),  # of skewed clients
        "client": [
            _budget(config),
            config.client.micro_budget or config.client.token_budget,  # dropout draws anew for each part
            DECAY,
            CLIP,
        ],
        "public": hash_json([data.train.keys[public].tolist(), np.asarray(data.train.labels[public]).tolist()]),
        "windows": [data.max_length, data.windows, data.stride],
        "compute": lesson.compute.name,
    }


def _budget(config: Config) -> int:
    """Padded word pieces per batch."""
    return config.student.warm_token_budget or config.client.token_budget


def warm_up(
    config: Config,
    lesson: Lesson,
    pupil: Pupil,
    progress: Progress,
    *,
    final: bool,
    learnt_before: Mapping[str, Tensor],
) -> dict[str, Tensor]:
    """Distil on public text, in place; labels are used where the public split has them all.

    Args:
        final: whether the student has its last heads and neurons: see `warms`.
        learnt_before: what this returned for the student with all of them.

    Returns:
        What learns with it: the exits of the smaller students inside it, or a projection.
    """
    data, compute, keys = lesson.data, lesson.compute, config.student
    if not final:
        config = config.model_copy(update={"student": keys.model_copy(update={"tiers": ""})})
    lesson.model.to(compute.device)
    tiers = Tiers(config, pupil.model.to(compute.device), pupil.shape, int(lesson.model.config.hidden_size))
    whole = len(tiers) - 1
    student = tiers.student(whole)
    start = {**tiers.initial(), **{name: each.to(compute.device) for name, each in learnt_before.items()}}
    weights = {name: weight.clone() for name, weight in tiers.part(whole, start).items()}
    recipe = make_recipe(config, 1, pupil.shape, lesson.model.config, data.task.regression)
    recipe = replace(
        recipe, lr=keys.warm_lr, last_lr=keys.warm_lr / 10, token_budget=_budget(config), weight_decay=DECAY,
        clip_norm=CLIP, proximal=0.0, sgd=False,
    )  # fmt: skip
    passes: list[tuple[str, Examples, Recipe, tuple[int, int]]] = []
    on_all_text, on_split = warms(config, lesson, final=final)
    if on_all_text:
        general = replace(recipe, epochs=keys.general_epochs, weights=_unlabelled(recipe, 1.0), adaptive=False)
        passes.append(("public texts", _all_public_text(lesson, pupil, config.seed, progress), general, WARM_GENERAL))
    if on_split:
        examples = _examples(lesson, pupil.data.train, np.asarray(data.public), pupil.taught, progress)
        if not labelled(data.train.labels[examples.rows]).all():
            recipe = replace(recipe, weights={**recipe.weights, "hard": 0.0}, adaptive=False)
        passes.append(("public examples", examples, replace(recipe, epochs=keys.warm_epochs), WARM))
    for what, examples, one, who in passes:
        room = None
        if config.client.micro_budget == AUTO_BUDGET:
            room = find_room(student, weights, examples, recipe=one, compute=compute, teacher=lesson.model)
        count = len(examples.rows)
        with progress.step(f"warm the student up on {count:,} {what}", count * one.epochs) as bar:
            state = learn(
                student, weights, examples, recipe=one, compute=compute, seed=config.seed, who=who,
                teacher=lesson.model, room=room, advance=bar.advance,
            )  # fmt: skip
        weights = {name: weight.clone() for name, weight in learnt(state, weights).items()}
    with torch.no_grad():
        for name, tensor in weights.items():
            student.trained[name].copy_(tensor)
    pupil.model.to("cpu").eval()
    inside = set(student.trained) - set(tiers[whole].names.values())
    return {name: student.trained[name].detach().cpu() for name in sorted(inside)}


def _unlabelled(recipe: Recipe, hidden: float) -> dict[str, float]:
    """The weights of the loss on outputs, without labels, and one of the loss on hidden states."""
    kept = {part: weight if part in ("soft", *INSIDE) else 0.0 for part, weight in recipe.weights.items()}
    return {**kept, "hidden": hidden}


def _reads_pairs(lesson: Lesson) -> bool:
    return len(lesson.data.train.texts) == 2


def _all_public_text(lesson: Lesson, pupil: Pupil, seed: int, progress: Progress) -> Examples:
    """Every public text, each once and by itself, or in pairs where the task is on pairs; no labels."""
    data = lesson.data
    own = [column.take(np.asarray(data.public)) for column in data.train.texts]
    texts = list(dict.fromkeys([text for column in own for text in column if text] + list(lesson.text)))
    columns: tuple[list[str], ...] = (texts,)
    if _reads_pairs(lesson):
        pairs = in_pairs(list(zip(*own, strict=True)), texts, generator(seed, "pairs"))
        columns = ([first for first, _ in pairs], [second for _, second in pairs])
    count = len(columns[0])
    folders = [pupil.folder] if pupil.taught is None else [pupil.folder, lesson.teacher.folder]
    with progress.step("tokenise the public texts", len(folders) * count) as bar:
        read, *taught = (tokenize(columns, load_tokenizer(one), data.max_length, bar.advance) for one in folders)
    split = Split(read, np.full(count, -1), np.zeros((count, 16), dtype=np.uint8))
    return _examples(lesson, split, np.arange(count), taught[0] if taught else None, progress)


def _examples(
    lesson: Lesson, split: Split, rows: NDArray[np.int64], taught: Tokens | None, progress: Progress
) -> Examples:
    """These rows with the teacher's outputs."""
    with progress.step(f"teacher outputs for {len(rows):,} public texts", len(rows)) as bar:
        soft = predict(lesson.model, split.tokens if taught is None else taught, rows, lesson.compute, bar.advance)
    return Examples(split, rows, soft, taught)
