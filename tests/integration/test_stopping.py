"""Ctrl-C in real processes: the run ends in seconds, says so, and leaves nothing behind."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from tests.integration.conftest import ROOT, read_summary


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[[list[str]], subprocess.Popen[str]]]:
    """Start ``fedistill simulate``; whatever is left of it after the test is killed."""
    started: list[subprocess.Popen[str]] = []

    def call(settings: list[str]) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "simulations.cli", "simulate", *settings, "--out", "run"]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        started.append(subprocess.Popen(command, cwd=tmp_path, env=environment, text=True, **pipes))
        return started[-1]

    yield call
    for process in started:
        if process.poll() is None:
            for child in psutil.Process(process.pid).children(recursive=True):
                child.kill()
            process.kill()
            process.wait()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stop_during_a_round_ends_within_seconds_and_leaves_no_process(start, tiny, tmp_path, number):
    long = ["-s", "rounds=1000", "-s", "client.epochs=500", "-s", "server.cohort=4"]
    process = start([*tiny, *long])
    metrics = tmp_path / "run" / "metrics.jsonl"
    end = time.monotonic() + 600
    while not (metrics.exists() and '"teach"' in metrics.read_text()):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.2)
    time.sleep(1.0)  # now clients are training
    children = psutil.Process(process.pid).children(recursive=True)
    assert children
    process.send_signal(number)
    began = time.monotonic()
    _, err = process.communicate(timeout=600)
    assert time.monotonic() - began < 60
    assert process.returncode == 130
    assert err.strip() == "fedistill: interrupted"
    assert read_summary(tmp_path / "run")["status"] == "interrupted"
    _, alive = psutil.wait_procs(children, timeout=60)
    assert not alive


def test_a_stop_while_preparing_says_so_too(start, tmp_path):
    from tests.conftest import make_teacher

    make_teacher(tmp_path / "encoder", labels=0)
    keys = ("teacher.model=encoder", "data.max-length=32", "teacher.epochs=100", "student.layers=2")
    settings = [part for key in keys for part in ("-s", key)]
    process = start(settings)
    end = time.monotonic() + 600
    while not list(Path(os.environ["FEDISTILL_CACHE"]).glob("teachers/.*")):
        assert time.monotonic() < end
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 130
    assert "Traceback" not in err
    assert read_summary(tmp_path / "run")["status"] == "interrupted"
    assert not list(Path(os.environ["FEDISTILL_CACHE"]).glob("teachers/.*")), "half a teacher is left"
