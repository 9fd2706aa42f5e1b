"""Teacher and student: loading a frozen teacher, choosing the layers of a student, what of it is trained."""

import re
from pathlib import Path
from typing import Any

import torch

from common.errors import InputError
from common.families import is_embedding, pad_with_end

DROPOUTS = (
    "hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout",
    "dropout", "attention_dropout", "seq_classif_dropout", "summary_last_dropout", "summary_first_dropout",
    "resid_pdrop", "embd_pdrop", "attn_pdrop",
)  # fmt: skip


def dropouts_of(model: Any) -> set[float]:
    """The shares of its states that a model drops out in training, as its configuration and its modules say."""
    said = (getattr(model.config, name, None) for name in DROPOUTS)
    return {float(share) for share in said if share is not None} | {
        m.p for m in model.modules() if isinstance(m, torch.nn.Dropout)
    }


def load_teacher(folder: Path, complete: bool = True, *, key: str = "teacher.model", **overrides: Any) -> Any:
    """A sequence classifier from a folder of safetensors, frozen and in evaluation mode.

    ``overrides`` go into its configuration, e.g. ``num_labels`` for a bare encoder, whose head is then drawn
    from torch's global generator.

    Args:
        key: the key that named it.

    Raises:
        InputError: it does not load, or ``complete`` is asked for and some of the weights are not there.
    """
    model, missing = load_frozen("AutoModelForSequenceClassification", folder, key=key, **overrides)
    if complete and missing:
        raise InputError(f"{key}: {folder} lacks {len(missing)} of the model's weights, e.g. {missing[0]}")
    return model


def load_frozen(kind: str, folder: Path, *, key: str = "teacher.model", **overrides: Any) -> tuple[Any, list[str]]:
    """A model that transformers opens as this kind, frozen and in evaluation mode, and its weights that are not there.

    Raises:
        InputError: it does not load.
    """
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    safely = {"local_files_only": True, "use_safetensors": True, "trust_remote_code": False}
    try:
        model, found = getattr(transformers, kind).from_pretrained(
            folder, dtype=torch.float32, output_loading_info=True, **safely, **overrides
        )
    except (RuntimeError, ValueError, KeyError, OSError) as error:
        raise InputError(f"{key}: {folder} does not load ({type(error).__name__})") from None
    pad_with_end(model.config)
    return model.requires_grad_(False).eval(), sorted(found["missing_keys"])


SELECTIONS = ("spaced", "distilbert", "bottom", "top", "random")


def choose_layers(selection: str, keep: int, have: int) -> tuple[int, ...]:
    """Which of the teacher's layers the student keeps, ascending.

    ``spaced`` spreads them evenly from the first to the last, and so does ``random``, whose weights are not kept;
    ``distilbert``, which takes 0, 2, 4, 7, 9, 11 of 12 (Sanh et al. 2019), does the same; ``bottom`` and ``top`` take
    neighbours. Otherwise the numbers themselves, comma between.

    Raises:
        InputError: the teacher has no such layers, or their number is not ``keep``.
    """
    if keep > have:
        raise InputError(f"student.layers = {keep}: the teacher has {have} layers; give at most that")
    if selection in ("spaced", "distilbert", "random"):
        return tuple(round(i * (have - 1) / max(keep - 1, 1)) for i in range(keep))
    if selection in ("bottom", "top"):
        return tuple(range(keep)) if selection == "bottom" else tuple(range(have - keep, have))
    if not re.fullmatch(r"\s*\d+\s*(,\s*\d+\s*)*", selection):
        raise InputError(
            f"student.layer-selection = {selection!r}: give {', '.join(SELECTIONS)} or layer numbers such as 0,2,5"
        )
    layers = tuple(int(part) for part in selection.split(","))
    if list(layers) != sorted(set(layers)) or layers[-1] >= have:
        raise InputError(
            f"student.layer-selection = {selection!r}: give different layers in ascending order, from 0 to {have - 1}"
        )
    if len(layers) != keep:
        raise InputError(f"student.layer-selection = {selection!r}: {len(layers)} layers, but student.layers = {keep}")
    return layers


def freeze_embeddings(model: Any, train_embeddings: bool) -> dict[str, torch.nn.Parameter]:
    """Set what is trained and return it by name; frozen weights get no gradient and never travel."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(train_embeddings or not is_embedding(model, name))
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def set_training(model: Any) -> None:
    """Training mode, with the attention that is fastest on the way back.

    On the CPU the fused attention of torch 2.13 takes 3 to 8 times the time of plain products there, at the lengths
    and widths of sentence encoders; `common.inference` chooses the fused one again, which wins on the way forward.
    """
    model.train()
    model.set_attn_implementation("eager" if model.device.type == "cpu" else "sdpa")


def count_parameters(model: torch.nn.Module) -> int:
    """All weights, tied ones once."""
    return sum(parameter.numel() for parameter in model.parameters())


def pair_hidden_layers(
    pairs: str, student_layers: int, teacher_layers: int, key: str = "hidden-layers"
) -> tuple[tuple[int, int], ...]:
    """Which student layer's output is compared with which teacher layer's, both counted from 0.

    ``even`` spreads the teacher over the student so that the last meets the last (TinyBERT's uniform map);
    ``last`` compares only those two (DistilBERT). A teacher with fewer layers (FedKD's mentor may have) is met by
    its first for as long as there is none before.

    Args:
        key: which of the section ``distill`` the pairs are from.

    Raises:
        InputError: a layer does not exist.
    """
    last = (student_layers - 1, teacher_layers - 1)
    if pairs == "last":
        return (last,)
    if pairs == "even":
        return tuple(
            (layer, max((layer + 1) * teacher_layers // student_layers, 1) - 1) for layer in range(student_layers)
        )
    if not re.fullmatch(r"\s*\d+\s*:\s*\d+\s*(,\s*\d+\s*:\s*\d+\s*)*", pairs):
        raise InputError(f"distill.{key} = {pairs!r}: give `even`, `last` or pairs such as 0:1,2:5")
    found = tuple((int(a), int(b)) for a, b in (pair.split(":") for pair in pairs.split(",")))
    if any(a > last[0] or b > last[1] for a, b in found):
        raise InputError(f"distill.{key} = {pairs!r}: student layers go to {last[0]}, teacher layers to {last[1]}")
    return found
