"""``fedistill sweep``: many runs from one file, each in a folder and a process of its own, and one table of them all.

A sweep's folder holds ARM/TASK/seed-N, one run folder each, and after every run anew sweep.json and sweep.md.
"""

import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from common.config import load_config
from common.errors import InputError, Interrupted, RunFailed
from common.progress import Progress
from common.store import make_folder, write_atomically
from server.run_folder import check_resumed, finite
from server.teacher import locate_model
from simulations.child import as_settings, run_child
from simulations.display import console_on, progress_for
from simulations.outcome import Numbers, Spread, averaged, numbers, of_tier, read_json, shares, spreads
from simulations.sweep_file import SKIP, Planned, Sweep
from simulations.table import Row, Sheet, markdown, percent, points, show

WAITING = "waiting"
NO_SCORE = "it has no score"  # as where there is no validation split


@dataclass(frozen=True)
class Done:
    """How a run of the sweep stands.

    Attributes:
        status: ``completed``, ``failed``, ``interrupted`` or ``waiting``.
        problem: why it failed, or why there is no ceiling beside it.
        metric: the task's headline metric.
        found: what was measured; empty unless completed.
    """

    status: str = WAITING
    problem: str = ""
    metric: str = ""
    found: Numbers = field(default_factory=dict)


Results = dict[Planned, Done]


def sweep(
    plan: Sweep,
    out: Path,
    *,
    resume: bool = False,
    more: Callable[[Results, Progress], list[Sheet]] = lambda results, progress: [],
) -> Results:
    """Run what is not there yet, show the table and ``more`` of them, leave sweep.json and sweep.md.

    Raises:
        InputError: the folder is taken, or holds runs of other keys, or no arm's teacher is there; nothing was started.
        RunFailed: some runs failed; the others are in the table.
        Interrupted: stopped by the user; ``resume`` goes on.
    """
    _check_folder(plan, out, resume)
    console = console_on(sys.stdout)
    progress = progress_for(console)
    plan = without_absent(plan, out, progress) if plan.may_skip else plan
    if plan.skipped:
        progress.line(f"skipped, no text in data.source: {', '.join(plan.skipped)}")
    results = run_all(plan, out, progress)
    for sheet in (sweep_sheet(plan, results), *more(results, progress)):
        show(console, sheet)
    console.print(f"folder  {out}", markup=False, highlight=False, soft_wrap=True)
    if failed := [str(run.folder) for run, done in results.items() if done.status != "completed"]:
        raise RunFailed(f"{len(failed)} of {len(results)} runs: {', '.join(failed)}; --resume tries them again")
    if lacking := [run.name for run, done in results.items() if done.problem and not done.problem.endswith(NO_SCORE)]:
        raise RunFailed(f"no ceiling beside {len(lacking)} of {len(results)} runs: {', '.join(lacking)}; try --resume")
    return results


def without_absent(plan: Sweep, out: Path, progress: Progress) -> Sweep:
    """The same without the arms that have a run to come whose teacher neither this machine nor the hub has.

    Raises:
        InputError: no arm is left.
    """
    absent: dict[str, str] = {}
    with progress.step("find the teachers", None):
        for run in plan.runs:
            if run.arm not in absent and _completed(out / run.folder, run) is None:
                try:
                    locate_model(run.config.teacher.model)
                except InputError as error:
                    absent[run.arm] = str(error)
    for arm, problem in absent.items():
        progress.line(f"skipped {arm}: {problem}")
    runs = tuple(run for run in plan.runs if run.arm not in absent)
    if not runs:
        raise InputError(f"{SKIP} = true: no arm is left; {next(iter(absent.values()))}")
    arms = {arm: keys for arm, keys in plan.arms.items() if arm not in absent}
    return replace(plan, runs=runs, arms=arms, absent=absent)


def run_all(plan: Sweep, out: Path, progress: Progress) -> Results:
    """Every run in its turn, each followed by a line."""
    results: Results = dict.fromkeys(plan.runs, Done())
    ceilings: dict[Any, tuple[float | None, str]] = {}
    write_results(plan, results, out)  # what is to come, for whoever looks on, or finds it killed
    with progress.step("runs", len(plan.runs)) as step:
        try:
            for number, run in enumerate(plan.runs, start=1):
                folder = out / run.folder
                known = _completed(folder, run)
                done = known or _simulate(run, folder, step.info)
                if plan.ceiling and done.status == "completed":
                    done = _with_ceiling(run, out, done, ceilings, step.info)
                results[run] = done
                write_results(plan, results, out)
                step.info("")
                progress.line(f"{number}/{len(plan.runs)} {run.name}: {_said(done)}{', was there' if known else ''}")
                step.advance()
        except (Interrupted, KeyboardInterrupt):
            results[run] = replace(results[run], status="interrupted")
            write_results(plan, results, out)
            raise
    return results


def _check_folder(plan: Sweep, out: Path, resume: bool) -> None:
    """Raise `InputError` unless every run can be begun or continued."""
    if out.exists() and not out.is_dir():
        raise InputError(f"--out {out}: a file; give a folder")
    if not resume and out.exists() and any(out.iterdir()):
        raise InputError(f"{out}: not an empty folder; --resume to continue the sweep in it, or give another --out")
    for run in plan.runs:
        if (kept := out / run.folder / "config.toml").is_file():
            check_resumed(load_config(kept), run.config, out / run.folder)
    make_folder(out, "--out")


def _completed(folder: Path, run: Planned) -> Done | None:
    """What a run has measured that is there already, with these keys."""
    summary, kept = read_json(folder / "summary.json"), folder / "config.toml"
    if summary is None or summary.get("status") != "completed" or not kept.is_file():
        return None
    if load_config(kept) != run.config:  # more rounds are asked for
        return None
    return Done("completed", metric=summary["metric"], found=numbers(summary))


def _simulate(run: Planned, folder: Path, tell: Callable[[str], Any]) -> Done:
    """Begin or continue a run."""
    code, last = run_child(["simulate", *as_settings(run.keys), "--out", str(folder), "--resume"], tell)
    done = _completed(folder, run)
    if code or done is None:
        return Done("failed", problem=last or f"it ended with {code}")
    return done


def _with_ceiling(
    run: Planned, out: Path, done: Done, known: dict[Any, tuple[float | None, str]], tell: Callable[[str], Any]
) -> Done:
    """The same with the ceiling of its task, teacher and seed beside it; runs share one."""
    if run.ceiling_key not in known:
        folder = out / run.folder.with_name(f"ceiling-{run.seed}")
        summary, last = read_json(folder / "summary.json"), NO_SCORE
        if summary is None or not _same(summary.get("keys", {}), run):
            (folder / "summary.json").unlink(missing_ok=True)
            code, last = run_child(["ceiling", *as_settings(run.keys), "--out", str(folder)], tell)
            summary = None if code else read_json(folder / "summary.json")
            last = last if code else NO_SCORE
        score = (summary or {}).get("validation", {}).get(done.metric)
        known[run.ceiling_key] = score, "" if score is not None else f"no ceiling: {last}"
    score, problem = known[run.ceiling_key]
    return replace(done, found={**done.found, "ceiling": score}, problem=problem)


def _same(keys: Mapping[str, Any], run: Planned) -> bool:
    return all(keys.get(key) == value for key, value in run.ceiling_key)


def _said(done: Done) -> str:
    """A run in a few words."""
    if done.status != "completed":
        return f"{done.status}: {done.problem}"
    kept = shares(spreads([done.found]))
    text = ", ".join(
        f"{where} {points(done.found[f'{where}.student'])} ({percent(kept[f'{where}.kept'])} of the teacher)"
        for where in ("validation", "federated")
    )
    problem = f", {done.problem}" if done.problem else ""
    return f"{text}, {done.found['seconds'] or 0:.0f} s{problem}"


# --- the table and the files ---------------------------------------------------------------------


def by_task(plan: Sweep, results: Results, arm: str) -> dict[str, dict[int, Numbers]]:
    """Of each of an arm's tasks the completed runs by seed."""
    found: dict[str, dict[int, Numbers]] = {run.task: {} for run in plan.runs if run.arm == arm}
    for run, done in results.items():
        if run.arm == arm and done.status == "completed":
            found[run.task][run.seed] = done.found
    return found


def sweep_sheet(plan: Sweep, results: Results) -> Sheet:
    """A section for each arm: its average over the tasks, then each task. Fits 80 columns with short names."""
    wanted = len({run.seed for run in plan.runs})
    one_task = len({run.task for run in plan.runs}) == 1  # an average of one says it all
    sections = []
    for arm in plan.arms:
        tasks = by_task(plan, results, arm)
        rows = [_row(f"  {task}", runs, wanted, plan.ceiling) for task, runs in tasks.items()]
        found = averaged(list(tasks.values()))
        inside = _tier_rows(plan, arm, found, wanted)
        sections.append([_row(arm, found, wanted, plan.ceiling), *([] if one_task else rows), *inside])
    if one_task and all(len(rows) == 1 for rows in sections):
        sections = [[row for rows in sections for row in rows]]
    head = ("", "validation", "kept", "clients", "kept", "size", *(["of ceiling"] if plan.ceiling else []))
    return Sheet(_title(plan), head, sections, _notes(plan, results))


def _title(plan: Sweep) -> str:
    tasks = dict.fromkeys(run.task for run in plan.runs)
    seeds = ", ".join(str(seed) for seed in dict.fromkeys(run.seed for run in plan.runs))
    return f"{', '.join(tasks)}: students, mean over seeds {seeds}"


def _notes(plan: Sweep, results: Results) -> list[str]:
    metrics = {run.task: done.metric for run, done in results.items() if done.metric}
    named = ", ".join(f"{task} {metric}" for task, metric in metrics.items())
    notes = [
        f"Scores in hundredths: {named}.",
        "clients: on their held-out text; ±: standard deviation over seeds; kept: of the",
        "teacher's score; size: of its parameters. An average needs every task of a seed.",
    ]
    if any(run.config.student.sizes for run in plan.runs):
        notes.append("2/4/256: a tier's layers, heads and neurons; clients: on the text of its own.")
    if plan.ceiling:
        notes.append("of ceiling: of the encoder fine-tuned centrally on all train text (validation).")
    skipped = {"text": plan.skipped, "teacher": plan.absent}
    return [*notes, *(f"Skipped, no {what}: {', '.join(names)}." for what, names in skipped.items() if names)]


def _row(name: str, runs: Mapping[int, Numbers], wanted: int, ceiling: bool) -> Row:
    found = spreads(list(runs.values()))
    kept = shares(found)
    few = f" ({len(runs)} of {wanted})" if len(runs) < wanted else ""
    cells = [
        cell
        for where in ("validation", "federated")
        for cell in (with_spread(found.get(f"{where}.student")), percent(kept[f"{where}.kept"]))
    ]
    last = [percent(kept["ceiling.kept"])] if ceiling else []
    return (name + few, *cells, percent(kept["params.ratio"]), *last)


def _tier_rows(plan: Sweep, arm: str, runs: Mapping[int, Numbers], wanted: int) -> list[Row]:
    """A row for each tier of an arm: its student, scored on public validation and on the text of its clients."""
    keys = next(run.config.student for run in plan.runs if run.arm == arm)
    if not keys.sizes or not runs:
        return []
    smaller = [(one.layers, one.heads or keys.heads, one.neurons or keys.neurons) for one in keys.sizes]
    sizes = [*smaller, (keys.layers, keys.heads, keys.neurons)]
    return [
        _row(
            f"  {'/'.join(str(count or 'all') for count in size)}",
            {seed: of_tier(found, number) for seed, found in runs.items()},
            wanted,
            plan.ceiling,
        )
        for number, size in enumerate(sizes, start=1)
    ]


def with_spread(found: Spread | None) -> str:
    """Mean and deviation in hundredths."""
    if found is None:
        return "-"
    return points(found.mean) + ("" if found.std is None else f" ±{points(found.std)}")


def write_results(plan: Sweep, results: Results, out: Path) -> None:
    """sweep.json and sweep.md, as far as the runs have come."""
    arms = {arm: _arm(plan, results, arm) for arm in plan.arms}
    summary = {"arms": arms, "skipped": list(plan.skipped), "absent": dict(plan.absent)}
    write_atomically(out / "sweep.json", (json.dumps(finite(summary), indent=2) + "\n").encode())
    write_atomically(out / "sweep.md", markdown(sweep_sheet(plan, results)).encode())


def _arm(plan: Sweep, results: Results, arm: str) -> dict[str, Any]:
    tasks = by_task(plan, results, arm)
    entries = {}
    for task, runs in tasks.items():
        each = [
            {"seed": run.seed, "folder": run.folder.as_posix(), "status": done.status, "problem": done.problem}
            | dict(done.found)
            for run, done in results.items()
            if (run.arm, run.task) == (arm, task)
        ]
        metric = next((d.metric for run, d in results.items() if (run.arm, run.task) == (arm, task) and d.metric), "")
        entries[task] = {"metric": metric, "runs": each, **_measured(runs)}
    return {"keys": dict(plan.arms[arm]), "tasks": entries, "average": _measured(averaged(list(tasks.values())))}


def _measured(runs: Mapping[int, Numbers]) -> dict[str, Any]:
    found = spreads(list(runs.values()))
    return {"measured": {name: asdict(each) for name, each in found.items()}, "kept": shares(found)}
