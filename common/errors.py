"""The three ways a run ends early. Each carries one line a user can act on and no private text."""


class InputError(Exception):
    """What the user gave is wrong: the message names the field or file, the value and what would be right.

    The command line prints it as one line and exits with 2.
    """


class RunFailed(Exception):
    """The input was right and the run still could not be finished; exit code 1."""


class Interrupted(Exception):
    """The user stopped the run (Ctrl-C or SIGTERM); exit code 130."""
