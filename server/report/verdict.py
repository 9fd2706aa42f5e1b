"""What became of a run, first of all: in a sentence or two, in figures, and as a table of scores."""

from collections.abc import Iterator
from typing import Any

from server.report.page import Fact, Section, Table
from server.report.read import Run
from server.report.words import listed, many, number, share, size, span

PLACES = (("federated", "at the clients"), ("validation", "on validation"))
STATUS = {
    "completed": "Completed",
    "failed": "Failed",
    "interrupted": "Stopped by its user",
    "unfinished": "Not finished: the run was killed, or goes on",
}
FAULTS = {"failed": "failed", "rejected": "refused", "late": "late", "retried": "lost at first and asked again"}


def verdict(run: Run) -> str:
    """How the run ended and what the student kept."""
    summary, metric = run.summary, run.metric
    began = f"{STATUS.get(summary['status'], summary['status'])}, after {many(summary['rounds'], 'round')}."
    if not metric:
        return f"{began} Nothing was scored yet."
    kept = [words for place in ("federated", "validation") if (words := _kept(run, place))]
    return f"{began} The student {listed(kept)}." if kept else began


def _kept(run: Run, place: str) -> str:
    """keeps 97.0 % of its teacher's accuracy on public validation (0.8730 against 0.9000)"""
    summary, metric = run.summary, run.metric
    found, below = (summary[who][place].get(metric) for who in ("student", "teacher"))
    if found is None:
        return ""
    line = next(iter(run.of("evaluate" if place == "federated" else "validation")[-1:]), {})
    clients = many(line["clients"], "client") if line.get("clients") else "the clients"
    where = f"on text that stayed with {clients}" if place == "federated" else "on public validation"
    if (after := line.get("round", summary["rounds"])) != summary["rounds"]:
        where += f" as scored after round {after}" if after else " as scored before round 1"
    if (kept := summary["retention"].get(place)) is not None:
        return f"keeps {share(kept)} of its teacher's {metric} {where} ({number(found)} against {number(below)})"
    return f"reaches {metric} {number(found)} {where}" + ("" if below is None else f" (its teacher {number(below)})")


def facts(run: Run) -> Iterator[Fact]:
    """The figures that people ask for first."""
    summary, metric = run.summary, run.metric
    if not metric:
        return
    teacher, student, cost = summary["teacher"], summary["student"], summary["cost"]
    place = "federated" if student["federated"].get(metric) is not None else "validation"
    where = dict(PLACES)[place]
    yield Fact("Teacher", number(teacher[place].get(metric)), f"{metric} {where}")
    yield Fact("Student", number(student[place].get(metric)), f"{metric} {where}")
    yield Fact("Kept of the teacher's score", share(summary["retention"].get(place)), where)
    if "params" in student:
        yield Fact("Size", share(student["params_ratio"]), f"{student['params']:,} of {teacher['params']:,} parameters")
    else:
        yield Fact("Size", "not known", "it is told when a run ends")
    if cost["examples"]:
        yield Fact("Examples per second", f"{cost['examples_per_s']:,.0f}", f"{span(cost['train_s'])} of training")
    down, up = cost["bytes_down"], cost["bytes_up"]
    yield Fact("Bytes", size(down + up), f"{size(down)} to the clients, {size(up)} from them")
    if "wall_s" in cost:
        memory = f", {size(1e6 * cost['peak_rss_mb'])} of memory at the server" if "peak_rss_mb" in cost else ""
        yield Fact("Time", span(cost["wall_s"]), f"in all{memory}")
    yield _privacy(summary.get("privacy", {}))
    if (faults := summary.get("faults")) is None:
        yield Fact("Answers lost", "not known", "they are told when a run ends")
        return
    lost = sum(count for name, count in faults.items() if name != "retried")
    yield Fact("Answers lost", str(lost or "none"), fault_words(summary))


def _privacy(block: dict[str, Any]) -> Fact:
    if block.get("unit", "none") == "none":
        masked = "sums are masked, and not noised" if block.get("secure_aggregation") else "updates are not noised"
        return Fact("Privacy", "no epsilon", masked)
    about = f"for one {block['unit']}, delta {block['delta']:g}"
    if block.get("epsilon") is None:
        why = "; what was spent is told when a run ends" if block.get("so_far") else "; nothing bounds it"
        return Fact("Privacy", "no epsilon", about + why)
    if block.get("noise_cohort"):
        more = f"epsilon {block['epsilon']:.3g} {about} is that of {block['noise_cohort']:,} clients a round"
        return Fact("Privacy", "simulated", f"{more}, and holds for no client of this run")
    return Fact("Privacy", f"epsilon {block['epsilon']:.3g}", about)


def any_fault(summary: dict[str, Any]) -> bool:
    return any(summary.get("faults", {}).values())


def fault_words(summary: dict[str, Any]) -> str:
    """2 failed and 1 late."""
    found = [f"{count} {FAULTS.get(name, name)}" for name, count in summary.get("faults", {}).items() if count]
    return listed(found) if found else "every client that was asked has answered"


def scores(run: Run) -> Section:
    """Every score of teacher and student."""
    rows = []
    for place, where in PLACES:
        for metric, value in run.summary["student"][place].items():
            if metric not in ("n", "spearman_bound"):
                below = run.summary["teacher"][place].get(metric)
                kept = value / below if value is not None and below is not None and below > 0 else None
                rows.append((f"{metric} {where}", number(below), number(value), share(kept)))
    student, teacher = run.summary["student"], run.summary["teacher"]
    if "params" in student:
        sizes = (number(teacher["params"]), number(student["params"]), share(student["params_ratio"]))
        rows.append(("parameters", *sizes))
    note = run.summary.get("privacy", {}).get("note")
    table = Table("Scores and sizes", ("", "teacher", "student", "share"), rows)
    return Section("Teacher and student", [table, *([f"Privacy: {note}."] if note else [])])
