"""An exported student on a device: opened, checked and run with onnxruntime, tokenizers and NumPy alone.

The folder that ``fedistill export`` writes:

    model.fp32.onnx   the student, weights as 32-bit floats; a device that has the other one does without
    model.int8.onnx   the same with 8-bit weights, where that was asked for
    tokenizer.json    how text is cut into word pieces
    model.json        what else is needed to feed the model and to read its outputs: `Spec`
    card.md           what the model is, for people
    card.json         the same for programs, with the SHA-256 of every other file

Neither torch nor transformers is imported here: import-linter holds that.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from common.errors import InputError
from common.files import clean

FORMAT = 1
FLOATS, BYTES, SPEC, TOKENIZER, CARD = "model.fp32.onnx", "model.int8.onnx", "model.json", "tokenizer.json", "card.json"
KINDS = ("classes", "multi-label", "score")
TOKEN_BUDGET = 1024  # padded word pieces that pass at once

Window = tuple[list[int], list[int]]  # its word pieces, and the text of a pair that each is of


@dataclass(frozen=True)
class Spec:
    """How texts become the model's inputs, and what its outputs mean.

    Attributes:
        kind: of `KINDS`: one of the labels, any number of them, or a number.
        labels: their names, in the order of the model's outputs; none for a number.
        columns: names of the texts of an example, one or two.
        max_length: word pieces of each window, special ones included.
        windows: the most that a text is cut into; the mean of their logits is the text's.
        stride: word pieces that neighbours share.
        side: where what is too long is cut off: right or left.
        padding: number of the padding piece.
        token_types: whether the model is told which text of a pair a piece is of.
    """

    task: str
    kind: str
    labels: tuple[str, ...]
    columns: tuple[str, ...]
    max_length: int
    windows: int
    stride: int
    side: str
    padding: int
    token_types: bool

    @property
    def outputs(self) -> int:
        return len(self.labels) or 1

    @property
    def inputs(self) -> tuple[str, ...]:
        return ("input_ids", "attention_mask", *(("token_type_ids",) if self.token_types else ()))

    def to_json(self) -> dict[str, Any]:
        return {"format": FORMAT, **asdict(self)}

    @classmethod
    def from_json(cls, raw: Any) -> "Spec":
        """Raises KeyError, TypeError or ValueError for anything but what `to_json` makes."""
        found = cls(
            task=str(raw["task"]),
            kind=str(raw["kind"]),
            labels=tuple(map(str, raw["labels"])),
            columns=tuple(map(str, raw["columns"])),
            **{name: int(raw[name]) for name in ("max_length", "windows", "stride", "padding")},
            side=str(raw["side"]),
            token_types=bool(raw["token_types"]),
        )
        counts = found.max_length > 0 and found.windows > 0 and found.stride >= 0 and found.padding >= 0
        named = (
            found.kind in KINDS and found.side in ("right", "left") and bool(found.labels) != (found.kind == "score")
        )
        if raw["format"] != FORMAT or not counts or not named or len(found.columns) not in (1, 2):
            raise ValueError("no such model")
        return found


class Exported:
    """A model that is ready to read texts.

    Args:
        tokenizer: the contents of tokenizer.json.
        model: the contents of an ONNX file.
        threads: that one text may use; 0: as many as onnxruntime finds fit.
    """

    def __init__(self, spec: Spec, tokenizer: str, model: bytes, threads: int = 0) -> None:
        runtime, tokenizers = import_runtime()
        self.spec, self._tokenizer = spec, tokenizers.Tokenizer.from_str(tokenizer)
        self._tokenizer.no_padding()
        stride = spec.stride if spec.windows > 1 else 0
        self._tokenizer.enable_truncation(spec.max_length, stride=stride, strategy="longest_first", direction=spec.side)
        options = runtime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
        options.log_severity_level = 3
        self._session = runtime.InferenceSession(model, options, providers=["CPUExecutionProvider"])

    def windows(self, columns: Sequence[Sequence[str]]) -> list[list[Window]]:
        """The windows of each example; of its texts one or two columns, each of the same length."""
        texts = [[clean(text) for text in column] for column in columns]
        rows = texts[0] if len(texts) == 1 else list(zip(*texts, strict=True))
        found = self._tokenizer.encode_batch(rows)
        whole = [[each, *each.overflowing][: self.spec.windows] for each in found]
        return [[(each.ids, each.type_ids) for each in windows] for windows in whole]

    def run(self, windows: Sequence[Window]) -> NDArray[np.float32]:
        """Logits of some windows in one batch, (len(windows), outputs)."""
        width = max(1, *(len(ids) for ids, _ in windows))  # of an empty text a tokenizer may make nothing
        arrays = {name: np.zeros((len(windows), width), dtype=np.int64) for name in self.spec.inputs}
        arrays["input_ids"][:] = self.spec.padding
        for row, (ids, types) in enumerate(windows):
            arrays["input_ids"][row, : len(ids)] = ids
            arrays["attention_mask"][row, : len(ids)] = 1
            if self.spec.token_types:
                arrays["token_type_ids"][row, : len(ids)] = types
        (logits,) = self._session.run(["logits"], arrays)
        return np.asarray(logits, dtype=np.float32)

    def logits(
        self,
        columns: Sequence[Sequence[str]],
        budget: int = TOKEN_BUDGET,
        advance: Callable[[int], None] = lambda amount: None,
    ) -> NDArray[np.float32]:
        """Logits of examples, (n, outputs): the mean over the windows of each.

        Args:
            budget: padded word pieces per batch; 0: each window by itself.
        """
        examples = self.windows(columns)
        flat = [window for windows in examples for window in windows]
        owners = np.repeat(np.arange(len(examples)), [len(windows) for windows in examples])
        order = np.argsort([len(ids) for ids, _ in flat], kind="stable")
        found = np.empty((len(flat), self.spec.outputs), dtype=np.float32)
        start = 0
        while start < len(order):
            end = start + 1
            while end < len(order) and (end - start + 1) * len(flat[order[end]][0]) <= budget:
                end += 1
            found[order[start:end]] = self.run([flat[place] for place in order[start:end]])
            advance(end - start)
            start = end
        total = np.zeros((len(examples), self.spec.outputs), dtype=np.float64)
        np.add.at(total, owners, found)
        return np.asarray(total / np.bincount(owners, minlength=len(examples))[:, None], dtype=np.float32)


def probabilities(spec: Spec, logits: NDArray[np.float32]) -> NDArray[np.float64]:
    """(n, labels): of classes, they add up to one; of several labels, each stands for itself."""
    wide = logits.astype(np.float64)
    if spec.kind == "multi-label":
        return np.asarray(np.exp(-np.logaddexp(0.0, -wide)))
    powers = np.exp(wide - wide.max(axis=1, keepdims=True))
    return np.asarray(powers / powers.sum(axis=1, keepdims=True))


def open_export(folder: Path, *, fp32: bool = False, threads: int = 0) -> Exported:
    """Open a folder that ``fedistill export`` wrote, after the hash of every file in it.

    Args:
        fp32: the model with 32-bit weights, where there is one with 8 bits too.

    Raises:
        InputError: it is no export, or a file is missing, damaged or of another version.
    """
    hashes = _hashes(folder)
    model = FLOATS if fp32 or BYTES not in hashes else BYTES
    data = {name: _checked(folder / name, hashes.get(name, "")) for name in (model, SPEC, TOKENIZER)}
    for name, digest in hashes.items():
        if name not in data and (folder / name).is_file():
            _checked(folder / name, digest)
    try:
        spec = Spec.from_json(json.loads(data[SPEC]))
    except (ValueError, KeyError, TypeError):
        raise InputError(f"{folder / SPEC}: of another version; export the run again with this one") from None
    import_runtime()
    try:
        return Exported(spec, data[TOKENIZER].decode(), data[model], threads)
    except Exception as error:  # onnxruntime and tokenizers raise many kinds
        raise InputError(f"{folder}: {model} or {TOKENIZER} does not load ({type(error).__name__})") from None


def import_runtime() -> tuple[Any, Any]:
    """onnxruntime and tokenizers. Raises InputError where one is not installed."""
    try:
        import onnxruntime
        import tokenizers
    except ImportError as error:
        raise InputError(f"{error.name} is not installed: pip install 'fedistill[export]'") from None
    return onnxruntime, tokenizers


def _hashes(folder: Path) -> dict[str, str]:
    """SHA-256 of each file of an export, by name."""
    try:
        files = json.loads((folder / CARD).read_text())["files"]
        found = {str(name): str(entry["sha256"]) for name, entry in files.items()}
    except FileNotFoundError:
        raise InputError(f"{folder}: no {CARD} in it; give a folder that `fedistill export` wrote") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise InputError(f"{folder / CARD}: not a card of `fedistill export`; export the run again") from None
    if any(Path(name).name != name for name in found):
        raise InputError(f"{folder / CARD}: names a file outside of its folder; export the run again")
    return found


def _checked(path: Path, digest: str) -> bytes:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}; copy the whole export, or export the run again") from None
    if (found := hashlib.sha256(data).hexdigest()) != digest:
        raise InputError(
            f"{path}: SHA-256 {found[:16]}..., but {CARD} says {digest[:16] or 'nothing'}...; copy it again, or export "
            "the run again"
        )
    return data
