"""What travels between server and clients, as Flower records, and the checks on arrival.

Down: the student's trainable arrays and one instruction. Up: one sum per node (weighted updates, statistics)
and a line of numbers per client. Nothing received is trusted: kind, dtype, shape and size of an array are
compared with what is expected before its bytes are looked at.
"""

import io
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict
from numpy.typing import NDArray

Shapes = Mapping[str, tuple[int, ...]]
MAX_EXAMPLES = 2**31 - 1  # of one client
NOT_FINITE = "update is not finite"  # a `ClientLine.problem` that means refused, not failed


class WireError(ValueError):
    """What arrived is not what was asked for; the message names the record or array, never its values."""


@dataclass(frozen=True)
class Instruction:
    """What a node is asked to do in one message.

    Attributes:
        round: the round, from 1; 0 for work before it.
        config: the run's keys as JSON (`Config.flat`).
        clients: ids of the clients this node works for.
        teacher: folder of the teacher, and the hash of its weights.
        dataset: key of the prepared dataset.
        scoreboard: a file to which a finished client adds a byte, for the progress display; may be empty.
    """

    round: int
    config: str
    clients: tuple[int, ...]
    teacher: str
    teacher_hash: str
    dataset: str
    scoreboard: str = ""


@dataclass(frozen=True)
class ClientLine:
    """One client's accounting.

    Attributes:
        client: its id.
        examples: how many examples it trained on or scored.
        seconds: how long that took.
        loss: mean loss over its steps, and its parts (training only).
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
    score: float | None = None
    problem: str = ""


def pack(instruction: Instruction, arrays: Mapping[str, NDArray[Any]]) -> RecordDict:
    """Content of a message to a node."""
    content = RecordDict({"instruction": ConfigRecord({"json": json.dumps(asdict(instruction))})})
    if arrays:
        content["student"] = _record(arrays)
    return content


def unpack(content: RecordDict, shapes: Shapes | None = None) -> tuple[Instruction, dict[str, NDArray[Any]]]:
    """The instruction and, where ``shapes`` are given, the student's float32 arrays."""
    raw = json.loads(_config_text(content, "instruction"))
    instruction = Instruction(**{**raw, "clients": tuple(int(client) for client in raw["clients"])})
    return instruction, {} if shapes is None else _arrays(content, "student", shapes, np.dtype(np.float32))


def pack_reply(sums: Mapping[str, Mapping[str, NDArray[np.int64]]], lines: list[ClientLine]) -> RecordDict:
    """Content of a node's reply: named groups of int64 sums, and a line per client."""
    content = RecordDict({"clients": ConfigRecord({"json": json.dumps([asdict(line) for line in lines])})})
    for name, arrays in sums.items():
        content[name] = _record(arrays)
    return content


def unpack_reply(
    content: RecordDict, expected: Mapping[str, Shapes], clients: frozenset[int]
) -> tuple[dict[str, dict[str, NDArray[np.int64]]], list[ClientLine]]:
    """Check a reply against what was asked for and decode it.

    Raises:
        WireError: a record is missing, an array has the wrong key, kind, dtype, shape or size, or a line
            names a client that was not asked or holds an impossible number.
    """
    extra = set(content) - set(expected) - {"clients"}
    if extra:
        raise WireError(f"unexpected records: {len(extra)}")
    lines = _client_lines(_config_text(content, "clients"), clients)
    dtype = np.dtype(np.int64)
    return {name: _arrays(content, name, shapes, dtype) for name, shapes in expected.items()}, lines


def message_bytes(message: Message) -> int:
    """Bytes of a message's content: array data and configuration values."""
    if not message.has_content():
        return 0
    total = 0
    for record in message.content.values():
        for value in record.values():
            if isinstance(value, Array):
                total += len(value.data)
            else:
                total += len(value) if isinstance(value, str | bytes) else 8
    return total


def _record(arrays: Mapping[str, NDArray[Any]]) -> ArrayRecord:
    return ArrayRecord({name: Array(np.asarray(array, order="C")) for name, array in arrays.items()})


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
    return {key: _decode(record[key], f"{name}/{key}", shapes[key], dtype) for key in shapes}


def _decode(array: Array, where: str, shape: tuple[int, ...], dtype: np.dtype[Any]) -> NDArray[Any]:
    """The array behind ``np.save`` bytes; the header is read and compared before memory is asked for."""
    size = dtype.itemsize * int(np.prod(shape, dtype=np.int64))
    if array.stype != "numpy.ndarray" or len(array.data) > size + 1024:
        raise WireError(f"{where}: {len(array.data)} bytes of kind {str(array.stype)[:20]!r}; expected about {size}")
    stream = io.BytesIO(array.data)
    try:
        version = np.lib.format.read_magic(stream)
        if version != (1, 0):
            raise WireError(f"{where}: array format {version}; expected (1, 0)")
        found_shape, fortran, found = np.lib.format.read_array_header_1_0(stream)
    except WireError:
        raise
    except Exception as error:  # a hostile header can raise anything
        raise WireError(f"{where}: no readable array header ({type(error).__name__})") from None
    if found != dtype or tuple(found_shape) != tuple(shape) or fortran:
        # numbers of a hostile header can be too long to print
        claimed = found_shape[:4] if all(abs(size) < 2**63 for size in found_shape) else "beyond 64 bits"
        order = "Fortran" if fortran else "C"
        raise WireError(
            f"{where}: {found.str} of shape {claimed} in {order} order; expected {dtype.str} of shape {tuple(shape)}"
        )
    if len(array.data) - stream.tell() != size:
        raise WireError(f"{where}: {len(array.data) - stream.tell()} bytes of data; expected {size}")
    return np.frombuffer(array.data, dtype=dtype, offset=stream.tell()).reshape(shape)


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
    for name in ("loss", "soft_loss", "hard_loss", "hidden_loss", "score"):
        value = getattr(line, name)
        if value is not None and not _is_number(value):
            raise WireError(f"{where}: {name} is not a number")


def _is_number(value: Any) -> bool:
    """A finite number that float arithmetic can take: JSON knows NaN, and integers of any size."""
    return type(value) in (int, float) and -1e300 < value < 1e300
