"""What a person sees while work goes on: steps that advance, and lines.

Code that works takes a `Progress`; who watches decides what it looks like. `Lines` prints plain lines, for a
log or a pipe; the command line draws bars in a terminal.
"""

import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import IO, Protocol


class Step(Protocol):
    """Something under way; ``advance`` says how much more of it is done."""

    def advance(self, amount: float = 1) -> None: ...

    def info(self, text: str) -> None:
        """A short text shown beside the bar, e.g. the loss."""


class Progress(Protocol):
    def step(self, name: str, total: float | None) -> AbstractContextManager[Step]:
        """Show a step of ``total`` units (None: unknown) until the context ends."""

    def line(self, text: str) -> None:
        """Print one line that stays."""


class _LineStep:
    def __init__(self, name: str, total: float | None, print_line: "Lines", every: float) -> None:
        self.name, self.total, self.lines, self.every = name, total, print_line, every
        self.done, self.text = 0.0, ""
        self.started = self.last = time.monotonic()

    def advance(self, amount: float = 1) -> None:
        self.done += amount
        now = time.monotonic()
        if now - self.last >= self.every:
            self.last = now
            self.lines.line(f"{self.name}: {self._share()}{self._left(now)}{self.text}")

    def info(self, text: str) -> None:
        self.text = f", {text}" if text else ""

    def _share(self) -> str:
        return f"{self.done:,.0f}" if not self.total else f"{self.done:,.0f} of {self.total:,.0f}"

    def _left(self, now: float) -> str:
        if not self.total or not 0 < self.done < self.total:
            return ""
        return f", about {(now - self.started) * (self.total - self.done) / self.done:.0f} s left"


class Lines:
    """Plain progress: a line per step every few seconds while it runs, and the caller's own lines."""

    def __init__(self, stream: IO[str] | None = None, every: float = 10.0) -> None:
        self.stream, self.every = stream, every

    def line(self, text: str) -> None:
        print(text, file=self.stream or sys.stdout, flush=True)

    @contextmanager
    def step(self, name: str, total: float | None) -> Iterator[Step]:
        yield _LineStep(name, total, self, self.every)


class Silent(Lines):
    """No output; for workers and tests."""

    def line(self, text: str) -> None:
        return
