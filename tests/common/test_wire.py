"""What travels arrives unchanged; whatever else arrives is refused in words that quote nothing of it."""

import dataclasses
import io
import json
import tracemalloc
from contextlib import suppress
from types import SimpleNamespace

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict
from hypothesis import given, settings
from hypothesis import strategies as st

from common.fixed_point import Rows
from common.wire import (
    ClientLine,
    Instruction,
    WireError,
    message_bytes,
    only_updates_of,
    own_update,
    pack,
    pack_arrays,
    pack_reply,
    unpack_files,
    unpack_instruction,
    unpack_lines,
    unpack_own_update,
    unpack_student,
    unpack_sums,
    unpack_update,
)

SHAPES = {"layer.weight": (3, 4), "layer.bias": (4,), "scalar": ()}
EXPECTED = {"update": SHAPES}
SECRET = 4815162342
LINES = [
    ClientLine(
        3, 17, 0.25, loss=0.5, soft_loss=0.25, hard_loss=1.0, hidden_loss=0.0, cls_loss=0.125, relation_loss=2.0
    ),
    ClientLine(5, 0, 1.0, problem="NotFinite"),
]
ASKED = frozenset({3, 5})
RUN = "0123456789abcdef"
INSTRUCTION = Instruction(
    RUN, 2, '{"rounds": 3}', (3, 5), (0, 1), "/teacher é", "ab12", "cd34", "ef56", "0789", scoreboard="/board"
)


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


def unpack_reply(content, expected, clients):
    lines = unpack_lines(content, clients)
    return unpack_sums(content, expected), lines


def refusal(content, read=lambda content: unpack_reply(content, EXPECTED, ASKED)):
    tracemalloc.start()
    try:
        with pytest.raises(WireError) as caught:
            read(content)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 2**20
    assert str(SECRET) not in str(caught.value)
    assert len(str(caught.value)) < 300
    return str(caught.value)


def student():
    return {name: np.random.default_rng(0).normal(size=s).astype(np.float32) for name, s in SHAPES.items()}


def test_an_instruction_and_its_student_arrive_unchanged():
    arrays = student()
    content = pack(INSTRUCTION, pack_arrays(arrays))
    assert unpack_instruction(content) == INSTRUCTION
    found = unpack_student(content, SHAPES)
    assert all(found[name].tobytes() == arrays[name].tobytes() for name in SHAPES)
    assert all(array.dtype == np.float32 and array.shape == SHAPES[name] for name, array in found.items())
    alone = pack(INSTRUCTION, None)
    assert unpack_instruction(alone) == INSTRUCTION
    assert list(alone) == ["instruction"]


def test_arrays_in_another_memory_order_arrive_as_they_are():
    array = np.arange(12, dtype=np.float32).reshape(4, 3).T
    assert not array.flags.c_contiguous
    found = unpack_student(pack(INSTRUCTION, pack_arrays({"w": array})), {"w": (3, 4)})
    assert found["w"].tolist() == array.tolist()


def test_a_student_of_other_shapes_or_numbers_is_refused():
    def read(content):
        return unpack_student(content, SHAPES)

    assert "not there" in refusal(pack(INSTRUCTION, None), read)
    wide = {name: array.astype(np.float64) for name, array in student().items()}
    assert "expected <f4" in refusal(pack(INSTRUCTION, pack_arrays(wide)), read)
    few = pack_arrays({name: array for name, array in student().items() if name != "scalar"})
    assert refusal(pack(INSTRUCTION, few), read) == "record 'student': 1 arrays missing (scalar), 0 unknown"


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"feedback": (1,)}, "feedback"),
        ({"clients": (3,)}, "feedback"),
        ({"run": ""}, "run's id"),
        ({"run": "../../../../etc"}, "run's id"),
        ({"run": RUN + "0"}, "run's id"),
        ({"run": RUN.upper()}, "run's id"),
        ({"run": RUN + "\n"}, "run's id"),
    ],
    ids=str,
)
def test_an_instruction_that_does_not_fit_together_is_refused(changed, named):
    content = pack(dataclasses.replace(INSTRUCTION, **changed), None)
    with pytest.raises(WireError, match=named):
        unpack_instruction(content)


def test_a_message_without_an_instruction_is_refused():
    for content in (RecordDict(), RecordDict({"instruction": ArrayRecord()})):
        with pytest.raises(WireError, match="record 'instruction': not there or not text"):
            unpack_instruction(content)


def test_a_reply_arrives_unchanged():
    found, lines = unpack_reply(reply(), EXPECTED, ASKED)
    assert lines == LINES
    assert {name: array.tolist() for name, array in found["update"].items()} == {
        name: array.tolist() for name, array in sums().items()
    }
    assert all(array.dtype == np.int64 and array.shape == SHAPES[name] for name, array in found["update"].items())


def test_bytes_of_a_message_are_its_arrays_and_texts():
    arrays = {name: np.zeros(shape, dtype=np.float32) for name, shape in SHAPES.items()}
    content = pack(INSTRUCTION, pack_arrays(arrays))
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


# --- a node's sum, of some arrays only rows -----------------------------------------------------


TABLE = {"words": (9, 2), "bias": (2,), "scalar": ()}


def table_of(index=(1, 4, 8), rows=3, **others):
    """A reply with rows of the first array; ``others`` are put in besides."""
    part = Rows(np.array(index, dtype=np.int64), np.full((rows, 2), SECRET, dtype=np.int64))
    arrays = {"words": part, "bias": np.ones(2, dtype=np.int64), "scalar": np.array(5), **others}
    return pack_reply({"update": arrays}, LINES)


def read_update(content):
    return unpack_update(content, TABLE)


def test_rows_of_a_sum_arrive_as_rows_and_whole_arrays_whole():
    found = read_update(table_of())
    assert found["words"].index.tolist() == [1, 4, 8]
    assert found["words"].values.tolist() == [[SECRET, SECRET]] * 3
    assert (found["bias"].tolist(), found["scalar"].tolist()) == ([1, 1], 5)
    assert list(found) == list(TABLE)
    whole = read_update(table_of(words=np.arange(18).reshape(9, 2)))
    assert whole["words"].tolist() == np.arange(18).reshape(9, 2).tolist()
    assert read_update(table_of((), 0))["words"].values.shape == (0, 2)


@pytest.mark.parametrize(
    "index", [(4, 1, 8), (1, 1, 8), (-1, 4, 8), (1, 4, 9), (1, 4, 2**62), (-(2**63), 2**63 - 1, 3)], ids=str
)
def test_row_numbers_that_are_not_ascending_rows_of_the_array_are_refused(index):
    """One row twice, or a row that is not there, would add up wrong or elsewhere."""
    assert refusal(table_of(index), read_update) == "update/words|rows: not ascending numbers from 0 to 8"


@pytest.mark.parametrize(
    "numbers",
    [
        raw(saved(np.array([1, 4, 8], dtype=np.int32))),
        raw(saved(np.array([1.0, 4.0, 8.0]))),
        raw(saved(np.array([[1, 4, 8]]))),
        raw(saved(np.arange(10))),
        raw(saved(np.array(3))),
        raw(saved(np.array([True, False, True]))),
        raw(b""),
        raw(headed("{'descr': '<i8', 'fortran_order': False, 'shape': (True,)}", bytes(8))),
    ],
)
def test_row_numbers_that_are_no_list_of_whole_numbers_are_refused(numbers):
    content = table_of()
    content["update"] = ArrayRecord({**content["update"], "words|rows": numbers})
    assert refusal(content, read_update).startswith("update/words|rows: ")


def test_rows_that_do_not_fit_their_numbers_or_their_array_are_refused():
    assert refusal(table_of((1, 4)), read_update).startswith("update/words: ")
    wide = Rows(np.array([1]), np.ones((1, 3), dtype=np.int64))
    assert refusal(table_of(words=wide), read_update).startswith("update/words: ")
    real = Rows(np.array([1]), np.ones((1, 2), dtype=np.float32))
    assert refusal(table_of(words=real), read_update).startswith("update/words: ")
    none = Rows(np.array([0]), np.ones(1, dtype=np.int64))
    assert refusal(table_of(scalar=none), read_update).startswith("update/scalar|rows: ")
    assert "1 unknown" in refusal(table_of(**{"other|rows": np.array([1])}), read_update)
    content = pack_reply({"update": {"words|rows": np.array([1])}}, LINES)
    assert "3 arrays missing" in refusal(content, read_update)
    assert refusal(RecordDict(), read_update) == "record 'update': not there or no arrays"
    assert refusal(pack_reply({"update": {}, "more": {}}, LINES), read_update) == "unexpected records: 1"


# --- one client's own update --------------------------------------------------------------------


PARTS = {
    "layer.weight|values": np.arange(12, dtype=np.int8).reshape(3, 4),
    "layer.weight|scale": np.array([0.5, 1.0, SECRET], dtype="<f4"),
    "layer.bias|values": np.array([1, 2], dtype="<f2"),
    "update|gaps": np.array([7, 65535], dtype="<u2"),
    "none|values": np.zeros((0, 3), dtype="<f4"),
}


def own(array=None, key="layer.weight|values"):
    """A reply with client 3's own update, one of its arrays replaced."""
    content = pack_reply({own_update(3): PARTS}, LINES)
    if array is not None:
        content[own_update(3)] = ArrayRecord({**content[own_update(3)], key: array})
    return content


def read_own(content):
    return unpack_own_update(content, 3)


def test_an_own_update_arrives_unchanged_whatever_its_arrays():
    found = read_own(own())
    assert list(found) == list(PARTS)
    for name, array in PARTS.items():
        assert (found[name].dtype, found[name].shape) == (array.dtype, array.shape)
        assert found[name].tobytes() == array.tobytes()


def test_an_own_update_that_is_not_there_is_refused():
    for content in (RecordDict(), pack_reply({own_update(5): PARTS}, LINES)):
        assert refusal(content, read_own) == "record 'update-3': not there or no arrays"
    assert "no arrays" in refusal(RecordDict({own_update(3): ConfigRecord({"json": "[]"})}), read_own)


def test_records_besides_the_updates_of_these_clients_are_refused():
    content = pack_reply({own_update(3): PARTS, own_update(5): PARTS}, LINES)
    only_updates_of(content, [3, 5])
    assert refusal(content, lambda found: only_updates_of(found, [3])) == "unexpected records: 1"
    assert refusal(reply(), lambda found: only_updates_of(found, [3, 5])) == "unexpected records: 1"


HOSTILE = [
    "(5000000000000,)", "(3, 5)", "(-3, -4)", "(2, 2, 1, 1, 3)", "(0x" + "f" * 800 + ",)",
    f"({2**62}, 4)",  # wraps around to 0 in 64 bits
    f"({2**32}, {2**32})",
    # nothing in it, and still more than an array can have
    f"(0, {2**70})", f"(0, {2**62}, {2**62})", f"(0, {2**30}, {2**30}, {2**30})",
    "(True, 12)", "(3, 4, True)",
]  # fmt: skip


@pytest.mark.parametrize("shape", HOSTILE)
@pytest.mark.parametrize("data", [b"", bytes(12)], ids=["empty", "12 bytes"])
def test_a_header_that_does_not_describe_the_data_is_refused(shape, data):
    array = raw(headed(f"{{'descr': '|i1', 'fortran_order': False, 'shape': {shape}}}", data))
    assert refusal(own(array), read_own).startswith("update-3/layer.weight|values: ")


@pytest.mark.parametrize(
    "array",
    [
        raw(saved(np.full((4, 3), SECRET).T)),
        raw(saved(np.full((3, 4), SECRET))[:-1]),
        raw(saved(np.full((3, 4), SECRET)) + b"x"),
        raw(saved(np.full((3, 4), SECRET)), stype="torch.Tensor"),
        raw(saved(np.array([{"a": SECRET}, None], dtype=object))),
        raw(saved(np.array(["a", "b"]))),
        raw(saved(np.array([True, False]))),
        raw(saved(np.array([1j, SECRET]))),
        raw(saved(np.zeros(2, dtype=[(f"a{SECRET}", "<i8")]))),
        raw(saved(np.array([SECRET], dtype="datetime64[s]"))),
        raw(b""),
        raw(b"\x93NUMPY"),
        raw(str(SECRET).encode()),
        raw(headed("{'descr': '|O', 'fortran_order': False, 'shape': (3, 4)}", bytes(96))),
        raw(headed("[" * 500)),
        raw(headed("__import__('os').abort()")),
    ],
)
def test_an_array_that_holds_no_plain_numbers_is_refused(array):
    assert refusal(own(array), read_own).startswith("update-3/layer.weight|values: ")


def test_a_refusal_can_be_printed_whatever_the_arrays_are_called():
    """A name is the client's own word: it could play with the terminal that shows it."""
    for name in ("\x1b[2J", "two\nlines", "\u202e", "x" * 5000):
        assert refusal(own(raw(b""), key=name), read_own).isprintable()
        assert refusal(own(raw(saved(np.zeros(2)), stype="\x1b[2J"), key=name), read_own).isprintable()


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


@settings(max_examples=150)
@given(
    st.text()
    | json_values.map(json.dumps)
    | near_lines.map(json.dumps)
    | st.binary().map(lambda b: b.decode("latin-1"))
)
def test_hostile_lines_raise_nothing_but_a_wire_error(text):
    survives(reply(lines=text))


@settings(max_examples=300)
@given(
    st.binary(max_size=300) | near_bytes | st.binary(max_size=200).map(lambda b: headed(b.decode("latin-1"), bytes(96)))
)
def test_hostile_bytes_raise_nothing_but_a_wire_error(data):
    survives(reply(raw(data)))


some_shapes = st.lists(st.integers(-1, 2**65) | st.integers(0, 5) | st.booleans(), max_size=5)
near_headers = st.builds(
    lambda descr, shape, data: headed(
        f"{{'descr': {descr!r}, 'fortran_order': False, 'shape': {tuple(shape)!r}}}", data
    ),
    st.sampled_from(["|i1", "<f4", "<f2", ">f8", "<u2", "|b1", "<f16", "<U3", "|V0", "<i0", "<m8[s]"]),
    some_shapes,
    st.binary(max_size=32),
)


@settings(max_examples=400)
@given(
    near_headers
    | st.binary(max_size=300)
    | near_bytes
    | st.binary(max_size=200).map(lambda b: headed(b.decode("latin-1"), bytes(96)))
)
def test_hostile_bytes_of_rows_and_own_updates_raise_nothing_but_a_wire_error(data):
    content = table_of()
    content["update"] = ArrayRecord({**content["update"], "words|rows": raw(data)})
    with suppress(WireError):
        read_update(content)
    try:
        found = read_own(own(raw(data)))
    except WireError as error:
        assert str(SECRET) not in str(error)
    else:
        assert found["layer.weight|values"].nbytes <= len(data)


# --- a model's files ----------------------------------------------------------------------------


def files_content(**files):
    arrays = {name.replace("__", "."): np.frombuffer(data, dtype=np.uint8) for name, data in files.items()}
    return RecordDict({"student": pack_arrays(arrays)})


def test_files_arrive_as_they_were():
    files = {"config__json": b"{}", "model__safetensors": bytes(range(256))}
    assert unpack_files(files_content(**files)) == {"config.json": b"{}", "model.safetensors": bytes(range(256))}


@pytest.mark.parametrize("name", ["../x.json", "a/b.json", "model.bin", "model.py", ".json", "MODEL.json", "x.json\n"])
def test_a_name_that_no_models_file_has_is_refused(name):
    content = RecordDict({"student": pack_arrays({name: np.zeros(1, np.uint8)})})
    with pytest.raises(WireError, match="not a name that a model's file has"):
        unpack_files(content)


def test_files_are_bytes():
    for array in (np.zeros(2, np.float32), np.zeros((1, 2), np.uint8)):
        with pytest.raises(WireError, match="not bytes"):
            unpack_files(RecordDict({"student": pack_arrays({"config.json": array})}))
    with pytest.raises(WireError, match="not there"):
        unpack_files(RecordDict({}))
