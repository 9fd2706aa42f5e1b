"""``flwr run .``: Flower's own command starts the same federation and leaves the same run folder."""

import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.integration.conftest import ROOT, read_lines, read_summary

FLWR = str(Path(sys.executable).with_name("flwr"))


@pytest.fixture
def flower_home(tmp_path: Path) -> Iterator[dict[str, str]]:
    """A Flower of its own: home, ports, and no superlink left behind."""
    home = tmp_path / "flower"
    ports = []
    for _ in range(2):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            ports.append(str(free.getsockname()[1]))
    yield {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "FLWR_HOME": str(home),
        "FLWR_LOCAL_SUPERLINK_HTTP_API_PORT": ports[0],
        "FLWR_LOCAL_CONTROL_API_PORT": ports[1],
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
    }
    for process in psutil.process_iter():
        try:
            if process.environ().get("FLWR_HOME") == str(home):
                process.kill()
        except psutil.Error:
            continue


def test_flwr_run_gives_the_bits_and_the_folder_of_simulate(fedistill, tiny, flower_home, tmp_path):
    app = tmp_path / "app"
    app.mkdir()
    for name in ("common", "server", "clients"):
        shutil.copytree(ROOT / name, app / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "LICENSE", "README.md"):
        shutil.copy(ROOT / name, app / name)
    done = fedistill("simulate", *tiny, "--out", "simulated")
    assert done.returncode == 0, done.stderr

    keys = dict(setting.split("=", 1) for setting in tiny[1::2]) | {"runtime.out": str(tmp_path / "flown")}
    config = " ".join(f'{key}="{value}"' if value[0] in "/" else f"{key}={value}" for key, value in keys.items())
    nodes = "num-supernodes=2 client-resources-num-cpus=1 init-args-num-cpus=2"
    command = [FLWR, "run", str(app), "--stream", "--run-config", config, "--federation-config", nodes]
    flown = subprocess.run(
        command, env=flower_home, cwd=tmp_path, capture_output=True, text=True, timeout=1500, check=False
    )
    assert flown.returncode == 0, flown.stdout + flown.stderr
    listed = subprocess.run(
        [FLWR, "ls", "--format", "json"], env=flower_home, cwd=tmp_path, capture_output=True, check=True
    )
    assert [run["status"] for run in json.loads(listed.stdout)["runs"]] == ["finished:completed"], flown.stdout

    one, other = tmp_path / "simulated", tmp_path / "flown"
    assert read_summary(one)["student_sha256"] == read_summary(other)["student_sha256"]
    names = {path.name for path in one.iterdir()} - {"log.txt"}  # Flower keeps its own log
    assert {path.name for path in other.iterdir()} == names
    phases = [[(line["round"], line["phase"]) for line in read_lines(run)] for run in (one, other)]
    assert phases[0] == phases[1]
    bundles = list((tmp_path / "flower").rglob("CONTENT"))
    for bundle in bundles:
        assert all(line.split(",")[0].endswith((".py", ".toml", "LICENSE")) for line in bundle.read_text().splitlines())
