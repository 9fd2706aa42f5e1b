"""What each wire kind keeps of an update, how few bytes it takes, and that nothing hostile passes."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.compression import Wire, compress, decompress, entry_bytes, size, wire_for
from common.fixed_point import NotFinite
from common.keys import ServerKeys

KINDS = ("fp32", "fp16", "int8", "topk", "svd")
MINILM = {"attention": (384, 384), "feed-forward": (1536, 384), "bias": (384,)}


def wire(kind, topk=0.02, energy=0.9):
    return Wire(kind, topk, energy)


def draw(shapes, seed=0, scale=1e-3):
    rng = np.random.default_rng(seed)
    return {name: (rng.standard_normal(shape) * scale).astype(np.float32) for name, shape in shapes.items()}


def shapes_of(update):
    return {name: array.shape for name, array in update.items()}


def there_and_back(update, chosen, seed=0):
    parts = compress(update, chosen, np.random.default_rng(seed))
    return decompress(parts, shapes_of(update), chosen)


def flat(update):
    return np.concatenate([update[name].reshape(-1) for name in sorted(update)] or [np.zeros(0, np.float32)])


def low_rank(m, n, rank, noise=0.0, seed=0):
    rng = np.random.default_rng(seed)
    product = rng.standard_normal((m, rank)) @ rng.standard_normal((rank, n))
    return (product + noise * rng.standard_normal((m, n))).astype(np.float32)


# --- all kinds ---


@pytest.mark.parametrize("kind", KINDS)
def test_names_shapes_and_dtype_come_back_in_any_order(kind):
    update = draw({"b": (5, 7), "a": (3,), "c": (2, 3, 4), "one": (1,), "scalar": (), "nothing": (0, 3), "empty": (0,)})
    parts = compress(update, wire(kind), np.random.default_rng(0))
    found = decompress(dict(reversed(parts.items())), dict(reversed(shapes_of(update).items())), wire(kind))
    assert shapes_of(found) == shapes_of(update)
    assert {array.dtype for array in found.values()} == {np.dtype(np.float32)}
    assert all(type(part) is np.ndarray and part.dtype.str[0] in "<|" for part in parts.values())


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_generator_gives_the_same_bits_whatever_the_order_of_arrays(kind):
    update = draw(MINILM)
    first = compress(update, wire(kind), np.random.default_rng(3))
    second = compress(dict(reversed(update.items())), wire(kind), np.random.default_rng(3))
    assert {key: part.tobytes() for key, part in first.items()} == {key: part.tobytes() for key, part in second.items()}


@pytest.mark.parametrize("kind", KINDS)
def test_an_update_of_zeros_and_one_of_nothing_come_back(kind):
    for shapes in ({"weight": (8, 6), "bias": (6,)}, {"empty": (0, 3)}, {}):
        zeros = {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}
        assert flat(there_and_back(zeros, wire(kind))).tolist() == flat(zeros).tolist()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.filterwarnings("error")
def test_the_smallest_numbers_there_are_harm_nothing(kind):
    update = {
        "weight": np.full((6, 4), 1e-45, np.float32),
        "bias": np.array([1e-40, -3e-39], np.float32),
        "row": np.array([[1e-37, 0.0, -1e-38], [0.0, 1e-36, -1e-38]], np.float32),  # 1e-37 / 127 is subnormal
    }
    assert np.abs(flat(there_and_back(update, wire(kind))) - flat(update)).max() <= 1.001e-36


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 65536.0, -1e30])
def test_what_cannot_be_sent_is_refused_without_its_value(kind, bad):
    update = draw({"weight": (4, 4)})
    update["weight"][2, 1] = bad
    with pytest.raises(NotFinite) as caught:
        compress(update, wire(kind), np.random.default_rng(0))
    assert not any(digit in str(caught.value) for digit in "0123456789")


@pytest.mark.parametrize("kind", KINDS)
def test_an_update_that_is_read_only_or_not_contiguous_is_as_good(kind):
    base = draw({"weight": (12, 10)})["weight"]
    base.flags.writeable = False
    expected = there_and_back({"weight": base.T.copy()}, wire(kind))
    assert there_and_back({"weight": base.T}, wire(kind))["weight"].tobytes() == expected["weight"].tobytes()
    parts = compress({"weight": base}, wire(kind), np.random.default_rng(0))
    for part in parts.values():
        part.flags.writeable = False  # as `numpy.frombuffer` gives them
    decompress(parts, {"weight": base.shape}, wire(kind))


@pytest.mark.parametrize(("kind", "ratio"), [("fp32", 1.0), ("fp16", 0.5), ("int8", 0.27), ("topk", 0.0165)])
def test_bytes_of_an_update_of_minilm(kind, ratio):
    update = draw(MINILM)
    assert size(compress(update, wire(kind), np.random.default_rng(0))) <= ratio * size(update)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("share", [0.02, 1 / 255, 0.001])
def test_no_update_takes_more_bytes_than_are_told(kind, share):
    update = draw({"a": (300, 200), "b": (70, 1000)})
    if kind == "topk":
        update["b"][-10:] += 1.0  # the largest stand at the end: before them all is zeros that are skipped
    scales = {"fp32": 0, "fp16": 0, "int8": 300 + 70, "topk": 1, "svd": 2}[kind]  # a row's, the update's, an array's
    sent = size(compress(update, wire(kind, topk=share), np.random.default_rng(0))) - 4 * scales
    told = entry_bytes(kind, share) * 130_000
    assert 0.9 * told <= sent <= told


def test_a_low_rank_update_takes_few_bytes_and_a_full_rank_one_no_more_than_float16():
    thin = {"a": low_rank(384, 384, 16, 0.1), "b": low_rank(1536, 384, 16, 0.1), "bias": np.ones(384, np.float32)}
    assert size(compress(thin, wire("svd", energy=0.95), np.random.default_rng(0))) < 0.05 * size(thin)
    full = draw(MINILM)
    assert size(compress(full, wire("svd", energy=0.999), np.random.default_rng(0))) <= 0.5 * size(full) + 4 * len(full)


# --- fp32, fp16 ---


def test_fp32_is_the_update_and_fp16_the_nearest_half():
    update = {"a": np.array([1.0, 1 / 3, -2.5e-7, 65504.0, -1e-9, 1 + 2**-11, 1 + 3 * 2**-11], np.float32)}
    assert there_and_back(update, wire("fp32"))["a"].tobytes() == update["a"].tobytes()
    assert there_and_back(update, wire("fp16"))["a"].tolist() == update["a"].astype(np.float16).tolist()
    many = draw({"a": (20_000,)}, scale=1e-5)  # half of them subnormal in float16
    assert there_and_back(many, wire("fp16"))["a"].tolist() == many["a"].astype(np.float16).tolist()


# --- int8 ---


def test_int8_is_unbiased():
    """A draw lies within a step of the truth, so its variance is at most step^2 / 4 and the mean of n draws
    within 5 step / (2 sqrt(n)) but for 1 in 2 million; the slack of 2^-16 steps is float32's rounding."""
    update = {"weight": draw({"weight": (6, 9)}, seed=1)["weight"] * np.geomspace(1e-6, 1e3, 6)[:, None].astype("f4")}
    draws = 4000
    rng = np.random.default_rng(0)
    parts = [compress(update, wire("int8"), rng) for _ in range(draws)]
    found = np.mean([decompress(p, shapes_of(update), wire("int8"))["weight"] for p in parts], axis=0, dtype=np.float64)
    step = np.abs(update["weight"]).max(axis=1, keepdims=True) / 127
    assert (np.abs(found - update["weight"]) <= step * (5 / (2 * np.sqrt(draws)) + 2**-16)).all()
    once = decompress(parts[0], shapes_of(update), wire("int8"))["weight"]
    assert (np.abs(once - update["weight"]) <= step * (1 + 2**-16)).all()


def test_int8_has_a_scale_for_each_row_and_one_for_a_vector():
    update = {
        "weight": np.array([[127.0, -64.0, 0.0], [0.0, 0.0, 0.0], [1e-6, -1e-6, 1e-6]], np.float32),
        "bias": np.array([0.0, -254.0], np.float32),
    }
    parts = compress(update, wire("int8"), np.random.default_rng(0))
    assert parts["weight|values"].tolist() == [[127, -64, 0], [0, 0, 0], [127, -127, 127]]
    assert parts["weight|scale"].tolist() == [1.0, 0.0, np.float32(1e-6) / np.float32(127)]
    assert (parts["bias|values"].tolist(), parts["bias|scale"].tolist()) == ([0, -127], [2.0])


def test_no_draw_carries_a_rows_largest_entry_over_the_end_of_int8():
    # 127 + r is 128 in float32 for r above 1 - 2^-18: about 8 of so many draws
    row = np.full(2_000_000, 127.0, np.float32)
    assert (there_and_back({"a": row}, wire("int8"))["a"] == 127.0).all()
    assert np.abs(there_and_back({"a": -row}, wire("int8"))["a"] + 127.0).max() <= 1.0


# --- topk ---


@settings(max_examples=60)
@given(
    st.lists(st.sampled_from([0.0, 0.5, -0.5, 1.0, -1.0, 2.0, 1e-3]), min_size=1, max_size=60),
    st.sampled_from([0.001, 0.02, 0.3, 1.0]),
    st.integers(0, 60),
)
def test_topk_is_what_sorting_by_magnitude_then_place_chooses(values, share, cut):
    values = np.array(values, np.float32)
    update = {"a": values[:cut], "b": values[cut:]}
    count = min(len(values), max(1, round(share * len(values))))
    chosen = sorted(range(len(values)), key=lambda place: (-abs(values[place]), place))[:count]
    expected = [float(values[place]) if place in chosen else 0.0 for place in range(len(values))]
    assert flat(there_and_back(update, wire("topk", topk=share))) == pytest.approx(expected, rel=2**-11)


@pytest.mark.parametrize("share", [0.02, 0.0005])
def test_places_survive_gaps_of_every_length(share):
    entries = 400_000
    rng = np.random.default_rng(0)
    count = round(share * entries)
    clustered = np.concatenate(
        [rng.choice(10_000, count - 5, replace=False), [10_254, 10_509, 10_765, 11_276, entries - 1]]
    )
    values = np.zeros(entries, np.float32)
    values[clustered] = rng.choice([-1.0, 1.0], count)
    update = {"a": values[:150_000].reshape(300, 500), "b": values[150_000:]}
    parts = compress(update, wire("topk", topk=share), np.random.default_rng(0))
    assert flat(decompress(parts, shapes_of(update), wire("topk", topk=share))).tobytes() == values.tobytes()
    assert parts["update|gaps"].dtype == (np.uint8 if share == 0.02 else np.uint16)
    assert parts["update|gaps"].size <= count + entries // (255 if share == 0.02 else 65535)


def test_among_equals_the_first_are_kept():
    update = {"b": np.ones(50, np.float32), "a": -np.ones((5, 10), np.float32)}
    found = there_and_back(update, wire("topk", topk=0.1))
    assert found["a"].reshape(-1).tolist() == [-1.0] * 10 + [0.0] * 40
    assert not found["b"].any()


def test_one_choice_over_all_arrays_leaves_less_out_than_one_for_each():
    update = {"a": draw({"a": (100, 100)})["a"], "b": draw({"b": (100, 100)}, 1)["b"] * np.float32(0.1)}
    together = flat(there_and_back(update, wire("topk"))) - flat(update)
    apart = [there_and_back({name: array}, wire("topk"))[name] - array for name, array in update.items()]
    assert np.square(together).sum() < sum(np.square(part).sum() for part in apart)


# --- svd ---


@pytest.mark.parametrize("shape", [(60, 40), (40, 60), (50, 50), (200, 8)])
@pytest.mark.parametrize("energy", [0.5, 0.8, 0.95])
def test_the_rank_is_the_least_that_keeps_the_energy(shape, energy):
    matrix = low_rank(*shape, 4, 0.3)
    u, s, v = np.linalg.svd(matrix.astype(np.float64), full_matrices=False)
    rank = int(np.argmax(np.cumsum(s**2) >= energy * (s**2).sum())) + 1
    parts = compress({"a": matrix}, wire("svd", energy=energy), np.random.default_rng(0))
    assert parts["a|left"].shape == (shape[0], rank)
    assert parts["a|right"].shape == (rank, shape[1])
    found = decompress(parts, {"a": shape}, wire("svd", energy=energy))["a"]
    best = (u[:, :rank] * s[:rank]) @ v[:rank]
    assert np.abs(found - best).max() < 2e-3 * np.abs(best).max()
    assert np.square(found - matrix).sum() <= (1 - energy + 1e-6) * np.square(matrix).sum()


def test_a_matrix_of_low_rank_comes_back_at_energy_1():
    matrix = low_rank(64, 48, 3)
    parts = compress({"a": matrix}, wire("svd", energy=1.0), np.random.default_rng(0))
    assert parts["a|left"].shape == (64, 3)
    found = decompress(parts, {"a": matrix.shape}, wire("svd", energy=1.0))["a"]
    assert np.abs(found - matrix).max() < 2e-3 * np.abs(matrix).max()


@pytest.mark.parametrize("energy", [1e-9, 0.8, 1.0])
def test_there_is_no_rank_0(energy):
    update = {"zeros": np.zeros((9, 5), np.float32), "one": np.eye(9, 5, dtype=np.float32)}
    parts = compress(update, wire("svd", energy=energy), np.random.default_rng(0))
    assert parts["zeros|left"].shape == (9, 1)
    assert energy > 0.5 or parts["one|left"].shape == (9, 1)
    assert not decompress(parts, shapes_of(update), wire("svd", energy=energy))["zeros"].any()


def test_what_factors_would_not_make_smaller_travels_whole():
    update = {"full": draw({"a": (40, 40)})["a"], "bias": draw({"a": (40,)})["a"], "cube": draw({"a": (4, 4, 4)})["a"]}
    parts = compress(update, wire("svd", energy=0.999), np.random.default_rng(0))
    assert set(parts) == {f"{name}|{part}" for name in update for part in ("values", "scale")}
    found = decompress(parts, shapes_of(update), wire("svd"))
    assert all(np.abs(found[n] - update[n]).max() <= 2**-11 * np.abs(update[n]).max() for n in update)
    # 20 x 20 of rank 10: the factors have 10 * 40 entries, as many as the matrix
    for rank, factored in ((9, True), (10, False)):
        parts = compress({"a": low_rank(20, 20, rank)}, wire("svd", energy=1.0), np.random.default_rng(0))
        assert ("a|left" in parts) is factored


def test_the_energy_rises_from_the_first_round_to_the_last():
    keys = ServerKeys(**{"wire": "svd", "svd-energy-start": 0.8, "svd-energy-end": 0.95, "topk": 0.05})
    assert [wire_for(keys, number, 4).energy for number in (1, 2, 3, 4)] == pytest.approx([0.8, 0.85, 0.9, 0.95])
    assert wire_for(keys, 1, 1) == Wire("svd", 0.05, 0.95)
    assert wire_for(keys, 4, 4).energy == 0.95


# --- hostile parts ---

SHAPES = {"bias": (30,), "weight": (20, 30)}
GOOD = {"bias": np.linspace(-1, 1, 30, dtype=np.float32), "weight": low_rank(20, 30, 2)}


def good(kind):
    return compress(GOOD, wire(kind), np.random.default_rng(0))


def changed(part, place, value):
    part = part.copy()
    part[place] = value
    return part


def gaps(*codes):
    return np.array(codes, np.uint8)


HOSTILE = {
    "a part missing": ("int8", "weight|scale", lambda part: None),
    "a part too many": ("fp32", "other|values", lambda part: np.zeros(3, np.float32)),
    "a part of another kind": ("fp32", "weight|scale", lambda part: np.zeros(1, np.float32)),
    "factors and the matrix": ("svd", "weight|values", lambda part: np.zeros((20, 30), np.float16)),
    "no array": ("fp32", "weight|values", lambda part: part.tolist()),
    "a subclass of array": ("fp32", "weight|values", np.ma.array),
    "float64": ("fp32", "weight|values", lambda part: part.astype(np.float64)),
    "big-endian": ("fp32", "weight|values", lambda part: part.astype(">f4")),
    "objects": ("fp16", "bias|values", lambda part: part.astype(object)),
    "unsigned steps": ("int8", "bias|values", lambda part: part.astype(np.uint8)),
    "transposed": ("fp32", "weight|values", lambda part: np.ascontiguousarray(part.T)),
    "flattened": ("int8", "weight|values", lambda part: part.reshape(-1)),
    "another length": ("fp16", "bias|values", lambda part: part[:-1]),
    "NaN": ("fp32", "weight|values", lambda part: changed(part, (3, 4), np.nan)),
    "infinite": ("fp16", "weight|values", lambda part: changed(part, (3, 4), -np.inf)),
    "a step of -128": ("int8", "weight|values", lambda part: changed(part, (0, 0), -128)),
    "a negative scale": ("int8", "weight|scale", lambda part: -part),
    "a NaN scale": ("int8", "weight|scale", lambda part: changed(part, 7, np.nan)),
    "an infinite scale": ("int8", "bias|scale", lambda part: changed(part, 0, np.inf)),
    "a scale that overflows": ("int8", "bias|scale", lambda part: changed(part, 0, 3e38)),
    "scales too few": ("int8", "weight|scale", lambda part: part[:1]),
    "fewer entries than asked": ("topk", "update|values", lambda part: part[:-1]),
    "more entries than asked": ("topk", "update|values", lambda part: np.append(part, part[:1])),
    "an entry beyond the scale": ("topk", "update|values", lambda part: changed(part, 0, 1.5)),
    "an entry that is NaN": ("topk", "update|values", lambda part: changed(part, 0, np.nan)),
    "a scale that is infinite": ("topk", "update|scale", lambda part: part * np.float32(np.inf)),
    "no scale": ("topk", "update|scale", lambda part: part[:0]),
    "gaps too few": ("topk", "update|gaps", lambda part: part[:-1]),
    "gaps too many": ("topk", "update|gaps", lambda part: np.append(part, part[-1:])),
    "endless gaps": ("topk", "update|gaps", lambda part: np.full(10_000, 255, np.uint8)),
    "gaps of 16 bits": ("topk", "update|gaps", lambda part: part.astype(np.uint16)),
    "gaps as a matrix": ("topk", "update|gaps", lambda part: part.reshape(1, -1)),
    "zeros after the last entry": ("topk", "update|gaps", lambda part: gaps(*[0] * 13, 255)),
    "a place beyond the end": ("topk", "update|gaps", lambda part: gaps(*[50] * 13)),
    "a place just beyond the end": ("topk", "update|gaps", lambda part: gaps(255, 255, 108, *[0] * 12)),
    "rank 0": ("svd", "weight|left", lambda part: part[:, :0]),
    "two ranks": ("svd", "weight|right", lambda part: part[:1]),
    "a rank larger than the matrix's": ("svd", "weight|left", lambda part: np.zeros((20, 21), np.float16)),
    "a rank that saves nothing": ("svd", "weight|left", lambda part: np.zeros((20, 12), np.float16)),
    "a factor of another matrix": ("svd", "weight|left", lambda part: np.append(part, part[:1], axis=0)),
    "a flat factor": ("svd", "weight|left", lambda part: part.reshape(-1)),
    "a factor that is not finite": ("svd", "weight|right", lambda part: changed(part, (0, 0), np.inf)),
    "a factor beyond 1": ("svd", "weight|right", lambda part: changed(part, (0, 0), 60000)),
    "a product that overflows": ("svd", "weight|scale", lambda part: np.full(1, 3e38, np.float32)),
    "factors of a vector": ("svd", "bias|left", lambda part: np.zeros((30, 1), np.float16)),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_parts_are_refused_by_name(case):
    kind, key, change = HOSTILE[case]
    parts = good(kind)
    assert decompress(parts, SHAPES, wire(kind))
    parts = {**parts, key: change(parts.get(key))}
    parts = {key: part for key, part in parts.items() if part is not None}
    with pytest.raises(ValueError, match=r"^(update|bias|weight|update: \d parts missing)") as caught:
        decompress(parts, SHAPES, wire(kind))
    if key in good(kind) and key in parts:
        assert str(caught.value).startswith(key.split("|")[0])
    assert "other" not in str(caught.value)  # a name that somebody else chose is not repeated


def test_the_last_place_of_all_is_no_overflow():
    parts = {**good("topk"), "update|gaps": gaps(255, 255, 107, *[0] * 12)}
    assert decompress(parts, SHAPES, wire("topk", topk=0.02))["weight"].reshape(-1)[-13:].all()


def test_factors_of_a_vector_and_a_cube_are_refused():
    factors = {"a|left": np.zeros((8, 1), "<f2"), "a|right": np.zeros((1, 4), "<f2"), "a|scale": np.zeros(1, "<f4")}
    for shape in ((8,), (8, 2, 2), ()):
        with pytest.raises(ValueError, match=r"^a\|left: no factor"):
            decompress(factors, {"a": shape}, wire("svd"))


@pytest.mark.parametrize(
    ("rank", "fits"), [(1, True), (11, True), (12, False), (20, False), (21, False), (10**6, False)]
)
def test_factors_that_agree_on_a_rank_beyond_what_saves_bytes_are_refused(rank, fits):
    parts = {**good("svd"), "weight|left": np.zeros((20, rank), "<f2"), "weight|right": np.zeros((rank, 30), "<f2")}
    if fits:  # 11 * (20 + 30) < 20 * 30 <= 12 * (20 + 30)
        assert not decompress(parts, SHAPES, wire("svd"))["weight"].any()
    else:
        with pytest.raises(ValueError, match=r"^weight\|left: no factor"):
            decompress(parts, SHAPES, wire("svd"))


def test_endless_gaps_are_refused_for_their_length_before_they_are_added_up():
    for length in (16, 10**6):  # 13 entries of 630: at most (630 - 13) // 255 = 2 codes more
        parts = {**good("topk"), "update|gaps": gaps(*[255] * (length - 13), *[0] * 13)}
        with pytest.raises(ValueError, match=r"^update\|gaps: not one line of gaps for 13 entries of 630"):
            decompress(parts, SHAPES, wire("topk"))
