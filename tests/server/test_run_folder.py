"""A run's folder is its own, its JSON is JSON, and only the last checkpoints are kept."""

import json

import numpy as np
import pytest
import safetensors.numpy

from common.config import Config, load_config
from common.errors import InputError
from server.run_folder import RunFolder, finite


def test_a_new_folder_holds_every_key_resolved(tmp_path):
    folder = RunFolder(tmp_path / "a" / "run", Config())
    assert load_config(folder.path / "config.toml") == Config()
    assert folder.path.is_absolute()


@pytest.mark.parametrize("content", ["a.txt", "config.toml"])
def test_a_folder_with_something_in_it_is_refused_and_left_alone(tmp_path, content):
    (tmp_path / content).write_text("mine")
    with pytest.raises(InputError, match=f"{tmp_path}: not an empty folder"):
        RunFolder(tmp_path, Config())
    assert (tmp_path / content).read_text() == "mine"
    with pytest.raises(InputError, match="not an empty folder"):
        RunFolder(tmp_path / content, Config())


def test_a_folder_that_cannot_be_made_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be made"):
        RunFolder(tmp_path / "file" / "run", Config())


def test_a_run_that_never_started_gives_its_folder_back(tmp_path):
    folder = RunFolder(tmp_path / "run", Config())
    folder.release()
    assert not (tmp_path / "run").exists()
    folder = RunFolder(tmp_path / "run", Config())
    (folder.path / "notes").write_text("")
    folder.release()
    assert [path.name for path in folder.path.iterdir()] == ["notes"]


def strict(text):
    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    return json.loads(text, parse_constant=refuse)


def test_what_json_has_no_word_for_becomes_null(tmp_path):
    nan, inf = float("nan"), float("inf")
    assert finite({"a": nan, "b": [inf, 1.5, (-inf, "x")], "c": {"d": nan, "e": None}}) == {
        "a": None,
        "b": [None, 1.5, [None, "x"]],
        "c": {"d": None, "e": None},
    }
    folder = RunFolder(tmp_path / "run", Config())
    folder.save_summary({"score": nan, "ü": 1})
    assert strict((folder.path / "summary.json").read_text()) == {"score": None, "ü": 1}
    folder.add_line({"round": 1, "loss": nan})
    folder.add_line({"round": 2, "loss": 0.5})
    lines = (folder.path / "metrics.jsonl").read_text().splitlines()
    assert [strict(line) for line in lines] == [{"round": 1, "loss": None}, {"round": 2, "loss": 0.5}]


def test_the_last_checkpoints_are_kept_and_hold_the_weights(tmp_path):
    folder = RunFolder(tmp_path / "run", Config())
    for number in (1, 2, 9, 10, 99_999, 100_000):
        folder.save_checkpoint(number, {"w": np.full((2, 3), number, dtype=np.float32)}, keep=2)
    kept = sorted(path.name for path in (folder.path / "checkpoints").iterdir())
    assert kept == ["round-100000.safetensors", "round-99999.safetensors"]
    loaded = safetensors.numpy.load_file(folder.path / "checkpoints" / kept[0])
    assert loaded["w"].tolist() == [[100_000.0] * 3] * 2
