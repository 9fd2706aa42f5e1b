"""GLUE's table: our arithmetic, and DistilBERT's published row over the same tasks."""

import pytest
from rich.console import Console

from common.tasks import GLUE
from simulations.glue import BERT, DISTILBERT, PRESET, glue_json, glue_sheet, published
from simulations.sweep_file import read_sweep
from simulations.table import show


def run(student, teacher, ceiling):
    return {
        "validation.student": student, "validation.teacher": teacher, "ceiling": ceiling, "params.student": 9_100_000,
        "params.teacher": 22_750_000,
    }  # fmt: skip


def measured(teacher, student):
    return {"ms.teacher": teacher, "ms.student": student, "ms.slim": student} | {
        f"mb.{name}": 90.0 for name in ("teacher", "student", "slim")
    }


RUNS = {"cola": {0: run(0.4, 0.5, 0.8), 1: run(0.5, 0.5, 0.8)}, "sst2": {0: run(0.8, 0.9, 1.0), 1: run(0.9, 1.0, 1.0)}}
TIMES = {"cola": measured(4.0, 2.0), "sst2": measured(8.0, 6.0)}


def rows(sheet):
    return {row[0].strip() + f" {number}": row[1:] for number, s in enumerate(sheet.sections) for row in s}


def test_systems_are_rows_and_tasks_columns_with_their_mean_first():
    sheet = glue_sheet(RUNS, TIMES)
    found = rows(sheet)
    assert sheet.head == ("", "mean", "cola", "sst2")
    assert found["teacher 0"] == ("72.5", "50.0", "95.0")
    assert found["student 0"] == ("65.0", "45.0", "85.0")
    assert sheet.sections[0][4] == ("  ±", "7.1", "7.1", "7.1")  # 0.6 and 0.7
    assert found["% of teacher 0"] == ("89.7", "90.0", "89.5")  # 65 of 72.5
    assert found["student, % of it 0"] == ("72.2", "56.2", "85.0")  # of 90, 80, 100
    assert found["student M params 2"] == ("9.1", "9.1", "9.1")
    assert found["% of teacher 2"] == ("40.0", "40.0", "40.0")
    assert found["teacher, ms 3"] == ("6.0", "4.0", "8.0")
    assert found["x faster 3"] == ("1.50", "2.00", "1.33")  # 6 to 4, not the mean of quotients


def test_each_column_says_its_metric():
    found = rows(glue_sheet({task: {} for task in ("cola", "mrpc", "sst2", "stsb")}, {}))
    assert found["metric 0"] == ("", "MCC", "F1", "acc", "r")
    assert set(rows(glue_sheet({task: {} for task in GLUE}, {}))["metric 0"]) == {"", "MCC", "F1", "acc", "r"}


def test_a_task_without_a_completed_run_leaves_no_mean():
    found = rows(glue_sheet({**RUNS, "rte": {}}, TIMES))
    assert found["student 0"] == ("-", "45.0", "85.0", "-")
    assert found["student, ms 3"] == ("-", "2.0", "6.0", "-")


def test_the_published_rows_are_those_of_the_same_tasks():
    bert, distilbert, kept = published(["cola", "sst2"])
    assert bert[1:] == ("74.5", "56.3", "92.7")
    assert distilbert[1:] == ("71.3", "51.3", "91.3")
    assert kept[1:] == ("95.7", "91.1", "98.5")
    assert set(BERT) == set(DISTILBERT) == set(GLUE)
    assert published(list(GLUE))[1][1] == "77.0"  # as the paper's own mean


def test_nine_tasks_fit_80_columns(capsys):
    runs = {task: {0: run(1.0, 0.9, 0.95), 1: run(0.5, 0.9, 0.95)} for task in GLUE}
    show(Console(width=80), glue_sheet(runs, {task: measured(120.0, 80.0) for task in GLUE}))
    out = capsys.readouterr().out
    assert max(len(line) for line in out.splitlines() if "  " in line) <= 80
    assert "student, % of it" in out  # not folded
    assert "DistilBERT 2019" in out


def test_the_json_has_a_mean_and_each_task():
    found = glue_json(RUNS, TIMES)
    assert list(found) == ["mean", "cola", "sst2"]
    assert found["mean"]["kept"]["validation.kept"] == pytest.approx(65 / 72.5)
    assert found["sst2"]["ms.teacher"] == 8.0


def test_the_preset_is_a_sweep_with_one_recipe_for_all_tasks():
    plan = read_sweep(PRESET, seeds=[0, 1])
    assert [run.task for run in plan.runs] == [*GLUE, *GLUE]
    assert plan.ceiling
    assert len(plan.arms) == 1
    own = ("task", "seed")
    flats = [{key: value for key, value in run.config.flat().items() if key not in own} for run in plan.runs]
    assert all(flat == flats[0] for flat in flats)
    assert flats[0]["data.partition"] == "dirichlet"
