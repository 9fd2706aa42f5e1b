"""What a compressed update leaves out arrives later, and a residual on disk is the right one or none."""

import json
import multiprocessing
import os
import signal

import numpy as np
import pytest
from safetensors.numpy import save_file

from clients.error_feedback import ErrorFeedback, MissingFeedback, compress_with_feedback
from common.compression import Wire, decompress

SHAPES = {"bias": (6,), "weight": (12, 8)}
KINDS = ("fp32", "fp16", "int8", "topk", "svd")


def draw(rng, scale=1e-3):
    return {name: (rng.standard_normal(shape) * scale).astype(np.float32) for name, shape in SHAPES.items()}


def zeros():
    return {name: np.zeros(shape, np.float32) for name, shape in SHAPES.items()}


def same(first, second):
    return list(first) == list(second) and all(first[name].tobytes() == second[name].tobytes() for name in first)


def files(folder, client=3):
    return sorted(path.name for path in (folder / str(client)).iterdir())


def rounds_of(folder, client=3):
    return [int(name[6:11]) for name in files(folder, client)]


# --- the rule ---


@pytest.mark.parametrize("kind", KINDS)
def test_what_was_sent_and_the_last_residual_are_the_sum_of_the_updates(kind):
    wire = Wire(kind, 0.1, 0.6)
    rng = np.random.default_rng(0)
    residual, sent, given = zeros(), zeros(), zeros()
    for _ in range(40):
        update = draw(rng)
        parts, residual = compress_with_feedback(update, residual, wire, rng)
        arrived = decompress(parts, SHAPES, wire)
        for name in SHAPES:
            sent[name] = sent[name] + arrived[name].astype(np.float64)
            given[name] = given[name] + update[name].astype(np.float64)
    for name in SHAPES:
        # float32 rounds the sum and the difference of each round once: 80 times half a unit of about 2^-7 at most
        assert np.abs(sent[name] + residual[name] - given[name]).max() < 80 * 2**-24 * 2**-7
        assert sent[name].any()


def test_a_direction_that_topk_leaves_out_arrives_in_time():
    """The small entry of a constant update is sent once its residual has grown beyond the large one."""
    wire = Wire("topk", 0.5, 1.0)
    update = {"a": np.array([1.0, 0.3], np.float32)}
    residual, arrived = {"a": np.zeros(2, np.float32)}, []
    for _ in range(8):
        parts, residual = compress_with_feedback(update, residual, wire, np.random.default_rng(0))
        arrived.append(decompress(parts, {"a": (2,)}, wire)["a"])
    # what waits: 0.3, 0.6, 0.9, then 1.2 beats 1.0 and goes; the 1.0 that waited goes with the next
    assert [round(float(row[1]), 3) for row in arrived] == [0, 0, 0, 1.2, 0, 0, 0, 1.2]
    assert [round(float(row[0]), 3) for row in arrived] == [1, 1, 1, 0, 2, 1, 1, 0]


def test_fp32_leaves_nothing_and_arguments_stay_as_they_are():
    update, residual = draw(np.random.default_rng(0)), draw(np.random.default_rng(1))
    copies = {name: array.copy() for name, array in update.items()}
    for kind in KINDS:
        _, left = compress_with_feedback(update, residual, Wire(kind, 0.1, 0.5), np.random.default_rng(0))
        assert any(array.any() for array in left.values()) is (kind != "fp32")
    assert same(update, copies)
    assert same(residual, draw(np.random.default_rng(1)))


def test_a_residual_of_other_arrays_is_refused():
    update = draw(np.random.default_rng(0))
    for wrong in ({}, {**zeros(), "bias": np.zeros(1, np.float32)}, {**zeros(), "more": np.zeros(1, np.float32)}):
        with pytest.raises(ValueError, match="names and shapes"):
            compress_with_feedback(update, wrong, Wire("int8", 0.1, 0.5), np.random.default_rng(0))


# --- the files ---


def test_a_residual_comes_back_bit_for_bit_and_base_0_is_zeros(tmp_path):
    store = ErrorFeedback(tmp_path / "run", keep=2)
    assert same(store.load(3, 0, SHAPES), zeros())
    first, second = draw(np.random.default_rng(0)), draw(np.random.default_rng(1))
    store.save(3, 1, 0, first)
    store.save(4, 1, 0, second)
    store.save(3, 5, 1, second)
    assert same(store.load(3, 1, SHAPES), first)
    assert same(store.load(4, 1, SHAPES), second)
    assert same(store.load(3, 5, dict(reversed(SHAPES.items()))), dict(reversed(second.items())))
    assert same(store.load(3, 0, SHAPES), zeros())
    assert files(tmp_path / "run") == ["round-00001.safetensors", "round-00005.safetensors"]
    assert (tmp_path / "run").stat().st_mode & 0o077 == 0


def test_a_round_that_is_trained_again_replaces_its_residual(tmp_path):
    store = ErrorFeedback(tmp_path, keep=2)
    store.save(3, 5, 0, zeros())
    again = draw(np.random.default_rng(0))
    store.save(3, 5, 0, again)
    assert same(store.load(3, 5, SHAPES), again)


def test_arrays_that_share_memory_or_are_read_only_are_saved(tmp_path):
    flat = np.arange(102, dtype=np.float32)
    flat.flags.writeable = False
    residual = {"bias": flat[:6], "weight": flat[6:].reshape(8, 12).T}
    ErrorFeedback(tmp_path, keep=1).save(3, 1, 0, residual)
    found = ErrorFeedback(tmp_path, keep=1).load(3, 1, SHAPES)
    assert all(found[name].tolist() == residual[name].tolist() for name in SHAPES)


@pytest.mark.parametrize(
    ("keep", "base", "left"),
    [
        (2, 0, [1, 2, 3, 7, 9, 10]),  # nothing was taken yet, nothing is older
        (2, 7, [2, 3, 7, 9, 10]),
        (1, 9, [7, 9, 10]),
        (0, 9, [9, 10]),
        (2, 8, [3, 7, 9, 10]),  # a base whose file is gone
        (9, 9, [1, 2, 3, 7, 9, 10]),
    ],
)
def test_the_base_and_what_is_newer_stay_and_of_the_older_the_newest(tmp_path, keep, base, left):
    store = ErrorFeedback(tmp_path, keep=100)
    for number in (1, 2, 3, 7, 9):
        store.save(3, number, 0, zeros())
        store.save(4, number, 0, zeros())
    ErrorFeedback(tmp_path, keep).save(3, 10, base, zeros())
    assert rounds_of(tmp_path) == left
    assert rounds_of(tmp_path, 4) == [1, 2, 3, 7, 9]  # another client's


def test_rounds_beyond_five_digits_are_older_and_newer_by_number(tmp_path):
    store = ErrorFeedback(tmp_path, keep=1)
    for number in (99_998, 99_999, 100_000):
        store.save(3, number, 0, zeros())
    store.save(3, 100_001, 100_000, zeros())
    assert files(tmp_path) == [f"round-{number}.safetensors" for number in (100000, 100001, 99999)]


def test_files_of_others_are_left_alone_and_drafts_of_killed_writers_are_not(tmp_path):
    store = ErrorFeedback(tmp_path, keep=0)
    store.save(3, 1, 0, zeros())
    names = ("notes.txt", "round-00001.safetensors.bak", ".round-00004.safetensors.abc", ".round-00002.safetensors.x_y")
    for name in names:
        (tmp_path / "3" / name).write_bytes(b"")
    store.save(3, 4, 3, zeros())
    # the draft of round 4 could be another process that is writing it now
    assert files(tmp_path) == sorted([*names[:3], "round-00004.safetensors"])


@pytest.mark.parametrize("base", [5, 6])
def test_a_residual_before_its_base_is_refused(tmp_path, base):
    with pytest.raises(ValueError, match="round 5"):
        ErrorFeedback(tmp_path, keep=1).save(3, 5, base, zeros())
    assert not list(tmp_path.iterdir())


def test_a_missing_file_is_an_error_with_its_round(tmp_path):
    with pytest.raises(MissingFeedback, match=r"^error feedback of round 5 is missing$"):
        ErrorFeedback(tmp_path, keep=1).load(3, 5, SHAPES)


def test_no_flipped_bit_and_no_cut_goes_unseen(tmp_path):
    store = ErrorFeedback(tmp_path, keep=1)
    residual = draw(np.random.default_rng(0))
    store.save(3, 5, 0, residual)
    path = tmp_path / "3" / "round-00005.safetensors"
    whole = path.read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    assert len(whole) - header == 4 * (6 + 12 * 8)
    for place in range(len(whole)):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << place % 8
        path.write_bytes(damaged)
        try:
            found = store.load(3, 5, SHAPES)
        except MissingFeedback as error:
            assert str(error).startswith("error feedback of round 5 is ")
        else:  # blanks that fill the header up say nothing
            assert place < header
            assert same(found, residual)
    for length in (0, 1, 8, header - 1, header, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(MissingFeedback, match="round 5 is damaged"):
            store.load(3, 5, SHAPES)
    path.write_bytes(whole)
    assert same(store.load(3, 5, SHAPES), residual)


def test_another_clients_rounds_or_students_file_is_refused(tmp_path):
    store = ErrorFeedback(tmp_path, keep=9)
    store.save(3, 5, 0, zeros())
    data = (tmp_path / "3" / "round-00005.safetensors").read_bytes()
    for client, number in ((3, 6), (4, 5)):
        path = tmp_path / str(client) / f"round-{number:05d}.safetensors"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(data)
        with pytest.raises(MissingFeedback, match=f"round {number} is damaged"):
            store.load(client, number, SHAPES)
    for shapes in ({"bias": (6,)}, {**SHAPES, "weight": (8, 12)}, {**SHAPES, "more": (1,)}):
        with pytest.raises(MissingFeedback, match="round 5 is of another student"):
            store.load(3, 5, shapes)
    save_file(zeros(), tmp_path / "3" / "round-00007.safetensors")  # without a hash
    with pytest.raises(MissingFeedback, match="round 7 is damaged"):
        store.load(3, 7, SHAPES)


def test_a_file_says_whose_it_is_and_is_safetensors(tmp_path):
    ErrorFeedback(tmp_path, keep=1).save(3, 5, 2, zeros())
    data = (tmp_path / "3" / "round-00005.safetensors").read_bytes()
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    assert header["bias"] == {"dtype": "F32", "shape": [6], "data_offsets": [0, 24]}
    assert header["__metadata__"]["residual"].startswith("client 3, round 5, sha256 ")
    assert len(header["__metadata__"]) == 1  # safetensors writes several in any order: equal files would differ


def save_for_ever(folder, started):
    store = ErrorFeedback(folder, keep=1)
    residual = draw(np.random.default_rng(0))
    for number in range(1, 100_000):
        store.save(3, number, max(number - 1, 0), residual)
        if number == 3:
            started.set()


def test_a_process_killed_while_it_writes_leaves_whole_files(tmp_path):
    context = multiprocessing.get_context("spawn")
    started = context.Event()
    writer = context.Process(target=save_for_ever, args=(tmp_path, started))
    writer.start()
    assert started.wait(60)
    os.kill(writer.pid, signal.SIGKILL)
    writer.join()
    store = ErrorFeedback(tmp_path, keep=1)
    left = [int(name[6:11]) for name in files(tmp_path) if name.startswith("round")]
    assert len(left) >= 2
    for number in left:
        assert same(store.load(3, number, SHAPES), draw(np.random.default_rng(0)))
    store.save(3, max(left) + 2, max(left), zeros())  # by then the draft of the round after them is an old one
    assert all(name.startswith("round") for name in files(tmp_path))
