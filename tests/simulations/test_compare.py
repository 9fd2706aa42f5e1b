"""Runs side by side."""

import json

import pytest

from common.config import from_flat
from common.errors import InputError
from simulations.compare import compare, compare_sheet, differing, names


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
    return config, summary


def test_only_keys_that_differ_are_shown(tmp_path):
    runs = [make_run(tmp_path / name, **{"rounds": n, "seed": 4}) for name, n in (("a", 2), ("b", 3))]
    keys = differing([config for config, _ in runs])
    assert keys == ["rounds"]
    said, scores, costs = compare_sheet(["a", "b"], runs, keys).sections
    assert said == [("rounds", "2", "3"), ("status", "completed", "completed")]
    assert ("public validation", "0.9000", "0.9000") in scores
    assert scores[2][1:] == ("90.0%", "90.0%")
    assert costs == [
        ("parameters", "400", "400"),
        ("  of the teacher's", "40.0%", "40.0%"),
        ("megabytes sent", "2.0", "2.0"),
        ("seconds", "12.3", "12.3"),
    ]


def test_a_run_that_ended_before_its_first_round_has_no_scores():
    config = from_flat({})
    sheet = compare_sheet(["a"], [(config, {"status": "failed", "task": "toy"})], [])
    assert {row[1] for rows in sheet.sections[1:] for row in rows} == {"-"}


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
    with pytest.raises(InputError, match="no finished run there"):
        compare([tmp_path])
