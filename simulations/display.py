"""What a terminal shows: bars for work under way, lines for what is done, everything else in a log file."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bars
from rich.table import Column

from common.progress import Lines, Progress, Step


class _BarStep:
    def __init__(self, bars: Bars, task: TaskID) -> None:
        self.bars, self.task = bars, task

    def advance(self, amount: float = 1) -> None:
        self.bars.advance(self.task, amount)

    def info(self, text: str) -> None:
        self.bars.update(self.task, info=text)


class LiveBars:
    """Progress in a terminal: one bar per step under way, removed when it ends."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.bars = Bars(
            TextColumn("{task.description}", table_column=Column(no_wrap=True)),
            BarColumn(bar_width=12),
            MofNCompleteColumn(table_column=Column(no_wrap=True)),
            TimeRemainingColumn(compact=True, table_column=Column(no_wrap=True)),
            # the one that gives way when the terminal is narrow
            TextColumn("[dim]{task.fields[info]}", table_column=Column(no_wrap=True, overflow="ellipsis", ratio=1)),
            console=console,
            transient=True,
        )

    def line(self, text: str) -> None:
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    @contextmanager
    def step(self, name: str, total: float | None) -> Iterator[Step]:
        self.bars.start()
        task = self.bars.add_task(name, total=total, info="")
        try:
            yield _BarStep(self.bars, task)
        finally:
            self.bars.remove_task(task)
            if not self.bars.tasks:
                self.bars.stop()


def progress_for(console: Console) -> Progress:
    """Bars in a terminal, plain lines elsewhere."""
    return LiveBars(console) if console.is_terminal else Lines(console.file)


@contextmanager
def chatter_in(path: Path) -> Iterator[Console]:
    """Send what libraries and their processes print to a log file; yields a console on the real output.

    Flower, Ray and transformers write to the file descriptors themselves, so these are what is redirected.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    kept = os.dup(1), os.dup(2)
    with path.open("ab") as log, os.fdopen(os.dup(1), "w", buffering=1) as real:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
        try:
            yield console_on(real)
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            for number, copy in enumerate(kept, start=1):
                os.dup2(copy, number)
                os.close(copy)


def console_on(stream: TextIO) -> Console:
    """A rich console on a stream, 80 columns wide at least when nobody can tell."""
    terminal = stream.isatty()
    return Console(file=stream, force_terminal=terminal, width=None if terminal else 100)
