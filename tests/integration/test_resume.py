"""A run that was killed and resumed ends with the bits of one that was not: real processes, real SIGKILL.

Every run here is the same federation: 5 of 12 clients a round, a server optimiser with a memory and a wire with error
feedback. One reference run, never killed, serves all comparisons.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from server.checkpoint import Checkpoint, checkpoint_folder, checkpoints, load_latest, save_checkpoint
from tests.integration.conftest import ROOT, read_lines, read_summary

SECONDS = 1200
ARRAYS = ("student.safetensors", "optimizer.safetensors")
FILES = (*ARRAYS, "state.json", "SHA256SUMS")


@dataclass(frozen=True)
class Place:
    """A folder with one run and its own cache."""

    folder: Path
    settings: tuple[str, ...]
    started: list[subprocess.Popen[str]] = field(default_factory=list)

    @property
    def run(self) -> Path:
        return self.folder / "run"

    @property
    def checkpoints(self) -> Path:
        return self.run / "checkpoints"

    @property
    def ledger(self) -> Path:
        """Where the run's error feedback lies."""
        state = json.loads((checkpoints(self.checkpoints)[-1] / "state.json").read_text())
        return self.folder / "cache" / "error-feedback" / state["run"]

    def start(self, *arguments: str, point: str = "") -> subprocess.Popen[str]:
        """``fedistill simulate``, perhaps with a point where it is killed."""
        module = ["tests.integration.killed", point] if point else ["simulations.cli"]
        command = [sys.executable, "-m", *module, "simulate", *arguments]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "FEDISTILL_CACHE": str(self.folder / "cache")}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        self.started.append(subprocess.Popen(command, cwd=self.folder, env=environment, text=True, **pipes))
        return self.started[-1]

    def begin(self, *arguments: str, point: str = "") -> subprocess.Popen[str]:
        return self.start(*self.settings, *arguments, "--out", "run", point=point)

    def resume(self, *arguments: str, point: str = "") -> subprocess.Popen[str]:
        return self.start(*arguments, "--out", "run", "--resume", point=point)

    def processes(self, *, agents: bool = False) -> list[psutil.Process]:
        """What is alive of all that was started here: workers, and Ray's, keep the folder they began in.

        But for Ray's two agents, which ask a dead raylet for a minute what became of it, and then go.
        """
        found = []
        for process in psutil.process_iter():
            try:
                here = Path(process.cwd()) == self.folder and process.status() != psutil.STATUS_ZOMBIE
                if here and (agents or not re.search(r"^ray::\w+Agent", " ".join(process.cmdline()))):
                    found.append(process)
            except (OSError, psutil.Error):
                continue
        return found


@contextmanager
def place_in(folder: Path, settings: tuple[str, ...]) -> Iterator[Place]:
    """A place in which nothing runs any more when it is left."""
    place = Place(folder.resolve(), settings)
    try:
        yield place
    finally:
        for process in place.processes(agents=True):
            process.kill()
        for started in place.started:
            started.communicate()


@dataclass(frozen=True)
class Result:
    """What two runs of the same bits have in common, byte for byte."""

    sha: str
    metrics: bytes
    ledger: dict[str, tuple[Any, bytes]]
    arrays: dict[str, bytes]
    student: dict[str, bytes]
    names: set[str]


def result(place: Place) -> Result:
    run = place.run
    summary = read_summary(run)
    assert summary["status"] == "completed"
    return Result(
        sha=summary["student_sha256"],
        metrics=(run / "metrics.jsonl").read_bytes(),
        ledger={name: opened(data) for name, data in contents(place.ledger, "*/round-*").items()},
        arrays={name: (checkpoint_folder(place.checkpoints, 3) / name).read_bytes() for name in ARRAYS},
        student=contents(run / "student"),
        names={str(path.relative_to(run)) for path in run.rglob("*")},
    )


def contents(folder: Path, pattern: str = "**/*") -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.glob(pattern) if path.is_file()}


def opened(data: bytes) -> tuple[Any, bytes]:
    """Header and data of a safetensors file, which writes the entries of its header in any order."""
    start = 8 + int.from_bytes(data[:8], "little")
    return json.loads(data[8:start]), data[start:]


def finish(process: subprocess.Popen[str], code: int = 0) -> tuple[str, str]:
    """Wait for its end, which must be this exit code; what it printed and what it complained of."""
    out, err = process.communicate(timeout=SECONDS)
    assert process.returncode == code, f"exit code {process.returncode}, expected {code}\n{out}\n{err}"
    return out, err


def wait_until(condition: Callable[[], bool], seconds: float = SECONDS) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.1)


@pytest.fixture(scope="module")
def settings(tiny_teacher: Path) -> tuple[str, ...]:
    keys = {
        "teacher.model": tiny_teacher,
        "data.limit": 600,
        "data.max-length": 32,
        "student.layers": 2,
        "rounds": 3,
        "client.lr": 0.01,
        "runtime.workers": 2,
        "server.cohort": 5,
        "server.strategy": "fedadam",
        "server.wire": "topk",
    }
    return tuple(part for key, value in keys.items() for part in ("-s", f"{key}={value}"))


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory, settings: tuple[str, ...]) -> Iterator[tuple[Path, Result]]:
    """The folder of a run that was never killed, and its result."""
    with place_in(tmp_path_factory.mktemp("reference"), settings) as place:
        finish(place.begin())
        yield place.folder, result(place)


@pytest.fixture
def never_killed(reference: tuple[Path, Result]) -> Result:
    return reference[1]


@pytest.fixture
def place(tmp_path: Path, settings: tuple[str, ...]) -> Iterator[Place]:
    with place_in(tmp_path, settings) as empty:
        yield empty


@pytest.fixture
def finished(reference: tuple[Path, Result], tmp_path: Path, settings: tuple[str, ...]) -> Iterator[Place]:
    """A copy of the reference run and its cache, in which error feedback of round 3 must not be read."""
    shutil.copytree(reference[0], tmp_path, dirs_exist_ok=True)
    with place_in(tmp_path, settings) as copy:
        for path in copy.ledger.glob("*/round-00003*"):
            path.write_bytes(b"left by a round that is done again")
        yield copy


# --- kills: each life is one folder, whose process is killed at one point after the other ---------

LIVES = {
    "from the first second": ("claimed", "preparing", "draft@0", "half@2"),
    "while clients are at work": ("sent@1", "renamed@1", "aggregated@2", "retrying@3"),
    "between the rounds": ("scoring@1", "draft@2", "pruning@2", "unsaved@3", "student"),
}


@pytest.mark.parametrize("points", LIVES.values(), ids=LIVES)
def test_a_run_that_is_killed_again_and_again_ends_with_the_same_bits(place, never_killed, points):
    left: list[psutil.Process] = []
    for number, point in enumerate(points):
        finish(place.begin(*["--resume"] * (number > 0), point=point), -signal.SIGKILL)
        check_gone(left)
        left = place.processes()  # its workers and Ray die while the next one begins
    out, _ = finish(place.begin("--resume"))
    check_gone(left)
    assert re.search("continues after round [0-3]\n", out)
    assert result(place) == never_killed


def check_gone(processes: list[psutil.Process]) -> None:
    _, alive = psutil.wait_procs(processes, timeout=120)
    assert not alive


def test_a_worker_killed_while_it_writes_error_feedback_changes_no_bit(place, never_killed):
    out, _ = finish(place.begin(point="worker@2"))
    assert "failed: its worker process died; tried again" in out
    assert read_summary(place.run)["faults"]["retried"] > 0
    (mark,) = place.folder.glob("worker-died-*")
    mark.unlink()
    assert result(place) == never_killed


def test_ctrl_c_and_a_second_process_change_no_bit(place, never_killed):
    first = place.begin(point="half@2:SIGSTOP")
    known = psutil.Process(first.pid)
    wait_until(lambda: known.status() == psutil.STATUS_STOPPED)
    before = contents(place.run, "**/[!.]*")  # its workers go on
    for arguments, reason in (["--resume"], "another process works in it"), ([], "not an empty folder"):
        _, err = finish(place.begin(*arguments), 2)
        assert reason in one_line(err)
    assert contents(place.run, "**/[!.]*") == before
    first.send_signal(signal.SIGCONT)
    wait_until(lambda: known.status() != psutil.STATUS_STOPPED)  # a thread that is stopped takes no signal
    first.send_signal(signal.SIGINT)
    finish(first, 130)
    assert read_summary(place.run)["status"] == "interrupted"
    out, _ = finish(place.resume())
    assert "continues after round 1\n" in out
    assert result(place) == never_killed


# --- what lies on disk ---------------------------------------------------------------------------


def test_a_full_disk_costs_one_checkpoint(place, never_killed):
    _, err = finish(place.begin(point="disk@2"), 1)
    assert re.search(r"run failed: .*checkpoints/\S*round-00002\S*: File too large", one_line(err))
    assert read_summary(place.run)["status"] == "failed"
    assert [path.name for path in sorted(place.checkpoints.iterdir())] == ["round-00000", "round-00001"]
    for path in checkpoints(place.checkpoints):
        subprocess.run(["sha256sum", "--check", "--quiet", "SHA256SUMS"], cwd=path, check=True)
    out, _ = finish(place.resume())
    assert "continues after round 1\n" in out
    assert result(place) == never_killed


def test_a_damaged_checkpoint_is_named_and_the_one_before_serves(finished, never_killed):
    flip(checkpoint_folder(finished.checkpoints, 3) / "optimizer.safetensors")
    out, _ = finish(finished.resume())
    assert re.search(r"round-00003: damaged .*: optimizer.safetensors is not what was written", out)
    assert "continues after round 2\n" in out
    assert result(finished) == never_killed


def test_a_run_whose_checkpoints_are_all_damaged_begins_at_round_1(finished, never_killed):
    for number, name in ((2, "state.json"), (3, "student.safetensors")):
        cut(checkpoint_folder(finished.checkpoints, number) / name)
    out, _ = finish(finished.resume())
    assert len(re.findall("damaged", out)) == 2
    assert "the run begins at round 1\n" in out
    assert result(finished) == never_killed


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("damage", [cut, flip, Path.unlink])
@pytest.mark.parametrize("name", FILES)
def test_any_damage_to_any_file_of_a_checkpoint_is_seen(reference, tmp_path, name, damage):
    shutil.copytree(reference[0] / "run" / "checkpoints", tmp_path, dirs_exist_ok=True)
    whole = load_shapes(checkpoint_folder(tmp_path, 2))
    damage(checkpoint_folder(tmp_path, 3) / name)
    heard: list[str] = []
    found = load_latest(tmp_path, whole, heard.append)
    assert found is not None
    assert found.round == 2
    (line,) = heard
    assert line.startswith(f"{checkpoint_folder(tmp_path, 3)}: damaged ")
    assert name in line or name == "SHA256SUMS"


def load_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    import safetensors.numpy

    return {name: array.shape for name, array in safetensors.numpy.load_file(path / ARRAYS[0]).items()}


def test_damaged_checkpoints_do_not_push_out_those_of_a_run_that_began_anew(tmp_path):
    shapes = {"w": (2,)}

    def save(number: int) -> None:
        weights = {"w": np.full(2, number, dtype=np.float32)}
        save_checkpoint(tmp_path, Checkpoint(number, weights, {}, {}), keep=2)

    for number in (4, 5):
        save(number)
        flip(checkpoint_folder(tmp_path, number) / "student.safetensors")
    for number in range(6):
        save(number)
        found = load_latest(tmp_path, shapes, lambda text: None)
        assert found is not None
        assert found.round == number
    assert [path.name for path in checkpoints(tmp_path)] == ["round-00004", "round-00005"]


def test_a_client_whose_error_feedback_is_gone_is_named_and_left_out(finished):
    (client, base), *_ = bases_of_round_3(finished)
    (finished.ledger / str(client) / f"round-{base:05d}.safetensors").unlink()
    shutil.rmtree(checkpoint_folder(finished.checkpoints, 3))
    out, _ = finish(finished.resume())
    assert f"round 3: client {client} failed: error feedback of round {base} is missing\n" in out
    (line,) = (line for line in read_lines(finished.run) if (line["round"], line["phase"]) == (3, "train"))
    assert line["failed"] == [client]
    assert line["clients"] == 4


def test_without_error_feedback_a_run_fails_and_with_it_goes_on(finished, never_killed):
    client, base = bases_of_round_3(finished)[0]
    ledger, aside = finished.ledger, finished.folder / "aside"
    shutil.rmtree(checkpoint_folder(finished.checkpoints, 3))
    ledger.rename(aside)
    _, err = finish(finished.resume(), 1)
    reason = f"the first: client {client} failed: error feedback of round {base} is missing"
    assert one_line(err).endswith(reason)
    shutil.copytree(aside, ledger, dirs_exist_ok=True)
    out, _ = finish(finished.resume())
    assert "continues after round 2\n" in out
    assert result(finished) == never_killed


def bases_of_round_3(place: Place) -> list[tuple[int, int]]:
    """Clients that trained in round 3 and before it, with the round of their error feedback then."""
    states = [
        json.loads((checkpoint_folder(place.checkpoints, number) / "state.json").read_text()) for number in (2, 3)
    ]
    before, after = (dict(state["feedback"]) for state in states)
    return [(client, before[client]) for client in sorted(before) if after[client] == 3]


# --- what may be asked ---------------------------------------------------------------------------


def test_a_run_may_be_given_more_rounds_and_keeps_its_lines(place):
    finish(place.begin("-s", "rounds=2", "--resume"))  # nothing there to resume: the run begins
    assert read_summary(place.run)["rounds"] == 2
    before = (place.run / "metrics.jsonl").read_bytes()
    out, _ = finish(place.resume("-s", "rounds=3"))
    assert "continues after round 2\n" in out
    assert read_summary(place.run)["rounds"] == 3
    lines = (place.run / "metrics.jsonl").read_bytes()
    assert lines.startswith(before)
    added = [json.loads(line) for line in lines[len(before) :].splitlines()]
    assert {line["round"] for line in added} == {3}
    assert [line["phase"] for line in added][-3:] == ["train", "evaluate", "validation"]


def test_a_completed_run_is_left_as_it_is(reference, never_killed, tmp_path, settings):
    shutil.copytree(reference[0], tmp_path, dirs_exist_ok=True)
    with place_in(tmp_path, settings) as copy:
        finish(copy.resume())
        assert result(copy) == never_killed


def test_another_configuration_is_refused_by_name(finished):
    before = contents(finished.folder)
    refused = {
        "client.lr=0.02": "client.lr = 0.02 (was 0.01)",
        "seed=1": "seed = 1 (was 0)",
        "runtime.workers=1": "runtime.workers = 1 (was 2)",
        "rounds=2": "rounds = 2 (was 3)",
    }
    for setting, reason in refused.items():
        _, err = finish(finished.resume("-s", setting), 2)
        assert reason in one_line(err)
        assert "only rounds may grow" in err
    assert contents(finished.folder) == before


def test_resume_needs_the_folder(place):
    _, err = finish(place.start("--resume"), 2)
    assert one_line(err) == "fedistill: --resume: give the run's folder with --out"
    assert not contents(place.folder)


def one_line(err: str) -> str:
    (line,) = err.splitlines()
    return line
