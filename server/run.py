"""A whole run at the server: rounds, then the student and the summary, whatever happens in between."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from typing import Any

from common.config import Config
from common.dataset import load_tokenizer
from common.errors import InputError, Interrupted, RunFailed
from common.progress import Progress
from common.slim import save_slim, widen
from server.history import summarise, unprepared_summary
from server.preparation import Federation
from server.report import write_report
from server.run_folder import RunFolder
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
    strategy = FederatedDistillation(federation, folder, progress, nodes=nodes, stopped=stopped, on_hang=on_hang)
    status = "failed"
    try:
        strategy.run(grid)
        save_student(federation, folder)
        status = "completed"
    except Interrupted:
        status = "interrupted"
        raise
    except OSError as error:
        raise RunFailed(f"{error.filename or folder.path}: {error.strerror}") from error
    finally:
        strategy.put_weights_into_student()
        summary = summarise(federation, strategy.history, status, folder.seconds)
        with suppress(OSError) if status == "failed" else nullcontext():  # a full disk has no room for it either
            folder.save_summary(summary)
            write_report(folder.path)
    return summary


@contextmanager
def told_in(folder: RunFolder, config: Config) -> Iterator[None]:
    """However a run ends before its first round, its folder says so; after wrong input it is as it was."""
    try:
        yield
    except InputError:
        folder.release()
        raise
    except BaseException as error:
        if not (folder.path / "summary.json").exists():
            stopped = isinstance(error, KeyboardInterrupt | Interrupted)
            with suppress(OSError):
                folder.save_summary(unprepared_summary(config, "interrupted" if stopped else "failed"))
        raise
    finally:
        folder.close()


def save_student(federation: Federation, folder: RunFolder) -> None:
    """Write student/, which plain transformers opens, and slim/, its smaller form."""
    pupil, tokenizer = federation.pupil, load_tokenizer(federation.pupil.folder)
    model = pupil.model.to("cpu")
    for name, save in (
        ("slim", lambda target: save_slim(model, pupil.shape, target)),
        ("student", lambda target: widen(model, pupil.shape).save_pretrained(target)),
    ):
        save(folder.path / name)
        tokenizer.save_pretrained(folder.path / name)
