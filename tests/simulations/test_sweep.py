"""The table of a sweep, and what is refused before anything starts."""

import io
import json
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from common.config import load_config, read_settings
from common.errors import InputError, RunFailed
from common.progress import Lines, Silent
from simulations.child import as_settings
from simulations.sweep import Done, by_task, sweep, sweep_sheet, without_absent, write_results
from simulations.sweep_file import read_sweep
from simulations.table import show

FILE = """
seeds = [0, 1]
tasks = ["sst2", "cola"]
ceiling = true
[arms.base]
[arms.small]
student.layers = 2
"""


@pytest.fixture
def plan(tmp_path):
    (tmp_path / "a.toml").write_text(FILE)
    return read_sweep(tmp_path / "a.toml")


def done(student, teacher, ceiling, held):
    found = {"validation.student": student, "validation.teacher": teacher, "federated.student": held}
    return Done(
        "completed",
        metric="accuracy",
        found={**found, "federated.teacher": 0.8, "params.student": 30, "params.teacher": 120, "ceiling": ceiling},
    )


@pytest.fixture
def results(plan):
    found = dict.fromkeys(plan.runs, Done())
    scores = {("sst2", 0): 0.8, ("sst2", 1): 0.9, ("cola", 0): 0.4, ("cola", 1): 0.6}
    for run in plan.runs:
        if run.arm == "base":
            found[run] = done(scores[run.task, run.seed], 1.0 if run.task == "sst2" else 0.5, 1.0, 0.4)
        elif (run.task, run.seed) == ("sst2", 0):
            found[run] = done(0.7, 1.0, None, 0.2)
        else:
            found[run] = Done("failed", problem="no room")
    return found


def test_each_arm_has_its_average_and_its_tasks(plan, results):
    sheet = sweep_sheet(plan, results)
    base, small = sheet.sections
    # average: 0.6 and 0.75 of a teacher's 0.75; 0.675 +- 0.106
    assert base[0] == ("base", "67.5 ±10.6", "90.0%", "40.0 ±0.0", "50.0%", "25.0%", "67.5%")
    assert base[1] == ("  sst2", "85.0 ±7.1", "85.0%", "40.0 ±0.0", "50.0%", "25.0%", "85.0%")
    assert base[2] == ("  cola", "50.0 ±14.1", "100.0%", "40.0 ±0.0", "50.0%", "25.0%", "50.0%")
    assert small[0] == ("small (0 of 2)", "-", "-", "-", "-", "-", "-")
    assert small[1] == ("  sst2 (1 of 2)", "70.0", "70.0%", "20.0", "25.0%", "25.0%", "-")


def test_it_fits_80_columns(plan, results, capsys):
    show(Console(width=100), sweep_sheet(plan, results))
    assert max(len(line.rstrip()) for line in capsys.readouterr().out.splitlines()) <= 80


def test_with_one_task_an_arm_is_one_row(tmp_path):
    (tmp_path / "a.toml").write_text("[arms.a]\n[arms.b]\nrounds = 2")
    plan = read_sweep(tmp_path / "a.toml")
    [rows] = sweep_sheet(plan, dict.fromkeys(plan.runs, done(0.5, 1.0, None, 0.4))).sections
    assert [row[:3] for row in rows] == [("a", "50.0", "50.0%"), ("b", "50.0", "50.0%")]


def test_tiers_stand_below_their_arm(tmp_path, capsys):
    """One of four examples' worth apart: seeds 0.5 and 0.7 of a teacher's 0.8 on the small one's own text."""
    keys = '[arms.plain]\n[arms.mixed]\nstudent.layers = 3\nstudent.tiers = "1/4/256@0.5"\n'
    (tmp_path / "a.toml").write_text("seeds = [0, 1]\n" + keys)
    plan = read_sweep(tmp_path / "a.toml")
    results = dict.fromkeys(plan.runs, done(0.5, 1.0, None, 0.4))
    for run in plan.runs[1::2]:
        tiers = {f"tier-1.{name}": value for name, value in results[run].found.items()}
        tiers["tier-1.federated.student"] = 0.5 + 0.2 * run.seed
        tiers |= {f"tier-2.{name}": value for name, value in results[run].found.items()}
        results[run] = replace(results[run], found={**results[run].found, **tiers})
    sheet = sweep_sheet(plan, results)
    plain, mixed = sheet.sections
    assert [row[0] for row in plain] == ["plain"]
    assert [row[0] for row in mixed] == ["mixed", "  1/4/256", "  3/all/all"]
    assert mixed[1] == ("  1/4/256", "50.0 ±0.0", "50.0%", "60.0 ±14.1", "75.0%", "25.0%")
    assert mixed[2][1:] == mixed[0][1:]
    show(Console(width=100), sheet)
    assert max(len(line.rstrip()) for line in capsys.readouterr().out.splitlines()) <= 80


def test_the_json_holds_every_run_and_the_same_numbers(plan, results, tmp_path):
    write_results(plan, results, tmp_path)
    found = json.loads((tmp_path / "sweep.json").read_text())["arms"]
    assert found["small"]["keys"] == {"student.layers": 2}
    assert found["base"]["average"]["kept"]["validation.kept"] == pytest.approx(0.9)
    assert found["base"]["tasks"]["cola"]["measured"]["validation.student"]["mean"] == pytest.approx(0.5)
    runs = found["small"]["tasks"]["sst2"]["runs"]
    assert [(run["seed"], run["status"], run["problem"], run["folder"]) for run in runs] == [
        (0, "completed", "", "small/sst2/seed-0"),
        (1, "failed", "no room", "small/sst2/seed-1"),
    ]
    assert "| base | 67.5 ±10.6 | 90.0% |" in (tmp_path / "sweep.md").read_text()
    assert set(by_task(plan, results, "small")["cola"]) == set()


def test_a_folder_in_use_is_left_alone(plan, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").touch()
    with pytest.raises(InputError, match=r"out: not an empty folder; --resume to continue"):
        sweep(plan, tmp_path / "out")
    with pytest.raises(InputError, match="a file; give a folder"):
        sweep(plan, tmp_path / "out" / "mine.txt")
    with pytest.raises(InputError, match=r"--out /proc/out: .*; give a folder that can be written"):
        sweep(plan, Path("/proc/out"))


def test_a_run_of_other_keys_is_not_continued(plan, tmp_path):
    folder = tmp_path / "out" / "base" / "sst2" / "seed-0"
    folder.mkdir(parents=True)
    other = load_config(None, ["task=sst2", "student.layers=1", "rounds=9"])
    (folder / "config.toml").write_text(other.toml())
    with pytest.raises(InputError, match=r"seed-0: --resume with another configuration: rounds = 5 \(was 9\), stud"):
        sweep(plan, tmp_path / "out", resume=True)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["base"]


TEACHERS = """
skip-absent-teachers = true
seeds = [0, 1]
[arms.there]
teacher.model = "{folder}"
[arms.gone]
teacher.model = "{folder}/gone"
[arms.nowhere]
teacher.model = "no-such-owner/no-such-model"
"""


def test_an_arm_whose_teacher_is_nowhere_is_skipped_and_named_where_the_file_asks_for_it(tmp_path):
    (tmp_path / "a.toml").write_text(TEACHERS.format(folder=tmp_path))
    asked, lines = read_sweep(tmp_path / "a.toml"), io.StringIO()
    plan = without_absent(asked, tmp_path / "out", Lines(lines))
    assert [(run.arm, run.seed) for run in plan.runs] == [("there", 0), ("there", 1)]
    gone, nowhere = lines.getvalue().splitlines()
    assert gone == f"skipped gone: teacher.model = '{tmp_path}/gone': no such folder"
    assert nowhere.startswith("skipped nowhere: teacher.model: the hub's model no-such-owner/no-such-model")
    results = dict.fromkeys(plan.runs, Done())
    assert sweep_sheet(plan, results).notes[-1] == "Skipped, no teacher: gone, nowhere."
    write_results(plan, results, tmp_path)
    found = json.loads((tmp_path / "sweep.json").read_text())
    assert (list(found["arms"]), list(found["absent"])) == (["there"], ["gone", "nowhere"])
    plain = TEACHERS.replace("skip-absent-teachers = true", "")
    (tmp_path / "b.toml").write_text(plain.format(folder=tmp_path))
    assert not read_sweep(tmp_path / "b.toml").may_skip


def test_a_sweep_without_any_teacher_is_refused(tmp_path):
    (tmp_path / "a.toml").write_text('skip-absent-teachers = true\nteacher.model = "/none"\n')
    with pytest.raises(InputError, match=r"skip-absent-teachers = true: no arm is left; teacher.model = '/none'"):
        sweep(read_sweep(tmp_path / "a.toml"), tmp_path / "out")


def test_what_has_been_run_is_not_skipped_though_its_teacher_is_gone(finished, tmp_path):
    plan, _, _ = finished
    lost = replace(plan, may_skip=True)
    assert without_absent(lost, tmp_path / "out", Silent()).runs == plan.runs


@pytest.fixture
def finished(tmp_path):
    """A sweep of one run that is done already, all but its ceiling; its data are nowhere."""
    keys = f'task = "sst2"\nceiling = true\nteacher.model = "/none"\ndata.source = "{tmp_path}/none"\n'
    (tmp_path / "a.toml").write_text(keys)
    plan = read_sweep(tmp_path / "a.toml")
    (run,) = plan.runs
    folder = tmp_path / "out" / run.folder
    folder.mkdir(parents=True)
    (folder / "config.toml").write_text(run.config.toml())
    scores = {"federated": {"accuracy": 0.8}, "validation": {}, "params": 10}
    cost = {"bytes_up": 1, "bytes_down": 1, "wall_s": 1.0}
    summary = {"status": "completed", "metric": "accuracy", "teacher": scores, "student": scores, "cost": cost}
    (folder / "summary.json").write_text(json.dumps(summary))
    return plan, run, folder.with_name(f"ceiling-{run.seed}")


def test_a_ceiling_that_fails_is_told_by_the_exit_code(finished, tmp_path, capsys):
    plan, _, _ = finished
    with pytest.raises(RunFailed, match=r"no ceiling beside 1 of 1 runs: .*; try --resume"):
        sweep(plan, tmp_path / "out", resume=True)
    assert "no ceiling: " in capsys.readouterr().out


def test_a_ceiling_without_a_score_is_no_failure(finished, tmp_path, capsys):
    plan, run, ceiling = finished
    ceiling.mkdir()
    (ceiling / "summary.json").write_text(json.dumps({"keys": run.config.flat(), "validation": {}}))
    (found,) = sweep(plan, tmp_path / "out", resume=True).values()
    assert found.found["ceiling"] is None
    assert found.problem == "no ceiling: it has no score"


def test_keys_survive_the_way_through_a_command_line():
    keys = {"data.source": 'a "b" ü=\\', "student.layer-selection": "1", "rounds": 3, "client.lr": 1e-5, "x": True}
    arguments = as_settings(keys)
    assert arguments[0::2] == ["-s"] * 5
    assert read_settings(arguments[1::2]) == keys
