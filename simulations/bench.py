"""``fedistill bench``: training speed of a federated round against the bare loop, interleaved in one call."""

import json
import os
import statistics
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
import torch
from rich.console import Console
from rich.table import Table

from clients.worker import Worker
from common.config import Config
from common.errors import InputError, RunFailed
from common.store import write_atomically
from server.assignment import pick_cohort
from server.preparation import Federation, prepare
from simulations.bare_loop import bare_round
from simulations.display import progress_for
from simulations.simulate import simulate

AGREE = 0.01  # of the update's size: the loop rounds differently (more threads), it must not learn differently


def bench(config: Config, repeats: int, out: Path | None) -> dict[str, Any]:
    """Time one round of both arms ``repeats`` times and print the medians and their ratio.

    The arms must have learnt the same: the loop's mean update has to agree with the federation's.

    Raises:
        RunFailed: it does not.
    """
    if config.distill.hidden_weight > 0 or config.student.dropout > 0:
        raise InputError("distill.hidden-weight, student.dropout: the bare loop has neither; set both to 0")
    config = config.model_copy(update={"rounds": 1})
    torch.set_num_threads(os.cpu_count() or 1)  # before the teacher: its bits depend on it
    console = Console()
    progress = progress_for(console)
    federation = prepare(config, progress)
    if federation.compute.device.type != "cpu":
        raise InputError("runtime.device: the bare loop runs on the CPU; set runtime.device = cpu")
    cohort = pick_cohort(federation.data.eligible, config.server.cohort, config.seed, 1)
    examples = int(federation.data.train_sizes[list(cohort)].sum()) * config.client.epochs
    soft = _teacher_logits(federation, cohort)
    start = {name: array.copy() for name, array in federation.weights.items()}
    arms: dict[str, list[float]] = {"bare loop": [], "fedistill": []}
    gap = 0.0
    for repeat in range(repeats):
        torch.set_num_threads(os.cpu_count() or 1)
        seconds, update = bare_round(federation, cohort, soft, 1)
        arms["bare loop"].append(examples / seconds)
        progress.line(f"{repeat + 1}/{repeats}: bare loop {arms['bare loop'][-1]:.0f} examples/s")
        speed, trained = _federated_round(config)
        arms["fedistill"].append(speed)
        progress.line(f"{repeat + 1}/{repeats}: fedistill {speed:.0f} examples/s")
        gap = max(gap, _disagreement(start, trained, update))
    if gap > AGREE:
        raise RunFailed(f"the arms learnt different updates: they differ by {gap:.3f} of their size")
    result = _result(config, examples, arms, gap)
    _show(console, result)
    if out is not None:
        write_atomically(out, (json.dumps(result, indent=2) + "\n").encode())
    return result


def _teacher_logits(federation: Federation, cohort: tuple[int, ...]) -> dict[int, Any]:
    teacher = federation.teacher
    worker = Worker(federation.config, str(teacher.folder), teacher.hash, federation.data.key)
    return {client: worker.teacher_logits(federation.data.shard(client).train) for client in cohort}


def _federated_round(config: Config) -> tuple[float, dict[str, Any]]:
    """Examples per second of the training phase of a real run, and the weights after it."""
    with tempfile.TemporaryDirectory() as name:
        run = Path(name) / "run"
        summary = simulate(config, run, quiet=True)
        weights = safetensors.numpy.load_file(run / "checkpoints" / "round-00001.safetensors")
    return summary["cost"]["examples_per_s"], weights


def _disagreement(start: dict[str, Any], trained: dict[str, Any], update: dict[str, Any]) -> float:
    """Norm of the difference of two updates over the norm of one."""
    apart = sum(float(np.square(trained[name] - start[name] - update[name]).sum()) for name in update)
    size = sum(float(np.square(array).sum()) for array in update.values())
    return float(np.sqrt(apart / size))


def _result(config: Config, examples: int, arms: dict[str, list[float]], gap: float) -> dict[str, Any]:
    medians = {name: statistics.median(speeds) for name, speeds in arms.items()}
    return {
        "task": config.task,
        "examples": examples,
        "examples_per_s": arms,
        "median": medians,
        "ratio": medians["fedistill"] / medians["bare loop"],
        "update_difference": gap,
        "cores": os.cpu_count(),
    }


def _show(console: Console, result: dict[str, Any]) -> None:
    table = Table(title=f"{result['task']}: {result['examples']:,} examples a round")
    for name in ("arm", "examples/s (median)", "least", "most", "ratio"):
        table.add_column(name, justify="left" if name == "arm" else "right")
    for name, speeds in result["examples_per_s"].items():
        middle = result["median"][name]
        ratio = middle / result["median"]["bare loop"]
        table.add_row(name, f"{middle:.0f}", f"{min(speeds):.0f}", f"{max(speeds):.0f}", f"{ratio:.2f}")
    console.print(table)
