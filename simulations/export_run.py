"""``fedistill export``: a finished run's student as a folder for devices, given out only if it answers as it did."""

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from clients.export import check_exporter, largest_difference, quantise, write_onnx
from clients.exported import BYTES, FLOATS, SPEC, TOKENIZER, Exported, Spec
from common.config import Config, load_config
from common.dataset import load_tokenizer
from common.device import Compute
from common.errors import ExportFailed, InputError
from common.hashing import hash_tensors
from common.inference import predict
from common.keys import VOTING
from common.metrics import scores, tally
from common.models import load_teacher
from common.progress import Progress
from common.slim import load_slim
from common.store import draft_of
from common.tasks import Task
from server.teacher import TeacherSource, find_teacher, head_of
from simulations.export_card import Finding, write_card
from simulations.export_trial import Trial, find_trial, tokens_of
from simulations.latency import caller, medians
from simulations.outcome import read_json

FORMATS = ("onnx",)
TOLERANCE = 1e-4  # of a logit, between torch and ONNX with 32-bit weights
COMPARED = 512  # texts that both read
TIMED, LAPS = 50, 3
ON_CPU = Compute(torch.device("cpu"), bf16=False)


def check_options(form: str, max_drop: float) -> None:
    """Raise `InputError` for what no export can be."""
    if form not in FORMATS:
        raise InputError(f"--format {form!r}: give {', '.join(FORMATS)}")
    if not (math.isfinite(max_drop) and max_drop >= 0):
        raise InputError(f"--max-drop {max_drop}: give 0 or more hundredths of the score")


def export_run(run: Path, out: Path | None, *, int8: bool, max_drop: float, progress: Progress, tier: int = 0) -> Path:
    """Write the folder that `clients.exported` describes; return where it is.

    Args:
        out: a new folder; None: ``export`` in the run's.
        max_drop: hundredths of the headline score that 8-bit weights may cost.
        tier: whose student, of a mixed federation, 1 the smallest; 0: the whole one.

    Raises:
        InputError: the run has no student, or something is missing that an export needs.
        ExportFailed: the export does not answer as its student does, or cannot be written; nothing is left.
    """
    check_exporter()
    target = out or run / "export"
    if target.exists():
        raise InputError(f"--out {target}: exists already; give a new folder")
    summary, config = read_run(run)
    own = summary_of(summary, config, tier)
    folder = run / ("slim" if tier in (0, len(summary.get("tiers", ()))) else f"tiers/{tier}/slim")
    student, tokenizer = open_student(folder, own), load_tokenizer(folder)
    teacher = _teacher(config)
    trial = find_trial(config, teacher.folder if teacher else folder, student, tokenizer, progress)
    spec = spec_of(config, trial.task, tokenizer)
    try:
        with draft_of(target) as draft:
            (draft / SPEC).write_text(json.dumps(spec.to_json(), indent=2) + "\n")
            (draft / TOKENIZER).write_text(tokenizer.backend_tokenizer.to_str())
            _write_models(student, spec, draft, progress, int8=int8)
            found = _gate(trial, draft, spec, student, progress, max_drop=max_drop)
            calls = {
                **(_teacher_call(config, teacher, trial, progress) if teacher else {}),
                "student": caller(student, trial.tokens.take(trial.spread(TIMED))),
                **{name: _call(_open(draft, spec, file, 1), trial) for name, file in forms(draft).items()},
            }
            times = _latency(calls, min(TIMED, len(trial)), progress)
            write_card(
                draft, own, found,
                source=trial.source, texts=len(trial), milliseconds=times, teacher_bytes=_size(teacher),
            )  # fmt: skip
            draft.chmod(0o755)
    except OSError as error:
        raise ExportFailed(f"{error.filename or target}: cannot be written: {error.strerror}") from None
    for name, each in found.items():
        progress.line(f"{name}: {each.told(trial.task.headline)}, {times['student'] / times[name]:.2f} x torch's speed")
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


def summary_of(summary: Mapping[str, Any], config: Config, tier: int) -> dict[str, Any]:
    """The summary with the figures of one student alone, and the scores that are of this student.

    Args:
        tier: 1 the smallest of a mixed federation, 0 the whole; the run's own figures are over all of its students.

    Raises:
        InputError: the run has no such tier.
    """
    rows, teacher, student = summary.get("tiers") or [], dict(summary["teacher"]), dict(summary["student"])
    if not 0 <= tier <= len(rows):
        have = f"tiers 1 to {len(rows)}" if rows else "no tiers"
        raise InputError(f"--tier {tier}: the run has {have}; leave it out for the whole student")
    if config.server.strategy in VOTING:  # clients have scored students of their own, never this one
        student["federated"] = {}
    if not rows:
        return {**summary, "student": student}
    row = rows[tier - 1]
    sizes = {"layers": student["shape"]["layers"][: row["layers"]], "heads": row["heads"], "neurons": row["neurons"]}
    student |= {"params": row["params"], "params_ratio": row["params"] / teacher["params"]}
    student |= {"shape": {**student["shape"], **sizes}, "validation": row["validation"]}
    student["federated"], teacher["federated"] = row["federated"] if student["federated"] else {}, row["teacher"]
    return {**summary, "teacher": teacher, "student": student, "student_sha256": row["sha256"]}


def open_student(folder: Path, summary: Mapping[str, Any]) -> Any:
    """The slim student in a run's folder, as the run left it."""
    if not (folder / "model.safetensors").is_file():
        raise InputError(f"{folder}: no student there; give a run folder that `fedistill simulate` has finished")
    try:
        student, _ = load_slim(folder)
    except InputError:
        raise
    except Exception as error:  # damaged files surface as many different kinds
        raise InputError(f"{folder}: no student loads from it ({type(error).__name__})") from None
    digest, wanted = hash_tensors(student.state_dict()), str(summary.get("student_sha256"))
    if digest != wanted:
        raise InputError(
            f"{folder}: its weights hash to {digest[:16]}..., but summary.json has {wanted[:16]}... for this student; "
            "give the run's own"
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


def forms(folder: Path) -> dict[str, str]:
    """The ONNX files of an export by precision."""
    return {name: file for name, file in (("fp32", FLOATS), ("int8", BYTES)) if (folder / file).is_file()}


def _teacher(config: Config) -> TeacherSource | None:
    """None where it is not at hand."""
    try:
        return find_teacher(config.teacher.model)
    except InputError:
        return None


def _size(teacher: TeacherSource | None) -> int | None:
    """Bytes of its weights."""
    return sum(path.stat().st_size for path in teacher.folder.glob("*.safetensors")) if teacher else None


def _write_models(student: Any, spec: Spec, draft: Path, progress: Progress, *, int8: bool) -> None:
    with progress.step("write the student as ONNX", 1 + int8) as step:
        write_onnx(student, spec, draft / FLOATS)
        step.advance()
        if int8:
            quantise(draft / FLOATS, draft / BYTES)


def _gate(
    trial: Trial, draft: Path, spec: Spec, student: Any, progress: Progress, *, max_drop: float
) -> dict[str, Finding]:
    """How far each form is from the student, and its score; raises `ExportFailed` where that is too far."""
    rows, found = trial.spread(COMPARED), {}
    with progress.step("compare with torch", len(rows)) as step:
        wanted = predict(student, trial.tokens, rows, ON_CPU, step.advance)
    for name, file in forms(draft).items():
        exported = _open(draft, spec, file)
        with progress.step(f"compare {name}", None):
            far = largest_difference(exported, trial.texts(rows), wanted)
        if name == "fp32" and not far <= TOLERANCE:
            raise ExportFailed(f"{FLOATS}: logits differ from torch's by {far:.1e}, more than {TOLERANCE:.0e}")
        found[name] = Finding(far, _score(exported, trial, name, progress))
    if "int8" in found:
        check_drop(trial.task.headline, found["fp32"].score, found["int8"].score, max_drop)
    return found


def _score(exported: Exported, trial: Trial, name: str, progress: Progress) -> dict[str, float]:
    if trial.labels is None:
        return {}
    with progress.step(f"score {name}", len(trial)) as step:
        logits = exported.logits(trial.columns, advance=step.advance)
    return scores(trial.task.score_spec, tally(trial.task.score_spec, logits, trial.labels))


def check_drop(headline: str, fp32: Mapping[str, float], int8: Mapping[str, float], max_drop: float) -> None:
    """Raise `ExportFailed` when 8-bit weights cost more than ``max_drop`` hundredths of the headline score."""
    before, after = fp32.get(headline, math.nan), int8.get(headline, math.nan)
    drop = 100 * (before - after)
    # a score that is not defined with fp32 cannot drop; one that is defined no more has
    if not math.isnan(before) and not drop <= max_drop:
        raise ExportFailed(
            f"--int8: {headline} is {after:.4f}, with fp32 {before:.4f}: {drop:.2f} hundredths less, more than "
            f"--max-drop {max_drop:g}; export without --int8, or allow more"
        )


def _open(draft: Path, spec: Spec, file: str, threads: int = 0) -> Exported:
    return Exported(spec, (draft / TOKENIZER).read_text(), (draft / file).read_bytes(), threads)


def _teacher_call(
    config: Config, source: TeacherSource, trial: Trial, progress: Progress
) -> dict[str, Callable[[int], Any]]:
    head = {} if source.head else head_of(trial.task)  # a fresh head takes as long as a trained one
    model = load_teacher(source.folder, complete=False, **head)
    texts = trial.texts(trial.spread(TIMED))
    return {"teacher": caller(model, tokens_of(config, load_tokenizer(source.folder), texts, progress))}


def _call(exported: Exported, trial: Trial) -> Callable[[int], Any]:
    windows = exported.windows(trial.texts(trial.spread(TIMED)))
    return lambda place: exported.run(windows[place])


def _latency(calls: Mapping[str, Callable[[int], Any]], count: int, progress: Progress) -> dict[str, float]:
    """Median milliseconds of one text, one thread, by who reads it; text is cut into pieces before."""
    with progress.step("latency", LAPS * count) as step:
        return {name: 1e3 * each for name, each in medians(calls, count, LAPS, step.advance).items()}
