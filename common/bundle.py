"""All arrays of a record as one: Flower moves every array as an object of its own, in requests of its own.

A student of forty arrays costs a hundred requests for each client and message so; over TLS and a database these take
longer than the training. One array costs four. The bundle is a line of JSON with the arrays' names, kinds and lengths,
then their bytes, one behind the other.
"""

import json
from typing import Any

from flwr.app import Array, ArrayRecord, RecordDict

BUNDLE = "bundle"
MAX_HEADER = 2**22  # bytes


class BundleError(ValueError):
    """What arrived is no bundle; the message tells nothing of what it holds."""


def bundled(content: RecordDict) -> RecordDict:
    """The same records, each with one array in place of its many."""
    return RecordDict(
        {name: bundle(record) if isinstance(record, ArrayRecord) else record for name, record in content.items()}
    )


def unbundled(content: RecordDict) -> RecordDict:
    """The records as they were before `bundled`; what is none stays as it is.

    Raises:
        BundleError: the header is not readable, or does not describe the bytes.
    """
    return RecordDict(
        {
            name: _open(record[BUNDLE]) if isinstance(record, ArrayRecord) and set(record) == {BUNDLE} else record
            for name, record in content.items()
        }
    )


def bundle(record: ArrayRecord) -> ArrayRecord:
    """One array in place of a record's many."""
    header = [[name, one.dtype, list(one.shape), one.stype, len(one.data)] for name, one in record.items()]
    data = b"".join([json.dumps(header).encode(), b"\n", *(one.data for one in record.values())])
    return ArrayRecord({BUNDLE: Array("uint8", (len(data),), BUNDLE, data)})


def _open(array: Array) -> ArrayRecord:
    data = memoryview(array.data)
    end = array.data.find(b"\n", 0, MAX_HEADER)
    if end < 0:
        raise BundleError("bundle: no header")
    try:
        header = json.loads(array.data[:end])
        arrays, place = {}, end + 1
        for name, dtype, shape, kind, length in header:
            _check(name, dtype, shape, kind, length)
            arrays[name] = Array(dtype, tuple(shape), kind, bytes(data[place : place + length]))
            place += length
    except (ValueError, TypeError, RecursionError) as error:
        raise BundleError(f"bundle: not readable ({type(error).__name__})") from None
    if place != len(data) or len(arrays) != len(header):
        raise BundleError("bundle: the header does not describe the bytes that came")
    return ArrayRecord(arrays)


def _check(name: Any, dtype: Any, shape: Any, kind: Any, length: Any) -> None:
    texts = all(isinstance(text, str) and len(text) < 1000 for text in (name, dtype, kind))
    sizes = isinstance(shape, list) and all(type(size) is int and size >= 0 for size in [*shape, length])
    if not texts or not sizes:
        raise BundleError
