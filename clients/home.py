"""A client on a device of its own: its data file, and the folder where it keeps models, caches and its record.

state/home.toml             which client this is, its data file, its limits
state/teachers/HASH/        teachers it was sent, or given with --teacher, by the hash of their weights
state/cache/                tokenised data, teacher outputs, students, and what it needs from round to round
state/joined.json           hash of the data that it has joined with, and how they are cut
state/ledger/               what its examples have spent of their privacy, in all runs; see `clients.ledger`
state/audit.jsonl           what has come and gone, without any content
"""

import json
import re
import tomllib
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import tomli_w

from clients.worker import ClientRefused
from common.config import Config, changed, from_flat
from common.corpus import Corpus, Table, own_table
from common.dataset import prepare_dataset
from common.errors import InputError
from common.hashing import hash_tensors
from common.models import load_teacher
from common.partition import cut_private, text_groups
from common.progress import Silent
from common.slim import load_slim
from common.store import build_folder, write_atomically
from common.tasks import Task
from common.version import FEDISTILL
from common.wire import MODEL_FILE, Instruction, Joined

LIMITS = {f"client.{name.replace('_', '-')}": name for name in ("max_seconds", "energy_budget", "memory_limit")}


@dataclass(frozen=True)
class Home:
    """What belongs to one client on its own device.

    Attributes:
        state: the folder.
        client: its id.
        data: its file of private examples.
        columns: of that file that a run may use: those of texts, then that of labels.
        threads: for training; 0: as many as the run says.
        max_seconds, energy_budget, memory_limit: its owner's, as the keys of the same names; where both are given, the
            stricter holds.
        lifetime_epsilon, delta: what its examples may ever spend of their privacy by training, and the delta that this
            is of; a run that does not hide examples, or whose delta is larger, is refused. 0: the run's hold alone.
    """

    state: Path
    client: int
    data: Path
    columns: tuple[str, ...] = ("text", "label")
    threads: int = 0
    max_seconds: float = 0.0
    energy_budget: float = 0.0
    memory_limit: int = 0
    lifetime_epsilon: float = 0.0
    delta: float = 0.0

    @classmethod
    def read(cls, state: Path) -> "Home":
        """The home whose folder this is."""
        told = tomllib.loads((state / "home.toml").read_text(encoding="utf-8"))
        return cls(**{**told, "state": state, "data": Path(told["data"]), "columns": tuple(told["columns"])})

    def write(self) -> None:
        """Keep all of it in ``home.toml``."""
        told = {**asdict(self), "data": str(self.data), "columns": list(self.columns)}
        del told["state"]
        write_atomically(self.state / "home.toml", tomli_w.dumps(told).encode())

    @property
    def cache(self) -> Path:
        return self.state / "cache"

    @property
    def teachers(self) -> Path:
        return self.state / "teachers"

    @property
    def students(self) -> Path:
        return self.cache / "students"

    def config(self, instruction: Instruction) -> Config:
        """The run's keys, with this device's own in place of the server's.

        Raises:
            ClientRefused: the run does not keep to what its owner says of privacy, or cannot keep to the limits.
        """
        flat: dict[str, Any] = json.loads(instruction.config)
        own = {"runtime.cache": str(self.cache), "runtime.workers": 1, "runtime.device": "auto"}
        if self.threads:
            own["runtime.threads"] = self.threads
        for key, mine in LIMITS.items():
            limits = [limit for limit in (getattr(self, mine), flat.get(key, 0)) if limit]
            own[key] = min(limits, default=0)
        try:
            config = from_flat({**flat, **own})
        except InputError as error:  # of keys alone, of which none is private
            raise ClientRefused(f"with its owner's limits the run's keys do not fit each other: {error}") from None
        return self._kept_private(config) if self.lifetime_epsilon else config

    def _kept_private(self, config: Config) -> Config:
        keys = config.privacy
        if keys.unit != "example":
            raise ClientRefused(f"its owner bounds what its examples spend, and privacy.unit = {keys.unit!r} does not")
        if self.delta and keys.delta > self.delta:
            raise ClientRefused(f"privacy.delta = {keys.delta:g}; its owner allows {self.delta:g}")
        least = min(limit for limit in (self.lifetime_epsilon, keys.lifetime_epsilon) if limit)
        return changed(config, {"privacy.lifetime-epsilon": least})

    def join(self, instruction: Instruction) -> Joined:
        """Read and cut the data; remember which they were.

        Raises:
            ClientRefused: the data do not fit the task, or this is another client's question.
        """
        self.is_asked(instruction)
        config, task = self.config(instruction), task_of(instruction)
        table = self._table(config, task)
        cut = cut_private(
            {self.client: text_groups(table)}, config.data.clients, config.data.holdout_fraction,
            config.data.min_examples, config.seed,
        )  # fmt: skip
        write_atomically(self.state / "joined.json", json.dumps(_cut(config, table)).encode())
        held = sorted(path.name for folder in (self.teachers, self.students) for path in _folders(folder))
        sizes = int(cut.train_sizes[self.client]), int(cut.heldout_sizes[self.client])
        if config.privacy.secure_aggregation:  # that it has some, not how many
            sizes = min(sizes[0], 1), min(sizes[1], 1)
        return Joined(self.client, *sizes, tuple(held), FEDISTILL)

    def take(self, instruction: Instruction, files: dict[str, bytes]) -> None:
        """Keep a model that was sent, after it has been opened and found to be the one that was promised.

        Raises:
            ClientRefused: it is another one, or does not open.
        """
        self.is_asked(instruction)
        student = "shape.json" in files
        name = _checked(instruction.student_hash if student else instruction.teacher_hash)
        with build_folder((self.students if student else self.teachers) / name) as draft:
            if draft is None:
                return
            for file, data in files.items():
                (draft / file).write_bytes(data)
            what, found = ("student", _slim_hash(draft)) if student else ("teacher", _weights_hash(draft))
            if found != name:
                raise ClientRefused(f"the {what} that was sent is not the one that was promised")

    def needs(self, instruction: Instruction) -> dict[str, str]:
        """What a worker is made of, as it lies here.

        Raises:
            ClientRefused: teacher or student are not here, or the data are not those that it has joined with.
        """
        self.is_asked(instruction)
        teacher, student = self.teachers / _checked(instruction.teacher_hash), _checked(instruction.student_hash)
        if not teacher.is_dir():
            raise ClientRefused("the teacher of this run is not here")
        if not (self.students / student).is_dir():
            raise ClientRefused("the student of this run is not here")
        return {
            "teacher": str(teacher),
            "teacher_hash": instruction.teacher_hash,
            "dataset": self._dataset(instruction, teacher),
            "student": student,
            "student_hash": student,
            "ledger": str(self.state / "ledger"),
        }

    def _dataset(self, instruction: Instruction, tokenizer: Path) -> str:
        config, task = self.config(instruction), task_of(instruction)
        table = self._table(config, task)
        if self._joined_with() != _cut(config, table):
            raise ClientRefused("its data, or their cut, are not those that it has joined with; start the run again")
        empty = Table(tuple([] for _ in table.texts), table.labels[:0])
        corpus = Corpus(replace(task, validation=()), empty, {}, private={self.client: table})
        return prepare_dataset(config, tokenizer, self.cache, Silent(), corpus).key

    def _joined_with(self) -> Any:
        try:
            return json.loads((self.state / "joined.json").read_text())
        except (OSError, ValueError):
            raise ClientRefused("it has not joined this run") from None

    def _table(self, config: Config, task: Task) -> Table:
        """The data, where the task asks for the columns that the owner gives.

        A server that could choose columns, or read what is wrong with a row, could search in the texts so.
        """
        if (*task.text_columns, task.label_column) != self.columns:
            raise ClientRefused(
                f"the task asks for columns that its owner does not give; these are {len(self.columns)}"
            )
        try:
            return own_table(self.data, task, config)
        except InputError as error:
            print(error, flush=True)  # into the owner's log
            raise ClientRefused("its data file does not fit the task; its owner finds why in worker.log") from None

    def is_asked(self, instruction: Instruction) -> None:
        """Raises `ClientRefused` when another client is asked."""
        if instruction.clients != (self.client,):
            raise ClientRefused(f"this is client {self.client}, and another was asked")


def _cut(config: Config, table: Table) -> dict[str, Any]:
    """The data, and what decides which of them are held out: another seed would have what was trained on scored."""
    keys = config.data
    return {
        "data": table.fingerprint(),
        "seed": config.seed,
        "clients": keys.clients,
        "holdout-fraction": keys.holdout_fraction,
        "min-examples": keys.min_examples,
    }


def _checked(name: str) -> str:
    """A hash that somebody else has given, and that becomes a folder's name."""
    if not re.fullmatch("[0-9a-f]{64}", name):
        raise ClientRefused("what should name a model is not a hash")
    return name


def task_of(instruction: Instruction) -> Task:
    """The task that an instruction describes."""
    told = json.loads(instruction.task)
    fields: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in told.items()}
    return Task(**fields)


def keep_teacher(home: Home, folder: Path) -> str:
    """Have a teacher from a folder of this machine, so that it need not be sent; returns the hash of its weights.

    Raises:
        InputError: it does not open.
    """
    name = _weights_hash(folder)
    with build_folder(home.teachers / name) as draft:
        if draft is not None:
            for path in folder.iterdir():
                if path.is_file() and MODEL_FILE.fullmatch(path.name):
                    (draft / path.name).write_bytes(path.read_bytes())
    return name


def _weights_hash(folder: Path) -> str:
    return hash_tensors(load_teacher(folder, key="--teacher").state_dict())


def _slim_hash(folder: Path) -> str:
    return hash_tensors(load_slim(folder)[0].state_dict())


def _folders(folder: Path) -> list[Path]:
    found = folder.iterdir() if folder.is_dir() else ()
    return [path for path in found if path.is_dir() and len(path.name) == 64 and not path.name.startswith(".")]
