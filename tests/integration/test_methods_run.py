"""Strategies beyond averaging weights in real Flower runs on Ray, with tiny random models."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from server.checkpoint import checkpoint_folder
from tests.integration.conftest import read_lines
from tests.integration.faulty import Outcome, Stage

METHODS = ("feddf", "fedmd", "ds-fl", "fedkd")
VOTING = ("fedmd", "ds-fl")


@pytest.fixture(scope="module")
def keys(tiny_teacher: Path) -> dict[str, Any]:
    return {
        "teacher.model": tiny_teacher,
        "data.limit": 300,
        "data.clients": 5,
        "data.max-length": 32,
        "student.layers": 1,
        "rounds": 2,
        "client.lr": 0.01,
        "server.cohort": 4,
        "server.public-sample": 20,
        "server.public-lr": 0.001,
    }


@pytest.fixture(scope="module")
def by_one_worker(tmp_path_factory: pytest.TempPathFactory, keys: dict[str, Any]) -> dict[str, Outcome]:
    with Stage(tmp_path_factory.mktemp("one-worker"), {**keys, "runtime.workers": 1}) as stage:
        return {name: stage.run(f"server.strategy={name}", nodes=1) for name in METHODS}


@pytest.fixture(scope="module")
def stage(
    tmp_path_factory: pytest.TempPathFactory, keys: dict[str, Any], by_one_worker: dict[str, Outcome]
) -> Iterator[Stage]:
    """Two workers. A process can hold one Ray: the other is down by now."""
    with Stage(tmp_path_factory.mktemp("two-workers"), {**keys, "runtime.workers": 2}) as up:
        yield up


@pytest.fixture(scope="module")
def run(stage: Stage) -> Callable[[str], Outcome]:
    known: dict[str, Outcome] = {}

    def call(method: str) -> Outcome:
        if method not in known:
            known[method] = stage.run(f"server.strategy={method}")
            assert known[method].error is None
            assert set(known[method].faults.values()) == {0}
        return known[method]

    return call


def learnt(run: Outcome) -> list[dict[str, Any]]:
    return [line for line in read_lines(run.path) if line["phase"] != "teach"]


@pytest.mark.parametrize("method", METHODS)
def test_one_and_two_workers_give_the_same_bits(run, by_one_worker, method):
    assert run(method).student == by_one_worker[method].student
    assert learnt(run(method)) == learnt(by_one_worker[method])
    assert len({run(other).student for other in METHODS}) == len(METHODS)
    assert (run(method).path / "student" / "model.safetensors").is_file()
    assert run(method).summary["student"]["validation"]["n"] > 0
    assert run(method).summary["student"]["federated"]["n"] > 0


@pytest.mark.parametrize("method", METHODS)
def test_a_run_that_goes_on_from_its_first_round_ends_with_the_same_bits(run, stage, method):
    whole = run(method)
    sha, lines = whole.student, learnt(whole)
    shutil.rmtree(checkpoint_folder(whole.path / "checkpoints", 2))
    again = stage.run(f"server.strategy={method}", again=whole)
    assert again.error is None
    assert again.said("continues after round 1")
    assert again.student == sha
    assert learnt(again) == lines


@pytest.mark.parametrize("method", VOTING)
def test_votes_are_few_bytes(run, method):
    votes, updates = (run(name).costs("train", 2) for name in (method, "feddf"))
    assert votes["bytes_up"] < 0.2 * updates["bytes_up"]
    assert votes["bytes_down"] < 0.5 * updates["bytes_down"]
