"""A student's own vocabulary: the word pieces most frequent in public text, and the tokenizer that cuts text into them.

Every single character of the teacher's vocabulary is kept, so no word is lost: what is not a piece any more is spelt
in smaller ones. Private text has no say in it, or the vocabulary would tell of it.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from common.dataset import load_tokenizer
from common.errors import InputError

MODELS = ("WordPiece", "BPE")


def choose_pieces(tokenizer: Any, counts: NDArray[np.int64], keep: int) -> list[int]:
    """The numbers of the pieces to keep, ascending.

    Special pieces and single characters first; then the most frequent, with every piece that a merge of theirs needs;
    among equals, and where public text has too few, the lower number, which vocabularies give to the commoner piece.

    Args:
        counts: (pieces,) how often each piece stands in public text.

    Raises:
        InputError: the tokenizer's kind cannot be trimmed, or ``keep`` is fewer than must be kept.
    """
    document = _document(tokenizer)
    model, vocabulary = document["model"], _numbers(document)
    needs = _parts(model)
    kept, used = set(_indispensable(tokenizer, model)), _used(vocabulary)
    if not len(kept) <= keep <= len(used):
        raise InputError(
            f"student.vocabulary = {keep}: give {len(kept)} (special pieces and single characters) to {len(used)}"
        )
    for number in np.lexsort((np.arange(len(counts)), -counts)).tolist():
        added = _closure(number, needs) - kept
        if number in used and len(kept) + len(added) <= keep:
            kept |= added
        if len(kept) == keep:
            break
    return sorted(kept)


def piece_bounds(tokenizer: Any) -> tuple[int, int]:
    """How many pieces any student of this vocabulary has at least, and at most."""
    document = _document(tokenizer)
    return len(_indispensable(tokenizer, document["model"])), len(_used(_numbers(document)))


def save_trimmed(tokenizer_folder: Path, pieces: Sequence[int], folder: Path) -> None:
    """Write the tokenizer that knows these pieces alone, numbered in their order."""
    tokenizer = load_tokenizer(tokenizer_folder)
    document = _document(tokenizer)
    names = {number: name for name, number in _numbers(document).items()}
    number = {names[old]: new for new, old in enumerate(pieces)}
    tokenizer.save_pretrained(folder)  # the files that say how it is used
    for stale in ("vocab.txt", "vocab.json", "merges.txt", "added_tokens.json"):
        (folder / stale).unlink(missing_ok=True)
    document["model"]["vocab"] = number
    if document["model"]["type"] == "BPE":
        document["model"]["merges"] = [
            pair for pair in document["model"]["merges"] if _joined(pair) in number and set(_pair(pair)) <= set(number)
        ]
    document["added_tokens"] = [
        {**entry, "id": number[entry["content"]]} for entry in document["added_tokens"] if entry["content"] in number
    ]
    document["truncation"] = document["padding"] = None
    _renumber(document.get("post_processor"), number)
    (folder / "tokenizer.json").write_text(json.dumps(document, ensure_ascii=False))
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text())
    config.pop("added_tokens_decoder", None)
    path.write_text(json.dumps(config, indent=2))


def _document(tokenizer: Any) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(tokenizer.backend_tokenizer.to_str())
    if found["model"]["type"] not in MODELS:
        raise InputError(
            f"student.vocabulary: a {found['model']['type']} tokenizer cannot be trimmed, only {' or '.join(MODELS)}"
        )
    return found


def _numbers(document: Mapping[str, Any]) -> dict[str, int]:
    """Of every piece, those that were added to the model's own vocabulary among them."""
    return {**document["model"]["vocab"], **{entry["content"]: entry["id"] for entry in document["added_tokens"]}}


def _indispensable(tokenizer: Any, model: Mapping[str, Any]) -> list[int]:
    vocabulary, prefix = model["vocab"], model.get("continuing_subword_prefix") or ""
    suffix = model.get("end_of_word_suffix") or ""
    single = [number for name, number in vocabulary.items() if len(name.removeprefix(prefix).removesuffix(suffix)) == 1]
    return sorted({*single, *tokenizer.all_special_ids})


def _used(vocabulary: Mapping[str, int]) -> set[int]:
    """All pieces but the places that BERT's vocabularies leave free. A model may have rows for more than these."""
    return {number for name, number in vocabulary.items() if not name.startswith("[unused")}


def _parts(model: Mapping[str, Any]) -> dict[int, tuple[int, int]]:
    """Of each piece that byte-pair encoding merges the two that it is merged from."""
    vocabulary = model["vocab"]
    found: dict[int, tuple[int, int]] = {}
    for pair in model.get("merges", []):
        left, right = _pair(pair)
        found.setdefault(vocabulary[left + right], (vocabulary[left], vocabulary[right]))
    return found


def _closure(number: int, needs: Mapping[int, tuple[int, int]]) -> set[int]:
    found, open_ = set(), [number]
    while open_:
        piece = open_.pop()
        if piece not in found:
            found.add(piece)
            open_ += needs.get(piece, ())
    return found


def _pair(pair: str | Iterable[str]) -> tuple[str, str]:
    left, right = pair.split(" ") if isinstance(pair, str) else pair
    return left, right


def _joined(pair: str | Iterable[str]) -> str:
    return "".join(_pair(pair))


def _renumber(processor: Any, number: Mapping[str, int]) -> None:
    """Give the special pieces that a post-processor adds their new numbers, wherever it keeps them."""
    if isinstance(processor, dict):
        for key, value in processor.items():
            if key == "special_tokens":
                for entry in value.values():
                    entry["ids"] = [number[name] for name in entry["tokens"]]
            elif key in ("sep", "cls"):
                processor[key] = [value[0], number[value[0]]]
            else:
                _renumber(value, number)
    elif isinstance(processor, list):
        for value in processor:
            _renumber(value, number)
