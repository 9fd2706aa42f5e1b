"""How one client's update becomes few bytes, and how hostile bytes become an update again.

An update u has N entries in named arrays. A wire kind replaces it by C(u), which takes fewer bytes:

    fp32   C(u) = u                                                              4 bytes an entry
    fp16   rounded to the nearest float16                                        2
    int8   s floor(u / s + r), r uniform in [0, 1), s = max |row| / 127          1, and 4 a row: E C(u) = u
    topk   the share k of the whole update's entries that are largest            3 an entry kept, and N / 255; where
                                                                                 k < 1 / 255: 4, and 2 N / 65535
    svd    per matrix the least rank r that keeps a share E of its squares       2 r (m + n) for an m x n matrix, where
                                                                                 that is less than fp16's

int8 is QSGD's stochastic rounding (Alistarh et al. 2017, https://arxiv.org/abs/1610.02132), topk is sparsified SGD
(Stich et al. 2018, https://arxiv.org/abs/1809.07599), svd is the dynamic gradient approximation of FedKD (Wu et al.
2022, https://arxiv.org/abs/2108.13323), whose E rises with the rounds. What C leaves out is made up for in later
rounds by error feedback (`clients.error_feedback`).

What travels is flat: ``{"NAME|values": array, "NAME|scale": array, ...}``, plain little-endian arrays. `decompress`
trusts none of it.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, assert_never

import numpy as np
import torch
from numpy.typing import DTypeLike, NDArray

from common.fixed_point import NotFinite
from common.keys import ServerKeys

Kind = Literal["fp32", "fp16", "int8", "topk", "svd"]
Parts = dict[str, NDArray[Any]]
Shapes = Mapping[str, tuple[int, ...]]
Update = dict[str, NDArray[np.float32]]

# float16's largest number. No weight moves that far in a round unless training has diverged, and then clipping
# would only hide it: error feedback would go on to deliver the rest, piece by piece, for rounds.
LARGEST = 65504.0
STEPS = 127  # of int8 on either side of 0
_MOST = float(np.finfo(np.float32).max)
_LEAST = float(np.finfo(np.float32).tiny)
_SPARSE = "update"  # topk sends one list for all arrays: "update|gaps", "update|values", "update|scale"


@dataclass(frozen=True)
class Wire:
    """How updates travel in one round.

    Attributes:
        topk: the share of an update's entries that ``topk`` keeps.
        energy: the share of a matrix's squared singular values that ``svd`` keeps at least.
    """

    kind: Kind
    topk: float
    energy: float


def wire_for(keys: ServerKeys, round_number: int, rounds: int) -> Wire:
    """The wire of a round from 1 to ``rounds``.

    FedKD's threshold is T(t) = T_start + (T_end - T_start) t, where t goes from 0 in the first round to 1 in the last.
    A run of one round has no later one to make up for what is left out: it takes T_end.
    """
    progress = (round_number - 1) / (rounds - 1) if rounds > 1 else 1.0
    energy = (1.0 - progress) * keys.svd_energy_start + progress * keys.svd_energy_end  # exact at both ends
    return Wire("fp32" if keys.wire == "auto" else keys.wire, keys.topk, energy)


def compress(update: Mapping[str, NDArray[np.float32]], wire: Wire, rng: np.random.Generator) -> Parts:
    """What travels instead of an update; its arrays may share memory with the update's.

    Args:
        update: float32 arrays of any shape; their order does not matter.
        rng: decides int8's rounding; the other kinds draw nothing.

    Raises:
        NotFinite: a value is NaN, infinite or beyond 65504.
    """
    arrays = {name: np.asarray(update[name], dtype="<f4", order="C") for name in sorted(update)}
    for array in arrays.values():
        if not _largest(array) <= LARGEST:  # also true for NaN
            raise NotFinite("an update holds NaN, Inf or a value too large to send")
    match wire.kind:
        case "fp32":
            return {f"{name}|values": array for name, array in arrays.items()}
        case "fp16":
            return {f"{name}|values": _half(array) for name, array in arrays.items()}
        case "int8":
            return _named({name: _to_int8(array, rng) for name, array in arrays.items()})
        case "topk":
            return _named({_SPARSE: _to_sparse(arrays, wire.topk)})
        case "svd":
            return _named({name: _to_factors(array, wire.energy) for name, array in arrays.items()})
        case _:
            assert_never(wire.kind)


def decompress(parts: Mapping[str, NDArray[Any]], shapes: Shapes, wire: Wire) -> Update:
    """The update that some parts stand for; its arrays may share memory with the parts.

    Keys, dtypes, shapes, counts, places, ranks, scales and values are checked before memory is asked for, beyond
    one copy of a part that has the right size.

    Args:
        parts: what arrived; nothing in it is trusted.
        shapes: names and shapes of the update's arrays.

    Raises:
        ValueError: a part is missing, unknown, of another dtype, shape or length, or holds what no update is made
            of; names the part, never a value of it.
    """
    _check_keys(parts, _expected_keys(parts, shapes, wire.kind))
    match wire.kind:
        case "fp32" | "fp16":
            dtype = "<f4" if wire.kind == "fp32" else "<f2"
            return {name: _values(parts, f"{name}|values", dtype, shape, _MOST) for name, shape in shapes.items()}
        case "int8":
            return {name: _from_int8(parts, name, shape) for name, shape in shapes.items()}
        case "topk":
            return _from_sparse(parts, shapes, wire.topk)
        case "svd":
            return {name: _from_factors(parts, name, shape) for name, shape in shapes.items()}
        case _:
            assert_never(wire.kind)


def size(parts: Mapping[str, NDArray[Any]]) -> int:
    """Bytes of the parts' data, without the names and headers that a message adds."""
    return sum(part.nbytes for part in parts.values())


def entry_bytes(kind: Kind, topk: float) -> float:
    """Bytes for each entry of an update, at most, without what rows and arrays share: a scale.

    What svd sends depends on the update; this is as if nothing were saved.
    """
    match kind:
        case "fp32":
            return 4.0
        case "fp16" | "svd":
            return 2.0
        case "int8":
            return 1.0
        case "topk":
            escape, dtype = _gap_code(topk)
            return topk * (2 + dtype.itemsize) + dtype.itemsize / escape
        case _:
            assert_never(kind)


# --- int8: a scale per row, rounding up with the probability of the remainder ---


def _to_int8(array: NDArray[np.float32], rng: np.random.Generator) -> Parts:
    rows = array.reshape(_rows(array.shape))
    scale = np.maximum(rows.max(axis=1, initial=0.0), -rows.min(axis=1, initial=0.0)) / np.float32(STEPS)
    scale[scale < _LEAST] = 0.0  # dividing by a subnormal number would overflow; such a row counts as zeros
    with np.errstate(divide="ignore"):
        inverse = np.where(scale > 0, np.float32(1.0) / scale, np.float32(0.0))
    steps = rows * inverse[:, None]
    steps += rng.random(rows.shape, dtype=np.float32)
    np.floor(steps, out=steps)
    np.clip(steps, -STEPS, STEPS, out=steps)  # a row's largest entry can round to 127 + 2^-17
    return {"values": steps.astype("|i1").reshape(array.shape), "scale": scale.astype("<f4")}


def _from_int8(parts: Mapping[str, NDArray[Any]], name: str, shape: tuple[int, ...]) -> NDArray[np.float32]:
    rows = _rows(shape)
    scale = _scale(parts, f"{name}|scale", rows[0], _MOST / STEPS)
    steps = _part(parts, f"{name}|values", "|i1", shape)
    if int(steps.min(initial=0)) < -STEPS:
        raise ValueError(f"{name}|values: a step beyond {STEPS}")
    found: NDArray[np.float32] = steps.reshape(rows).astype(np.float32)
    found *= scale[:, None]
    return found.reshape(shape)


def _rows(shape: tuple[int, ...]) -> tuple[int, int]:
    """Rows that share a scale, and their length; an array of one dimension is one row."""
    return (shape[0], math.prod(shape[1:])) if len(shape) > 1 else (1, math.prod(shape))


# --- topk: the largest entries of the whole update, as gaps between their places ---
#
# One choice over all arrays: no other choice of as many entries leaves a smaller squared error, and arrays that hardly
# moved this round wait in the residual until they have something to say. The number of entries is fixed, so every
# client's message has nearly the same length whatever it holds. Places are ascending in the update laid out flat,
# arrays in the order of their names, and travel as the zeros skipped before each: a byte where the gap is below 255,
# and a 255 for every 255 zeros more ("255, 3" skips 258), which is at most N / 255 bytes on top of a byte an entry,
# against 4 bytes for a flat index. Where so few entries are kept that the 255s would outweigh them, 16 bits serve in
# the same way. Duplicates and descending places cannot be written in this code.


def _to_sparse(arrays: Mapping[str, NDArray[np.float32]], share: float) -> Parts:
    flat = np.concatenate([array.reshape(-1) for array in arrays.values()] or [np.zeros(0, np.float32)])
    places = _largest_places(flat, _kept(flat.size, share))
    escape, dtype = _gap_code(share)
    gaps = np.diff(places, prepend=-1) - 1
    last = np.cumsum(gaps // escape + 1)  # where each entry's own code ends
    codes = np.full(int(last[-1]) if last.size else 0, escape, dtype=dtype)
    codes[last - 1] = gaps % escape
    values, scale = _normalised(flat[places])
    return {"gaps": codes, "values": _half(values), "scale": scale}


def _largest_places(flat: NDArray[np.float32], count: int) -> NDArray[np.int64]:
    """Ascending places of the ``count`` entries of largest magnitude; among equals the first ones."""
    if not count:
        return np.zeros(0, dtype=np.int64)
    magnitudes = np.abs(flat)
    least = np.partition(magnitudes, flat.size - count)[flat.size - count]
    above = np.flatnonzero(magnitudes > least)
    equal = np.flatnonzero(magnitudes == least)[: count - above.size]
    return np.sort(np.concatenate([above, equal]))


def _from_sparse(parts: Mapping[str, NDArray[Any]], shapes: Shapes, share: float) -> Update:
    entries = sum(math.prod(shape) for shape in shapes.values())
    count = _kept(entries, share)
    scale = _scale(parts, f"{_SPARSE}|scale", 1, _MOST)
    values = _values(parts, f"{_SPARSE}|values", "<f2", (count,), 1.0)
    places = _places(parts, f"{_SPARSE}|gaps", entries, count, share)
    flat = np.zeros(entries, dtype=np.float32)
    flat[places] = values * scale[0]
    ordered = sorted(shapes)
    pieces = np.split(flat, np.cumsum([math.prod(shapes[name]) for name in ordered]))[: len(ordered)]
    named = dict(zip(ordered, pieces, strict=True))
    return {name: named[name].reshape(shape) for name, shape in shapes.items()}


def _places(
    parts: Mapping[str, NDArray[Any]], key: str, entries: int, count: int, share: float
) -> NDArray[np.int64]:  # fmt: skip
    escape, dtype = _gap_code(share)
    codes = _part(parts, key, dtype, None)
    if codes.ndim != 1 or not count <= codes.size <= count + (entries - count) // escape:
        raise ValueError(f"{key}: not one line of gaps for {count} entries of {entries}")
    own = codes != escape
    if int(own.sum()) != count or (count and not own[-1]):
        raise ValueError(f"{key}: not the gaps of {count} entries")
    places: NDArray[np.int64] = np.cumsum(codes, dtype=np.int64)[own] + np.arange(count)
    if count and places[-1] >= entries:
        raise ValueError(f"{key}: a place beyond the update's {entries} entries")
    return places


def _kept(entries: int, share: float) -> int:
    return min(entries, max(1, round(share * entries)))


def _gap_code(share: float) -> tuple[int, np.dtype[Any]]:
    """The code that stands for zeros alone, and the dtype of gaps: the shorter one for such a share."""
    return (255, np.dtype("|u1")) if share >= 1 / 255 else (65535, np.dtype("<u2"))


# --- svd: the product of two thin matrices where that is smaller ---
#
# FedKD sends U, S and V in float32. Here U S and V travel in float16 with one scale: its rounding, 2^-11 of an entry,
# is far below what a truncation to 95 % of the squares leaves out, and halves the bytes. Arrays that are no matrix,
# and matrices for which the factors would be no smaller, travel whole, in float16 with a scale.


def _to_factors(array: NDArray[np.float32], energy: float) -> Parts:
    factors = _factor(array, energy) if array.ndim == 2 and array.size else None
    if factors is None:
        values, scale = _normalised(array)
        return {"values": _half(values), "scale": scale}
    return factors


def _factor(matrix: NDArray[np.float32], energy: float) -> Parts | None:
    """``left`` (m, r), ``right`` (r, n) and their scale, r the least rank that keeps ``energy``; None when larger.

    V and the squared singular values are the eigenvectors and eigenvalues of A^T A, in float64, and U S = A V: several
    times faster than the SVD itself, and as exact for the large singular values that are kept. By torch, which uses
    the threads that it was given; NumPy's linear algebra would take every core from the other workers.
    """
    wide = matrix.shape[0] < matrix.shape[1]
    tall = torch.from_numpy((matrix.T if wide else matrix).astype(np.float64))
    squares, vectors = torch.linalg.eigh(tall.T @ tall)  # ascending
    kept = np.cumsum(np.maximum(squares.numpy()[::-1], 0.0))
    # with an energy of 1 the last squares are rounding errors: no rank must be missed, nor added, for them
    rank = 1 + int(np.searchsorted(kept, min(energy, 1.0 - 1e-12) * kept[-1]))  # a matrix of zeros has rank 1 here
    if rank * sum(matrix.shape) >= matrix.size:
        return None
    largest = vectors[:, -rank:].flip(1)
    weighted, scale = _normalised((tall @ largest).numpy())
    basis = largest.numpy()
    left, right = (basis, weighted.T) if wide else (weighted, basis.T)
    return {"left": _half(left), "right": _half(right), "scale": scale}


def _from_factors(parts: Mapping[str, NDArray[Any]], name: str, shape: tuple[int, ...]) -> NDArray[np.float32]:
    if f"{name}|left" not in parts:
        values = _values(parts, f"{name}|values", "<f2", shape, 1.0)
        values *= _scale(parts, f"{name}|scale", 1, _MOST)[0]
        return values
    rank = _rank(parts, name, shape)
    scale = _scale(parts, f"{name}|scale", 1, _MOST / rank)
    left = _values(parts, f"{name}|left", "<f2", (shape[0], rank), 1.0)
    right = _values(parts, f"{name}|right", "<f2", (rank, shape[1]), 1.0)
    product: NDArray[np.float32] = (torch.from_numpy(left) @ torch.from_numpy(right)).numpy()
    product *= scale[0]
    return product


def _rank(parts: Mapping[str, NDArray[Any]], name: str, shape: tuple[int, ...]) -> int:
    left = _part(parts, f"{name}|left", "<f2", None)
    rank = left.shape[1] if left.ndim == 2 else 0
    # what is not smaller than the matrix itself is not above its rank either: r (m + n) < m n makes r < min(m, n)
    if len(shape) != 2 or rank < 1 or rank * sum(shape) >= math.prod(shape):
        raise ValueError(f"{name}|left: no factor of an array of shape {tuple(shape)}")
    return rank


# --- what the kinds share ---


def _normalised(values: NDArray[Any]) -> tuple[NDArray[Any], NDArray[np.float32]]:
    """Values divided by the largest magnitude, same shape, and that magnitude as a (1,) scale."""
    scale = np.full(1, _largest(values), dtype="<f4")
    return (values / scale[0] if scale[0] > 0 else values), scale


def _half(values: NDArray[Any]) -> NDArray[Any]:
    """The nearest float16; by torch, for which NumPy's conversion takes twenty times as long on small numbers."""
    return np.asarray(torch.from_numpy(np.require(values, np.float32, ["C", "W"])).half().numpy())


def _largest(values: NDArray[Any]) -> float:
    """The largest magnitude; NaN when there is one."""
    return float(np.maximum(values.max(initial=0.0), -values.min(initial=0.0)))


def _named(parts: Mapping[str, Parts]) -> Parts:
    return {f"{name}|{part}": array for name, inner in parts.items() for part, array in inner.items()}


def _expected_keys(parts: Mapping[str, NDArray[Any]], shapes: Shapes, kind: Kind) -> set[str]:
    if kind == "topk":
        return {f"{_SPARSE}|{part}" for part in ("gaps", "values", "scale")}
    found: set[str] = set()
    for name in shapes:
        whole = ("values",) if kind in ("fp32", "fp16") else ("values", "scale")
        factored = kind == "svd" and f"{name}|left" in parts
        found.update(f"{name}|{part}" for part in (("left", "right", "scale") if factored else whole))
    return found


def _check_keys(parts: Mapping[str, NDArray[Any]], expected: set[str]) -> None:
    missing, unknown = sorted(expected - set(parts)), len(set(parts) - expected)
    if missing or unknown:
        raise ValueError(f"update: {len(missing)} parts missing ({', '.join(missing[:3])}), {unknown} unknown")


def _part(
    parts: Mapping[str, NDArray[Any]], key: str, dtype: DTypeLike, shape: tuple[int, ...] | None
) -> NDArray[Any]:  # fmt: skip
    """A part of this dtype and, where one is given, shape."""
    part, dtype = parts[key], np.dtype(dtype)
    if type(part) is not np.ndarray or part.dtype != dtype:
        raise ValueError(f"{key}: no array of {dtype.str}")
    if shape is not None and part.shape != tuple(shape):
        raise ValueError(f"{key}: not of shape {tuple(shape)}")
    return part


def _values(
    parts: Mapping[str, NDArray[Any]], key: str, dtype: str, shape: tuple[int, ...], most: float
) -> NDArray[np.float32]:
    """A part as float32, its magnitudes at most ``most``."""
    values = _part(parts, key, dtype, shape)
    if dtype == "<f2":
        values = torch.from_numpy(np.array(values)).float().numpy()
    if not _largest(values) <= most:  # also true for NaN
        raise ValueError(f"{key}: a value is not finite or too large")
    return values


def _scale(parts: Mapping[str, NDArray[Any]], key: str, count: int, most: float) -> NDArray[np.float32]:
    scale = _values(parts, key, "<f4", (count,), most)
    if float(scale.min(initial=0.0)) < 0:
        raise ValueError(f"{key}: a scale is negative")
    return scale
