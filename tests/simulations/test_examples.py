"""The example of paper abstracts: what it makes is what its preset reads, and is long enough to need its windows."""

import csv
import subprocess
import sys

import numpy as np
import pytest

from common.config import load_config
from common.dataset import prepare_dataset
from common.progress import Silent
from tests.simulations.test_presets import ROOT


def make(path, *arguments):
    script = ROOT / "examples" / "paper_abstracts.py"
    done = subprocess.run([sys.executable, script, path, *arguments], capture_output=True, text=True, check=True)
    assert str(path) in done.stdout
    return path


@pytest.fixture(scope="module")
def abstracts(tmp_path_factory):
    return make(tmp_path_factory.mktemp("abstracts") / "abstracts.csv")


def test_the_same_seed_makes_the_same_file_and_another_another(abstracts, tmp_path):
    assert make(tmp_path / "again.csv").read_bytes() == abstracts.read_bytes()
    assert make(tmp_path / "other.csv", "--seed", "1").read_bytes() != abstracts.read_bytes()


def test_no_field_shows_in_the_first_third_of_an_abstract(abstracts):
    """It begins with sentences that are drawn from the same ten for all fields: no other word occurs there."""
    with abstracts.open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert len(rows) == 200
    assert len({row["abstract"] for row in rows}) == 200
    words = {}
    for row in rows:
        text = row["abstract"].split()
        assert 150 < len(text) < 300
        words.setdefault(row["field"], set()).update(text[: len(text) // 3])
    alone = [words[field] for field in ("astronomy", "biology", "chemistry", "computing", "economics")]
    assert all(found == alone[0] for found in alone)


def test_the_preset_reads_the_file_in_windows_with_several_labels(abstracts, tiny_teacher, tmp_path):
    config = load_config(
        ROOT / "simulations" / "presets" / "abstracts.toml",
        [f"data.source={abstracts}", f"teacher.model={tiny_teacher}"],
    )
    data = prepare_dataset(config, tiny_teacher, tmp_path, Silent())
    assert data.task.multi_label
    assert data.task.num_labels == 5
    assert data.clients == 4
    assert len(data.eligible) == 4
    counts = np.asarray(data.train.labels).sum(axis=1)
    assert set(counts.tolist()) == {1, 2}
    windows = data.train.tokens.windows(np.arange(len(data.train)))[1]
    assert windows.max() == np.median(windows) == config.data.windows == 5
