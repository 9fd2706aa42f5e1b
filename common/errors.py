"""The ways a run ends early. Each carries one line a user can act on and no private text."""

import errno
from pathlib import Path

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def place_of(error: BaseException) -> str:
    """`` at FILE:LINE`` where an error was raised: with its kind, all that may be told of one we did not foresee."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return f" at {Path(trace.tb_frame.f_code.co_filename).name}:{trace.tb_lineno}" if trace else ""


def told_of(error: BaseException) -> str:
    """All that may be told of an error that we did not foresee: that a disk is full, else its kind."""
    full = isinstance(error, OSError) and error.errno in NO_ROOM
    return "its disk is full" if full else type(error).__name__


class InputError(Exception):
    """What the user gave is wrong: the message names the field or file, the value and what would be right.

    The command line prints it as one line and exits with 2.
    """


class RunFailed(Exception):
    """The input was right and the run still could not be finished; exit code 1."""


class Interrupted(Exception):
    """The user stopped the run (Ctrl-C or SIGTERM); exit code 130."""


class ExportFailed(RunFailed):
    """A model could not be written for devices, or does not answer as its student does; exit code 1."""
