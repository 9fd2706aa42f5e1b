"""A few processes of our own that work for this one, and end with it."""

import multiprocessing
import os
import signal
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager

from common.config import Config
from common.errors import RunFailed
from simulations.child import PARENT, end_with_parent

_share: int | None = None  # in a process of a pool: how many it may have of its own


def processes(config: Config) -> int:
    """How many federations are trained at once; in a process that is one of several, its share of them."""
    return _share or config.runtime.workers or max((os.cpu_count() or 1) // config.runtime.threads, 1)


@contextmanager
def pool(count: int, share: int = 1) -> Iterator[ProcessPoolExecutor]:
    """So many processes, started anew. After an error or a signal they are ended at once.

    Args:
        share: `processes` of each.

    Raises:
        RunFailed: one of them ended.
    """
    spawn = multiprocessing.get_context("spawn")
    workers = ProcessPoolExecutor(count, mp_context=spawn, initializer=_begin, initargs=(share,))
    try:
        yield workers
        workers.shutdown()
    except BrokenProcessPool:
        raise RunFailed("a process that trains models ended; too little memory?") from None
    finally:
        for process in multiprocessing.active_children():
            process.kill()
        workers.shutdown(cancel_futures=True)


def _begin(share: int) -> None:
    """In a new process: it leaves stopping to its parent, and ends with it."""
    global _share  # noqa: PLW0603
    _share = share
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None
    os.environ[PARENT] = str(parent.pid)
    end_with_parent()
