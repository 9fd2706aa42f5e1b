"""Examples with any number of classes: read, cut, learnt and scored exactly."""

import json
import math

import numpy as np
import pytest
import torch
from sklearn.metrics import accuracy_score, f1_score
from torch.distributions import Bernoulli, kl_divergence

from common import losses
from common.config import from_flat
from common.corpus import labelled, load_corpus
from common.errors import InputError
from common.metrics import MULTI_LABEL_METRICS, ScoreSpec, check_statistics, scores, statistics_length, tally
from common.partition import _partition_classes

SPEC = ScoreSpec(4, MULTI_LABEL_METRICS, multi_label=True)


def some(count, classes=4, seed=0):
    rng = np.random.default_rng(seed)
    labels = (rng.random((count, classes)) < 0.4).astype(np.int8)
    return rng.normal(size=(count, classes)) + labels, labels


# --- scores --------------------------------------------------------------------------------------


def test_pooled_scores_are_scikit_learns():
    logits, labels = some(300)
    logits[:, 3] = -1.0  # never predicted
    shards = np.split(np.arange(300), [7, 7, 150])
    total = sum(tally(SPEC, logits[rows], labels[rows]) for rows in shards)
    assert len(total) == statistics_length(SPEC) == 17
    found, said = scores(SPEC, total), logits > 0
    assert found["f1_micro"] == pytest.approx(f1_score(labels, said, average="micro"), abs=1e-15)
    assert found["f1_macro"] == pytest.approx(f1_score(labels, said, average="macro", zero_division=0), abs=1e-15)
    assert found["subset_accuracy"] == accuracy_score(labels, said)
    assert found["n"] == 300


def test_a_hand_worked_example():
    logits = [[1.0, -1, -1], [1, 1, -1], [-1, -1, -1]]
    labels = [[1, 0, 0], [1, 0, 1], [0, 0, 0]]
    statistics = tally(ScoreSpec(3, ("f1_micro",), multi_label=True), logits, labels)
    #                             exact, then tp fp fn tn of each class
    assert statistics.tolist() == [2, 2, 0, 0, 1, 0, 1, 0, 2, 0, 0, 1, 2]
    found = scores(ScoreSpec(3, MULTI_LABEL_METRICS, multi_label=True), statistics)
    assert found == {"f1_micro": 2 / 3, "f1_macro": 1 / 3, "subset_accuracy": 2 / 3, "n": 3}


def test_no_examples_have_no_score_and_no_class_anywhere_counts_as_0():
    empty = scores(SPEC, tally(SPEC, np.zeros((0, 4)), np.zeros((0, 4))))
    assert all(math.isnan(empty[name]) for name in MULTI_LABEL_METRICS)
    nothing = scores(SPEC, tally(SPEC, -np.ones((5, 4)), np.zeros((5, 4))))
    assert nothing == {"f1_micro": 0.0, "f1_macro": 0.0, "subset_accuracy": 1.0, "n": 5}


@pytest.mark.parametrize(
    ("place", "value"),
    [(0, -1), (1, -1), (2, 2**62), (5, 100), (0, 61), (0, 0), (4, 2**31)],
    ids=["negative", "negative count", "wraps", "another n", "more than n", "fewer than errors allow", "too many"],
)
def test_hostile_statistics_are_refused(place, value):
    logits, labels = np.full((60, 4), -1.0), np.zeros((60, 4))
    logits[:10, 1] = 1.0  # ten errors
    statistics = tally(SPEC, logits, labels)
    check_statistics(SPEC, statistics)
    check_statistics(SPEC, statistics + statistics)
    statistics[place] = value
    with pytest.raises(ValueError, match="statistics"):
        check_statistics(SPEC, statistics)


def test_what_is_no_label_or_no_logit_is_refused():
    for labels in ([[0, 2, 0, 0]], [[0, -1, 0, 0]], [[0.5, 0, 0, 0]], [0], [[0, 1, 0]]):
        with pytest.raises(ValueError, match="labels"):
            tally(SPEC, np.zeros((1, 4)), labels)
    with pytest.raises(ValueError, match="NaN"):
        tally(SPEC, np.full((1, 4), np.nan), np.zeros((1, 4)))
    with pytest.raises(ValueError, match="at least 2"):
        ScoreSpec(1, ("f1_micro",), multi_label=True)
    with pytest.raises(ValueError, match="accuracy"):
        ScoreSpec(3, ("accuracy",), multi_label=True)


# --- losses --------------------------------------------------------------------------------------


def test_soft_targets_are_the_divergence_of_bernoullis_and_hard_ones_the_cross_entropy():
    student, teacher = (torch.from_numpy(some(6, seed=seed)[0]) for seed in (1, 2))
    for heat in (1.0, 3.0):
        expected = kl_divergence(Bernoulli(logits=teacher / heat), Bernoulli(logits=student / heat)).mean(1) * heat**2
        torch.testing.assert_close(losses.soft_multi_label(student, teacher, heat), expected)
    far = losses.soft_multi_label(torch.tensor([[200.0, -200.0]]), torch.tensor([[-200.0, -200.0]]), 1.0)
    assert float(far) == pytest.approx(100.0)
    labels = torch.from_numpy(some(6, seed=3)[1])
    chance = torch.where(labels > 0, torch.sigmoid(student), 1 - torch.sigmoid(student))
    torch.testing.assert_close(losses.hard_multi_label(student, labels), -chance.log().mean(1))


def test_the_soft_gradient_hardly_moves_with_the_temperature():
    student, teacher = (torch.from_numpy(some(50, seed=seed)[0]) * 0.1 for seed in (1, 2))
    norms = []
    for heat in (1.0, 2.0, 8.0):
        student.requires_grad_(True).grad = None
        losses.soft_multi_label(student, teacher, heat).sum().backward()
        norms.append(float(student.grad.norm()))
    assert max(norms) / min(norms) < 1.02


# --- data ----------------------------------------------------------------------------------------

CSV = 'text,label\na one,red|blue\nb two,\nc three,|\nd four, blue | \ne five,"red"\n'


def corpus_of(path, **keys):
    flat = {"task": "text", "data.source": str(path), "data.multi-label": True, "distill.hard-weight": 0.0, **keys}
    return load_corpus(from_flat(flat))


def test_an_empty_cell_is_unlabelled_and_a_separator_alone_no_class(tmp_path):
    path = tmp_path / "some.csv"
    path.write_text(CSV)
    corpus = corpus_of(path)
    assert corpus.task.labels == ("blue", "red")
    assert corpus.task.metrics == ("f1_micro", "f1_macro", "subset_accuracy")
    assert corpus.train.labels.tolist() == [[1, 1], [-1, -1], [0, 0], [1, 0], [0, 1]]
    assert labelled(corpus.train.labels).tolist() == [True, False, True, True, True]
    assert _partition_classes(corpus.train.labels).tolist() == [0, -1, 2, 0, 1]
    with pytest.raises(InputError, match="row 2 has no label"):
        corpus_of(path, **{"distill.hard-weight": 0.3})


def test_lists_in_json_are_names_and_other_separators_are_heard(tmp_path):
    path = tmp_path / "some.jsonl"
    rows = [("a", ["x", "y z"]), ("b", None), ("c", []), ("d", "x;y z")]
    path.write_text("".join(json.dumps({"text": text, "label": label}) + "\n" for text, label in rows))
    corpus = corpus_of(path, **{"data.label-separator": ";"})
    assert corpus.task.labels == ("x", "y z")
    assert corpus.train.labels.tolist() == [[1, 1], [-1, -1], [0, 0], [1, 1]]


def test_a_class_of_no_training_example_and_a_task_of_one_label_are_refused(tmp_path):
    path, other = tmp_path / "some.csv", tmp_path / "other.csv"
    path.write_text(CSV)
    other.write_text("text,label\nx,red|green\n")
    with pytest.raises(InputError, match=r"other.csv: row 1: the label is none of the 2 classes") as refused:
        corpus_of(path, **{"data.validation": str(other)})
    assert "green" not in str(refused.value)
    with pytest.raises(InputError, match=r"data.multi-label = true: examples of task = sst2"):
        from_flat({"task": "sst2", "data.multi-label": True})
