"""Running the command line as a user does: in a process of its own."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(item.fspath).parent.name == "integration":
            item.add_marker(pytest.mark.integration)


@pytest.fixture
def fedistill(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Call ``fedistill`` with arguments, in the test's own folder."""

    def call(*arguments: str, env: dict[str, str] | None = None, timeout: float = 1500) -> Any:
        command = [sys.executable, "-m", "simulations.cli", *arguments]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), **(env or {})}
        return subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=timeout, check=False
        )

    return call


@pytest.fixture
def tiny(tiny_teacher: Path) -> list[str]:
    """Keys of a federation of tiny random models that takes seconds."""
    keys = {
        "teacher.model": tiny_teacher,
        "data.limit": 600,
        "data.max-length": 32,
        "student.layers": 2,
        "rounds": 2,
        "client.lr": 0.01,
        "runtime.workers": 2,
    }
    return [part for key, value in keys.items() for part in ("-s", f"{key}={value}")]


def read_summary(run: Path) -> dict[str, Any]:
    return json.loads((run / "summary.json").read_text())


def read_lines(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture
def edge(tmp_path) -> Iterator[Callable[..., Any]]:
    from tests.integration.edges import Command

    started: list[Command] = []

    def start(*arguments: object, prefix: tuple[str, ...] = (), **more: Any) -> Command:
        out = tmp_path / f"out-{len(started)}.txt"
        started.append(Command([str(argument) for argument in arguments], out, list(prefix), **more))
        return started[-1]

    yield start
    for command in started:
        if command.process.poll() is None:
            for process in command.family():
                process.kill()
            command.process.kill()
            command.process.wait()


@pytest.fixture
def texts(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """Of three clients, or as many as the test says."""
    from tests.integration.edges import write_texts

    return write_texts(tmp_path / "data", getattr(request, "param", 3))


@pytest.fixture
def keys(texts: Path, tiny_teacher: Path, tmp_path: Path) -> list[str]:
    """Of a run of real clients with tiny models."""
    given = {
        "task": "text",
        "rounds": 3,
        "data.source": texts / "public.csv",
        "data.validation": texts / "validation.csv",
        "data.max-length": 32,
        "teacher.model": tiny_teacher,
        "student.layers": 2,
        "student.heads": 1,
        "client.lr": 0.01,
        "runtime.workers": 2,
        "runtime.cache": tmp_path / "cache",
        "server.round-timeout": 600,
    }
    return [part for key, value in given.items() for part in ("-s", f"{key}={value}")]


@pytest.fixture
def federation(edge: Callable[..., Any], texts: Path, tmp_path: Path) -> Any:
    from tests.integration.edges import Federation, make

    return Federation(edge, texts, make(tmp_path / "fed", len(list((texts / "private").iterdir()))))
