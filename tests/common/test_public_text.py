"""Public text without labels: a file of lines, or what is public of every GLUE task."""

from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from common.config import from_flat
from common.corpus import load_corpus
from common.dataset import _cut, prepare_dataset
from common.errors import InputError
from common.progress import Silent
from common.public_text import LOST, MOVED, apart_from, in_pairs, load_public_text


def texts(**keys):
    return load_public_text(from_flat({name.replace("__", ".").replace("_", "-"): v for name, v in keys.items()}))


def refusal(**keys):
    with pytest.raises(InputError) as caught:
        texts(**keys)
    return str(caught.value)


def glue(folder, task, **columns):
    (folder / task).mkdir(parents=True)
    for split in ("train", "validation"):
        pq.write_table(pa.table(columns), folder / task / f"{split}-00000-of-00001.parquet")


def test_no_key_is_no_text():
    assert texts() == []


def test_each_line_of_a_file_is_a_text_and_no_text_comes_twice(tmp_path):
    (tmp_path / "a.txt").write_text("one two\n\n  three \r\none two\nvier fünf\n", encoding="utf-8-sig")
    assert texts(data__public_text=str(tmp_path / "a.txt")) == ["one two", "three", "vier fünf"]


def test_what_is_wrong_with_a_file_is_named_and_never_quoted(tmp_path):
    path = tmp_path / "a.txt"
    assert "no such file; give one with a text on each line" in refusal(data__public_text=str(path))
    path.write_text("\n \n")
    assert "no text in it" in refusal(data__public_text=str(path))
    path.write_bytes(b"fine\nsecret \xff\n")
    assert refusal(data__public_text=str(path)) == f"{path}: line 2, byte 8 is not UTF-8; save it as UTF-8"


def test_of_every_glue_task_what_would_be_public_if_it_were_the_runs(tmp_path):
    numbers = [f"text {number}" for number in range(40)]
    glue(tmp_path, "cola", sentence=numbers, label=[0, 1] * 20)
    glue(tmp_path, "stsb", sentence1=numbers, sentence2=[f"other {n}" for n in range(40)], label=[0.0, 5.0] * 20)
    keys = {"data__source": str(tmp_path), "data__public_fraction": 0.25, "seed": 3}
    expected = []
    for task in ("cola", "stsb"):
        config = from_flat(
            {"task": task, "data.source": str(tmp_path), "data.public-fraction": 0.25, "seed": 3, "data.clients": 2}
        )
        corpus = load_corpus(config)
        public, _, _ = _cut(config, corpus)
        rows = corpus.train.take(public)
        expected += [text for row in zip(*rows.texts, strict=True) for text in row]
    found = texts(task="cola", data__public_text="glue", **keys)
    assert len(found) == len(set(expected)) >= 20
    assert set(found) == set(expected)
    assert texts(task="stsb", data__public_text="glue", **keys) == found  # the same for every task
    clients = tmp_path / "clients"  # files with the columns of one task
    clients.mkdir()
    (clients / "a.csv").write_text("sentence,label\nmine,0\n")
    assert texts(task="cola", data__public_text="glue", data__private=str(clients), **keys) == found


def test_a_text_that_a_client_holds_or_a_score_is_of_is_not_public(tmp_path, tiny_teacher):
    sentences = [f"sentence {number}" for number in range(40)]
    glue(tmp_path, "cola", sentence=sentences, label=[0, 1] * 20)
    keys = {"task": "cola", "data.source": str(tmp_path), "data.public-fraction": 0.25, "data.clients": 2}
    config = from_flat({**keys, "data.min-examples": 2})
    corpus = load_corpus(config)
    corpus = replace(corpus, validation={"validation": replace(corpus.train, texts=(["Scored here"] * 40,))})
    data = prepare_dataset(config, tiny_teacher, tmp_path / "cache", Silent(), corpus)
    public = set(data.train.texts[0].take(data.public))
    assert len(public) == 10
    found = apart_from(data, [*(f"  SENTENCE {number}" for number in range(40)), "scored HERE", "of nobody"])
    assert {text.strip().lower() for text in found} == public | {"of nobody"}
    assert apart_from(data, []) == []


def test_glues_text_needs_a_glue_folder():
    assert "needs a GLUE task and a folder" in refusal(task="toy", data__public_text="glue")
    assert "needs a GLUE task and a folder" in refusal(task="sst2", data__public_text="glue")


def test_a_task_of_pairs_reads_its_own_pairs_and_each_text_once_more():
    texts = [f"a{n} b{n} c{n} d{n}" for n in range(40)]
    own = [("one", "two"), ("three", "")]
    pairs = in_pairs(own, texts, np.random.default_rng(0))
    assert pairs[:2] == own
    strange, alike = pairs[2:12], pairs[12:]
    assert sorted([*(text for pair in strange for text in pair), *(first for first, _ in alike)]) == sorted(texts)
    assert all(set(second.split()) <= set(first.split()) for first, second in alike)
    lost = 1 - sum(len(second.split()) for _, second in alike) / sum(len(first.split()) for first, _ in alike)
    assert abs(lost - LOST) < 0.15
    for first, second in alike:
        places = [first.split().index(word) for word in second.split()]
        assert all(abs(place - now) <= MOVED for now, place in enumerate(np.argsort(np.argsort(places))))
    assert any(second.split() != sorted(second.split()) for _, second in alike)  # out of their order
    assert in_pairs(own, texts, np.random.default_rng(0)) == pairs
    assert in_pairs([], ["a b c"], np.random.default_rng(1))[0][0] == "a b c"
