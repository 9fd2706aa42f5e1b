"""``fedistill bench``: training speed of a federated round beside plain PyTorch and a usual Flower app.

The arms take turns within each repeat, so that a machine that slows down slows them all. They train the same
clients from the same student; ours and both plain loops must learn the same. Each arm is warm when its clock
starts: models and data are loaded, the teacher's outputs cached where the arm caches them, a step is done.
"""

import json
import os
import platform
import shutil
import statistics
import tempfile
from collections.abc import Callable, Container, Iterator
from contextlib import ExitStack, contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from clients.worker import Worker
from common.config import Config, changed
from common.errors import InputError, RunFailed
from common.store import write_atomically
from server.assignment import pick_cohort
from server.checkpoint import checkpoint_folder
from server.preparation import Federation, prepare
from simulations.bare_loop import ROUND, Lap, OneProcess, Plan, ProcessPerCore, Update
from simulations.display import progress_for
from simulations.simulate import simulate
from simulations.usual_flower import usual_lap

# A loop may round differently (threads); it must not learn differently. AdamW's first steps are the gradient's
# signs, and bf16 turns some of the smallest.
AGREE = {"fp32": 0.01, "bf16": 0.03}  # of the update's size
FLOOR, PER_CORE, OURS, USUAL = ARMS = ("loop-1xN", "loop-Nx1", "fedistill", "flower")
MUST_AGREE = (FLOOR, PER_CORE, OURS)  # the usual app cuts other batches
CORES = os.cpu_count() or 1
NAMES = {
    FLOOR: f"bare loop, 1 x {CORES} threads",
    PER_CORE: f"bare loop, {CORES} x 1 thread",
    OURS: "fedistill",
    USUAL: "usual Flower app",
}
_SST2 = {"task": "sst2", "data.limit": 6400, "data.public-fraction": 0.2, "data.holdout-fraction": 0.2}
WORKLOADS: dict[str, dict[str, Any]] = {
    # 16 clients that train on 256 sentences each; every weight is trained, and travels
    "few-large": _SST2
    | {"data.partition": "iid", "data.clients": 16, "server.cohort": 8, "student.layers": 3}
    | {"student.train-embeddings": True},
    # 512 clients that train on 8
    "many-small": _SST2
    | {"data.partition": "iid", "data.clients": 512, "server.cohort": 64, "student.layers": 3}
    | {"student.train-embeddings": False},
}
PLAIN = {  # what the loops do; with another value an arm would not do the same work
    "data.multi-label": False,
    "distill.weighting": "constant",
    "distill.prior-correction": False,
    "distill.general-rounds": 0,
    "distill.hidden-weight": 0.0,
    "distill.cls-weight": 0.0,
    "distill.relation-weight": 0.0,
    "student.model": "",
    "student.heads": 0,
    "student.neurons": 0,
    "student.vocabulary": 0,
    "student.target-ratio": 0.0,
    "student.tiers": "",
    "student.dropout": 0.0,
    "client.share": 1.0,
    "client.optimizer": "adamw",
    "client.grow-batch": False,
    "client.max-seconds": 0.0,
    "client.energy-budget": 0.0,
    "server.strategy": "fedavg",
    "server.lr": 1.0,
    "server.warmup-rounds": 0,
    "server.lr-decay": "constant",
    "server.average-rounds": 1,
    "server.norm-bound": 0.0,
    "server.wire": "fp32",
    "server.over-select": 1.0,
    "privacy.unit": "none",
    "privacy.secure-aggregation": False,
}
PACKAGES = ("fedistill", "flwr", "ray", "torch", "transformers", "numpy")


def workload_settings(name: str | None) -> list[str]:
    """The keys of a named workload as ``key=value``.

    Raises:
        InputError: there is no such workload.
    """
    if name is None:
        return []
    if name not in WORKLOADS:
        raise InputError(f"--workload {name}: no such workload; give {' or '.join(WORKLOADS)}")
    return [f"{key}={json.dumps(value)}" for key, value in WORKLOADS[name].items()]


def choose_arms(text: str) -> tuple[str, ...]:
    """The arms named in a comma list, in their order; all of them when it is empty.

    Raises:
        InputError: one of them does not exist.
    """
    named = [part.strip() for part in text.split(",") if part.strip()]
    for name in named:
        if name not in ARMS:
            raise InputError(f"--arms {name}: no such arm; give some of {','.join(ARMS)}")
    return tuple(arm for arm in ARMS if arm in named or not named)


def bench(
    config: Config, repeats: int, out: Path | None, workload: str | None = None, arms: tuple[str, ...] = ARMS
) -> dict[str, Any]:
    """Time a round of each arm ``repeats`` times; print a table, write every figure to ``out``, return them.

    Raises:
        RunFailed: ours and the loops learnt different updates, or an arm did not finish.
    """
    _check_plain(config)
    torch.set_num_threads(CORES)  # before the teacher: its bits depend on it
    console = Console()
    progress = progress_for(console)
    federation = prepare(config, progress)
    if federation.compute.device.type != "cpu":
        raise InputError("runtime.device: the plain loops run on the CPU; set runtime.device = cpu")
    cohort = pick_cohort(federation.data.eligible, config.server.cohort, config.seed, ROUND)
    laps: dict[str, list[Lap]] = {arm: [] for arm in arms}
    gaps: dict[str, list[float]] = {arm: [] for arm in arms}
    with ExitStack() as stack:
        runners = _runners(federation, cohort, arms, stack)
        bar = stack.enter_context(progress.step("laps", repeats * len(runners)))
        for repeat in range(1, repeats + 1):
            updates: dict[str, Update] = {}
            for arm, run in runners.items():
                lap = run()
                updates[arm] = lap.update
                laps[arm].append(Lap(lap.seconds, lap.training_seconds, lap.examples, {}))
                bar.advance()
                progress.line(f"{repeat}/{repeats} {NAMES[arm]}: {lap.speed:.0f} examples/s, {lap.seconds:.1f} s")
            reference = updates[_reference(updates)]
            for arm, update in updates.items():
                gaps[arm].append(_difference(update, reference))
    result = _result(federation, cohort, workload, laps, gaps)
    _show(console, result)
    if out is not None:
        write_atomically(out, (json.dumps(result, indent=2) + "\n").encode())
    _check_agreement(gaps, AGREE["bf16" if federation.compute.bf16 else "fp32"])
    return result


def _check_plain(config: Config) -> None:
    flat = config.flat()
    for key, value in PLAIN.items():
        if flat[key] != value:
            raise InputError(f"{key} = {flat[key]!r}: the plain loops know only {value!r}; give that")


def _runners(
    federation: Federation, cohort: tuple[int, ...], arms: tuple[str, ...], stack: ExitStack
) -> dict[str, Callable[[], Lap]]:
    """How each arm does a lap; what it keeps between laps is warm when this returns."""
    runners: dict[str, Callable[[], Lap]] = {}
    if FLOOR in arms or PER_CORE in arms:
        soft = _teacher_logits(federation, cohort)
        plan = Plan(federation.config, federation.data.key, federation.student, tuple(federation.weights()), soft)
    if FLOOR in arms:
        runners[FLOOR] = OneProcess(plan, CORES).lap
    if PER_CORE in arms:
        sizes = {client: int(federation.data.train_sizes[client]) for client in cohort}
        processes = ProcessPerCore(plan, sizes, CORES)
        stack.callback(processes.close)
        runners[PER_CORE] = processes.lap
    if OURS in arms:
        runners[OURS] = lambda: _federated_lap(federation)
    if USUAL in arms:
        runners[USUAL] = lambda: _usual_lap(federation, cohort)
    return runners


@contextmanager
def _lap_folder() -> Iterator[Path]:
    """A folder for a lap's files; when the lap fails it stays, because the log is there."""
    folder = Path(tempfile.mkdtemp(prefix="fedistill-bench-"))
    try:
        yield folder
    except BaseException as error:
        if not isinstance(error, RunFailed):
            shutil.rmtree(folder, ignore_errors=True)
        raise
    shutil.rmtree(folder, ignore_errors=True)


def _teacher_logits(federation: Federation, cohort: tuple[int, ...]) -> dict[int, NDArray[np.float32]]:
    teacher = federation.teacher
    worker = Worker(
        federation.config, teacher=str(teacher.folder), teacher_hash=teacher.hash, dataset=federation.data.key,
        student=federation.pupil.key, student_hash=federation.pupil.hash,
    )  # fmt: skip
    logits = {client: worker.teacher_logits(federation.data.shard(client).train) for client in cohort}
    torch.set_num_threads(CORES)  # a worker sets its own number
    return logits


def _federated_lap(federation: Federation) -> Lap:
    """A real run of two rounds: the second, when workers are warm, gives the time, the first the update."""
    keys = {"rounds": ROUND + 1, "server.keep-checkpoints": 2, "server.scores": "cohort"}
    config = changed(federation.config, keys)
    with _lap_folder() as run:
        simulate(config, run, quiet=True)
        examples, seconds, busy = _training_phase(run, ROUND + 1)
        trained = _weights_after(run, ROUND)
    update = {name: trained[name] - array for name, array in federation.weights().items()}
    return Lap(seconds, busy, examples * config.client.epochs, update)


def _usual_lap(federation: Federation, cohort: tuple[int, ...]) -> Lap:
    with _lap_folder() as folder:
        return usual_lap(federation, cohort, CORES, folder)


def _training_phase(run: Path, round_number: int) -> tuple[int, float, float]:
    """Examples of a round, the seconds of its training phase, and those that a worker trained in it."""

    def line(name: str) -> dict[str, Any]:
        lines = [json.loads(text) for text in (run / name).read_text().splitlines()]
        return next(each for each in lines if (each["round"], each["phase"]) == (round_number, "train"))

    costs = line("costs.jsonl")
    return line("metrics.jsonl")["examples"], costs["seconds"], costs["seconds"] * statistics.mean(costs["busy"])


def _weights_after(run: Path, round_number: int) -> dict[str, NDArray[np.float32]]:
    """The student's trained arrays after a round."""
    return safetensors.numpy.load_file(checkpoint_folder(run / "checkpoints", round_number) / "student.safetensors")


def _reference(arms: Container[str]) -> str:
    """The arm whose update the others are compared with: ours, else the first."""
    return next(arm for arm in (OURS, *ARMS) if arm in arms)


def _difference(update: Update, reference: Update) -> float:
    """Norm of the difference of two updates over the norm of one."""
    apart = sum(float(np.square(update[name] - array, dtype=np.float64).sum()) for name, array in reference.items())
    size = sum(float(np.square(array, dtype=np.float64).sum()) for array in reference.values())
    return float(np.sqrt(apart / size))


def _check_agreement(gaps: dict[str, list[float]], allowed: float) -> None:
    for arm, found in gaps.items():
        if arm in MUST_AGREE and not max(found) <= allowed:
            raise RunFailed(f"{NAMES[arm]}: learnt another update, {max(found):.3f} of its size away")


def _result(
    federation: Federation,
    cohort: tuple[int, ...],
    workload: str | None,
    laps: dict[str, list[Lap]],
    gaps: dict[str, list[float]],
) -> dict[str, Any]:
    medians = {arm: statistics.median(lap.speed for lap in found) for arm, found in laps.items()}
    arms = {}
    for arm, found in laps.items():
        speeds = [lap.speed for lap in found]
        arms[arm] = {
            "name": NAMES[arm],
            "median": medians[arm],
            "least": min(speeds),
            "most": max(speeds),
            "ratio": _ratio(medians, arm, FLOOR),
            "overhead": statistics.median(1 - lap.training_seconds / lap.seconds for lap in found),
            "update_difference": max(gaps[arm]),
            "examples_per_s": speeds,
            "seconds": [lap.seconds for lap in found],
            "training_seconds": [lap.training_seconds for lap in found],
            "examples": [lap.examples for lap in found],
            "update_differences": gaps[arm],
        }
    config = federation.config
    return {
        "workload": workload,
        "keys": config.flat(),
        "clients": federation.data.clients,
        "cohort": list(cohort),
        "examples": int(federation.data.train_sizes[list(cohort)].sum()) * config.client.epochs,
        "repeats": len(next(iter(laps.values()))),
        "arms": arms,
        "fedistill_over_flower": _ratio(medians, OURS, USUAL),
        "cores": CORES,
        "compute": federation.compute.name,
        "versions": {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}},
    }


def _ratio(medians: dict[str, float], arm: str, to: str) -> float | None:
    return medians[arm] / medians[to] if arm in medians and to in medians else None


def _show(console: Console, result: dict[str, Any]) -> None:
    what = result["workload"] or result["keys"]["task"]
    table = Table(
        title=f"{what}: {len(result['cohort'])} clients, {result['examples']:,} examples a round, "
        f"{result['cores']} cores, {result['compute']}",
        caption="in examples/s; overhead: share of the time that trains no client",
    )
    for name in ("arm", "median", "least", "most", f"of 1 x {result['cores']}", "overhead"):
        table.add_column(name, justify="left" if name == "arm" else "right")
    for arm in result["arms"].values():
        ratio = "" if arm["ratio"] is None else f"{arm['ratio']:.2f}"
        figures = [f"{arm[name]:.0f}" for name in ("median", "least", "most")]
        table.add_row(arm["name"], *figures, ratio, f"{arm['overhead']:.0%}")
    console.print(table)
    ratio = result["fedistill_over_flower"]
    if ratio is not None:
        console.print(f"fedistill trains {ratio:.2f} times as fast as the usual Flower app", highlight=False)
    reference = _reference(result["arms"])
    gaps = [f"{key} {arm['update_difference']:.2g}" for key, arm in result["arms"].items() if key != reference]
    if gaps:
        console.print(f"updates, relative difference to {reference}: {', '.join(gaps)}", highlight=False)
