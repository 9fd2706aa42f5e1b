"""A whole run at the server: rounds, then the student and the summary, whatever happens in between."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

from common.config import Config
from common.dataset import load_tokenizer
from common.errors import InputError, Interrupted, RunFailed, place_of
from common.nested import Tier
from common.progress import Progress
from common.slim import save_slim, widen
from server.history import summarise, unprepared_summary
from server.preparation import Federation
from server.report import write_report
from server.run_folder import RunFolder
from server.shards import write_shards
from server.strategy import FederatedDistillation


def run_federation(
    federation: Federation,
    folder: RunFolder,
    grid: Any,
    progress: Progress,
    *,
    nodes: int,
    stopped: Callable[[], bool] = lambda: False,
    on_hang: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Run all rounds that are left, leave the run folder complete, return the summary.

    A run that fails or is stopped leaves a summary that says so, and its checkpoints.

    Raises:
        InputError: the run in the folder cannot be continued with this federation.
        RunFailed, Interrupted: see `FederatedDistillation.run`; any other error is passed on.
    """
    folder.trackers.tell = progress.line
    strategy = FederatedDistillation(federation, folder, progress, nodes=nodes, stopped=stopped, on_hang=on_hang)
    status = "failed"
    try:
        write_shards(federation, folder.path)
        strategy.run(grid)
        with progress.step("save the student", None):
            save_student(federation, folder)
        status = "completed"
    except Interrupted:
        status = "interrupted"
        raise
    except OSError as error:
        raise RunFailed(f"{error.filename or folder.path}: {error.strerror}") from error
    finally:
        strategy.put_weights_into_student()
        strategy.tell_privacy()
        summary = summarise(federation, strategy.journal.history, status, folder.seconds)
        with suppress(OSError) if status == "failed" else nullcontext():  # a full disk has no room for it either
            folder.save_summary(summary)
        leave_report(folder.path, progress.line)
    return summary


@contextmanager
def told_in(folder: RunFolder, config: Config) -> Iterator[None]:
    """However a run ends before its first round, its folder says so; after wrong input it is as it was.

    So is that of a run that was to go on: its earlier end says more than that it was taken up.
    """
    try:
        yield
    except InputError:
        folder.release()
        raise
    except BaseException as error:
        if not (folder.path / "summary.json").exists():
            stopped = isinstance(error, KeyboardInterrupt | Interrupted)
            with suppress(OSError):
                if folder.begun:
                    folder.release()
                else:
                    folder.save_summary(unprepared_summary(config, "interrupted" if stopped else "failed"))
            leave_report(folder.path, folder.trackers.tell)
        raise
    finally:
        folder.close()


def leave_report(run: Path, tell: Callable[[str], Any]) -> None:
    """Write report.html. What goes wrong there is told, and changes nothing about how the run has ended."""
    try:
        write_report(run)
    except Exception as error:  # a fault of the page: the run is worth more
        tell(f"no report.html: {type(error).__name__}{place_of(error)}; fedistill report RUN tries it again")


def save_student(federation: Federation, folder: RunFolder) -> None:
    """Write student/, which plain transformers opens, and slim/, its smaller form; of smaller tiers tiers/N/student."""
    tiers = federation.tiers.tiers
    for number, tier in enumerate(tiers[:-1], start=1):
        _save(federation, tier, folder.path / "tiers" / str(number))
    _save(federation, tiers[-1], folder.path)


def _save(federation: Federation, tier: Tier, target: Path) -> None:
    model, tokenizer = tier.model.to("cpu"), load_tokenizer(federation.pupil.folder)
    save_slim(model, tier.shape, target / "slim")
    widen(model, tier.shape).save_pretrained(target / "student")
    for name in ("slim", "student"):
        tokenizer.save_pretrained(target / name)
