"""Arrays from bytes that nobody is trusted with: ``np.save``'s format, checked before memory is asked for."""

import io
import math
from typing import Any

import numpy as np
from flwr.app import Array
from numpy.typing import NDArray


class WireError(ValueError):
    """What arrived is not what was asked for; the message names the record or array, never its values."""


def row_numbers(array: Array, where: str, shape: tuple[int, ...]) -> NDArray[np.int64]:
    """Ascending numbers of rows that an array of this shape has."""
    rows = decode_any(array, where)
    if rows.dtype != np.int64 or rows.ndim != 1 or not shape or len(rows) > shape[0]:
        raise WireError(f"{where}: not a list of at most {shape[0] if shape else 0} row numbers")
    if len(rows) and (rows[0] < 0 or rows[-1] >= shape[0] or (np.diff(rows) <= 0).any()):
        raise WireError(f"{where}: not ascending numbers from 0 to {shape[0] - 1}")
    return rows


def decode(array: Array, where: str, shape: tuple[int, ...], dtype: np.dtype[Any]) -> NDArray[Any]:
    """The array behind ``np.save`` bytes; the header is read and compared before memory is asked for."""
    size = dtype.itemsize * int(np.prod(shape, dtype=np.int64))
    if array.stype != "numpy.ndarray" or len(array.data) > size + 1024:
        raise WireError(f"{where}: {len(array.data)} bytes of kind {str(array.stype)[:20]!r}; expected about {size}")
    found_shape, fortran, found, start = _header(array.data, where)
    if found != dtype or found_shape != tuple(shape) or fortran:
        # numbers of a hostile header can be too long to print
        claimed = found_shape[:4] if all(abs(size) < 2**63 for size in found_shape) else "beyond 64 bits"
        order = "Fortran" if fortran else "C"
        raise WireError(
            f"{where}: {found.str} of shape {claimed} in {order} order; expected {dtype.str} of shape {tuple(shape)}"
        )
    if len(array.data) - start != size:
        raise WireError(f"{where}: {len(array.data) - start} bytes of data; expected {size}")
    return np.frombuffer(array.data, dtype=dtype, offset=start).reshape(shape)


def decode_any(array: Array, where: str) -> NDArray[Any]:
    """An array of numbers whose shape is not known beforehand: it must fit the bytes that came."""
    if array.stype != "numpy.ndarray":
        raise WireError(f"{where}: {len(array.data)} bytes of kind {str(array.stype)[:20]!r}")
    shape, fortran, dtype, start = _header(array.data, where)
    count = math.prod(shape)  # Python's own integers: a hostile shape must not wrap around
    whole = (
        all(type(size) is int and size >= 0 for size in shape)
        and len(shape) <= 4
        and dtype.kind in "iuf"
        and not fortran
    )
    if not whole or count * dtype.itemsize != len(array.data) - start:
        raise WireError(f"{where}: the header does not describe the {len(array.data) - start} bytes of data")
    try:
        return np.frombuffer(array.data, dtype=dtype, offset=start, count=count).reshape(shape)
    except ValueError:  # an empty array may claim any other size
        raise WireError(f"{where}: a shape that no array has") from None


def _header(data: bytes, where: str) -> tuple[tuple[int, ...], bool, np.dtype[Any], int]:
    """Shape, Fortran order, dtype and where the data start."""
    stream = io.BytesIO(data)
    try:
        version = np.lib.format.read_magic(stream)
        if version != (1, 0):
            raise WireError(f"{where}: array format {version}; expected (1, 0)")
        shape, fortran, dtype = np.lib.format.read_array_header_1_0(stream)
    except WireError:
        raise
    except Exception as error:  # a hostile header can raise anything
        raise WireError(f"{where}: no readable array header ({type(error).__name__})") from None
    return tuple(shape), fortran, dtype, stream.tell()
