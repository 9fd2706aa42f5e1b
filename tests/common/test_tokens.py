"""Flat token arrays give a model exactly what its own tokenizer gives it."""

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from common.families import FAMILIES
from common.tokens import CHUNK, Tokens, tokenize
from tests.conftest import make_sentences, make_teacher, make_tokens

LEFT = [*make_sentences(20, seed=1), "", "x", "unknown wörds, 42!"]
RIGHT = [*make_sentences(22, seed=2), ""]


@pytest.fixture(scope="module", params=FAMILIES)
def family(request, tmp_path_factory):
    return make_teacher(tmp_path_factory.mktemp(request.param), request.param, layers=1)


@pytest.mark.parametrize("columns", [(LEFT,), (LEFT, RIGHT)], ids=["singles", "pairs"])
@pytest.mark.parametrize("max_length", [64, 12])
def test_a_batch_is_what_the_tokenizer_pads(family, columns, max_length):
    tokens = make_tokens(family, *columns, max_length=max_length)
    tokenizer = AutoTokenizer.from_pretrained(family)
    for rows in (np.arange(len(LEFT)), np.array([3, 3, 0]), np.array([20])):
        given = [[column[row] for row in rows] for column in columns]
        expected = tokenizer(*given, truncation=True, max_length=max_length, padding=True, return_tensors="pt")
        batch = tokens.batch(rows)
        assert set(batch) == set(expected)
        assert all(torch.equal(batch[name], expected[name]) for name in batch)
        wide = tokens.batch(rows, 66)
        cut = tokenizer(*given, truncation=True, max_length=max_length)
        expected = tokenizer.pad(cut, padding="max_length", max_length=66)
        assert all(wide[name].tolist() == expected[name] for name in wide)


def test_saved_tokens_are_mapped_and_equal(tmp_path, tiny_teacher):
    tokens = make_tokens(tiny_teacher, LEFT, RIGHT)
    tokens.save(tmp_path, "train")
    opened = Tokens.open(tmp_path, "train", tokens.pad, tokens.typed)
    assert len(opened) == len(tokens) == len(LEFT)
    assert isinstance(opened.ids, np.memmap)
    rows = np.array([5, 0, 22])
    assert all(torch.equal(opened.batch(rows)[name], part) for name, part in tokens.batch(rows).items())


def test_progress_counts_every_example_once(tiny_teacher):
    seen = []
    texts = ["good"] * (CHUNK + 3)
    tokens = tokenize((texts,), AutoTokenizer.from_pretrained(tiny_teacher), 8, seen.append)
    assert seen == [CHUNK, 3]
    assert tokens.lengths(np.arange(len(texts))).tolist() == [3] * len(texts)
