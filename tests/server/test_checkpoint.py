"""A checkpoint comes back as it was written, or is known to be damaged and the one before it is used."""

import errno
import json
import math
import multiprocessing
import os
import resource
import signal
import stat
import subprocess
from pathlib import Path

import numpy as np
import pytest

from common.errors import InputError
from server.checkpoint import (
    Checkpoint,
    Damaged,
    checkpoint_folder,
    checkpoints,
    load_checkpoint,
    load_latest,
    save_checkpoint,
)

PROCESSES = multiprocessing.get_context("fork")
SHAPES = {"layer.weight": (3, 4), "layer.bias": (4,), "scale": ()}
FILES = ("student.safetensors", "optimizer.safetensors", "state.json", "SHA256SUMS")


def make(number, seed=0, empty=False):
    """A round's checkpoint; its state has what JSON finds hard: NaN, infinity, pairs, letters."""
    rng = np.random.default_rng([seed, number])
    weights = {name: np.asarray(rng.normal(size=shape), dtype=np.float32) for name, shape in SHAPES.items()}
    moments = {f"first/{name}": np.asarray(rng.normal(size=shape)) for name, shape in SHAPES.items()}
    moments["second/scale"] = np.asarray(5e-324)
    state = {
        "run": "0123456789abcdef",
        "history": {"rounds": number, "losses": {"loss": math.nan}, "student": {"pearson": math.nan, "f1": 0.1}},
        "feedback": [[3, number], [7, 1]],
        "journals": {"metrics.jsonl": 2**40},
        "teacher": "é \u2028",
        "odd": [math.inf, -math.inf, 1e-320, None],
    }
    return Checkpoint(number, weights, {} if empty else moments, state)


def same(found, expected):
    """Equal bit by bit, and in what the state says."""
    for ours, theirs in ((found.weights, expected.weights), (found.optimizer, expected.optimizer)):
        assert set(ours) == set(theirs)
        for name, array in theirs.items():
            assert (ours[name].dtype, ours[name].shape) == (array.dtype, array.shape)
            assert ours[name].tobytes() == array.tobytes()
    assert found.round == expected.round
    states = [{"round": expected.round, **expected.state}, found.state]
    assert len({json.dumps(state, sort_keys=True) for state in states}) == 1  # as text, where NaN is equal to NaN


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def latest(folder):
    """The last whole checkpoint, and what the user is told."""
    heard = []
    return load_latest(folder, SHAPES, heard.append), heard


# --- there and back -----------------------------------------------------------------------------


@pytest.mark.parametrize("empty", [True, False], ids=["no memory", "memory"])
def test_a_checkpoint_comes_back_as_it_was_written(tmp_path, empty):
    written = make(3, empty=empty)
    save_checkpoint(tmp_path / "made" / "checkpoints", written, keep=2)
    found, heard = latest(tmp_path / "made" / "checkpoints")
    same(found, written)
    assert math.isnan(found.state["history"]["losses"]["loss"])
    assert found.state["history"]["student"]["f1"] == 0.1
    assert dict(found.state["feedback"]) == {3: 3, 7: 1}
    assert heard == []


def test_without_a_checkpoint_there_is_none(tmp_path):
    assert latest(tmp_path) == (None, [])
    assert latest(tmp_path / "missing") == (None, [])


def test_the_last_round_is_the_latest_by_number(tmp_path):
    for number in (9, 10, 99_999, 100_000):
        save_checkpoint(tmp_path, make(number), keep=9)
    same(latest(tmp_path)[0], make(100_000))


def test_the_last_checkpoints_are_kept_and_hold_the_weights(tmp_path):
    for number in (1, 2, 9, 10, 99_999, 100_000):
        save_checkpoint(tmp_path, make(number), keep=2)
    assert names(tmp_path) == ["round-100000", "round-99999"]
    for number in (99_999, 100_000):
        same(load_checkpoint(checkpoint_folder(tmp_path, number), SHAPES), make(number))


@pytest.mark.parametrize("keep", [1, 2, 5])
def test_as_many_are_kept_as_are_asked_for(tmp_path, keep):
    for number in range(8):
        save_checkpoint(tmp_path, make(number), keep)
        assert names(tmp_path) == [f"round-{kept:05d}" for kept in range(max(number + 1 - keep, 0), number + 1)]


def test_sha256sum_finds_a_checkpoint_whole_and_a_changed_one_not(tmp_path):
    save_checkpoint(tmp_path, make(1), keep=2)
    folder = checkpoint_folder(tmp_path, 1)
    command = ["sha256sum", "-c", "--strict", "SHA256SUMS"]
    whole = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert whole.returncode == 0
    assert sorted(whole.stdout.split()) == sorted([*(f"{name}:" for name in FILES[:3]), "OK", "OK", "OK"])
    (folder / "state.json").write_bytes((folder / "state.json").read_bytes() + b" ")
    assert subprocess.run(command, cwd=folder, capture_output=True, check=False).returncode != 0


def test_a_checkpoint_can_be_read_by_everyone_who_can_read_its_folder(tmp_path):
    save_checkpoint(tmp_path, make(1), keep=2)
    assert stat.S_IMODE(checkpoint_folder(tmp_path, 1).stat().st_mode) == 0o755
    assert names(checkpoint_folder(tmp_path, 1)) == sorted(FILES)


# --- damage -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """Checkpoints of rounds 4 and 5, and the bytes of the second."""
    folder = tmp_path_factory.mktemp("two")
    for number in (4, 5):
        save_checkpoint(folder, make(number), keep=2)
    path = checkpoint_folder(folder, 5)
    whole = {name: (path / name).read_bytes() for name in FILES}
    yield folder, path, whole


def falls_back(folder, path, what=""):
    """The checkpoint before is used, and the user hears which one is damaged and how."""
    with pytest.raises(Damaged):
        load_checkpoint(path, SHAPES)
    found, heard = latest(folder)
    same(found, make(4))
    assert len(heard) == 1
    assert heard[0].startswith(f"{path}: damaged and left out: ")
    assert what in heard[0]


@pytest.mark.parametrize("name", FILES)
def test_a_flipped_byte_anywhere_is_noticed(two, name):
    folder, path, whole = two
    data = whole[name]
    rng = np.random.default_rng(0)
    places = {0, 1, 7, 8, len(data) // 2, len(data) - 2, len(data) - 1, *rng.integers(0, len(data), 40).tolist()}
    if name == "SHA256SUMS":
        places = range(len(data))
    try:
        for place in sorted(places):
            for mask in (0x20, 0x80, 0xFF):
                (path / name).write_bytes(data[:place] + bytes([data[place] ^ mask]) + data[place + 1 :])
                with pytest.raises(Damaged):
                    load_checkpoint(path, SHAPES)
        falls_back(folder, path, name if name != "SHA256SUMS" else "")
    finally:
        (path / name).write_bytes(data)
    same(latest(folder)[0], make(5))


@pytest.mark.parametrize("name", FILES)
def test_a_file_cut_short_or_longer_is_noticed(two, name):
    folder, path, whole = two
    data = whole[name]
    try:
        for changed in (b"", data[:1], data[: len(data) // 2], data[:-1], data + b"\0", data + data):
            if name == "SHA256SUMS" and changed in (data[:-1], data + data):
                continue  # the last line's end says nothing, and a line twice says the same twice
            (path / name).write_bytes(changed)
            falls_back(folder, path)
    finally:
        (path / name).write_bytes(data)


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_noticed(two, name):
    folder, path, whole = two
    try:
        (path / name).unlink()
        falls_back(folder, path, f"{name}: No such file or directory")
        (path / name).mkdir()
        falls_back(folder, path, name)
        (path / name).rmdir()
    finally:
        (path / name).write_bytes(whole[name])


def test_two_files_that_have_changed_places_are_noticed(two):
    folder, path, whole = two
    try:
        (path / "student.safetensors").write_bytes(whole["optimizer.safetensors"])
        (path / "optimizer.safetensors").write_bytes(whole["student.safetensors"])
        falls_back(folder, path, "student.safetensors is not what was written")
    finally:
        for name in FILES[:2]:
            (path / name).write_bytes(whole[name])


def test_a_whole_checkpoint_of_another_student_is_refused_and_not_called_damaged(tmp_path):
    """A run that took it for damaged would begin anew, and forget all its rounds."""
    save_checkpoint(tmp_path, make(1), keep=2)
    for shapes in ({**SHAPES, "scale": (1,)}, {**SHAPES, "more": ()}, {"scale": ()}):
        with pytest.raises(InputError, match=r"round-00001: whole, and of a student of another shape"):
            load_latest(tmp_path, shapes, pytest.fail)


def test_when_all_are_damaged_each_is_named_and_none_is_used(two):
    folder, _, _ = two
    saved = {path: (path / "state.json").read_bytes() for path in checkpoints(folder)}
    try:
        for path in saved:
            (path / "state.json").write_bytes(b"{}")
        found, heard = latest(folder)
        assert found is None
        assert [text.split(": ", 1)[0] for text in heard] == [str(path) for path in sorted(saved, reverse=True)]
    finally:
        for path, data in saved.items():
            (path / "state.json").write_bytes(data)


def test_a_damaged_round_is_written_again_when_it_is_done_again(tmp_path):
    for number in (4, 5):
        save_checkpoint(tmp_path, make(number), keep=2)
    (checkpoint_folder(tmp_path, 5) / "state.json").write_bytes(b"{}")
    save_checkpoint(tmp_path, make(5, seed=1), keep=2)
    found, heard = latest(tmp_path)
    same(found, make(5, seed=1))
    assert (heard, names(tmp_path)) == ([], ["round-00004", "round-00005"])


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_a_run_that_begins_anew_keeps_its_new_checkpoints_not_damaged_later_ones(tmp_path, keep):
    for number in (4, 5, 6):
        save_checkpoint(tmp_path, make(number), keep)
    for path in checkpoints(tmp_path):
        (path / "state.json").write_bytes(b"{}")
    for number in range(3):
        save_checkpoint(tmp_path, make(number, seed=1), keep)
        found, _ = latest(tmp_path)
        same(found, make(number, seed=1))


def test_what_else_lies_among_the_checkpoints_is_left_alone(tmp_path):
    (tmp_path / "round-00007.bak").mkdir()
    (tmp_path / "round-best.txt").write_text("mine")
    (tmp_path / "notes").write_text("mine")
    for number in (1, 2, 3):
        save_checkpoint(tmp_path, make(number), keep=1)
    same(latest(tmp_path)[0], make(3))
    assert names(tmp_path) == ["notes", "round-00003", "round-00007.bak", "round-best.txt"]


# --- writing that ends early --------------------------------------------------------------------


def die_at(step, folder):
    """Write round 2 and be killed before one of its steps: a file, the sums, the new name."""
    done = []
    real = {"fsync": os.fsync, "rename": Path.rename}

    def count_or_die(kind):
        def call(*arguments):
            done.append(kind)
            if len(done) == step:
                os.kill(os.getpid(), signal.SIGKILL)
            return real[kind](*arguments)

        return call

    os.fsync = count_or_die("fsync")
    Path.rename = count_or_die("rename")
    save_checkpoint(folder, make(2), keep=2)
    os._exit(len(done))


@pytest.mark.parametrize("step", range(1, 9))
def test_a_kill_at_any_step_leaves_the_old_checkpoint_or_the_new_one_whole(tmp_path, step):
    save_checkpoint(tmp_path, make(1), keep=2)
    writer = PROCESSES.Process(target=die_at, args=(step, tmp_path))
    writer.start()
    writer.join(60)
    assert writer.exitcode == (-signal.SIGKILL if step < 8 else 7)
    renamed = step > 6  # after four files, the draft's folder and the rename
    found, heard = latest(tmp_path)
    same(found, make(2 if renamed else 1))
    assert heard == []
    drafts = [name for name in names(tmp_path) if name.startswith(".")]
    assert len(drafts) == (0 if renamed else 1)
    save_checkpoint(tmp_path, make(3), keep=3)
    assert names(tmp_path) == ["round-00001", *(["round-00002"] if renamed else []), "round-00003"]


@pytest.mark.parametrize("step", range(1, 6))
def test_a_full_disk_at_any_step_leaves_the_old_checkpoint_and_no_draft(tmp_path, monkeypatch, step):
    save_checkpoint(tmp_path, make(1), keep=2)
    done, real = [], os.fsync

    def full(handle):
        done.append(handle)
        if len(done) == step:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(handle)

    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left"):
        patch.setattr(os, "fsync", full)
        save_checkpoint(tmp_path, make(2), keep=1)
    assert names(tmp_path) == ["round-00001"]
    found, heard = latest(tmp_path)
    same(found, make(1))
    assert heard == []
    save_checkpoint(tmp_path, make(2), keep=1)
    assert names(tmp_path) == ["round-00002"]


def write_with_little_room(folder, limit, told):
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    try:
        save_checkpoint(folder, make(2), keep=1)
    except OSError as error:
        told.put(error.errno)


@pytest.mark.parametrize("limit", [0, 100, 400])
def test_a_file_that_may_not_grow_leaves_the_old_checkpoint_and_no_draft(tmp_path, limit):
    """The system itself refuses to write on: half a file is there when it does."""
    save_checkpoint(tmp_path, make(1), keep=2)
    told = PROCESSES.SimpleQueue()
    writer = PROCESSES.Process(target=write_with_little_room, args=(tmp_path, limit, told))
    writer.start()
    writer.join(60)
    assert writer.exitcode == 0
    assert not told.empty()
    assert told.get() == errno.EFBIG
    assert names(tmp_path) == ["round-00001"]
    same(latest(tmp_path)[0], make(1))


def test_a_folder_that_cannot_be_written_is_an_error_and_stays_as_it_is(tmp_path):
    (tmp_path / "checkpoints").write_text("in the way")
    with pytest.raises(OSError):
        save_checkpoint(tmp_path / "checkpoints", make(1), keep=2)
    assert (tmp_path / "checkpoints").read_text() == "in the way"
