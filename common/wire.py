"""What travels between server and clients, as Flower records, and the checks on arrival.

Down: the student's trainable arrays and one instruction. Up: one sum per node (weighted updates, statistics)
and a line of numbers per client. Nothing received is trusted: kind, dtype, shape and size of an array are
compared with what is expected before its bytes are looked at.
"""

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict
from numpy.typing import NDArray

from common.array_bytes import WireError, decode, decode_any, row_numbers
from common.fixed_point import Rows

Shapes = Mapping[str, tuple[int, ...]]
MAX_EXAMPLES = 2**31 - 1  # of one client
LOSSES = (
    "loss", "soft_loss", "hard_loss", "hidden_loss", "cls_loss", "relation_loss", "self_loss", "inner_loss", "mlm_loss",
)  # fmt: skip
SPENT = ("epsilon", "lifetime_epsilon")
MODEL_FILE = re.compile(r"[a-z_]{1,40}\.(json|txt|safetensors|model)")  # a name that a file of a model has
MAX_HELD = 1000  # hashes of models that a client may say it has
NOT_FINITE = "update is not finite"  # a `ClientLine.problem` that means refused, not failed


@dataclass(frozen=True)
class Instruction:
    """What a node is asked to do in one message.

    Attributes:
        run: the run's id, 16 hexadecimal digits.
        round: the round, from 1; 0 for work before it.
        config: the run's keys as JSON (`Config.flat`).
        clients: ids of the clients this node works for.
        feedback: for each of them the round of its last accepted update, where its error feedback stands; 0: none.
        teacher: folder of the teacher, and the hash of its weights.
        dataset: key of the prepared dataset.
        student: key of the prepared student, and the hash of its weights as it was prepared.
        token_budget: padded word pieces per step of training; 0: as the keys say.
        clip_norm: norm that a client's whole update is scaled down to, and it counts as one; 0: it is not.
        noise: deviation of the noise that clients add together, each its part; 0: they add none.
        masked: folder of the masked-LM teacher of general rounds, and the hash of its weights; empty: there are none.
        scoreboard: a file to which a finished client adds a byte, for the progress display; may be empty. When
            its folder is there and the file is not, nobody waits for the answer any more.
        host: the machine on which the scoreboard lies; no other looks for it.
        task: for a client on a device of its own, which has its own data, what they are to look like, as JSON
            (`Task`). Such a client gets no folder or key of the server's; it finds teacher and student by their hashes.
        secure: what it is about in a secure sum, as JSON (`common.secure_sum.Question`); empty: nothing.
    """

    run: str
    round: int
    config: str
    clients: tuple[int, ...]
    feedback: tuple[int, ...]
    teacher: str
    teacher_hash: str
    dataset: str
    student: str
    student_hash: str
    token_budget: int = 0
    clip_norm: float = 0.0
    noise: float = 0.0
    masked: str = ""
    masked_hash: str = ""
    scoreboard: str = ""
    host: str = ""
    task: str = ""
    secure: str = ""


@dataclass(frozen=True)
class Joined:
    """What a client on a device of its own says before round 1.

    Attributes:
        client: its id.
        train, heldout: how many of its examples it trains on and only scores.
        held: hashes of the teachers and students that it has.
        version: of its fedistill.
    """

    client: int
    train: int
    heldout: int
    held: tuple[str, ...]
    version: str


@dataclass(frozen=True)
class ClientLine:
    """One client's accounting.

    Attributes:
        client: its id.
        examples: how many examples it trained on or scored.
        seconds: how long that took.
        loss: mean loss over its steps, and its parts (training only).
        epsilon, lifetime_epsilon: where its steps were private, what its examples have spent of their privacy by the
            end of them: in this run, and ever; None: nothing bounds it.
        score: the headline metric on its own held-out data (evaluation only; None when undefined).
        problem: empty, or why it has no part in the sum: a kind, never private text.
    """

    client: int
    examples: int
    seconds: float
    loss: float | None = None
    soft_loss: float | None = None
    hard_loss: float | None = None
    hidden_loss: float | None = None
    cls_loss: float | None = None
    relation_loss: float | None = None
    self_loss: float | None = None
    inner_loss: float | None = None
    mlm_loss: float | None = None
    epsilon: float | None = None
    lifetime_epsilon: float | None = None
    score: float | None = None
    problem: str = ""


def pack_arrays(arrays: Mapping[str, NDArray[Any]]) -> ArrayRecord:
    """Arrays as they travel; several messages may share one record."""
    return ArrayRecord({name: Array(np.asarray(array, order="C")) for name, array in arrays.items()})


def pack(instruction: Instruction, student: ArrayRecord | None) -> RecordDict:
    """Content of a message to a node."""
    told = asdict(instruction)
    for name in ("token_budget", "clip_norm", "noise", "masked", "masked_hash", "task", "secure"):
        if not told[name]:
            del told[name]
    content = RecordDict({"instruction": ConfigRecord({"json": json.dumps(told)})})
    if student is not None:
        content["student"] = student
    return content


def unpack_instruction(content: RecordDict) -> Instruction:
    """Raises `WireError` when there is none, or its clients and their feedback do not fit together."""
    raw = json.loads(_config_text(content, "instruction"))
    rows = {name: tuple(int(number) for number in raw[name]) for name in ("clients", "feedback")}
    instruction = Instruction(**{**raw, **rows})
    if len(instruction.clients) != len(instruction.feedback):
        raise WireError("instruction: not one round of feedback for each client")
    if type(instruction.token_budget) is not int or instruction.token_budget < 0:
        raise WireError("instruction: the token budget is not a whole number from 0 up")
    for name in ("clip_norm", "noise"):
        number = getattr(instruction, name)
        if not _is_number(number) or number < 0:
            raise WireError(f"instruction: {name} is not a number from 0 up")
    if not re.fullmatch("[0-9a-f]{16}", instruction.run):  # it names a folder
        raise WireError("instruction: the run's id is not 16 hexadecimal digits")
    return instruction


def unpack_student(content: RecordDict, shapes: Shapes) -> dict[str, NDArray[Any]]:
    """The student's float32 arrays."""
    return _arrays(content, "student", shapes, np.dtype(np.float32))


def pack_reply(groups: Mapping[str, Mapping[str, NDArray[Any] | Rows]], lines: list[ClientLine]) -> RecordDict:
    """Content of a node's reply: named groups of arrays, and a line per client.

    Of an array that is zero but for some rows these rows travel, and their numbers as ``NAME|rows``.
    """
    content = RecordDict({"clients": ConfigRecord({"json": json.dumps([asdict(line) for line in lines])})})
    for group, arrays in groups.items():
        plain: dict[str, NDArray[Any]] = {}
        for name, array in arrays.items():
            if isinstance(array, Rows):
                plain[f"{name}|rows"] = array.index
                plain[name] = array.values
            else:
                plain[name] = array
        content[group] = pack_arrays(plain)
    return content


def mark_answer(content: RecordDict, instruction: Instruction, kind: str) -> RecordDict:
    """The reply, with the question that it answers: a message of this kind."""
    record = content["clients"]
    assert isinstance(record, ConfigRecord)
    record["answers"] = _question(instruction.run, instruction.round, kind)
    return content


def check_answer(content: RecordDict, run: str, round_number: int, kind: str) -> None:
    """Raise `WireError` for the answer to another question, as of an earlier round."""
    _config_text(content, "clients")
    record = content["clients"]
    told = record.get("answers") if isinstance(record, ConfigRecord) else None
    if told != _question(run, round_number, kind):
        raise WireError("its answer is to another question")


def _question(run: str, round_number: int, kind: str) -> str:
    return f"{run}/{round_number}/{kind}"


def pack_told(told: Mapping[int, Any], lines: list[ClientLine]) -> RecordDict:
    """Content of a node's answer in a stage of a secure sum: what each client says, and a line for each."""
    content = pack_reply({}, lines)
    content["secure"] = ConfigRecord({"json": json.dumps({str(client): said for client, said in told.items()})})
    return content


def unpack_told(content: RecordDict) -> str:
    """What clients say in a stage of a secure sum, as JSON. Raises `WireError` when it is not there, or more is."""
    _only(content, {"secure"})
    return _config_text(content, "secure")


def unpack_lines(content: RecordDict, clients: frozenset[int]) -> list[ClientLine]:
    """The line of each client that was asked. Raises `WireError` for any other, and for impossible numbers."""
    return _client_lines(_config_text(content, "clients"), clients)


def unpack_sums(content: RecordDict, expected: Mapping[str, Shapes]) -> dict[str, dict[str, NDArray[np.int64]]]:
    """A reply's groups of int64 sums.

    Raises:
        WireError: a record is missing or not expected, an array has the wrong key, kind, dtype, shape or size.
    """
    _only(content, set(expected))
    return {name: _arrays(content, name, shapes, np.dtype(np.int64)) for name, shapes in expected.items()}


def unpack_update(content: RecordDict, shapes: Shapes) -> dict[str, NDArray[np.int64] | Rows]:
    """The sum of a node's updates, int64: whole arrays, or some of their rows. Raises `WireError` as `unpack_sums`."""
    return unpack_updates(content, {"update": shapes})["update"]


def unpack_updates(
    content: RecordDict, expected: Mapping[str, Shapes]
) -> dict[str, dict[str, NDArray[np.int64] | Rows]]:
    """Such sums by the name of their record."""
    _only(content, set(expected))
    return {group: _some_update(content, group, shapes) for group, shapes in expected.items()}


def _some_update(content: RecordDict, group: str, shapes: Shapes) -> dict[str, NDArray[np.int64] | Rows]:
    record = content.get(group)
    if not isinstance(record, ArrayRecord):
        raise WireError(f"record {group!r}: not there or no arrays")
    index = {
        name: row_numbers(record[f"{name}|rows"], f"{group}/{name}|rows", shape)
        for name, shape in shapes.items()
        if f"{name}|rows" in record
    }
    some = {f"{name}|rows": rows.shape for name, rows in index.items()}
    whole = {name: (len(index[name]), *shape[1:]) if name in index else shape for name, shape in shapes.items()}
    arrays = _arrays(content, group, {**whole, **some}, np.dtype(np.int64))
    return {name: Rows(index[name], arrays[name]) if name in index else arrays[name] for name in shapes}


def pack_joined(joined: Joined) -> RecordDict:
    """Content of a client's answer to being asked to join."""
    return RecordDict({"joined": ConfigRecord({"json": json.dumps(asdict(joined))})})


def unpack_joined(content: RecordDict, client: int) -> Joined:
    """The answer of this client. Raises `WireError` for another's, and for impossible numbers or names."""
    if set(content) != {"joined"}:
        raise WireError("not one record of joining alone")
    try:
        found = Joined(**json.loads(_config_text(content, "joined")))
    except (ValueError, TypeError, RecursionError) as error:
        raise WireError(f"joining: not readable ({type(error).__name__})") from None
    if type(found.client) is not int or found.client != client:
        raise WireError(f"joining: not from client {client}")
    for count in (found.train, found.heldout):
        if type(count) is not int or not 0 <= count <= MAX_EXAMPLES:
            raise WireError(f"joining: a count of examples is not a whole number from 0 to {MAX_EXAMPLES}")
    if not isinstance(found.held, list) or len(found.held) > MAX_HELD or not all(map(_is_hash, found.held)):
        raise WireError("joining: not a short list of hashes")
    if not isinstance(found.version, str) or not re.fullmatch(r"[\w.+-]{1,40}", found.version):
        raise WireError("joining: the version is not a short word")
    return Joined(client, found.train, found.heldout, tuple(found.held), found.version)


def unpack_files(content: RecordDict) -> dict[str, bytes]:
    """A model's files by name. Raises `WireError` for names that no model's file has, and for anything but bytes."""
    record = content.get("student")
    if not isinstance(record, ArrayRecord) or not len(record):
        raise WireError("files: not there or no arrays")
    files = {}
    for name, array in record.items():
        if not MODEL_FILE.fullmatch(name):
            raise WireError(f"files: {_printable(name)}: not a name that a model's file has")
        data = decode_any(array, name)
        if data.dtype != np.uint8 or data.ndim != 1:
            raise WireError(f"files: {name}: not bytes")
        files[name] = data.tobytes()
    return files


def _is_hash(text: Any) -> bool:
    return isinstance(text, str) and re.fullmatch("[0-9a-f]{64}", text) is not None


def own_update(client: int) -> str:
    """Name of the record that holds one client's own update."""
    return f"update-{client}"


def unpack_own_update(content: RecordDict, client: int) -> dict[str, NDArray[Any]]:
    """The arrays of one client's own update, of whatever kind and shape they say, no larger than what came.

    Raises:
        WireError: the record is not there, or holds something that is no plain array.
    """
    record = content.get(own_update(client))
    if not isinstance(record, ArrayRecord):
        raise WireError(f"record {own_update(client)!r}: not there or no arrays")
    return {name: decode_any(array, f"{own_update(client)}/{_printable(name)}") for name, array in record.items()}


def only_updates_of(content: RecordDict, clients: Iterable[int]) -> None:
    """Raise `WireError` when a reply holds records besides these clients' own updates."""
    _only(content, {own_update(client) for client in clients})


def _only(content: RecordDict, expected: set[str]) -> None:
    extra = set(content) - expected - {"clients"}
    if extra:
        raise WireError(f"unexpected records: {len(extra)}")


def message_bytes(message: Message) -> int:
    """Bytes of a message's content: array data and configuration values."""
    return content_bytes(message.content) if message.has_content() else 0


def content_bytes(content: RecordDict) -> int:
    """The same of a content by itself."""
    total = 0
    for record in content.values():
        for value in record.values():
            if isinstance(value, Array):
                total += len(value.data)
            else:
                total += len(value) if isinstance(value, str | bytes) else 8
    return total


def _config_text(content: RecordDict, name: str) -> str:
    record = content.get(name)
    text = record.get("json") if isinstance(record, ConfigRecord) else None
    if not isinstance(text, str):
        raise WireError(f"record {name!r}: not there or not text")
    return text


def _arrays(content: RecordDict, name: str, shapes: Shapes, dtype: np.dtype[Any]) -> dict[str, NDArray[Any]]:
    record = content.get(name)
    if not isinstance(record, ArrayRecord):
        raise WireError(f"record {name!r}: not there or no arrays")
    if set(record) != set(shapes):
        missing, extra = sorted(set(shapes) - set(record)), len(set(record) - set(shapes))
        raise WireError(f"record {name!r}: {len(missing)} arrays missing ({', '.join(missing[:3])}), {extra} unknown")
    return {key: decode(record[key], f"{name}/{key}", shapes[key], dtype) for key in shapes}


def _printable(name: str) -> str:
    """A name that somebody else has chosen, fit for a message."""
    return "".join(letter if letter.isprintable() else "?" for letter in name[:80])


def _client_lines(text: str, clients: frozenset[int]) -> list[ClientLine]:
    try:
        lines = [ClientLine(**entry) for entry in json.loads(text)]
    except (ValueError, TypeError, RecursionError) as error:
        raise WireError(f"client lines: not readable ({type(error).__name__})") from None
    named = [line.client for line in lines if type(line.client) is int]
    if len(named) != len(lines) or sorted(named) != sorted(clients):
        raise WireError("client lines: not one for each client that was asked")
    for line in lines:
        _check_line(line)
    return lines


def _check_line(line: ClientLine) -> None:
    where = f"client {line.client}"
    if type(line.examples) is not int or not 0 <= line.examples <= MAX_EXAMPLES:
        raise WireError(f"{where}: the count of examples is not a whole number from 0 to {MAX_EXAMPLES}")
    # what is not printable could play with the terminal that shows it
    if not isinstance(line.problem, str) or len(line.problem) > 200 or not line.problem.isprintable():
        raise WireError(f"{where}: problem is not a short text")
    if not _is_number(line.seconds) or line.seconds < 0:
        raise WireError(f"{where}: seconds is not a number from 0 up")
    for name in (*LOSSES, "score"):
        value = getattr(line, name)
        if value is not None and not _is_number(value):
            raise WireError(f"{where}: {name} is not a number")
    for name in SPENT:
        value = getattr(line, name)
        if value is not None and not (_is_number(value) and value >= 0):
            raise WireError(f"{where}: {name} is not a number from 0 up")


def _is_number(value: Any) -> bool:
    """A finite number that float arithmetic can take: JSON knows NaN, and integers of any size."""
    return type(value) in (int, float) and -1e300 < value < 1e300
