"""A sweep of real runs, gone on with; Ctrl-C; GLUE's table from real runs and models."""

import json
import os
import signal
import threading
from pathlib import Path

import psutil
import pytest

from common.errors import Interrupted
from simulations.child import run_child
from tests.conftest import make_teacher
from tests.integration.conftest import read_summary
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


def test_one_recipe_makes_students_of_an_encoder_and_a_decoder(fedistill, tmp_path):
    make_teacher(tmp_path / "distilbert", "distilbert", labels=0)
    make_gpt2(tmp_path / "gpt2")
    recipe = FILE[: FILE.index("[arms")].replace('teacher.model = "encoder"', "student.heads = 1\nstudent.neurons = 8")
    arms = [f'[arms.{name}]\nteacher.model = "{name}"' for name in ("distilbert", "gpt2")]
    (tmp_path / "a.toml").write_text("\n".join([recipe.replace("ceiling = true", "student.layers = 2"), *arms]))
    done = fedistill("sweep", "a.toml", "--out", "all", timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr
    for name in ("distilbert", "gpt2"):
        shape = read_summary(tmp_path / "all" / name / "toy" / "seed-0")["student"]["shape"]
        assert (len(shape["layers"]), shape["heads"], shape["neurons"]) == (2, 1, 8)


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
