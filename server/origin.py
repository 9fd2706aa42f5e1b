"""What the student is cut from: its teacher, or the model that ``student.model`` names."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from common.config import Config
from common.dataset import in_pieces_of, load_tokenizer, tokenizer_hash
from common.errors import InputError
from common.families import family_of
from common.hashing import hash_file, hash_json, hash_tensors
from common.models import load_teacher
from common.progress import Progress
from common.recipe import BY_PLACE
from common.seeding import seed_for
from common.store import cache_folder
from common.tokens import Tokens
from server.lesson import Lesson
from server.teacher import TeacherSource, check_labels, check_length, find_teacher, head_of

KEY = "student.model"


@dataclass(frozen=True)
class Origin:
    """A frozen model with the task's head.

    Attributes:
        folder: where its tokenizer lies.
        tokens: the train table in its pieces.
        key: hash of its weights, its configuration and its tokenizer's files; empty: it is the teacher.
        own_pieces: whether it cuts text in another way than the teacher.
        name: what an error calls it.
    """

    folder: Path
    model: Any
    tokens: Tokens
    key: str = ""
    own_pieces: bool = False
    name: str = "the teacher"

    @property
    def head_size(self) -> int:
        """Width of an attention head, where it may differ from the teacher's, as `common.slim.Shape` has it."""
        return int(self.model.config.hidden_size) // int(self.model.config.num_attention_heads) if self.key else 0


def find_origin(config: Config) -> TeacherSource | None:
    """What ``student.model`` names, checked without loading its weights; None: the student is cut from its teacher.

    Raises:
        InputError: as `find_teacher`, and when examples could be longer than it can take.
    """
    if not config.student.model:
        return None
    source = find_teacher(config.student.model, KEY)
    check_length(source, config.data.max_length, KEY)
    return source


def open_origin(config: Config, lesson: Lesson, progress: Progress) -> Origin:
    """Load what the student is cut from; a bare encoder gets a head drawn from the seed.

    Raises:
        InputError: its head is another task's, or the loss compares states that it does not have.
    """
    data, source = lesson.data, find_origin(config)
    if source is None:
        return Origin(lesson.teacher.folder, lesson.model, data.train.tokens)
    check_labels(source, data.task, KEY)
    torch.manual_seed(seed_for(config.seed, "student-head"))
    fresh = {} if source.head else head_of(data.task)
    model = load_teacher(source.folder, complete=not fresh, key=KEY, **fresh)
    config_hash = hash_file(source.folder / "config.json")  # other activations are another model of the same weights
    key = hash_json([hash_tensors(model.state_dict()), config_hash, tokenizer_hash(source.folder)])
    own_pieces, tokens = has_own_pieces(config, model, source.folder, lesson.teacher.folder), data.train.tokens
    if own_pieces:
        tokens = in_pieces_of(source.folder, data, cache_folder(config.runtime.cache), progress).train.tokens
    return Origin(source.folder, model, tokens, key, own_pieces, KEY)


def has_own_pieces(config: Config, model: Any, folder: Path, teacher: Path) -> bool:
    """Whether the origin cuts text in another way than the teacher.

    Args:
        model: the origin; its weights are not read.
        folder, teacher: where their tokenizers lie.

    Raises:
        InputError: words, or first pieces, would be compared that are not the same.
    """
    check_first_piece(config, model, KEY)
    mine, theirs = _document(folder), _document(teacher)
    distill = config.distill
    weights = [f"{part}-weight" for part in BY_PLACE if getattr(distill, f"{part}_weight") > 0]
    if weights and _words(mine) != _words(theirs):
        raise InputError(
            f"distill.{weights[0]}: the tokenizer of {KEY} = {config.student.model!r} splits text into other words "
            "than the teacher's, and states are compared word by word; give 0, or a model whose tokenizer is of the "
            "teacher's kind"
        )
    return mine != theirs


def check_first_piece(config: Config, model: Any, name: str) -> None:
    """Raise `InputError` where a text's first piece is compared, and the model has not read the others by then."""
    if config.distill.cls_weight > 0 and family_of(model).reads_last:
        raise InputError(
            f"distill.cls-weight = {config.distill.cls_weight}: {name} reads from left to right, so that a text's "
            "first piece knows nothing of the others; give 0, or distill.hidden-weight"
        )


def _document(folder: Path) -> dict[str, Any]:
    """All that the inputs of a text depend on."""
    tokenizer = load_tokenizer(folder)
    found: dict[str, Any] = json.loads(tokenizer.backend_tokenizer.to_str())
    names = list(tokenizer.model_input_names)  # BERT's has token types, DistilBERT's has none
    return {**found, "truncation": None, "padding": None, "inputs": names, "pad": tokenizer.pad_token_id}


def _words(document: dict[str, Any]) -> Any:
    """What a tokenizer's words depend on: whether letters have case or accents does not matter."""
    normalizer, processor = document["normalizer"] or {}, document["post_processor"] or {}
    kept = {name: value for name, value in normalizer.items() if name not in ("lowercase", "strip_accents")}
    # special pieces are words of their own, whatever they are called
    special = {name: [list(part) for part in processor.get(name) or ()] for name in ("single", "pair")}
    return kept, document["pre_tokenizer"], processor.get("type"), special
