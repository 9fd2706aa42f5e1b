"""Every GLUE task, from files in the hub's layout to its own metrics."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from common.config import load_config
from common.corpus import load_corpus
from common.progress import Silent
from common.tasks import GLUE
from server.preparation import prepare
from tests.conftest import make_sentences, make_teacher

# columns, labels and metrics as the GLUE paper (Wang et al. 2019, table 1) and the hub's data set card have them
TABLE = {
    "cola": (("sentence",), 2, ("matthews", "accuracy")),
    "sst2": (("sentence",), 2, ("accuracy",)),
    "mrpc": (("sentence1", "sentence2"), 2, ("f1", "accuracy")),
    "stsb": (("sentence1", "sentence2"), 0, ("pearson", "spearman")),
    "qqp": (("question1", "question2"), 2, ("f1", "accuracy")),
    "mnli": (("premise", "hypothesis"), 3, ("accuracy",)),
    "qnli": (("question", "sentence"), 2, ("accuracy",)),
    "rte": (("sentence1", "sentence2"), 2, ("accuracy",)),
    "wnli": (("sentence1", "sentence2"), 2, ("accuracy",)),
}


def test_the_nine_tasks_are_glues():
    assert {name: (task.text_columns, len(task.labels), task.metrics) for name, task in GLUE.items()} == TABLE


@pytest.fixture(scope="module")
def glue(tmp_path_factory):
    """All nine tasks with made-up text, in the hub's folder layout."""
    root = tmp_path_factory.mktemp("glue")
    for name, task in GLUE.items():
        (root / name).mkdir()
        for seed, split in enumerate(("train", *task.validation)):
            rng = np.random.default_rng(seed)
            texts = make_sentences(80 * len(task.text_columns))
            columns = {c: texts[i :: len(task.text_columns)] for i, c in enumerate(task.text_columns)}
            labels = rng.integers(0, 11, 80) / 2 if task.regression else rng.integers(0, len(task.labels), 80)
            table = pa.table({**columns, "label": labels, "idx": np.arange(80)})
            pq.write_table(table, root / name / f"{split}-00000-of-00001.parquet")
    return root


@pytest.mark.parametrize("name", TABLE)
def test_a_task_is_read_prepared_and_scored_with_its_own_metrics(name, glue, tmp_path):
    task = GLUE[name]
    make_teacher(tmp_path, labels=task.num_labels, layers=2)
    keys = [f"task={name}", f"data.source={glue}", "data.clients=3", "data.partition=iid", "data.max-length=48"]
    config = load_config(None, [*keys, f"teacher.model={tmp_path}", "student.layers=1"])
    assert len(load_corpus(config).train) == 80
    federation = prepare(config, Silent())
    scored = set(federation.lesson.validation)
    extra = {"spearman_bound"} if name == "stsb" else {"accuracy_mismatched"} if name == "mnli" else set()
    assert scored == {*task.metrics, "n"} | extra
    assert federation.lesson.validation["n"] == 80
