"""Runs side by side."""

import csv
import json
import re

import pytest

from common.config import from_flat
from common.errors import InputError
from simulations.compare import column_names, compare, compare_sheet, merged, names, read_run, run_folders


def make_run(folder, student=0.9, **keys):
    config = from_flat(keys)
    folder.mkdir(parents=True)
    (folder / "config.toml").write_text(config.toml())
    who = {"params": 1000, "federated": {"accuracy": 0.5}, "validation": {"accuracy": 1.0}}
    summary = {
        "status": "completed", "metric": "accuracy", "teacher": who,
        "student": {**who, "params": 400, "validation": {"accuracy": student}},
        "cost": {"bytes_up": 1_500_000, "bytes_down": 500_000, "wall_s": 12.34},
    }  # fmt: skip
    (folder / "summary.json").write_text(json.dumps(summary))
    return read_run(folder)


def test_only_keys_that_differ_are_shown(tmp_path):
    runs = [make_run(tmp_path / name, **{"rounds": n, "seed": 4}) for name, n in (("a", 2), ("b", 3))]
    said, scores, costs = compare_sheet(merged(runs)).sections
    assert said == [("rounds", "2", "3"), ("status", "completed", "completed")]
    assert ("public validation", "0.9000", "0.9000") in scores
    assert scores[2][1:] == ("90.0%", "90.0%")
    assert costs == [
        ("parameters", "400", "400"),
        ("  of the teacher's", "40.0%", "40.0%"),
        ("megabytes sent", "2.0", "2.0"),
        ("seconds", "12.3", "12.3"),
    ]


def test_runs_that_differ_in_their_seed_alone_are_one_column(tmp_path):
    """0.8 and 0.9: mean 0.85, deviation 0.1 / sqrt(2); of the teacher's 1.0: 85 %."""
    runs = [make_run(tmp_path / "a" / f"seed-{n}", 0.8 + 0.1 * n, seed=n) for n in (0, 1)]
    runs.append(make_run(tmp_path / "b" / "seed-0", 0.5, seed=0, **{"client.lr": 0.01}))
    columns = merged(runs)
    assert column_names(columns) == ["a", "b/seed-0"]
    said, scores, costs = compare_sheet(columns).sections
    assert said[:2] == [("client.lr", "0.0003", "0.01"), ("seeds", "2: 0, 1", "0")]
    assert scores[1][1:] == ("0.8500 ±0.0707", "0.5000")
    assert scores[2][1:] == ("85.0%", "50.0%")
    assert costs[3][1:] == ("12.3", "12.3")


def test_the_same_seed_twice_is_no_second_seed(tmp_path):
    columns = merged([make_run(tmp_path / name) for name in "ab"])
    assert [column.seeds for column in columns] == [(0,), (0,)]
    assert column_names(columns) == ["a", "b"]


def test_means_are_of_completed_runs(tmp_path):
    runs = [make_run(tmp_path / f"{n}", seed=n) for n in (0, 1)]
    (tmp_path / "1" / "summary.json").unlink()
    said, scores, _ = compare_sheet(merged([runs[0], read_run(tmp_path / "1")])).sections
    assert said[-1] == ("status", "1 completed, 1 unfinished")
    assert scores[1][1] == "0.9000"


def test_a_run_without_a_score_has_dashes(tmp_path):
    make_run(tmp_path / "a")
    for summary in ('{"status": "failed", "task": "toy"}', "{half"):
        (tmp_path / "a" / "summary.json").write_text(summary)
        run = read_run(tmp_path / "a")
        assert run.status == ("unfinished" if "half" in summary else "failed")
        assert {row[1] for rows in compare_sheet(merged([run])).sections[1:] for row in rows} == {"-"}


def test_a_run_of_another_version_is_named(tmp_path):
    make_run(tmp_path / "a")
    (tmp_path / "a" / "summary.json").write_text('{"status": "completed", "student": {}}')
    with pytest.raises(InputError, match=r"a/summary.json: damaged, or of another version \('metric'\)"):
        read_run(tmp_path / "a")
    make_run(tmp_path / "b")
    keys = (tmp_path / "b" / "config.toml").read_text()
    (tmp_path / "b" / "config.toml").write_text(f"rounbs = 3\n{keys}")
    with pytest.raises(InputError, match=r"b/config.toml: rounbs: no such key.*written by another version"):
        read_run(tmp_path / "b")


def test_a_name_of_two_lines_is_one_cell_of_markdown(tmp_path, capsys):
    compare([make_run(tmp_path / "a\n|b").path, make_run(tmp_path / "c", rounds=2).path], "markdown")
    assert "|  | a \\|b | c |\n" in capsys.readouterr().out


def test_an_epsilon_of_another_federation_is_said_to_be(tmp_path, capsys):
    runs = [make_run(tmp_path / name).path for name in "ab"]
    for path, more in zip(runs, ({}, {"noise_cohort": 1000}), strict=True):
        summary = json.loads((path / "summary.json").read_text())
        summary["privacy"] = {"unit": "client", "epsilon": 2.0, "delta": 1e-5, **more}
        (path / "summary.json").write_text(json.dumps(summary))
    compare(runs, "markdown")
    assert "| epsilon, the largest | 2 | 2 simulated |" in capsys.readouterr().out
    compare(runs, "csv")
    assert "\nepsilon,2.0,\nepsilon.simulated,,2.0\n" in capsys.readouterr().out


def test_a_sweep_stands_for_its_runs_that_have_begun(tmp_path):
    for seed in (10, 2):
        make_run(tmp_path / f"arm/toy/seed-{seed}", seed=seed)
    listed = [{"folder": f"arm/toy/seed-{seed}"} for seed in (10, 2, 3)]
    (tmp_path / "sweep.json").write_text(json.dumps({"arms": {"arm": {"tasks": {"toy": {"runs": listed}}}}}))
    assert [path.name for path in run_folders(tmp_path)] == ["seed-10", "seed-2"]


def test_csv_has_every_run_and_every_digit(tmp_path):
    runs = [make_run(tmp_path / name, 1 / 3, seed=n).path for n, name in enumerate("ab")]
    compare(runs, "", tmp_path / "all.csv")
    rows = {row[0]: row[1:] for row in csv.reader((tmp_path / "all.csv").open())}
    assert (rows[""], rows["seed"]) == (["a", "b"], ["0", "1"])
    assert [float(cell) for cell in rows["validation.student"]] == [1 / 3, 1 / 3]
    assert rows["bytes"] == ["2000000", "2000000"]
    assert rows["ceiling"] == ["", ""]


def test_a_page_needs_nothing_else_and_says_names_as_they_are(tmp_path, capsys):
    runs = [make_run(tmp_path / f"<b>{n}&", rounds=n).path for n in range(1, 7)]
    compare(runs, "html")
    page = capsys.readouterr().out
    assert "&lt;b&gt;1&amp;" in page
    assert "<b>" not in page
    assert not re.search(r"https?:|src=|href=|@import", page)
    assert page.count('scope="col"') == 6
    compare(runs, "markdown")
    assert "| public validation | 0.9000 |" in capsys.readouterr().out


def test_names_leave_out_what_all_have(tmp_path):
    runs = [tmp_path / arm / "toy" / f"seed-{seed}" for arm, seed in (("a", 0), ("a", 1), ("b", 0))]
    assert names(runs) == ["a/toy/seed-0", "a/toy/seed-1", "b/toy/seed-0"]
    assert names([runs[0], runs[2]]) == ["a", "b"]
    assert names([tmp_path / "a"] * 2) == ["a", "a"]


def test_four_runs_stand_side_by_side_in_80_columns(tmp_path, capsys):
    for number in range(5):
        make_run(tmp_path / f"a-run-with-a-long-name-{number}", **{"teacher.model": f"some/where/else-{number}"})
    compare(sorted(tmp_path.iterdir()))
    out = capsys.readouterr().out
    assert max(len(line.rstrip()) for line in out.splitlines()) <= 80
    assert out.count("public validation") == 2  # the fifth below
    assert "…" not in out


def test_no_run_is_refused(tmp_path):
    with pytest.raises(InputError, match="no run there, and no sweep"):
        compare([tmp_path])
    make_run(tmp_path / "a")
    with pytest.raises(InputError, match="--format excel: give one of table, markdown, csv, html"):
        compare([tmp_path / "a"], "excel")
    with pytest.raises(InputError, match="a folder; give a file"):
        compare([tmp_path / "a"], "csv", tmp_path)
