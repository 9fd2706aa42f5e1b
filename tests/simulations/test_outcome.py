"""Means, deviations and shares, worked by hand."""

import pytest

from simulations.outcome import Spread, averaged, numbers, shares, spread, spreads


def test_the_deviation_is_that_of_a_sample():
    found = spread([0.8, 0.9])
    assert found.mean == pytest.approx(0.85)
    assert found.std == pytest.approx(0.005**0.5)  # (0.05^2 + 0.05^2) / (2 - 1)
    assert found.n == 2
    assert spread([1.0, 2.0, 6.0]).std == pytest.approx(7**0.5)  # (4 + 1 + 9) / 2


def test_one_seed_has_no_deviation_and_none_no_mean():
    assert spread([0.5]) == Spread(0.5, None, 1)
    assert spread([]) == Spread(None, None, 0)


@pytest.mark.parametrize("undefined", [None, float("nan")])
def test_an_undefined_score_is_not_left_out_of_the_mean(undefined):
    assert spread([0.9, undefined]) == Spread(None, None, 2)


def run(student, teacher=1.0, ceiling=None, **more):
    return {"validation.student": student, "validation.teacher": teacher, "ceiling": ceiling, **more}


def test_an_average_is_taken_over_the_tasks_of_each_seed():
    a = {0: run(0.8), 1: run(0.9)}
    b = {0: run(0.4, 0.5), 1: run(0.6, 0.75)}
    found = averaged([a, b])
    assert found[0]["validation.student"] == pytest.approx(0.6)
    assert found[1]["validation.student"] == pytest.approx(0.75)
    over = spreads(list(found.values()))
    assert over["validation.student"].mean == pytest.approx(0.675)
    assert over["validation.student"].std == pytest.approx(0.075 * 2**0.5)
    # 0.675 / 0.8125, not the mean of 0.85 and 0.8
    assert shares(over)["validation.kept"] == pytest.approx(0.675 / 0.8125)
    assert shares(spreads(list(b.values())))["validation.kept"] == pytest.approx(0.8)


def test_a_seed_that_lacks_a_task_has_no_average():
    assert set(averaged([{0: run(0.8), 1: run(0.9)}, {1: run(0.4)}])) == {1}
    assert averaged([{0: run(0.8)}, {}]) == {}
    assert averaged([]) == {}
    assert spreads([]) == {}
    assert shares({}) == dict.fromkeys(("validation.kept", "federated.kept", "params.ratio", "ceiling.kept"))


def test_an_undefined_score_of_one_task_leaves_no_average():
    assert averaged([{0: run(0.8)}, {0: run(None)}])[0]["validation.student"] is None


def test_shares_of_ceiling_and_size():
    sizes = {"params.student": 40, "params.teacher": 100}
    kept = shares(spreads([run(0.8, 0.9, 1.0, **sizes), run(0.6, 0.7, 0.75, **sizes)]))
    assert kept["ceiling.kept"] == pytest.approx(0.7 / 0.875)
    assert kept["params.ratio"] == pytest.approx(0.4)
    assert kept["federated.kept"] is None


@pytest.mark.parametrize("teacher", [0.0, -0.1])
def test_a_share_of_a_teacher_that_knows_nothing_means_nothing(teacher):
    assert shares(spreads([run(0.3, teacher)]))["validation.kept"] is None


def test_numbers_are_the_headline_metrics():
    def who(score, params):
        return {"params": params, "federated": {"f1": score, "accuracy": 9.0}, "validation": {"accuracy": 9.0}}

    cost = {"bytes_up": 3, "bytes_down": 4, "wall_s": 5.0}
    found = numbers({"metric": "f1", "student": who(0.5, 4), "teacher": who(0.6, 8), "cost": cost}, 0.9)
    assert (found["federated.student"], found["federated.teacher"]) == (0.5, 0.6)
    assert found["validation.student"] is None  # not measured
    assert (found["params.student"], found["params.teacher"], found["bytes"], found["seconds"]) == (4, 8, 7, 5.0)
    assert found["ceiling"] == 0.9
