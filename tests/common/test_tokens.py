"""Flat token arrays give a model exactly what its own tokenizer gives it."""

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from common.errors import InputError
from common.families import FAMILIES
from common.tokens import CHUNK, PARTS, Tokens, check_stride, tokenize
from tests.conftest import WORDS, make_sentences, make_teacher, make_tokens

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
        if not expected["input_ids"].numel():  # a model cannot answer to nothing
            assert batch["input_ids"].tolist() == [[tokens.pad]] and not batch["attention_mask"].any()
            continue
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
    found = [[places.tolist() for places in texts] for texts in tokens.words(np.array([1, 0]))]
    assert found == [[[0, 1, 3], [4, 6]], [[0, 1, 2, 4, 5, 6], [7, 8]]]


def test_two_texts_without_a_piece_between_them_are_two_words(tmp_path):
    """GPT-2 puts nothing between a pair."""
    tokens = make_tokens(make_teacher(tmp_path, "gpt2", layers=1), ["good"], ["good"])
    half = len(tokens.ids) // 2
    assert [places.tolist() for places in tokens.words(np.array([0]))[0]] == [[0], [half]]
    assert tokens.starts[[0, half]].tolist() == [True, True]
    assert tokens.starts.sum() == 2


def test_every_family_counts_as_many_words_as_its_text_has(family):
    texts = make_sentences(10, seed=4)
    tokens = make_tokens(family, texts)
    special = 0 if AutoTokenizer.from_pretrained(family).cls_token is None else 2
    for row, (places, behind) in enumerate(tokens.words(np.arange(10))):
        assert len(places) == len(texts[row].split()) + special
        assert not len(behind)


def test_the_windows_of_a_text_are_those_a_hand_cuts(tiny_teacher):
    # max-length 6: four words and two special pieces; neighbours share one word
    words = WORDS[:12]
    texts = [" ".join(words[:count]) for count in (3, 4, 5, 7, 8, 12)]
    spans = [
        [(0, 3)],
        [(0, 4)],
        [(0, 4), (3, 5)],
        [(0, 4), (3, 7)],
        [(0, 4), (3, 7), (6, 8)],
        [(0, 4), (3, 7), (6, 10)],
    ]
    tokenizer = AutoTokenizer.from_pretrained(tiny_teacher)
    tokens = tokenize((texts,), tokenizer, 6, lambda amount: None, windows=3, stride=1)
    assert len(tokens) == len(texts)
    for row, expected in enumerate(spans):
        given = tokens.batch(np.array([row]))
        wanted = [" ".join(words[start:end]) for start, end in expected]
        cut = tokenizer(wanted, padding=True, return_tensors="pt")
        assert all(torch.equal(given[name], cut[name]) for name in given)
    rows = np.array([4, 0, 2])
    windows, counts = tokens.windows(rows)
    assert counts.tolist() == [3, 1, 2]
    assert windows.tolist() == [6, 7, 8, 0, 2, 3]
    assert tokens.lengths(rows).tolist() == [3 * 6, 5, 2 * 6]
    third, half = 1 / 3, 0.5
    expected = torch.tensor([[third] * 3 + [0.0] * 3, [0, 0, 0, 1, 0, 0], [0, 0, 0, 0, half, half]])
    assert torch.equal(tokens.pooling(rows), expected.float())
    assert tokens.pooling(np.array([0, 1])) is None
    assert set(tokens.vocabulary(rows)) == {*range(tokens.pad + 1), *tokens.batch(rows)["input_ids"].unique().tolist()}


def test_texts_that_fit_are_the_same_with_windows_as_without(family):
    plain = make_tokens(family, LEFT)
    cut = tokenize((LEFT,), AutoTokenizer.from_pretrained(family), 64, lambda amount: None, windows=5, stride=8)
    assert cut.first is None
    for part in PARTS:
        assert np.array_equal(getattr(plain, part), getattr(cut, part))


def test_examples_that_are_longer_than_what_is_kept_of_them_are_marked(tmp_path, tiny_teacher):
    """By hand: 4 words fit 6 pieces, of which two are special; 10 three windows that share one; 4 and 1 fit 8."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_teacher)
    texts = [" ".join(WORDS[:count]) for count in (11, 4, 5, 10, 1)]
    alone = tokenize((texts,), tokenizer, 6, lambda amount: None)
    assert alone.cut.tolist() == [True, False, True, True, False]
    windows = tokenize((texts,), tokenizer, 6, lambda amount: None, windows=3, stride=1)
    assert windows.cut.tolist() == [True, False, False, False, False]
    pairs = tokenize((texts, ["good"] * 5), tokenizer, 8, lambda amount: None)
    assert pairs.cut.tolist() == [True, False, True, True, False]
    windows.save(tmp_path, "train")
    opened = Tokens.open(tmp_path, "train", windows.pad, windows.typed)
    assert opened.take(np.array([4, 0])).cut.tolist() == [False, True]
    (tmp_path / "train.cut.npy").unlink()  # as an older version has saved them
    assert Tokens.open(tmp_path, "train", windows.pad, windows.typed).cut is None


def test_saved_windows_are_mapped_and_equal(tmp_path, tiny_teacher):
    tokens = tokenize((LEFT,), AutoTokenizer.from_pretrained(tiny_teacher), 8, lambda amount: None, windows=4, stride=2)
    tokens.save(tmp_path, "train")
    opened = Tokens.open(tmp_path, "train", tokens.pad, tokens.typed)
    assert len(opened) == len(LEFT) < len(opened.offsets) - 1
    rows = np.array([5, 0, 20, 19])
    assert all(torch.equal(opened.batch(rows)[name], part) for name, part in tokens.batch(rows).items())
    assert torch.equal(opened.pooling(rows), tokens.pooling(rows))


def test_a_stride_must_leave_room_for_new_pieces(tiny_teacher):
    tokenizer = AutoTokenizer.from_pretrained(tiny_teacher)
    check_stride(tokenizer, 8, 2, 5)
    check_stride(tokenizer, 8, 1, 6)  # no neighbours
    with pytest.raises(InputError, match=r"data.stride = 6: .* room for 6 pieces"):
        check_stride(tokenizer, 8, 2, 6)
