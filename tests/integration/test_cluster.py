"""The same run on a Ray cluster that was there before it: two raylets, as on two machines, here on one host."""

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.integration.conftest import ROOT, read_summary
from tests.integration.faulty import Fault, Stage

START_SECONDS = 600


class Machine:
    """A raylet with one core, and whatever runs under it."""

    def __init__(self, folder: Path, *arguments: str) -> None:
        self.folder = folder
        self.log = folder.with_suffix(".log")
        environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        environment.pop("FEDISTILL_CACHE", None)  # another machine has an environment of its own
        command = [str(Path(sys.executable).with_name("ray")), "start", *arguments, "--num-cpus=1", "--block"]
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [*command, f"--temp-dir={folder}", "--object-store-memory=100000000"],
                env={**environment, "RAY_USAGE_STATS_ENABLED": "0"},
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self._wait_until(lambda: "Ray runtime started" in self.log.read_text())

    def workers(self, *, busy: bool = False) -> list[psutil.Process]:
        """The worker processes of federations on this machine."""
        title = "ray::ClientAppActor" + (".run" if busy else "")
        found = []
        for process in self._family():
            try:
                if process.cmdline()[:1] and process.cmdline()[0].startswith(title):
                    found.append(process)
            except psutil.Error:
                continue
        return found

    def is_up(self) -> bool:
        return any(process.name() == "raylet" for process in self._family())

    def stop(self) -> None:
        family = self._family()
        for process in family:
            try:
                process.kill()
            except psutil.Error:
                continue
        psutil.wait_procs(family, timeout=10)
        self.process.wait()

    def _family(self) -> list[psutil.Process]:
        try:
            own = psutil.Process(self.process.pid)
            return [*own.children(recursive=True), own]
        except psutil.Error:
            return []

    def _wait_until(self, done: Callable[[], bool]) -> None:
        end = time.monotonic() + START_SECONDS
        while not done():
            if self.process.poll() is not None or time.monotonic() > end:
                self.stop()
                pytest.fail(self.log.read_text())
            time.sleep(0.2)


@dataclass(frozen=True)
class Cluster:
    address: str
    machines: list[Machine]


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """Two machines; the second knows the first by its address alone."""
    folder = Path(tempfile.mkdtemp(prefix="ray-"))  # the sockets in it must have short names
    port, started = free_port(), []
    head = ("--head", f"--port={port}", f"--ray-client-server-port={free_port()}", "--include-dashboard=false")
    try:
        started.append(Machine(folder / "a", *head, "--disable-usage-stats"))
        started.append(Machine(folder / "b", f"--address=127.0.0.1:{port}"))
        yield Cluster(f"127.0.0.1:{port}", started)
    finally:
        for machine in reversed(started):
            machine.stop()
        shutil.rmtree(folder, ignore_errors=True)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="module")
def keys(tiny_teacher: Path) -> dict[str, Any]:
    return {
        "teacher.model": tiny_teacher,
        "data.limit": 400,
        "data.max-length": 32,
        "student.layers": 1,
        "rounds": 4,
        "client.lr": 0.01,
        "runtime.workers": 2,
    }


@pytest.fixture(scope="module")
def at_home(keys: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> str:
    """The student of the same run without a cluster."""
    folder = tmp_path_factory.mktemp("at-home")
    assert simulate(keys, folder).wait(timeout=1500) == 0, (folder / "run" / "log.txt").read_text()
    return read_summary(folder / "run")["student_sha256"]


def simulate(keys: dict[str, Any], folder: Path, *settings: str, address: str = "") -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "simulations.cli", "simulate", "--out", "run"]
    command += [part for key, value in keys.items() for part in ("-s", f"{key}={value}")]
    command += [part for setting in settings for part in ("-s", setting)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **({"RAY_ADDRESS": address} if address else {})}
    pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, cwd=folder, env=environment, text=True, **pipes)


def test_a_cluster_gives_the_same_bits_and_lives_on(cluster, keys, at_home, tmp_path):
    """The cache is named by a relative path, which means the folder of the caller, not that of the raylets."""
    process = simulate(keys, tmp_path, "runtime.cache=cache", address=cluster.address)
    worked: set[int] = set()
    while process.poll() is None:
        worked |= {place for place, machine in enumerate(cluster.machines) if machine.workers(busy=True)}
        time.sleep(0.05)
    assert process.returncode == 0, process.stderr
    assert worked == {0, 1}
    summary = read_summary(tmp_path / "run")
    assert summary["faults"] == {"failed": 0, "rejected": 0, "late": 0, "retried": 0}
    assert summary["student_sha256"] == at_home
    assert "Traceback" not in (tmp_path / "run" / "log.txt").read_text()
    check_left_alone(cluster.machines)


def check_left_alone(machines: list[Machine]) -> None:
    """The machines are up, and nothing of the run is left on them."""
    end = time.monotonic() + 600
    while any(machine.workers() for machine in machines) and time.monotonic() < end:
        time.sleep(0.2)
    assert not [worker for machine in machines for worker in machine.workers()]
    assert all(machine.is_up() for machine in machines)


def test_ctrl_c_ends_the_run_and_not_the_cluster(cluster, keys, tmp_path):
    process = simulate(keys, tmp_path, "rounds=1000", "client.epochs=500", address=cluster.address)
    end = time.monotonic() + 600
    while not all(machine.workers(busy=True) for machine in cluster.machines):
        assert process.poll() is None
        assert time.monotonic() < end
        time.sleep(0.1)
    process.send_signal(2)
    assert process.wait(timeout=120) == 130
    assert read_summary(tmp_path / "run")["status"] == "interrupted"
    check_left_alone(cluster.machines)


@pytest.mark.parametrize(
    "unready",
    [
        ("", "runtime.threads=2", "runtime.threads = 2: the Ray cluster's largest machine has 1 cores"),
        ("127.0.0.1:1", "rounds=2", "RAY_ADDRESS = 127.0.0.1:1: no Ray cluster answers there; start one, or unset it"),
    ],
    ids=["no room", "nobody there"],
)
def test_a_cluster_that_cannot_serve_is_told_at_once(cluster, keys, tmp_path, unready):
    where, setting, told = unready
    process = simulate(keys, tmp_path, setting, address=where or cluster.address)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 2
    assert err.strip() == f"fedistill: {told}"
    assert not (tmp_path / "run").exists()
    check_left_alone(cluster.machines)


@pytest.fixture
def stage(cluster: Cluster, keys: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Stage]:
    monkeypatch.setenv("RAY_ADDRESS", cluster.address)
    with Stage(tmp_path, keys) as up:
        yield up
    check_left_alone([machine for machine in cluster.machines if machine.is_up()])


def test_a_worker_that_hangs_on_another_machine_is_ended_and_one_that_dies_started_again(stage, at_home):
    # long enough for the worker to be started again on a busy machine: it gets as long a time once more
    hung = stage.run("server.round-timeout=60", faults=[Fault("hangs", times=1)])
    assert (hung.error, hung.student) == (None, at_home)
    died = stage.run(faults=[Fault("is killed", round=2, times=1)])
    assert (died.error, died.student) == (None, at_home)
    assert hung.faults["retried"] > 1
    assert died.faults["retried"] > 1


def test_a_machine_that_dies_takes_no_client_with_it(stage, cluster, at_home):
    """The last of these tests: one machine is left after it."""
    watching = threading.Thread(target=kill_when_busy, args=(cluster.machines[1],))
    busy = [Fault("sleeps", client=client, round=1, times=1, seconds=6) for client in (0, 3)]  # one on each list
    stage.run()
    watching.start()
    run = stage.run(faults=busy)
    watching.join()
    assert not cluster.machines[1].is_up()
    assert (run.error, run.student) == (None, at_home)
    assert run.costs("train")["recovered"]
    assert run.faults["failed"] == run.faults["late"] == 0


def kill_when_busy(machine: Machine) -> None:
    end = time.monotonic() + 600
    while time.monotonic() < end:
        if machine.workers(busy=True):
            time.sleep(2)  # the phase in which it sleeps
            if machine.workers(busy=True):
                machine.stop()
                return
        time.sleep(0.05)
