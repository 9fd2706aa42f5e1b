"""Trackers get the numbers of metrics.jsonl, all of them and nothing else, and cannot harm a run."""

import json
from importlib.util import find_spec
from pathlib import Path

import pytest

from common.config import Config, from_flat
from common.errors import InputError
from server.lines import numbers_of
from server.run_folder import RunFolder
from server.trackers import chosen
from server.trackers.given import told_keys

LINE = {
    "round": 3, "phase": "evaluate", "student": {"accuracy": 0.5, "f1": None}, "retention": float("nan"),
    "clients": 7, "failed": [4, 9], "note": "a text", "tiers": [{"layers": 1, "federated": {"accuracy": 0.25}}],
}  # fmt: skip
NUMBERS = {
    "evaluate/student/accuracy": 0.5, "evaluate/clients": 7.0, "evaluate/failed": 2.0,
    "evaluate/tiers/1/layers": 1.0, "evaluate/tiers/1/federated/accuracy": 0.25,
}  # fmt: skip


def test_a_line_is_its_finite_numbers():
    assert numbers_of(LINE) == (3, NUMBERS)


def test_keys_go_out_without_folders_and_not_at_all_from_a_protected_run(tmp_path):
    told = told_keys(from_flat({"task": "text", "data.source": "/home/me/a.csv", "tracking.wandb": "mine"}))
    assert (told["rounds"], told["teacher.model"], told["student.model"]) == (5, "minilm", "")
    assert not [key for key, value in told.items() if "/home" in str(value) or key.startswith("tracking")]
    told = told_keys(from_flat({"teacher.model": str(tmp_path), "student.model": "someone/a-model"}))
    assert "teacher.model" not in told and told["student.model"] == "someone/a-model"
    assert told_keys(from_flat({"privacy.unit": "client", "privacy.noise-multiplier": 1.0})) == {}


def test_a_password_is_refused_where_all_keys_are_written_down():
    with pytest.raises(InputError, match=r"tracking.mlflow .* give it without a name and password"):
        from_flat({"tracking.mlflow": "https://me:secret@host/x"})
    assert from_flat({"tracking.mlflow": "https://host/me@x"}).tracking.mlflow == "https://host/me@x"


@pytest.mark.skipif(find_spec("wandb") is not None, reason="the package is there")
def test_a_missing_package_is_told_before_anything_is_made(tmp_path):
    with pytest.raises(InputError, match=r"tracking.wandb = 'mine': .* pip install 'fedistill\[wandb\]'"):
        RunFolder(tmp_path / "run", from_flat({"tracking.wandb": "mine"}))
    assert not (tmp_path / "run").exists()


def test_one_that_fails_is_told_of_once_and_the_lines_are_written(tmp_path, monkeypatch):
    class Broken:
        def __init__(self, config, run):
            raise ConnectionError("https://who-knows-what")

    monkeypatch.setitem(chosen.KINDS, "tensorboard", Broken)
    monkeypatch.setattr(chosen, "find_spec", lambda name: True)
    folder = RunFolder(tmp_path / "run", from_flat({"tracking.tensorboard": True}))
    told = []
    folder.trackers.tell = told.append
    for _ in range(3):
        folder.add_line(LINE)
    folder.close()
    assert told == ["tracking.tensorboard: ConnectionError; the run goes on without it"]
    assert len((folder.path / "metrics.jsonl").read_text().splitlines()) == 3


def test_nothing_is_written_unless_asked(tmp_path):
    folder = RunFolder(tmp_path / "run", Config())
    folder.add_line(LINE)
    folder.close()
    assert sorted(path.name for path in folder.path.iterdir()) == [".lock", "config.toml", "metrics.jsonl"]


def continued(tmp_path: Path, **keys: object) -> Path:
    """A run of three lines whose second was written twice: once before it was killed and continued."""
    config = from_flat(keys)
    folder = RunFolder(tmp_path / "run", config)
    folder.add_line({"round": 1, "phase": "train", "loss": 0.5})
    kept = folder.lengths()
    folder.add_line({"round": 2, "phase": "train", "loss": 0.25})
    folder.close()
    folder = RunFolder(tmp_path / "run", config, resume=True)
    folder.cut_back(kept)
    folder.add_line({"round": 2, "phase": "train", "loss": 0.25})
    folder.add_line({"round": 3, "phase": "train", "loss": 0.125})
    folder.save_summary({"status": "completed"})
    folder.close()
    return folder.path


def test_tensorboard_shows_what_metrics_jsonl_says(tmp_path):
    pytest.importorskip("tensorboard", reason="the extra `tensorboard` is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = continued(tmp_path, **{"tracking.tensorboard": True})
    found = EventAccumulator(str(run / "tensorboard"))
    found.Reload()
    assert found.Tags()["scalars"] == ["train/loss"]
    assert [(one.step, one.value) for one in found.Scalars("train/loss")] == [(1, 0.5), (2, 0.25), (3, 0.125)]


def test_mlflow_has_one_run_of_it(tmp_path, monkeypatch):
    pytest.importorskip("mlflow", reason="the extra `mlflow` is not installed")
    from mlflow import MlflowClient

    run = continued(tmp_path, **{"tracking.mlflow": str(tmp_path / "store")})
    client = MlflowClient((tmp_path / "store").as_uri())
    [found] = client.search_runs([client.get_experiment_by_name("fedistill").experiment_id])
    assert (found.info.status, found.info.run_name) == ("FINISHED", "run")
    assert found.data.params["rounds"] == "5"
    assert "data.source" not in found.data.params
    steps = {(one.step, one.value) for one in client.get_metric_history(found.info.run_id, "train/loss")}
    assert steps == {(1, 0.5), (2, 0.25), (3, 0.125)}
    assert json.loads((run / "tracking.json").read_text()) == {"mlflow": found.info.run_id}


def test_wandb_offline_stays_in_the_run_folder(tmp_path, monkeypatch):
    pytest.importorskip("wandb", reason="the extra `wandb` is not installed")
    monkeypatch.setenv("WANDB_MODE", "offline")
    run = continued(tmp_path, **{"tracking.wandb": "mine"})
    written = list((run / "wandb").glob("offline-run-*/*.wandb"))
    assert written
    assert all(b"train/loss" in path.read_bytes() for path in written)
