"""``fedistill export``: a finished run's student as a folder for devices, given out only if it answers as it did."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from clients.export import check_exporter, largest_difference, quantise, write_onnx
from clients.exported import BYTES, FLOATS, SPEC, TOKENIZER, Exported, Spec
from common.config import Config, load_config
from common.corpus import labelled
from common.dataset import load_tokenizer, prepare_dataset
from common.device import Compute
from common.errors import ExportFailed, InputError
from common.hashing import hash_tensors
from common.inference import predict
from common.metrics import scores, tally
from common.models import load_teacher
from common.progress import Progress
from common.slim import load_slim
from common.store import cache_folder, draft_of
from common.tasks import GLUE, TOY, Task, text_task
from common.tokens import Tokens, tokenize
from common.toy import toy_corpus
from server.teacher import TeacherSource, find_teacher, head_of
from simulations.export_card import Finding, write_card
from simulations.latency import caller, medians
from simulations.outcome import read_json

TOLERANCE = 1e-4  # of a logit, between torch and ONNX with 32-bit weights
SAMPLE = 512  # texts on which the two are compared, from the shortest to the longest
TIMED, LAPS = 50, 3
VALIDATION, MADE = "the public validation split", "texts made by the program"
ON_CPU = Compute(torch.device("cpu"), bf16=False)


@dataclass(frozen=True)
class Trial:
    """What an export is tried on.

    Attributes:
        columns: one or two columns of n texts.
        labels: (n, ...) as in `common.corpus.Table`; None: there are none to score with.
        source: where the texts are from.
    """

    columns: tuple[list[str], ...]
    labels: NDArray[Any] | None
    source: str

    def take(self, rows: NDArray[np.int64]) -> tuple[list[str], ...]:
        return tuple([column[row] for row in rows.tolist()] for column in self.columns)


def export_run(run: Path, out: Path | None, *, int8: bool, max_drop: float, progress: Progress) -> Path:
    """Write the folder that `clients.exported` describes; return where it is.

    Args:
        out: a new folder; None: ``export`` in the run's.
        max_drop: hundredths of the headline score that 8-bit weights may cost.

    Raises:
        InputError: the run has no student, or something is missing that an export needs.
        ExportFailed: the export does not answer as its student does, or cannot be written; nothing is left.
    """
    check_exporter()
    target = out or run / "export"
    if target.exists():
        raise InputError(f"--out {target}: exists already; give a new folder")
    if not (math.isfinite(max_drop) and max_drop >= 0):
        raise InputError(f"--max-drop {max_drop}: give 0 or more hundredths of the score")
    summary, config = read_run(run)
    student, tokenizer = open_student(run, summary), load_tokenizer(run / "slim")
    source = _teacher(config)
    task, trial = _trial(config, run, student, source, progress)
    spec = spec_of(config, task, tokenizer)
    try:
        with draft_of(target) as draft:
            (draft / SPEC).write_text(json.dumps(spec.to_json(), indent=2) + "\n")
            (draft / TOKENIZER).write_text(tokenizer.backend_tokenizer.to_str())
            with progress.step("write the student as ONNX", None):
                write_onnx(student, spec, draft / FLOATS)
                if int8:
                    quantise(draft / FLOATS, draft / BYTES)
            tokens = _tokens(trial, config, tokenizer, progress)
            found = _gate(task, trial, draft, spec, student, tokens, max_drop, progress)
            times = _latency(trial, draft, spec, student, tokens, config, task, source, progress)
            teacher_bytes = sum(path.stat().st_size for path in source.folder.glob("*.safetensors")) if source else None
            write_card(draft, summary, found, times, teacher_bytes, (trial.source, len(trial.columns[0])))
            draft.chmod(0o755)
    except OSError as error:
        raise ExportFailed(f"{error.filename or target}: cannot be written: {error.strerror}") from None
    for name, each in found.items():
        progress.line(f"{name}: {each.told(task.headline)}")
    return target


def read_run(run: Path) -> tuple[dict[str, Any], Config]:
    """The summary and the keys of a completed run."""
    summary = read_json(run / "summary.json")
    if summary is None or not (run / "config.toml").is_file():
        raise InputError(f"{run}: no finished run there (summary.json and config.toml are needed)")
    status = summary.get("status")
    if status != "completed" or "student" not in summary:
        raise InputError(f"{run}: status = {status!r} in summary.json; give a completed run")
    return summary, load_config(run / "config.toml")


def open_student(run: Path, summary: dict[str, Any]) -> Any:
    """The slim student of a run, as the run left it."""
    folder = run / "slim"
    if not (folder / "model.safetensors").is_file():
        raise InputError(f"{folder}: no student there; give a run folder that `fedistill simulate` has finished")
    try:
        student, _ = load_slim(folder)
    except InputError:
        raise
    except Exception as error:  # damaged files surface as many different kinds
        raise InputError(f"{folder}: no student loads from it ({type(error).__name__})") from None
    if (digest := hash_tensors(student.state_dict())) != summary.get("student_sha256"):
        raise InputError(
            f"{folder}: its weights hash to {digest[:16]}..., but student_sha256 in summary.json is "
            f"{str(summary.get('student_sha256'))[:16]}...; give the run's own student"
        )
    return student


def spec_of(config: Config, task: Task, tokenizer: Any) -> Spec:
    return Spec(
        task=task.name,
        kind="score" if task.regression else "multi-label" if task.multi_label else "classes",
        labels=task.labels,
        columns=task.text_columns,
        max_length=config.data.max_length,
        windows=config.data.windows,
        stride=config.data.stride,
        side=tokenizer.truncation_side,
        padding=tokenizer.pad_token_id,
        token_types="token_type_ids" in tokenizer.model_input_names,
    )


def _teacher(config: Config) -> TeacherSource | None:
    try:
        return find_teacher(config.teacher.model)
    except InputError:
        return None


def _trial(
    config: Config, run: Path, student: Any, source: TeacherSource | None, progress: Progress
) -> tuple[Task, Trial]:
    """The run's task, and its public validation split; where that is not at hand, texts that the program makes."""
    try:
        # the cut does not depend on the tokenizer; with the teacher's, the run has prepared it
        folder = source.folder if source else run / "slim"
        data = prepare_dataset(config, folder, cache_folder(config.runtime.cache), progress)
    except InputError as error:
        progress.line(f"no validation text: {error}")
        task = _task(config, student)
        return task, _made(task)
    if not data.validation:
        progress.line("no validation text: the run has no validation split")
        return data.task, _made(data.task)
    split = next(iter(data.validation.values()))
    rows = np.flatnonzero(labelled(np.asarray(split.labels)))
    if not len(rows):
        progress.line("no validation text: none of it has a label")
        return data.task, _made(data.task)
    return data.task, Trial(tuple(each.take(rows) for each in split.texts), np.asarray(split.labels)[rows], VALIDATION)


def _task(config: Config, student: Any) -> Task:
    """The task of a run whose data are not at hand."""
    if config.task != TOY.name and config.task not in GLUE:
        labels = tuple(str(student.config.id2label[number]) for number in range(student.config.num_labels))
        columns = config.data.text_columns or "text"
        names = tuple(name.strip() for name in columns.split(","))
        return text_task(names, labels, config.data.label_column, config.data.multi_label)
    return TOY if config.task == TOY.name else GLUE[config.task]


def _made(task: Task) -> Trial:
    """Sentences of the program's own corpus, every fourth text made of several."""
    texts = toy_corpus(0)["validation"]["sentence"][:SAMPLE]
    texts = [" ".join(texts[place : place + 12]) if place % 4 == 0 else text for place, text in enumerate(texts)]
    columns = (texts,) if len(task.text_columns) == 1 else (texts, texts[::-1])
    return Trial(columns, None, MADE)


def _tokens(trial: Trial, config: Config, tokenizer: Any, progress: Progress) -> Tokens:
    """The texts as training cuts them."""
    keys = config.data
    with progress.step("tokenise", len(trial.columns[0])) as step:
        return tokenize(
            trial.columns, tokenizer, keys.max_length, step.advance, windows=keys.windows, stride=keys.stride
        )


def _gate(
    task: Task, trial: Trial, draft: Path, spec: Spec, student: Any, tokens: Tokens, max_drop: float, progress: Progress
) -> dict[str, Finding]:
    """What each form differs from the student in, and scores; raises `ExportFailed` where that is too much."""
    lengths = tokens.lengths(np.arange(len(tokens)))
    rows = np.unique(np.linspace(0, len(tokens) - 1, min(SAMPLE, len(tokens))).astype(np.int64))
    rows = np.argsort(lengths, kind="stable")[rows]
    with progress.step("compare with torch", len(rows)) as step:
        wanted = predict(student, tokens, rows, ON_CPU, step.advance)
    found: dict[str, Finding] = {}
    for name, file in forms(draft).items():
        exported = _open(draft, spec, file)
        with progress.step(f"try {name}", None):
            far = largest_difference(exported, trial.take(rows), wanted)
        if name == "fp32" and not far <= TOLERANCE:
            raise ExportFailed(f"{FLOATS}: logits differ from torch's by {far:.1e}, more than {TOLERANCE:.0e}")
        score = {}
        if trial.labels is not None:
            with progress.step(f"score {name}", len(trial.labels)) as step:
                logits = exported.logits(trial.columns, advance=step.advance)
            score = scores(task.score_spec, tally(task.score_spec, logits, trial.labels))
        found[name] = Finding(far, score)
    if "int8" in found:
        _check_drop(task.headline, found["fp32"].score, found["int8"].score, max_drop)
    return found


def _check_drop(headline: str, fp32: dict[str, float], int8: dict[str, float], max_drop: float) -> None:
    before, after = fp32.get(headline, math.nan), int8.get(headline, math.nan)
    # a score that is not defined before cannot drop, one that is not defined after has
    if not math.isnan(before) and not 100 * (before - after) <= max_drop:
        raise ExportFailed(
            f"--int8: {headline} is {after:.4f}, with fp32 {before:.4f}: {100 * (before - after):.2f} points less, more "
            f"than --max-drop {max_drop:g}; export without --int8, or allow more"
        )


def forms(draft: Path) -> dict[str, str]:
    """The ONNX files of an export by precision."""
    return {name: file for name, file in (("fp32", FLOATS), ("int8", BYTES)) if (draft / file).is_file()}


def _open(draft: Path, spec: Spec, file: str, threads: int = 0) -> Exported:
    return Exported(spec, (draft / TOKENIZER).read_text(), (draft / file).read_bytes(), threads)


def _latency(
    trial: Trial,
    draft: Path,
    spec: Spec,
    student: Any,
    tokens: Tokens,
    config: Config,
    task: Task,
    source: TeacherSource | None,
    progress: Progress,
) -> dict[str, float]:
    """Median milliseconds of one text, one thread, for the export and in torch; text is cut into pieces before."""
    rows = np.unique(np.linspace(0, len(tokens) - 1, TIMED).astype(np.int64))
    texts, calls = trial.take(rows), {}
    if source:  # a fresh head takes as long as a trained one
        overrides = {} if source.head else dict(head_of(task))
        teacher = load_teacher(source.folder, complete=False, **overrides)
        keys, cutter = config.data, load_tokenizer(source.folder)
        pieces = tokenize(
            texts, cutter, keys.max_length, lambda amount: None, windows=keys.windows, stride=keys.stride
        )
        calls["teacher"] = caller(teacher, pieces)
    calls["student"] = caller(student, tokens.take(rows))
    for name, file in forms(draft).items():
        calls[name] = _runner(_open(draft, spec, file, threads=1), texts)
    with progress.step("latency", LAPS * len(rows)) as step:
        return {name: 1e3 * each for name, each in medians(calls, len(rows), LAPS, step.advance).items()}


def _runner(exported: Exported, texts: Sequence[Sequence[str]]) -> Any:
    windows = exported.windows(texts)
    return lambda place: exported.run(windows[place])
