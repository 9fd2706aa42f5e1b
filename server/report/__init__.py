"""RUN/report.html: one self-contained page about a run, from what the run folder holds.

It is made for every run, finished or killed; what is not known is said to be. The same folder gives the same page.
"""

from pathlib import Path

from common.store import write_atomically
from server.report.clients import shards
from server.report.costs import bytes_per_round, faults, time_by_phase
from server.report.keys import configuration, versions
from server.report.page import page
from server.report.plots import theme
from server.report.read import Run, read_run
from server.report.rounds import losses, score_per_round, tiers
from server.report.shape import shape
from server.report.verdict import facts, scores, verdict


def write_report(folder: Path) -> Path:
    """Write ``report.html`` into a run folder and return its path.

    Raises:
        InputError: the folder holds no run.
    """
    run = read_run(folder)
    target = folder / "report.html"
    write_atomically(target, report(run).encode())
    return target


def report(run: Run) -> str:
    """The page."""
    name = folder_name(run)
    with theme():
        about = [shards(run), configuration(run), versions(run)]
        if run.metric:
            found = [score_per_round(run), scores(run), tiers(run), losses(run), shape(run)]
            costs = [time_by_phase(run), bytes_per_round(run), faults(run)]
            about = [*(each for each in found if each is not None), about[0], *costs, *about[1:]]
        return page(f"fedistill: {name}", verdict(run), facts(run), about)


def folder_name(run: Run) -> str:
    """The task and how the run is called."""
    return f"{run.summary.get('task', '')}, {run.folder.resolve().name}"
