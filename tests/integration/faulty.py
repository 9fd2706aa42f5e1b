"""Federations in which clients, replies, workers and the grid go wrong on request.

A `Stage` is a Flower simulation on Ray that stays up for several runs. Its workers run our app and read, before each
message, the faults that the test has written down for the run.
"""

import json
import os
import pickle
import queue
import resource
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

import clients.app as ours
import clients.worker as worker_module
from common.config import Config, load_config
from common.errors import RunFailed
from common.progress import Lines, Silent
from common.wire import unpack_instruction
from server.preparation import prepare
from server.run import run_federation, told_in
from server.run_folder import RunFolder
from simulations.runtime import kill_workers, run_on_ray
from tests.integration.conftest import read_lines, read_summary

LONGEST = 900  # seconds of a run
PRIVATE = "patient Smith has a cough"


@dataclass(frozen=True)
class Fault:
    """Something that goes wrong.

    Attributes:
        how: a name in IN_CLIENT, IN_ARRAYS, IN_RECORDS, IN_LINES or IN_MESSAGES.
        client: whose work, or whose message, it befalls.
        round: in which round; 0: in each.
        phase: teach, weigh, train or evaluate.
        times: how often in all; 0: always.
        seconds: how long a client sleeps.
    """

    how: str
    client: int = 0
    round: int = 0
    phase: str = "train"
    times: int = 0
    seconds: float = 0.0


# --- in a worker: what befalls a client while it works ---------------------------------------------


def _raise(fault: Fault) -> None:
    raise RuntimeError(PRIVATE)


def _use_up_memory(fault: Fault) -> None:
    """Ask for more than the process may have."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + 2**26, before[1]))
    try:
        np.ones(2**28)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def _killed_for_memory(fault: Fault) -> None:
    """Take memory and end as the kernel would end us."""
    taken = np.ones(2**25)
    os.kill(os.getpid(), signal.SIGKILL)
    del taken


IN_CLIENT: dict[str, Callable[[Fault], None]] = {
    "raises": _raise,
    "uses up its memory": _use_up_memory,
    "is killed for its memory": _killed_for_memory,
    "is killed": lambda fault: os.kill(os.getpid(), signal.SIGKILL),
    "crashes in native code": lambda fault: os.kill(os.getpid(), signal.SIGSEGV),
    "sleeps": lambda fault: time.sleep(fault.seconds),
    "hangs": lambda fault: time.sleep(3600),
    "diverges": lambda fault: None,  # see `_distil`
}


# --- in a worker: what becomes of a reply's arrays, which are of the whole list or of the client itself -------


def _with(array: Any, **changed: Any) -> Array:
    return Array(**{"dtype": array.dtype, "shape": array.shape, "stype": array.stype, "data": array.data, **changed})


def _filled(dtype: Any, value: float) -> Callable[[Array], Array]:
    return lambda array: Array(np.full(array.shape, value, dtype=dtype or array.dtype))


def _said_to_be(descr: str, shape: str, fortran: bool = False, data: bytes = b"") -> Callable[[Array], Array]:
    """An array whose header says something else; ``data`` instead of its own."""
    text = f"{{'descr': {descr!r}, 'fortran_order': {fortran}, 'shape': {shape}, }}".encode()
    header = b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text

    def change(array: Array) -> Array:
        start = 10 + int.from_bytes(array.data[8:10], "little")
        return _with(array, data=header + (data or array.data[start:]))

    return change


class _Trap:
    """Unpickling it leaves a file."""

    def __reduce__(self) -> Any:
        return Path.touch, (unpickled(),)


def unpickled() -> Path:
    return Path(os.environ["FEDISTILL_CACHE"]) / "unpickled"


def _objects(array: Array) -> Array:
    return _said_to_be("|O", "(1,)", data=pickle.dumps(_Trap()))(array)


IN_ARRAYS: dict[str, Callable[[Array], Array]] = {
    "another shape": lambda array: Array(np.zeros((3, 3), dtype=array.dtype)),
    "another dtype": lambda array: Array(np.zeros(array.shape, dtype=np.complex64)),
    "NaN": _filled(np.float64, np.nan),
    "Inf": _filled(np.float64, np.inf),
    "integers too large to add": _filled(np.int64, float(-(2**63))),
    "a huge header": _said_to_be("<i8", "(5000000000000,)"),
    "a shape beyond 64 bits": _said_to_be("<i8", "(" + "9" * 400 + ",)"),
    "a negative shape": _said_to_be("<i8", "(-1,)"),
    "Fortran order": _said_to_be("<i8", "(16, 16)", fortran=True),
    "an array of objects": _objects,
    "no header": lambda array: _with(array, data=b"x" * len(array.data)),
    "half the data": lambda array: _with(array, data=array.data[: len(array.data) // 2]),
    "more data than it says": lambda array: _with(array, data=array.data + b"\0" * 8),
    "another kind of array": lambda array: _with(array, stype="torch.tensor"),
    "float32 NaN": _filled(np.float32, np.nan),
    "float32 Inf": _filled(np.float32, np.inf),
    "its own dtype, NaN": _filled(None, np.nan),
    "negative": _filled(None, -1.0),
    "largest steps": _filled(np.int8, -128),
    "no gaps": lambda array: Array(np.zeros(0, dtype=array.dtype)),
    "largest gaps": _filled(None, 254),
}
IN_RECORDS: dict[str, Callable[[Any], None]] = {
    "a missing array": lambda record: record.pop(next(iter(record))),
    "an extra array": lambda record: record.update(extra=Array(np.zeros(3))),
    "another name": lambda record: record.update(another=record.pop(next(iter(record)))),
    "no arrays at all": lambda record: record.clear(),
}


# --- in a worker: what becomes of a reply's lines --------------------------------------------------


def _field(name: str, value: Any) -> Callable[[list[dict[str, Any]], int], None]:
    return lambda lines, place: lines[place].update({name: value})


IN_LINES: dict[str, Callable[[list[dict[str, Any]], int], Any]] = {
    "a count of zero": _field("examples", 0),
    "a negative count": _field("examples", -5),
    "a count that is NaN": _field("examples", float("nan")),
    "a count of 1e12": _field("examples", 1e12),
    "a count of a million million": _field("examples", 10**12),
    "a count that is text": _field("examples", "12"),
    "a count that is true": _field("examples", True),
    "one example more": lambda lines, place: lines[place].update(examples=lines[place]["examples"] + 1),
    "a line for someone else": _field("client", 4711),
    "no line": lambda lines, place: lines.pop(place),
    "a line twice": lambda lines, place: lines.append(lines[place]),
    "endless seconds": _field("seconds", float("inf")),
    "a loss that is NaN": _field("loss", float("nan")),
    "a loss of 400 digits": _field("loss", 10**400),
    "codes for the terminal": _field("problem", "\x1b[2J"),
    "an unknown field": _field("weight", 3.0),
}


# --- in a worker: what becomes of a whole reply ----------------------------------------------------


def _raise_for_all(content: RecordDict) -> None:
    raise RuntimeError(PRIVATE)


IN_MESSAGES: dict[str, Callable[[RecordDict], Any]] = {
    "the message raises": _raise_for_all,
    "no record of lines": lambda content: content.pop("clients"),
    "lines that are no JSON": lambda content: content["clients"].update(json="[" * 100_000),
    "lines that are no text": lambda content: content["clients"].update(json=5),
    "an extra record": lambda content: content.update(extra=ArrayRecord({"x": Array(np.zeros(3))})),
    "no records": lambda content: content.clear(),
}


class Script:
    """The faults of a run, as the workers read them from a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def write(self, faults: Iterable[Fault]) -> None:
        for mark in [*self.folder.glob("done-*"), *self.folder.glob("trained-*")]:
            mark.unlink()
        draft = self.folder / "draft"
        draft.write_text(json.dumps([asdict(fault) for fault in faults]))
        draft.rename(self.folder / "faults.json")

    def due(self, phase: str, round_number: int, clients: Iterable[int], kinds: Iterable[str]) -> Iterator[Fault]:
        """The faults of these kinds that befall these clients now, each counted."""
        for place, entry in enumerate(json.loads((self.folder / "faults.json").read_text())):
            fault = Fault(**entry)
            now = fault.phase == phase and fault.round in (0, round_number) and fault.client in clients
            if now and fault.how in kinds and (not fault.times or self._counts(place, fault.times)):
                yield fault

    def note_training(self, round_number: int, client: int) -> None:
        (self.folder / f"trained-{round_number}-{client}").touch()

    def trained(self, round_number: int) -> set[int]:
        """Clients that were trained in a round, whatever became of it."""
        return {int(path.name.rsplit("-", 1)[1]) for path in self.folder.glob(f"trained-{round_number}-*")}

    def happened(self) -> int:
        """How often faults of limited number have happened."""
        return len(list(self.folder.glob("done-*")))

    def _counts(self, place: int, times: int) -> bool:
        for number in range(times):
            try:
                (self.folder / f"done-{place}-{number}").touch(exist_ok=False)
            except FileExistsError:
                continue
            return True
        return False


def app_obeying(script: Script) -> ClientApp:
    """Our app, with the script's faults."""
    app = ClientApp()

    @app.query("teach")
    def teach(message: Message, context: Context) -> Message:
        return _obey(script, "teach", message, lambda: ours.teach(message, context))

    @app.query("weigh")
    def weigh(message: Message, context: Context) -> Message:
        return _obey(script, "weigh", message, lambda: ours.weigh(message, context))

    @app.train()
    def train(message: Message, context: Context) -> Message:
        if worker_module.distil is HONEST:
            worker_module.distil = _distil(script)
        return _obey(script, "train", message, lambda: ours.train(message, context))

    @app.evaluate()
    def evaluate(message: Message, context: Context) -> Message:
        return _obey(script, "evaluate", message, lambda: ours.evaluate(message, context))

    return app


HONEST = worker_module.distil


def _distil(script: Script) -> Any:
    def distil(student: Any, weights: Any, *rest: Any, who: tuple[int, int], **more: Any) -> Any:
        script.note_training(*who)
        for fault in script.due("train", who[0], [who[1]], IN_CLIENT):
            IN_CLIENT[fault.how](fault)
            if fault.how == "diverges":
                weights = {name: torch.full_like(tensor, torch.nan) for name, tensor in weights.items()}
        return HONEST(student, weights, *rest, who=who, **more)

    return distil


def _obey(script: Script, phase: str, message: Message, answer: Callable[[], Message]) -> Message:
    asked = unpack_instruction(message.content)
    if phase != "train":
        for fault in script.due(phase, asked.round, asked.clients, IN_CLIENT):
            IN_CLIENT[fault.how](fault)

    def spoilt() -> Message:
        reply = answer()
        for fault in script.due(phase, asked.round, asked.clients, IN_MESSAGES):
            IN_MESSAGES[fault.how](reply.content)
        for fault in script.due(phase, asked.round, asked.clients, IN_LINES):
            lines = json.loads(str(reply.content["clients"]["json"]))
            place = next(place for place, line in enumerate(lines) if line["client"] == fault.client)
            IN_LINES[fault.how](lines, place)
            reply.content["clients"]["json"] = json.dumps(lines)
        for fault in script.due(phase, asked.round, asked.clients, [*IN_ARRAYS, *IN_RECORDS]):
            _spoil(reply.content, fault)
        return reply

    return ours._safely(spoilt)


PARTS = {"largest steps": "|values", "no gaps": "|gaps", "largest gaps": "|gaps"}  # of an update on a lossy wire
PARTS |= {"negative": "|scale", "its own dtype, NaN": "|scale"}


def _spoil(content: Any, fault: Fault) -> None:
    """Change the first array of a record, or the first of the kind of part that the fault is for."""
    name = next(name for name in ("update", f"update-{fault.client}", "student") if name in content)
    record = content[name]
    if fault.how in IN_RECORDS:
        IN_RECORDS[fault.how](record)
        return
    part = PARTS.get(fault.how, "")
    key = next((key for key in record if key.endswith(part)), next(iter(record)))
    record[key] = IN_ARRAYS[fault.how](record[key])


# --- at the server: a grid that delivers twice, or late --------------------------------------------


class OddGrid:
    """A Flower grid, but for how replies to training messages come.

    Args:
        twice: every reply comes a second time, at once and once more with the next ones.
        late: the first of the replies is held back for this many seconds.
    """

    def __init__(self, grid: Any, *, twice: bool = False, late: float = 0.0) -> None:
        self.grid, self.twice, self.late = grid, twice, late
        self.again: list[Message] = []
        self.held: list[tuple[float, Message]] = []
        self.training: set[str] = set()
        self.delivered: list[str] = []

    def get_node_ids(self) -> Any:
        return self.grid.get_node_ids()

    def push_messages(self, messages: list[Message]) -> Any:
        pushed = list(self.grid.push_messages(messages))
        self.training |= {one.metadata.message_id for one in messages if one.metadata.message_type == "train"}
        return pushed

    def pull_messages(self, wanted: Any) -> list[Message]:
        held = {reply.metadata.reply_to_message_id for _, reply in self.held}
        found = list(self.grid.pull_messages(wanted - held))
        if self.twice:
            found, self.again = [*found, *found, *self.again], found
        for reply in [one for one in found if one.metadata.reply_to_message_id in self.training]:
            if self.late and not self.held:
                found.remove(reply)
                self.held.append((time.monotonic() + self.late, reply))
        for due, reply in self.held:
            answered = reply.metadata.reply_to_message_id
            if time.monotonic() > due and answered in wanted and answered not in self.delivered:
                found.append(reply)
        self.delivered += [one.metadata.reply_to_message_id for one in found]
        return found


# --- running -----------------------------------------------------------------------------------------


class Heard(Lines):
    """Keeps the lines a user would see."""

    def __init__(self) -> None:
        super().__init__()
        self.heard: list[str] = []

    def line(self, text: str) -> None:
        self.heard.append(text)


@dataclass
class Outcome:
    """How a run went.

    Attributes:
        path: its folder.
        heard: the lines that a user would have seen.
        error: what ended it, if anything did.
        happened: how often faults of limited number happened.
    """

    path: Path
    heard: list[str]
    error: BaseException | None
    happened: int
    seconds: float

    @property
    def summary(self) -> dict[str, Any]:
        return read_summary(self.path)

    @property
    def student(self) -> str:
        return self.summary["student_sha256"]

    @property
    def faults(self) -> dict[str, int]:
        return self.summary["faults"]

    def line(self, phase: str, round_number: int = 1) -> dict[str, Any]:
        """The line of metrics.jsonl."""
        lines = [line for line in read_lines(self.path) if (line["phase"], line["round"]) == (phase, round_number)]
        assert len(lines) == 1, lines
        return lines[0]

    def costs(self, phase: str, round_number: int = 1) -> dict[str, Any]:
        """The line of costs.jsonl."""
        lines = [json.loads(line) for line in (self.path / "costs.jsonl").read_text().splitlines()]
        return next(line for line in lines if (line["phase"], line["round"]) == (phase, round_number))

    def said(self, start: str) -> list[str]:
        return [text for text in self.heard if text.startswith(start)]


class Stage:
    """A simulation that stays up: `run` sends one federation after the other through the same workers.

    Args:
        folder: for scripts and run folders.
        keys: configuration that all runs share.
    """

    def __init__(self, folder: Path, keys: dict[str, Any]) -> None:
        self.folder, self.keys = folder, keys
        self.script = Script(folder)
        self.jobs: queue.Queue[Callable[[Any], None] | None] = queue.Queue()
        self.count = 0
        self.thread = threading.Thread(target=self._stay_up, daemon=True)

    def __enter__(self) -> "Stage":
        self.script.write([])
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.jobs.put(None)
        self.thread.join(timeout=60)
        assert not self.thread.is_alive(), "the simulation did not end"

    def run(
        self,
        *settings: str,
        faults: Iterable[Fault] = (),
        nodes: int = 2,
        odd: dict[str, Any] | None = None,
        again: Outcome | None = None,
    ) -> Outcome:
        """Run a federation to its end, or continue the one that ``again`` left."""
        self.count += 1
        config, heard, began = self.config(*settings), Heard(), time.monotonic()
        federation = prepare(config, heard)
        folder = RunFolder(again.path if again else self.folder / f"run-{self.count}", config, resume=again is not None)
        self.script.write(faults)
        done: queue.Queue[BaseException | None] = queue.Queue()

        def job(grid: Any) -> None:
            try:
                grid = OddGrid(grid, **odd) if odd else grid
                run_federation(federation, folder, grid, heard, nodes=nodes, on_hang=kill_workers)
            except BaseException as error:
                done.put(error)
            else:
                done.put(None)

        error: BaseException | None = None
        try:
            with told_in(folder, config):
                self.jobs.put(job)
                if (ended := self._wait_for(done)) is not None:
                    raise ended
        except RunFailed as failed:
            error = failed
        return Outcome(folder.path, heard.heard, error, self.script.happened(), time.monotonic() - began)

    def _wait_for(self, done: "queue.Queue[BaseException | None]") -> BaseException | None:
        end = time.monotonic() + LONGEST
        while self.thread.is_alive() and time.monotonic() < end:
            with suppress(queue.Empty):
                return done.get(timeout=0.1)
        raise TimeoutError("the run did not end")

    def config(self, *settings: str) -> Config:
        return load_config(None, [*(f"{key}={value}" for key, value in self.keys.items()), *settings])

    def largest_of(self, clients: Iterable[int]) -> int:
        """The client with the most examples: its message is the first to be sent."""
        sizes = prepare(self.config(), Silent()).data.train_sizes
        return max(clients, key=lambda client: (sizes[client], -client))

    def _stay_up(self) -> None:
        def serve(grid: Any) -> None:
            while (job := self.jobs.get()) is not None:
                job(grid)

        run_on_ray(serve, self.config(), app_obeying(self.script))
