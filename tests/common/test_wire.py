"""What travels arrives unchanged; whatever else arrives is refused in words that quote nothing of it."""

import dataclasses
import io
import json
import tracemalloc
from types import SimpleNamespace

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict
from hypothesis import given, settings
from hypothesis import strategies as st

from common.wire import ClientLine, Instruction, WireError, message_bytes, pack, pack_reply, unpack, unpack_reply

SHAPES = {"layer.weight": (3, 4), "layer.bias": (4,), "scalar": ()}
EXPECTED = {"update": SHAPES}
SECRET = 4815162342
LINES = [
    ClientLine(3, 17, 0.25, loss=0.5, soft_loss=0.25, hard_loss=1.0, hidden_loss=0.0),
    ClientLine(5, 0, 1.0, problem="NotFinite"),
]
ASKED = frozenset({3, 5})
INSTRUCTION = Instruction(2, '{"rounds": 3}', (3, 5), "/teacher é", "ab12", "cd34")


def sums():
    return {name: np.full(shape, SECRET, dtype=np.int64) for name, shape in SHAPES.items()}


def saved(array):
    stream = io.BytesIO()
    np.lib.format.write_array(stream, array, version=(1, 0), allow_pickle=True)
    return stream.getvalue()


def headed(header, data=b""):
    """A file of `np.save` with a header of our own."""
    text = header.encode("latin-1") + b"\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text + data


def raw(data, stype="numpy.ndarray", shape=(3, 4), dtype="int64"):
    return Array(dtype=dtype, shape=shape, stype=stype, data=data)


def reply(array=None, key="layer.weight", lines=None, **records):
    """A good reply with one array, the client lines or some records replaced."""
    content = pack_reply({"update": sums()}, LINES)
    if array is not None:
        content["update"] = ArrayRecord({**content["update"], key: array})
    if lines is not None:
        content["clients"] = ConfigRecord({"json": lines})
    for name, record in records.items():
        content[name] = record
    return content


def refusal(content):
    tracemalloc.start()
    with pytest.raises(WireError) as caught:
        unpack_reply(content, EXPECTED, ASKED)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**20
    assert str(SECRET) not in str(caught.value)
    assert len(str(caught.value)) < 300
    return str(caught.value)


def test_an_instruction_arrives_unchanged():
    arrays = {name: np.random.default_rng(0).normal(size=s).astype(np.float32) for name, s in SHAPES.items()}
    instruction, found = unpack(pack(INSTRUCTION, arrays), SHAPES)
    assert instruction == INSTRUCTION
    assert all(found[name].tobytes() == arrays[name].tobytes() for name in SHAPES)
    assert unpack(pack(INSTRUCTION, {})) == (INSTRUCTION, {})


def test_a_reply_arrives_unchanged():
    found, lines = unpack_reply(reply(), EXPECTED, ASKED)
    assert lines == LINES
    assert {name: array.tolist() for name, array in found["update"].items()} == {
        name: array.tolist() for name, array in sums().items()
    }
    assert all(array.dtype == np.int64 and array.shape == SHAPES[name] for name, array in found["update"].items())


def test_bytes_of_a_message_are_its_arrays_and_texts():
    arrays = {name: np.zeros(shape, dtype=np.float32) for name, shape in SHAPES.items()}
    content = pack(INSTRUCTION, arrays)
    expected = len(content["instruction"]["json"]) + sum(len(saved(array)) for array in arrays.values())
    message = SimpleNamespace(content=content, has_content=lambda: True)  # Flower makes messages inside apps only
    assert message_bytes(message) == expected


@pytest.mark.parametrize(
    "array",
    [
        raw(saved(np.zeros((3, 4), dtype=np.int32))),
        raw(saved(np.zeros((3, 4), dtype=">i8"))),
        raw(saved(np.zeros((3, 4), dtype=np.float64))),
        raw(saved(np.full((4, 3), SECRET))),
        raw(saved(np.full(12, SECRET))),
        raw(saved(np.full((4, 3), SECRET).T)),
        raw(saved(np.full((3, 4), SECRET))[:-1]),
        raw(saved(np.full((3, 4), SECRET)) + b"x"),
        raw(saved(np.full((3, 4), SECRET)) + b"x" * 5000),
        raw(saved(np.full((3, 4), SECRET)), stype="torch.Tensor"),
        raw(saved(np.array([{"a": SECRET}, None], dtype=object))),
        raw(b""),
        raw(b"\x93NUMPY"),
        raw(str(SECRET).encode()),
        raw(headed("{'descr': '<i8', 'fortran_order': False, 'shape': (5000000000000,)}")),
        raw(headed("{'descr': '<i8', 'fortran_order': False, 'shape': (3, 4)}")),
        raw(headed("{'descr': '<i8', 'fortran_order': False, 'shape': (-3, -4)}", bytes(96))),
        raw(headed("{'descr': '<i8', 'fortran_order': False, 'shape': (0x" + "f" * 800 + ",)}")),
        raw(headed(f"{{'descr': [('a{SECRET}', '<i8')], 'fortran_order': False, 'shape': (3, 4)}}", bytes(96))),
        raw(headed("{'descr': '|O', 'fortran_order': False, 'shape': (3, 4)}", bytes(96))),
        raw(headed("[" * 500)),
        raw(headed("__import__('os').abort()")),
    ],
)
def test_an_array_that_is_not_the_expected_one_is_refused(array):
    assert refusal(reply(array)).startswith("update/layer.weight: ")


def test_a_declared_shape_and_dtype_are_not_believed():
    """The record may say anything; what counts is the header of the bytes."""
    found, _ = unpack_reply(reply(raw(saved(sums()["layer.weight"]), shape=(9,), dtype="O")), EXPECTED, ASKED)
    assert found["update"]["layer.weight"].shape == (3, 4)


def test_missing_and_unknown_arrays_and_records_are_refused():
    few = sums()
    del few["layer.bias"]
    assert refusal(pack_reply({"update": few}, LINES)) == "record 'update': 1 arrays missing (layer.bias), 0 unknown"
    assert "1 unknown" in refusal(pack_reply({"update": {**sums(), str(SECRET): np.zeros(1, np.int64)}}, LINES))
    assert "not there" in refusal(pack_reply({}, LINES))
    assert refusal(reply(**{str(SECRET): ConfigRecord()})) == "unexpected records: 1"
    assert "no arrays" in refusal(reply(update=ConfigRecord({"json": "[]"})))
    assert "not text" in refusal(reply(clients=ConfigRecord({"json": SECRET})))
    assert "not text" in refusal(reply(clients=ArrayRecord()))
    assert "not there" in refusal(RecordDict())


GOOD = dataclasses.asdict(LINES[0])


@pytest.mark.parametrize(
    "changed",
    [
        {"client": 4}, {"client": 5}, {"client": "3"}, {"client": 3.0}, {"client": True}, {"client": [3]},
        {"examples": -1}, {"examples": 1.0}, {"examples": True}, {"examples": float("nan")}, {"examples": 10**30},
        {"client": None}, {"examples": None}, {"seconds": None},
        {"seconds": "1"}, {"seconds": -1.0}, {"seconds": float("inf")},
        {"seconds": 10**400}, {"loss": True}, {"loss": "0.1"}, {"loss": [1]}, {"loss": float("nan")}, {"score": {}},
        {"hidden_loss": float("-inf")}, {"problem": 3}, {"problem": None}, {"problem": "x" * 201},
        {"problem": "\x1b[2J"}, {"problem": "two\nlines"}, {"problem": "\ud800"}, {str(SECRET): 1},
    ],
    ids=str,
)  # fmt: skip
def test_a_line_with_an_impossible_entry_is_refused(changed):
    lines = [GOOD | changed, dataclasses.asdict(LINES[1])]
    assert refusal(reply(lines=json.dumps(lines))).startswith("client")


def test_lines_are_one_for_each_client_that_was_asked():
    def lines(*clients):
        return json.dumps([GOOD | {"client": client} for client in clients])

    for clients in [(), (3,), (3, 5, 5), (3, 5, 6), (3, 5, "x"), (3, 5, None), (3, 5, 4.5), (5, 5)]:
        assert refusal(reply(lines=lines(*clients))) == "client lines: not one for each client that was asked"
    assert len(unpack_reply(reply(lines=lines(5, 3)), EXPECTED, ASKED)[1]) == 2


@pytest.mark.parametrize(
    "text", ["", "{", "5", "null", '"x"', "[1]", "[[]]", "{}", '{"a": 1}', "[{}]", "9" * 5000, "[" * 100_000, "\x00"]
)
def test_lines_that_are_no_list_of_lines_are_refused(text):
    assert refusal(reply(lines=text)).startswith("client lines: not ")


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from([*GOOD, "x"]), inner, max_size=9),
    max_leaves=6,
)
near_lines = st.builds(
    lambda name, value: [GOOD | {name: value}, dataclasses.asdict(LINES[1])], st.sampled_from(list(GOOD)), json_values
)
good_bytes = saved(sums()["layer.weight"])
near_bytes = st.builds(
    lambda at, junk, drop: good_bytes[:at] + junk + good_bytes[at + drop :],
    st.integers(0, len(good_bytes)), st.binary(max_size=12), st.integers(0, 12),
)  # fmt: skip


def survives(content):
    try:
        unpack_reply(content, EXPECTED, ASKED)
    except WireError as error:
        assert str(SECRET) not in str(error)


@settings(max_examples=150, deadline=None)
@given(
    st.text()
    | json_values.map(json.dumps)
    | near_lines.map(json.dumps)
    | st.binary().map(lambda b: b.decode("latin-1"))
)
def test_hostile_lines_raise_nothing_but_a_wire_error(text):
    survives(reply(lines=text))


@settings(max_examples=300, deadline=None)
@given(
    st.binary(max_size=300) | near_bytes | st.binary(max_size=200).map(lambda b: headed(b.decode("latin-1"), bytes(96)))
)
def test_hostile_bytes_raise_nothing_but_a_wire_error(data):
    survives(reply(raw(data)))
