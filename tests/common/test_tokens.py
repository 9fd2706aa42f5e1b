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


def test_words_begin_where_they_begin(tmp_path):
    """By hand: [CLS] good z ##oo , bad [SEP], and of a pair both texts."""
    teacher = make_teacher(tmp_path, layers=1)
    tokenizer = AutoTokenizer.from_pretrained(teacher)
    tokens = make_tokens(teacher, ["good zo,bad", "zz"], ["bad", "zz"])
    names = [tokenizer.convert_ids_to_tokens(tokens.batch(np.array([row]))["input_ids"][0]) for row in (0, 1)]
    assert names[0] == ["[CLS]", "good", "z", "##o", ",", "bad", "[SEP]", "bad", "[SEP]"]
    assert names[1] == ["[CLS]", "z", "##z", "[SEP]", "z", "##z", "[SEP]"]
    first = [True, True, True, False, True, True, True, True, True]
    assert tokens.starts.tolist() == [*first, True, True, False, True, True, False, True]
    assert [places.tolist() for places in tokens.words(np.array([1, 0]))] == [[0, 1, 3, 4, 6], [0, 1, 2, 4, 5, 6, 7, 8]]


def test_two_texts_without_a_piece_between_them_are_two_words(tmp_path):
    """GPT-2 puts nothing between a pair."""
    tokens = make_tokens(make_teacher(tmp_path, "gpt2", layers=1), ["good"], ["good"])
    assert tokens.words(np.array([0]))[0][0] == 0
    half = len(tokens.ids) // 2
    assert tokens.starts[[0, half]].tolist() == [True, True]
    assert tokens.starts.sum() == 2


def test_every_family_counts_as_many_words_as_its_text_has(family):
    texts = make_sentences(10, seed=4)
    tokens = make_tokens(family, texts)
    special = 0 if AutoTokenizer.from_pretrained(family).cls_token is None else 2
    for row, places in enumerate(tokens.words(np.arange(10))):
        assert len(places) == len(texts[row].split()) + special
