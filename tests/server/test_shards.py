"""What shards hold is counted by client and class, and told only where nobody's data are protected."""

import json
from types import SimpleNamespace

import numpy as np
import pytest

from common.config import from_flat
from common.dataset import FederatedDataset, Split
from common.partition import shards_of_sizes
from common.tasks import TOY, text_task
from server.shards import label_counts, write_shards

REGRESSION = text_task(("text",), (), "score", False)
TAGS = text_task(("text",), ("a", "b", "c"), "label", True)
ORDER = np.array([5, 3, 4, 1, 0])  # row 2 is public
SIZES = np.array([[2, 1], [0, 0], [1, 1]])  # client 0: rows 5, 3 and 4; client 2: rows 1 and 0


def dataset(labels, task=TOY, order=ORDER):
    split = Split(None, np.asarray(labels), np.zeros((6, 16), np.uint8))  # type: ignore[arg-type]
    return FederatedDataset("", task, 8, 1, 0, split, np.array([2]), {}, shards_of_sizes(SIZES, order))


def test_counts_are_of_train_and_held_out_rows():
    names, counts = label_counts(dataset([0, 1, 1, 0, 0, 1]))
    assert names == ["negative", "positive"]
    assert counts.dtype == np.int64
    assert counts.tolist() == [[2, 1], [0, 0], [1, 1]]


def test_rows_without_a_label_are_a_class_of_their_own():
    names, counts = label_counts(dataset([-1, 1, 1, 0, -1, 1]))
    assert names == ["negative", "positive", "unlabelled"]
    assert counts.tolist() == [[1, 1, 1], [0, 0, 0], [0, 1, 1]]


def test_scores_are_counted_in_equal_ranges():
    names, counts = label_counts(dataset([5.0, 0.0, 9.0, 0.9, np.nan, 2.5], REGRESSION))
    assert names == ["0 to 1", "1 to 2", "2 to 3", "3 to 4", "4 to 5", "unlabelled"]
    assert counts.tolist() == [[1, 0, 1, 0, 0, 1], [0, 0, 0, 0, 0, 0], [1, 0, 0, 0, 1, 0]]


def test_an_example_counts_for_each_of_its_labels():
    rows = [[1, 0, 1], [0, 0, 0], [1, 1, 1], [1, 1, 0], [-1, -1, -1], [0, 1, 0]]
    names, counts = label_counts(dataset(np.array(rows, np.int8), TAGS))
    assert names == ["a", "b", "c", "unlabelled"]
    assert counts.tolist() == [[1, 2, 0, 1], [0, 0, 0, 0], [1, 0, 1, 0]]


def test_rows_that_are_with_the_clients_cannot_be_counted():
    with pytest.raises(ValueError, match="with the clients"):
        label_counts(dataset([0, 1, 1, 0, 0, 1], order=None))


@pytest.mark.parametrize(
    ("keys", "homes", "told"),
    [
        ({}, {}, True),
        ({}, {0: 17}, False),
        ({"privacy.secure-aggregation": True, "server.cohort": 3}, {}, False),
        ({"privacy.unit": "example", "privacy.noise-multiplier": 1.0}, {}, False),
    ],
)
def test_shards_are_told_only_where_nothing_is_protected(tmp_path, keys, homes, told):
    federation = SimpleNamespace(config=from_flat(keys), homes=homes, data=dataset([0, 1, 1, 0, 0, 1]))
    write_shards(federation, tmp_path)  # type: ignore[arg-type]
    path = tmp_path / "shards.json"
    assert path.is_file() == told
    if told:
        found = json.loads(path.read_text())
        assert found == {"classes": ["negative", "positive"], "counts": [[2, 1], [0, 0], [1, 1]], "sizes": [3, 0, 2]}
