"""A sheet as text: for a terminal, and as Markdown."""

import pytest
from rich.console import Console

from simulations.table import Sheet, figure, markdown, points, result_table, share, show


def lines(sheet, capsys, width=80):
    show(Console(width=width), sheet)
    return [line.rstrip() for line in capsys.readouterr().out.splitlines()]


def test_names_give_way_and_figures_stay(capsys):
    sheet = Sheet("t", ("", "score"), [[("a-very-long-name-of-an-arm", "85.1 ±0.3")]], ("a note that is longer",))
    found = lines(sheet, capsys, width=24)
    assert any(line.endswith("85.1 ±0.3") for line in found)
    assert max(map(len, found[:-1])) <= 24
    assert found[-1] == "a note that is longer"
    narrow = lines(sheet, capsys, width=16)
    assert any(line.endswith("85.1 ±0.3") for line in narrow)
    assert sum("a-very-long-" in line for line in narrow) == 1


def test_brackets_are_text(capsys):
    assert "[bold]" in "".join(lines(Sheet("t", ("", "x"), [[("[bold]", "1")]]), capsys))


def test_markdown_has_a_row_for_each_and_escapes_bars():
    sheet = Sheet("scores", ("", "a", "b"), [[("one", "1", "2")], [("  two|", "3", "-")]], ("note",))
    assert markdown(sheet) == (
        "**scores**\n\n|  | a | b |\n| --- | ---: | ---: |\n| one | 1 | 2 |\n| two\\| | 3 | - |\n\nnote\n"
    )


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, "-"), (float("nan"), "-"), (9.96, "10.0"), (99.94, "99.9"), (99.96, "100"), (109.5, "110")],
)
def test_a_figure_takes_four_characters(value, text):
    assert figure(value) == text


def test_points_are_hundredths():
    assert points(0.8512) == "85.1"
    assert points(None) == "-"


def test_a_share_needs_two_scores_and_a_teacher_above_zero():
    assert share(0.9, 1.0) == 0.9
    for above, below in ((None, 1.0), (1.0, None), (1.0, 0.0), (1.0, -0.5), (1.0, float("nan")), (float("nan"), 1.0)):
        assert share(above, below) is None


def test_the_table_of_a_run_fits_80_columns(capsys):
    who = {"params": 22_700_000, "federated": {"spearman": 0.8, "n": 9}, "validation": {"spearman": 0.7, "n": 9}}
    student = {**who, "params_ratio": 0.4, "federated": {"spearman": 0.6, "spearman_bound": 0.001, "n": 9}}
    cost = {"wall_s": 1.0, "train_s": 1.0, "examples_per_s": 5.0, "bytes_down": 2e6, "bytes_up": 1e6}
    summary = {
        "teacher": who, "student": student, "cost": cost, "task": "stsb", "status": "completed", "rounds": 3,
        "faults": {"failed": 2, "late": 0},
        "privacy": {"unit": "example", "epsilon": 7.9964, "delta": 1e-5},
    }  # fmt: skip
    Console(width=100).print(result_table(summary))
    out = capsys.readouterr().out
    assert max(len(line.rstrip()) for line in out.splitlines()) <= 80
    assert "0.6000 ±1e-03" in out
    assert "75.0%" in out  # 0.6 of 0.8
    assert "2 failed" in out
    assert [line.split() for line in out.splitlines() if "privacy" in line] == [
        ["privacy", "of", "one", "example", "epsilon", "8", "delta", "1e-05"]
    ]
    assert "scores of" not in out
    Console(width=100).print(result_table(summary | {"rounds": 9, "scored": {"federated": 9, "validation": 5}}))
    out = capsys.readouterr().out
    assert max(len(line.rstrip()) for line in out.splitlines()) <= 80
    assert "completed after 9 rounds, scores of round 5 and 9" in out
