"""Flower's own long-running processes as children of ours: started clean, watched, ended whole."""

import ctypes
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from logging.handlers import RotatingFileHandler
from pathlib import Path
from typing import Any

import psutil

STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
TICK = 0.2  # seconds between two looks at what was asked
PATIENCE = 10.0  # seconds that a child may take to end
LOG_BYTES = 10_000_000  # of each of two files
PARENT_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG, linux/prctl.h


class _Log(RotatingFileHandler):
    """A log whose lines are lost where the disk is full; logging would print each failure instead."""

    def handleError(self, record: logging.LogRecord) -> None:
        pass


class Child:
    """A Python module of ours that runs as a process, in a session of its own, so that Ctrl-C reaches us alone.

    Args:
        arguments: the module and what it is given.
        log: file for all it prints; an older one becomes ``NAME.1``.
        hear: gets each line too, from another thread.
    """

    def __init__(
        self, arguments: Sequence[str], env: Mapping[str, str], log: Path, hear: Callable[[str], None]
    ) -> None:
        # -P: the folder it is started in must not lend it a module
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", *arguments],
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace",
            env=dict(env), start_new_session=True,
        )  # fmt: skip
        self._family: list[psutil.Process] = []
        self._reader = threading.Thread(target=self._read, args=(log, hear), daemon=True)
        self._reader.start()

    def _read(self, log: Path, hear: Callable[[str], None]) -> None:
        assert self._process.stdout is not None
        keep = _Log(log, maxBytes=LOG_BYTES, backupCount=1, encoding="utf-8")
        for line in self._process.stdout:
            keep.emit(logging.LogRecord("child", logging.INFO, "", 0, line.rstrip("\n"), None, None))
            hear(line.rstrip())
        keep.close()

    @property
    def running(self) -> bool:
        with suppress(psutil.Error):
            family = psutil.Process(self._process.pid).children(recursive=True)
            if self._process.poll() is None:  # a dead process no longer knows its children: the last look counts
                self._family = family
        return self._process.poll() is None

    @property
    def exit_code(self) -> int | None:
        """Negative: the signal that ended it."""
        return self._process.returncode

    def stop(self) -> None:
        """End it and all that it has started: asked first, then by force."""
        if self.running:
            self._process.terminate()
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(PATIENCE)
        family = [process for process in self._family if process.is_running()]
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()
        _, alive = psutil.wait_procs(family, timeout=2.0)  # Flower's look for their parent five times a second
        for process in alive:
            with suppress(psutil.Error):
                process.kill()
        self._reader.join(5.0)


def end_with(parent: int) -> None:
    """Have this process end when the one that started it does, even by SIGKILL (on Linux).

    Args:
        parent: the process id of that one, to see that it has not ended already.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PARENT_DEATH_SIGNAL, signal.SIGTERM)
    if os.getppid() != parent:
        sys.exit("the process that has started this one is gone")


class Stop:
    """Whether this process was asked to stop. A plain flag: a lock could be held by what a signal interrupts."""

    def __init__(self) -> None:
        self.asked = False

    def wait(self, seconds: float) -> bool:
        """Return after so many seconds, or when asked to stop: whether it was asked."""
        end = time.monotonic() + seconds
        while not self.asked and (left := end - time.monotonic()) > 0:
            time.sleep(min(left, TICK))
        return self.asked


@contextmanager
def until_stopped() -> Iterator[Stop]:
    """Have Ctrl-C, SIGTERM and SIGHUP ask to stop, and do nothing else."""
    stop = Stop()

    def note(number: int, frame: Any) -> None:
        stop.asked = True

    before = {number: signal.signal(number, note) for number in STOPS}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def flower_environment(home: Path) -> dict[str, str]:
    """This process's environment for one of Flower's: its own Flower folder, no question to the network."""
    loopback = "127.0.0.1,localhost,::1"
    return {
        **os.environ,
        "FLWR_HOME": str(home),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "FLWR_INTERNAL_GRPC_CONTROL_API": "0",  # 1 would open it on all addresses
        "FLWR_INTERNAL_GRPC_FLEET_API": "0",
        "FLWR_ENABLE_EVENT_LOG": "0",
        "NO_PROXY": ",".join(filter(None, (os.environ.get("NO_PROXY", ""), loopback))),
        "PATH": os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", ""))),  # its other commands
        "PYTHONUNBUFFERED": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }


def free_port(host: str = "127.0.0.1") -> int:
    """A TCP port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])
