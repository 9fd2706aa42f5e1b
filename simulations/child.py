"""Running a command of ours in a process of its own, so that Ray and torch start clean, and ending it cleanly."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import psutil
import tomli_w

from common.errors import Interrupted
from common.section import Scalar

PATIENCE = 30.0  # seconds that a stopped run may take to write its summary
STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
PARENT = "FEDISTILL_PARENT"  # in a command that we run: the process that waits for it


def as_settings(keys: Mapping[str, Scalar]) -> list[str]:
    """The keys as arguments of a command."""
    return [part for key, value in keys.items() for part in ("-s", f"{key}={_toml(value)}")]


def _toml(value: Scalar) -> str:
    return tomli_w.dumps({"v": value}).removeprefix("v = ").strip()


def run_child(arguments: Sequence[str], tell: Callable[[str], Any]) -> tuple[int, str]:
    """Run ``fedistill`` with arguments; returns its exit code and the last line that it printed.

    ``tell`` gets each line. Ctrl-C reaches this process alone, which stops the other and waits for its end.

    Raises:
        Interrupted: stopped by a signal; nothing is left running.
    """
    last = [""]
    with stoppable():
        process = _start(arguments)

        def read() -> None:
            assert process.stdout is not None
            for line in process.stdout:
                if line.strip():
                    last[0] = line.strip()
                    tell(last[0])

        reader = threading.Thread(target=read, daemon=True)
        try:
            reader.start()
            while process.poll() is None:
                time.sleep(0.1)  # a signal that another thread takes is seen after it
        except KeyboardInterrupt:
            process.send_signal(signal.SIGINT)
            with suppress(subprocess.TimeoutExpired, KeyboardInterrupt):  # asked twice: at once
                process.wait(PATIENCE)
            raise Interrupted from None
        finally:
            _kill(process)
    reader.join(5)
    return process.returncode, last[0].removeprefix("fedistill: ")


def _start(arguments: Sequence[str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "simulations.cli", *arguments],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, text=True, errors="replace",
        start_new_session=True, env={**os.environ, PARENT: str(os.getpid())},
    )  # fmt: skip


def end_with_parent() -> None:
    """In a command that `run_child` runs: end at once when that process has been killed.

    It had no chance to stop this one, which would go on in a folder that nobody waits for, and hold its lock.
    """
    if not (number := os.environ.pop(PARENT, "")).isdecimal():
        return

    def watch() -> None:
        while os.getppid() == int(number):
            time.sleep(0.2)
        with suppress(psutil.Error):
            for each in psutil.Process().children(recursive=True):
                with suppress(psutil.Error):
                    each.kill()
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()


@contextmanager
def stoppable() -> Iterator[None]:
    """The signals that end a program raise KeyboardInterrupt."""

    def stop(number: int, frame: Any) -> None:
        raise KeyboardInterrupt

    before = {number: signal.signal(number, stop) for number in STOPS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _kill(process: subprocess.Popen[str]) -> None:
    """End what is left of a process and of those that it has started."""
    if process.poll() is not None:
        return
    with suppress(psutil.Error):
        for each in psutil.Process(process.pid).children(recursive=True):
            with suppress(psutil.Error):
                each.kill()
    process.kill()
    process.wait()
