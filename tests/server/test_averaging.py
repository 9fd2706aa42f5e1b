"""The final student as the mean of the last rounds'."""

import numpy as np
import pytest

from common.config import load_config
from common.errors import InputError
from server.averaging import mean_of_last, to_go_on_from


def rounds(span, values):
    """What each round ends with, when the rule alone would end in these values."""
    config = load_config(None, [f"rounds={len(values)}", f"server.average-rounds={span}"])
    memory, found = {}, []
    for number, value in enumerate(values, start=1):
        moved = {"a": np.full((2,), value, dtype=np.float32)}
        found.append(float(mean_of_last(config, number, moved, memory)["a"][0]))
    return found, memory


def test_only_the_last_round_ends_in_the_mean():
    found, memory = rounds(3, [8.0, 1.0, 2.0, 6.0])
    assert found == [8.0, 1.0, 2.0, 3.0]
    assert {name: kept.tolist() for name, kept in memory.items()} == {"without-mean/a": [6.0, 6.0]}


def test_the_mean_of_one_round_is_that_round():
    assert rounds(1, [8.0, 5.0]) == ([8.0, 5.0], {})


def test_all_rounds():
    assert rounds(2, [1.0, 2.0])[0] == [1.0, 1.5]


def test_the_sum_so_far_is_in_the_memory_that_checkpoints_keep():
    config = load_config(None, ["rounds=3", "server.average-rounds=3"])
    memory = {"first/a": np.zeros(1)}
    mean_of_last(config, 1, {"a": np.array([0.1], dtype=np.float32)}, memory)
    assert set(memory) == {"first/a", "sum-of-last/a", "summed-since"}
    assert memory["sum-of-last/a"].dtype == np.float64


@pytest.mark.parametrize(
    ("span", "before", "stopped", "after", "expected"),
    [
        (2, 5, 4, 10, (9 + 10) / 2),  # the last two of five and of ten have none in common
        (3, 5, 4, 6, (5 + 6) / 2),  # 3 and 4 were added up; 4 alone is wanted, and is gone
        (3, 5, 2, 6, (4 + 5 + 6) / 3),  # none was added up yet
        (2, 3, 3, 4, 4.0),  # it had ended: round 3 is in no sum any more
    ],
)
def test_a_run_that_goes_on_with_more_rounds_averages_none_of_before(span, before, stopped, after, expected):
    memory = {}
    for number in range(1, after + 1):
        rounds = before if number <= stopped else after
        config = load_config(None, [f"rounds={rounds}", f"server.average-rounds={span}"])
        end = mean_of_last(config, number, {"a": np.float32(number), "b": np.full((2, 1), number, np.float32)}, memory)
    assert float(end["a"]) == expected
    assert end["b"].tolist() == [[expected]] * 2
    assert set(memory) == {"without-mean/a", "without-mean/b"}


def walk(first, last, rounds, weights, memory):
    """Rounds of a rule that adds one."""
    config = load_config(None, [f"rounds={rounds}", "server.average-rounds=3"])
    for number in range(first, last + 1):
        weights = mean_of_last(config, number, {"a": weights["a"] + np.float32(1)}, memory)
    return weights


def test_a_finished_run_that_goes_on_is_as_if_it_had_had_all_rounds_from_the_beginning():
    memory, start = {}, {"a": np.zeros(2, np.float32)}
    ended = walk(1, 3, 3, start, memory)
    assert ended["a"].tolist() == [2.0, 2.0]
    assert walk(4, 6, 6, to_go_on_from(ended, memory), memory)["a"].tolist() == walk(1, 6, 6, start, {})["a"].tolist()
    assert to_go_on_from(start, {})["a"].tolist() == [0.0, 0.0]  # no round has ended in a mean


def test_the_mean_is_rounded_once():
    values = np.float32([0.1, 0.2, 0.4])
    found, _ = rounds(3, values)
    assert found[-1] == float(np.float32(np.sum(values.astype(np.float64)) / 3))


def test_no_more_rounds_than_there_are():
    with pytest.raises(InputError, match=r"server\.average-rounds = 6: there are rounds = 5; give at most that"):
        load_config(None, ["rounds=5", "server.average-rounds=6"])
