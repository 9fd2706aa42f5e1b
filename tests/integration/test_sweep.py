"""A sweep of real runs, gone on with; Ctrl-C; GLUE's table from real runs and models."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from common.errors import Interrupted
from simulations.child import run_child
from tests.conftest import make_teacher
from tests.integration.conftest import ROOT, read_lines, read_summary
from tests.server.test_gpt2 import make_gpt2

FILE = """
ceiling = true
rounds = 1
data.limit = 300
data.max-length = 32
teacher.model = "encoder"
teacher.epochs = 2
teacher.lr = 0.01
client.lr = 0.01
runtime.workers = 2

[arms.two]
student.layers = 2

[arms.one]
student.layers = 1
"""


def test_arms_are_run_compared_and_not_run_again(fedistill, tmp_path):
    make_teacher(tmp_path / "encoder", labels=0)
    (tmp_path / "a.toml").write_text(FILE)
    first = fedistill("sweep", "a.toml", "--out", "all")
    assert first.returncode == 0, first.stdout + first.stderr
    runs = {arm: tmp_path / "all" / arm / "toy" / "seed-0" for arm in ("two", "one")}
    found = json.loads((tmp_path / "all" / "sweep.json").read_text())["arms"]
    ceiling = json.loads((runs["two"].with_name("ceiling-0") / "summary.json").read_text())
    assert ceiling["examples"] == 300
    for arm, run in runs.items():
        summary, entry = read_summary(run), found[arm]["tasks"]["toy"]
        student = summary["student"]["validation"]["accuracy"]
        assert summary["status"] == "completed"
        assert len(summary["student"]["shape"]["layers"]) == (2 if arm == "two" else 1)
        assert entry["measured"]["validation.student"] == {"mean": student, "std": None, "n": 1}
        assert entry["kept"]["validation.kept"] == pytest.approx(summary["retention"]["validation"])
        assert entry["kept"]["federated.kept"] == pytest.approx(summary["retention"]["federated"])
        assert entry["kept"]["ceiling.kept"] == pytest.approx(student / ceiling["validation"]["accuracy"])
    table = [line for line in first.stdout.splitlines() if line.strip().startswith(("two ", "one "))]
    assert len(table) == 2
    assert all(len(line) <= 80 for line in table)

    (tmp_path / "a.toml").write_text(FILE + "[arms.wrong]\nstudent.layers = 9\n")
    before = {arm: (run / "summary.json").stat().st_mtime_ns for arm, run in runs.items()}
    again = fedistill("sweep", "a.toml", "--out", "all", "--resume")
    assert again.returncode == 1
    assert again.stdout.count("was there") == 2
    assert "wrong toy seed 0: failed: student.layers = 9: the teacher has 4 layers" in again.stdout
    assert again.stderr.strip().startswith("fedistill: the run failed: 1 of 3 runs: wrong/toy/seed-0")
    assert before == {arm: (run / "summary.json").stat().st_mtime_ns for arm, run in runs.items()}

    side = fedistill("compare", str(runs["two"]), str(runs["one"]))
    assert side.returncode == 0, side.stderr
    assert [line.split() for line in side.stdout.splitlines() if "student.layers" in line] == [
        ["student.layers", "2", "1"]
    ]


GRID = """
seeds = [0, 1]
rounds = 1
data.limit = 200
data.clients = 4
data.max-length = 32
client.lr = 0.01
runtime.workers = 1

[grid]
student.layers = [1, 2]
distill.temperature = [1.0, 4.0]
"""
TIMES = {"seconds"}  # beside bytes, whose counts of a line's digits are of seconds too
RUN = 6  # of eight: the killed one, in the middle of the second seed


def without_times(found):
    """What a sweep's JSON says of anything but time and bytes."""
    if isinstance(found, dict):
        return {name: without_times(inner) for name, inner in found.items() if name not in {*TIMES, "bytes"}}
    return [without_times(inner) for inner in found] if isinstance(found, list) else found


@pytest.mark.timeout(5400)  # 17 runs
def test_a_sweep_that_was_killed_and_continued_equals_one_that_was_not(fedistill, tiny_teacher, tmp_path, request):
    """2 x 2 x 2 seeds; SIGKILL to all processes of its group, while a run trains."""
    (tmp_path / "a.toml").write_text(f'teacher.model = "{tiny_teacher}"\n{GRID}')
    whole, sweep = (begin("a.toml", tmp_path / name) for name in ("whole", "killed"))  # beside each other
    request.addfinalizer(whole.kill)
    out = tmp_path / "killed"
    try:
        while not (out / "sweep.json").exists() and sweep.poll() is None:
            time.sleep(0.05)
        half_way = out / folders_of(out)[RUN - 1] / "checkpoints"
        while not half_way.exists() and sweep.poll() is None:  # it has its student, and has not trained it
            time.sleep(0.05)
        runs = [process for process in psutil.Process(sweep.pid).children() if "simulate" in process.cmdline()]
    finally:
        os.killpg(sweep.pid, signal.SIGKILL)
        sweep.wait()
    assert len(runs) == 1
    assert psutil.wait_procs(runs, timeout=60)[1] == []  # it does not go on alone
    assert len([run for run in folders_of(out) if (out / run / "summary.json").exists()]) == RUN - 1

    again = fedistill("sweep", "a.toml", "--out", "killed", "--resume", timeout=3600)
    assert again.returncode == 0, again.stdout + again.stderr
    assert again.stdout.count("was there") == RUN - 1
    assert whole.wait(timeout=3600) == 0
    folders = [tmp_path / "whole" / run for run in folders_of(out)]
    assert len(folders) == 8
    for folder in folders:
        other = out / folder.relative_to(tmp_path / "whole")
        assert read_summary(other)["student_sha256"] == read_summary(folder)["student_sha256"]
        assert read_lines(other) == read_lines(folder)
    found, expected = (json.loads((tmp_path / name / "sweep.json").read_text()) for name in ("killed", "whole"))
    assert without_times(found) == without_times(expected)
    assert len({read_summary(folder)["student_sha256"] for folder in folders}) == 8


def begin(file: str, out: Path) -> "subprocess.Popen[bytes]":
    command = [sys.executable, "-m", "simulations.cli", "sweep", file, "--out", str(out)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(command, cwd=out.parent, env=environment, start_new_session=True, stdout=subprocess.DEVNULL)


def folders_of(out: Path) -> list[str]:
    arms = json.loads((out / "sweep.json").read_text())["arms"].values()
    runs = [run for arm in arms for task in arm["tasks"].values() for run in task["runs"]]
    return [run["folder"] for run in sorted(runs, key=lambda run: run["seed"])]  # in the order in which they are run


KINDS = ("bert", "roberta", "electra", "distilbert", "gpt2")


def test_one_recipe_makes_students_of_all_kinds_of_teachers_in_one_table(fedistill, tmp_path):
    """GPT-2 as it is published, without a padding piece; of one teacher there is nothing."""
    for name in KINDS[:-1]:
        make_teacher(tmp_path / name, name, labels=0)
    make_gpt2(tmp_path / "gpt2", pad=False)
    keys = {"ceiling = true": "skip-absent-teachers = true", 'teacher.model = "encoder"': "student.layers = 2"}
    recipe = FILE[: FILE.index("[arms")] + "student.heads = 1\nstudent.neurons = 8\n"
    for old, new in keys.items():
        recipe = recipe.replace(old, new)
    arms = [f'[arms.{name}]\nteacher.model = "{name}"\n' for name in (*KINDS, "gone")]
    (tmp_path / "a.toml").write_text("".join([recipe, *arms]))
    done = fedistill("sweep", "a.toml", "--out", "all")
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "all" / "sweep.json").read_text())
    assert (tuple(found["arms"]), list(found["absent"])) == (KINDS, ["gone"])
    table = (tmp_path / "all" / "sweep.md").read_text()
    for name in KINDS:
        student = read_summary(tmp_path / "all" / name / "toy" / "seed-0")["student"]
        shape = student["shape"]
        assert (len(shape["layers"]), shape["heads"], shape["neurons"]) == (2, 1, 8)
        assert f"| {name} | {100 * student['validation']['accuracy']:.1f} |" in table
    assert "Skipped, no teacher: gone." in table


def test_a_command_runs_in_its_own_process_and_says_its_last_line():
    told: list[str] = []
    code, last = run_child(["keys"], told.append)
    assert (code, last) == (0, told[-1])
    assert run_child(["simulate", "-s", "rounds=0"], told.append) == (
        2, "rounds = 0: input should be greater than or equal to 1",
    )  # fmt: skip


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stop_ends_the_command_too(tmp_path: Path, number: int):
    encoder = make_teacher(tmp_path / "encoder", labels=0)
    keys = {"teacher.model": encoder, "data.max-length": 32, "teacher.epochs": 100}
    settings = [part for key, value in keys.items() for part in ("-s", f"{key}={value}")]
    before = signal.getsignal(number)
    timer = threading.Timer(4.0, os.kill, (os.getpid(), number))
    timer.start()
    try:
        with pytest.raises(Interrupted):
            run_child(["ceiling", *settings, "--out", str(tmp_path / "out")], lambda line: None)
    finally:
        timer.cancel()  # else it would end the tests
    assert signal.getsignal(number) == before
    assert not [child for child in psutil.Process().children() if "simulations.cli" in child.cmdline()]
    assert not (tmp_path / "out").exists()
