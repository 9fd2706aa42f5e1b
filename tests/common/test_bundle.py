"""A bundle opens to what was put in, and what is none is refused."""

import contextlib
import json

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict
from hypothesis import given
from hypothesis import strategies as st

from common.bundle import BundleError, bundled, unbundled
from common.wire import pack_arrays, unpack_student

SHAPES = {"layer.weight": (3, 4), "bias": (4,), "scalar": (), "empty": (0, 2)}


def arrays():
    rng = np.random.default_rng(0)
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in SHAPES.items()}


def test_records_come_back_as_they_were_and_travel_as_one_array():
    content = RecordDict({"student": pack_arrays(arrays()), "note": ConfigRecord({"json": "{}"})})
    travels = bundled(content)
    assert [len(record) for record in travels.values()] == [1, 1]
    back = unbundled(travels)
    found = unpack_student(back, SHAPES)
    assert all(np.array_equal(found[name], array) for name, array in arrays().items())
    assert back["note"] == content["note"]
    assert unbundled(content)["student"] == content["student"]  # what is no bundle stays


def opened(data: bytes):
    return unbundled(RecordDict({"student": ArrayRecord({"bundle": Array("uint8", (len(data),), "bundle", data)})}))


def header(*rows):
    return json.dumps(list(rows)).encode() + b"\n"


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"no header",
        b"{}\nabc",
        b"7\n",
        header(["a", "float32", [1], "numpy.ndarray", 4]) + b"abc",
        header(["a", "float32", [1], "numpy.ndarray", 4]) + b"abcde",
        header(["a", "float32", [1], "numpy.ndarray", -4]),
        header(["a", "float32", [1], "numpy.ndarray", True]) + b"a",
        header(["a", "float32", [-1], "numpy.ndarray", 0]),
        header(["a", "float32", "shape", "numpy.ndarray", 0]),
        header([1, "float32", [1], "numpy.ndarray", 0]),
        header(["a", "float32", [1], "numpy.ndarray"]),
        header(["a", "f", [1], "k", 1], ["a", "f", [1], "k", 1]) + b"ab",
        b"[" * 100_000 + b"\n",
    ],
)
def test_what_is_no_bundle_is_refused(data):
    with pytest.raises(BundleError, match="bundle"):
        opened(data)


@given(st.binary(max_size=200))
def test_whatever_arrives_opens_or_is_refused(data):
    with contextlib.suppress(BundleError):
        opened(data)
