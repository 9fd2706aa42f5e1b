"""``fedistill`` in a process that ends itself at a named point of a run.

    python -m tests.integration.killed POINT[@ROUND][:SIGNAL] simulate ARGUMENTS...

One function is replaced, in this process alone (in its workers alone for `worker`), by one that sends the process
SIGKILL, or the SIGNAL that is named. `disk` does not end it: it lets files grow no further, as a full disk would.
"""

import functools
import os
import resource
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

Where = Callable[..., bool]  # takes the arguments of the call that is watched
SIZE = 4096  # bytes that a file may have on a full disk: less than a checkpoint's arrays


def main(arguments: list[str]) -> None:
    from simulations import cli

    point, *rest = arguments
    name, _, number = point.partition(":")
    name, _, round_number = name.partition("@")
    POINTS[name](int(round_number or 0), once(getattr(signal, number or "SIGKILL")))
    cli.main(rest)


def once(number: int) -> Callable[[], None]:
    """Sends this process a signal when it is first called: one that was only stopped passes the point again."""
    left = [number]

    def send() -> None:
        if left:
            os.kill(os.getpid(), left.pop())

    return send


def before(owner: Any, name: str, act: Callable[[], None], where: Where = lambda *_, **__: True) -> None:
    """Act whenever ``owner.name`` is about to be called, there."""
    honest = getattr(owner, name)

    def watched(*args: Any, **kwargs: Any) -> Any:
        if where(*args, **kwargs):
            act()
        return honest(*args, **kwargs)

    setattr(owner, name, watched)


def after(owner: Any, name: str, act: Callable[[], None], where: Where) -> None:
    """Act whenever ``owner.name`` has done its work, there."""
    honest = getattr(owner, name)

    def watched(*args: Any, **kwargs: Any) -> Any:
        found = honest(*args, **kwargs)
        if where(*args, **kwargs):
            act()
        return found

    setattr(owner, name, watched)


# --- the points, in the order of a run -----------------------------------------------------------


def claimed(_: int, act: Callable[[], None]) -> None:
    """The run's folder is there and locked; what runs in it is not written yet."""
    before(Path, "replace", act)


def preparing(_: int, act: Callable[[], None]) -> None:
    """The data are tokenised; their folder in the cache has not got its name."""
    before(Path, "rename", act)


def sent(number: int, act: Callable[[], None]) -> None:
    """The cohort has its messages."""
    from server.exchange import Exchange

    before(Exchange, "tick", act, lambda self: _phase(self) == ("train", number))


def half(number: int, act: Callable[[], None]) -> None:
    """The first of two replies is in the sum."""
    from server.exchange import Exchange

    after(Exchange, "_take", act, lambda self, *_: _phase(self) == ("train", number))


def retrying(number: int, act: Callable[[], None]) -> None:
    """A worker died while it wrote error feedback, and what it lost is about to be sent again."""
    from server.exchange import Exchange

    worker(number, act)
    before(Exchange, "_second_chance", act)


def aggregated(number: int, act: Callable[[], None]) -> None:
    """The next student is there and the round's first line; no score, no checkpoint."""
    from server.strategy import FederatedDistillation

    after(FederatedDistillation, "aggregate_train", act, lambda self, step, _: self.done + step == number)


def scoring(number: int, act: Callable[[], None]) -> None:
    """The first of two replies with scores is in."""
    from server.exchange import Exchange

    after(Exchange, "_take", act, lambda self, *_: _phase(self) == ("evaluate", number))


def unsaved(number: int, act: Callable[[], None]) -> None:
    """All lines of the round are written; its checkpoint is not."""
    from server.strategy import FederatedDistillation

    before(FederatedDistillation, "save", act, lambda _, saved: saved == number)


def draft(number: int, act: Callable[[], None]) -> None:
    """One file of the checkpoint is written."""
    from server import checkpoint

    def where(path: Path, data: bytes) -> bool:
        return path.name == "student.safetensors" and path.parent.name.startswith(f".round-{number:05d}.")

    after(checkpoint, "_write", act, where)


def renamed(number: int, act: Callable[[], None]) -> None:
    """The checkpoint has its name; the oldest is not removed."""
    from server import checkpoint

    after(checkpoint, "sync_folder", act, lambda folder: (folder / f"round-{number:05d}").is_dir())


def pruning(number: int, act: Callable[[], None]) -> None:
    """Half of the oldest checkpoint is removed."""
    from server import checkpoint

    def where(path: Path, **_: Any) -> bool:
        if path.name.startswith(".") or not (path.parent / f"round-{number:05d}").is_dir():
            return False
        (path / "student.safetensors").unlink()
        return True

    before(checkpoint.shutil, "rmtree", act, where)


def student(_: int, act: Callable[[], None]) -> None:
    """After the last checkpoint: the student is saved, its tokenizer is not."""
    from transformers import PreTrainedModel

    after(PreTrainedModel, "save_pretrained", act, lambda _, folder, **__: Path(folder).name == "student")


def disk(number: int, _: Callable[[], None]) -> None:
    """The disk is full when a round's checkpoint shall be written."""
    from server import strategy

    def fill() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (SIZE, resource.RLIM_INFINITY))

    before(strategy, "save_checkpoint", fill, lambda _, checkpoint, __: checkpoint.round == number)


def worker(number: int, _: Callable[[], None]) -> None:
    """A worker, not this process: the first to write error feedback in a round has written half of it."""
    from simulations import simulate

    mark = str(Path(f"worker-died-{os.getpid()}").absolute())
    simulate.run_on_ray = functools.partial(simulate.run_on_ray, client_app=_torn(mark, number))


def _torn(mark: str, number: int) -> Any:
    """Our ClientApp, in which the first worker that syncs a file in a round's training tears it and dies."""
    from flwr.app import Context, Message
    from flwr.clientapp import ClientApp

    import clients.app as ours
    from common.wire import unpack_instruction

    app = ClientApp()
    app.query("teach")(ours.teach)
    app.query("weigh")(ours.weigh)
    app.evaluate()(ours.evaluate)

    def tear(handle: int) -> None:
        try:
            os.close(os.open(mark, os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            return
        os.ftruncate(handle, os.fstat(handle).st_size // 2)
        os.kill(os.getpid(), signal.SIGKILL)

    @app.train()
    def train(message: Message, context: Context) -> Message:
        if unpack_instruction(message.content).round == number:
            os.fsync = tear
        return ours.train(message, context)

    return app


def _phase(exchange: Any) -> tuple[str, int] | None:
    return (exchange.phase.kind, exchange.phase.round) if exchange.phase is not None else None


POINTS: dict[str, Callable[[int, Callable[[], None]], None]] = {
    point.__name__: point
    for point in (
        *(claimed, preparing, sent, half, retrying, aggregated, scoring, unsaved, draft, renamed, pruning, student),
        *(disk, worker),
    )
}

if __name__ == "__main__":
    main(sys.argv[1:])
