"""The teacher's outputs: the same bits cold and warm, each example computed once, safe among processes."""

import multiprocessing
import os
import signal
from multiprocessing.synchronize import Barrier
from pathlib import Path

import numpy as np
import pytest

from clients.teacher_cache import TeacherCache
from common.inference import predict
from common.models import load_teacher
from tests.conftest import FP32, make_sentences, make_tokens

PROCESSES = multiprocessing.get_context("fork")


def keys(*numbers: int) -> np.ndarray:
    return np.stack([np.frombuffer(number.to_bytes(16, "little"), dtype=np.uint8) for number in numbers])


def logits(*numbers: int) -> np.ndarray:
    """What a teacher says of these examples, here known beforehand."""
    return np.asarray([[number / 3, -number] for number in numbers], dtype=np.float32)


def fill(cache: TeacherCache, *numbers: int) -> np.ndarray:
    return cache.outputs(keys(*numbers), lambda places: logits(*np.asarray(numbers)[places]))


def untouched(places):
    pytest.fail(f"computed again: {places}")


def test_cold_and_warm_outputs_are_the_teachers_bits(tiny_teacher, tmp_path):
    model, tokens = load_teacher(tiny_teacher), make_tokens(tiny_teacher, make_sentences(70))
    rows = np.arange(70)
    truth = predict(model, tokens, rows, FP32)
    names = keys(*rows.tolist())

    def compute(chosen):
        return lambda places: predict(model, tokens, chosen[places], FP32)

    cache = TeacherCache(tmp_path, "space", 2)
    some = np.array([3, 69, 10, 11])
    assert cache.outputs(names[some], compute(some)).tobytes() == truth[some].tobytes()
    assert cache.outputs(names, compute(rows)).tobytes() == truth.tobytes()
    warm = TeacherCache(tmp_path, "space", 2)
    back = rows[::-1].copy()
    assert warm.outputs(names[back], untouched).tobytes() == truth[back].tobytes()


def test_an_example_is_computed_once_however_often_it_is_asked_for(tmp_path):
    cache, asked = TeacherCache(tmp_path, "space", 2), []
    numbers = np.array([7, 1, 7, 7, 2, 1])

    def compute(places):
        asked.append(sorted(numbers[places].tolist()))
        return logits(*numbers[places])

    assert cache.outputs(keys(*numbers.tolist()), compute).tolist() == logits(*numbers).tolist()
    numbers = np.array([2, 3, 7])
    cache.outputs(keys(2, 3, 7), compute)
    assert asked == [[1, 2, 7], [3]]


def test_more_examples_than_one_query_holds(tmp_path):
    cache, numbers = TeacherCache(tmp_path, "space", 2), range(2500)
    fill(cache, *numbers)
    assert cache.outputs(keys(*numbers), untouched).tolist() == logits(*numbers).tolist()


def test_no_examples_have_no_outputs(tmp_path):
    none = np.zeros((0, 16), dtype=np.uint8)
    assert TeacherCache(tmp_path, "space", 3).outputs(none, untouched).shape == (0, 3)


def test_another_space_is_another_cache(tmp_path):
    fill(TeacherCache(tmp_path, "one", 2), 5)
    other = TeacherCache(tmp_path, "two", 2).outputs(keys(5), lambda places: np.array([[9.0, 9.0]], dtype=np.float32))
    assert other.tolist() == [[9.0, 9.0]]
    assert TeacherCache(tmp_path, "one", 2).outputs(keys(5), untouched).tolist() == logits(5).tolist()


def test_a_row_of_the_wrong_size_is_computed_again(tmp_path):
    cache = TeacherCache(tmp_path, "space", 2)
    fill(cache, 5)
    cache.database.execute("UPDATE outputs SET logits = x'00'")
    assert fill(cache, 5).tolist() == logits(5).tolist()
    assert cache.outputs(keys(5), untouched).tolist() == logits(5).tolist()


def test_a_failed_computation_stores_nothing(tmp_path):
    cache = TeacherCache(tmp_path, "space", 2)
    with pytest.raises(ValueError):
        cache.outputs(keys(1, 2), lambda places: logits(1))
    assert fill(cache, 1, 2).tolist() == logits(1, 2).tolist()


def write(folder: Path, barrier: Barrier, first: int) -> None:
    barrier.wait(20)
    cache = TeacherCache(folder, "space", 2)  # all of them make the file at once
    for start in range(first, first + 300, 20):
        numbers = range(start, start + 60)
        assert fill(cache, *numbers).tolist() == logits(*numbers).tolist()


def test_processes_write_at_once(tmp_path):
    for attempt in range(5):
        folder, barrier = tmp_path / str(attempt), PROCESSES.Barrier(4)
        writers = [PROCESSES.Process(target=write, args=(folder, barrier, 50 * number)) for number in range(4)]
        for writer in writers:
            writer.start()
        for writer in writers:
            writer.join()
        assert [writer.exitcode for writer in writers] == [0] * 4
        everything = range(450)
        assert (
            TeacherCache(folder, "space", 2).outputs(keys(*everything), untouched).tolist()
            == logits(*everything).tolist()
        )


def die_while_writing(folder: Path) -> None:
    cache = TeacherCache(folder, "space", 2)
    fill(cache, 1)
    cache.database.execute("BEGIN IMMEDIATE")
    cache.database.execute("INSERT INTO outputs VALUES (?, ?)", (keys(2)[0].tobytes(), logits(99)[0].tobytes()))
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_killed_writer_leaves_what_it_finished_and_no_lock(tmp_path):
    writer = PROCESSES.Process(target=die_while_writing, args=(tmp_path,))
    writer.start()
    writer.join()
    assert writer.exitcode == -signal.SIGKILL
    cache = TeacherCache(tmp_path, "space", 2)
    assert cache.outputs(keys(1), untouched).tolist() == logits(1).tolist()
    assert fill(cache, 2).tolist() == logits(2).tolist()
