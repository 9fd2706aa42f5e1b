"""The card of an export: card.json with the hash of every file, and card.md, the same for people."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from clients.exported import BYTES, CARD, FLOATS, FORMAT, SPEC, TOKENIZER
from common.hashing import hash_file
from server.run_folder import finite

CARD_TEXT = "card.md"
PACKAGES = ("fedistill", "torch", "transformers", "onnx", "onnxruntime", "tokenizers")
WHO = {"teacher": "teacher, torch", "student": "student, torch", "fp32": FLOATS, "int8": BYTES}


@dataclass(frozen=True)
class Finding:
    """What one form of an export was found to do.

    Attributes:
        difference: of any logit from torch's, at most.
        score: on the texts that it was tried on; none where they have no labels.
    """

    difference: float
    score: Mapping[str, float]

    def told(self, headline: str) -> str:
        score = f"{headline} {self.score[headline]:.4f}, " if headline in self.score else "not scored, "
        return f"{score}logits within {self.difference:.1e} of torch's"


def write_card(
    folder: Path,
    summary: Mapping[str, Any],
    found: Mapping[str, Finding],
    *,
    source: str,
    texts: int,
    milliseconds: Mapping[str, float],
    teacher_bytes: int | None,
) -> None:
    """Write both cards into an export whose other files are all there.

    Args:
        found: by precision.
        source: of the texts that it was tried on.
        texts: how many these were.
        milliseconds: median time of one text with one thread, by who read it.
        teacher_bytes: of the teacher's weights; None: it is not at hand.
    """
    metric = summary["metric"]
    tried = {name: {"largest_difference": each.difference, "score": each.score} for name, each in found.items()}
    drop = None
    if "int8" in found and metric in found["fp32"].score:
        drop = 100 * (found["fp32"].score[metric] - found["int8"].score[metric])
    card = finite(
        {
            "format": FORMAT,
            "task": summary["task"],
            "metric": metric,
            "student": {**summary["student"], "sha256": summary["student_sha256"]},
            "teacher": summary["teacher"],
            "tried": {"on": source, "texts": texts, **tried, "int8_drop": drop},
            "bytes": {"teacher": teacher_bytes, **_sizes(folder)},
            "latency_ms": dict(milliseconds),
            "privacy": summary.get("privacy"),
            "run": {name: summary.get(name) for name in ("seed", "rounds", "clients", "cohort")},
            "versions": {name: version(name) for name in PACKAGES},
        }
    )
    (folder / CARD_TEXT).write_text(_text(card))
    names = sorted(path.name for path in folder.iterdir())
    files = {name: {"bytes": (folder / name).stat().st_size, "sha256": hash_file(folder / name)} for name in names}
    (folder / CARD).write_text(json.dumps({**card, "files": files}, indent=2) + "\n")


def _sizes(folder: Path) -> dict[str, int]:
    """What a device needs with each precision."""
    size = {path.name: path.stat().st_size for path in folder.iterdir()}
    forms = {"fp32": FLOATS, "int8": BYTES}
    return {name: size[file] + size[SPEC] + size[TOKENIZER] for name, file in forms.items() if file in size}


def _text(card: Mapping[str, Any]) -> str:
    metric, student, teacher, tried = card["metric"], card["student"], card["teacher"], card["tried"]
    lines = [
        f"# A student for `{card['task']}`",
        "",
        f"{student['params']:,} parameters, {student['params_ratio']:.1%} of its teacher's, learnt by federated "
        f"distillation: {card['run']['rounds']} rounds, {card['run']['clients']} clients.",
        "",
        f"| {metric} | teacher | student |",
        "| --- | --- | --- |",
        *(
            f"| {label} | {_figure(teacher[where].get(metric))} | {_figure(student[where].get(metric))} |"
            for where, label in (("federated", "text held by the clients"), ("validation", "public validation split"))
        ),
        "",
        "## The export against its student",
        "",
        f"Tried on {tried['texts']:,} texts of {tried['on']}.",
        *([] if tried["fp32"]["score"] else ["**No validation text was at hand: the export is not scored.**"]),
        "",
        f"| | largest difference of a logit | {metric} | bytes a device needs | of the teacher's weights |",
        "| --- | --- | --- | --- | --- |",
    ]
    whole = card["bytes"]["teacher"]
    for name in (name for name in ("fp32", "int8") if name in tried):
        size, score = card["bytes"][name], _figure(tried[name]["score"].get(metric))
        share = f"1/{whole / size:.1f}" if whole else "-"
        lines.append(f"| {name} | {tried[name]['largest_difference']:.1e} | {score} | {size:,} | {share} |")
    times = card["latency_ms"]
    first = next(iter(times))
    lines += [
        "",
        "One text at a time on one thread of the exporting machine, the model alone, median:",
        "",
        f"| | milliseconds | times as fast as the {first} |",
        "| --- | --- | --- |",
        *(f"| {WHO[name]} | {each:.2f} | {times[first] / each:.2f} |" for name, each in times.items()),
        *([] if first == "teacher" else ["", "The teacher was not at hand."]),
        "",
        "## Privacy",
        "",
        spending_words(card["privacy"]),
        "",
        f"SHA-256 of every file: `{CARD}`. A device that has `{BYTES}` needs no `{FLOATS}`.",
        "",
    ]
    return "\n".join(lines)


def spending_words(spent: Mapping[str, Any] | None) -> str:
    """What a summary's block on privacy says of the student."""
    if not spent or spent.get("epsilon") is None:
        return "No privacy budget was kept: the clients' updates were not noised, and nothing is claimed."
    words = (
        f"epsilon {spent['epsilon']:.3f} at delta {spent['delta']:g}, unit {spent['unit']}, accountant "
        f"{spent['accountant']}."
    )
    if spent.get("noise_cohort"):
        return f"Simulated, it holds for no client of this run: {words}"
    return words


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"
