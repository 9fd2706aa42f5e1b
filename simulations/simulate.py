"""``fedistill simulate``: prepare in this process, run on Ray, end with a table and a truthful exit code."""

import signal
import socket
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console

from common.config import Config
from common.errors import InputError, Interrupted, RunFailed, place_of
from common.progress import Progress, Silent
from server.app import default_folder
from server.run import told_in
from server.run_folder import RunFolder
from simulations.display import chatter_in, progress_for
from simulations.runtime import GRACE_SECONDS, ends_within, kill_children, kill_workers, run_on_ray, worker_count
from simulations.table import result_table

INTERRUPTED = 130
Work = Callable[[Progress, Callable[[], None], threading.Event], dict[str, Any]]


def simulate(config: Config, out: Path | None, *, resume: bool = False, quiet: bool = False) -> dict[str, Any]:
    """Run a whole federation in the foreground, or what is left of it, and return its summary.

    Raises:
        InputError: nothing was started, the output folder is as it was.
        RunFailed: the run folder says how far it came.
        Interrupted: likewise.
    """
    folder = RunFolder(out or default_folder(config), config, resume=resume)

    def work(progress: Progress, prepared: Callable[[], None], stop: threading.Event) -> dict[str, Any]:
        with progress.step("load the libraries", None):
            from server.preparation import prepare

        federation = prepare(config, progress)
        prepared()
        say_what_runs(progress, config, federation)
        return _run(federation, folder, progress, stop)

    return in_foreground(folder, config, work, quiet=quiet)


def in_foreground(folder: RunFolder, config: Config, work: Work, *, quiet: bool = False) -> dict[str, Any]:
    """Do the work of a run in front of the user, show how it has ended and return its summary.

    Args:
        work: gets the display, a function to call when all is prepared, and what is set when the user wants a stop
            from then on; before, KeyboardInterrupt is raised.

    Raises:
        InputError, RunFailed, Interrupted: as `simulate`.
    """
    stop = threading.Event()
    with chatter_in(folder.path / "log.txt") as console:
        progress = Silent() if quiet else progress_for(console)
        try:
            with stop_signals(stop) as prepared, told_in(folder, config):
                summary = work(progress, prepared, stop)
        except (InputError, RunFailed):
            raise
        except (KeyboardInterrupt, Interrupted):
            kill_children()
            raise Interrupted from None
        except Exception as error:
            traceback.print_tb(error.__traceback__)  # goes to log.txt; the error's own text could quote private data
            raise RunFailed(f"{type(error).__name__}{place_of(error)}, see {folder.path / 'log.txt'}") from None
        if not quiet:
            _show(console, summary, folder)
    return summary


def _run(federation: Any, folder: RunFolder, progress: Progress, stop: threading.Event) -> dict[str, Any]:
    from server.run import run_federation

    outcome: list[Any] = []
    nodes = worker_count(federation.config)

    starting = ExitStack()

    def serve(grid: Any) -> None:
        starting.close()
        try:
            summary = run_federation(
                federation, folder, grid, progress, nodes=nodes, stopped=stop.is_set, on_hang=kill_workers
            )
            outcome.append(summary)
        except BaseException as error:
            outcome.append(error)  # the runtime would wrap it; we want it as it is
            raise

    with starting, ends_within(stop, GRACE_SECONDS, INTERRUPTED):
        starting.enter_context(progress.step("start the workers", None))
        try:
            run_on_ray(serve, federation.config)
        except BaseException:
            if not outcome:
                raise
    if not outcome:
        raise RunFailed("the simulation runtime ended before the run; see log.txt")
    if isinstance(outcome[0], BaseException):
        raise outcome[0]
    found: dict[str, Any] = outcome[0]
    return found


@contextmanager
def stop_signals(stop: threading.Event) -> Iterator[Callable[[], None]]:
    """Ctrl-C and SIGTERM: raise while preparing; during the run only set ``stop``, the server thread sees it.

    The kernel may give a signal to any thread, and Python's own handler waits for the main one, which during the run
    sleeps in a lock until the end. So ``stop`` is set by a thread that Python's C handler writes to.

    Yields a function to call when preparation is over.
    """
    running = threading.Event()
    ours = (signal.SIGINT, signal.SIGTERM)

    def on_signal(number: int, frame: Any) -> None:
        if not running.is_set():
            raise KeyboardInterrupt

    def listen() -> None:
        while arrived := ear.recv(1):
            if arrived[0] in ours:
                stop.set()

    ear, mouth = socket.socketpair()
    mouth.setblocking(False)
    before = {number: signal.signal(number, on_signal) for number in ours}
    wakeup = signal.set_wakeup_fd(mouth.fileno(), warn_on_full_buffer=False)
    listener = threading.Thread(target=listen, daemon=True)
    listener.start()
    try:
        yield running.set
    finally:
        signal.set_wakeup_fd(wakeup)
        for number, handler in before.items():
            signal.signal(number, handler)
        mouth.close()
        listener.join()
        ear.close()


def say_what_runs(progress: Progress, config: Config, federation: Any) -> None:
    data = federation.data
    left_out = data.clients - len(data.eligible)
    note = f", {left_out} left out with too few examples of their own" if left_out else ""
    cohort = config.server.cohort or len(data.eligible)
    progress.line(f"{data.task.name}: {data.clients} clients{note}, {cohort} a round, {config.rounds} rounds")
    if told := data.told_of_ends():
        progress.line(told)
    progress.line(_student_line(federation))
    if federation.pupil.taught is not None and (told := federation.pupil.data.told_of_ends()):
        progress.line(f"in the student's own pieces, {told}")
    for line in _tier_lines(federation):
        progress.line(line)


def _student_line(federation: Any) -> str:
    """The student that the keys ask for, as `student.target-ratio` may have chosen it."""
    from common.models import count_parameters

    keys, shape = federation.config.student, federation.pupil.shape
    size, whole = count_parameters(federation.final_student()), count_parameters(federation.lesson.model)
    parts = [
        f"layers {', '.join(map(str, shape.layers))}",
        f"{keys.heads or len(shape.heads[0])} heads",
        f"{keys.neurons or len(shape.neurons[0]):,} neurons",
        f"{shape.pieces:,} word pieces" + (f" of rank {shape.rank}" if shape.rank else ""),
    ]
    return f"student: {', '.join(parts)}; {size:,} parameters, {size / whole:.1%} of its teacher's"


def _tier_lines(federation: Any) -> list[str]:
    """Which smaller students there are, and how many clients hold each."""
    from server.tiered import clients_of_tiers

    keys = federation.config.student
    counts = clients_of_tiers(federation.config, federation.data)
    return [
        f"tier {number}: {size.layers} layers, {size.heads or 'all'} heads, {size.neurons or 'all'} neurons; "
        f"{count} clients"
        for number, (size, count) in enumerate(zip(keys.sizes, counts, strict=False), start=1)
    ]


def _show(console: Console, summary: dict[str, Any], folder: RunFolder) -> None:
    console.print(result_table(summary))
    console.print(
        f"report  {folder.path / 'report.html'}\nfolder  {folder.path}", markup=False, highlight=False, soft_wrap=True
    )
