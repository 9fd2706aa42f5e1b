"""A trimmed tokenizer knows the pieces that were kept, loses no text, and cuts as the whole one where it can."""

import json

import numpy as np
import pytest
from tokenizers import Tokenizer
from tokenizers.models import Unigram
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from common.dataset import load_tokenizer
from common.errors import InputError
from common.vocabulary import choose_pieces, piece_bounds, save_trimmed
from tests.conftest import WORDS, make_sentences, make_tokenizer

TEXTS = [*make_sentences(60, seed=3), "cat", "x", "zebra 42!", "unfilmable"]


@pytest.fixture(scope="module", params=["bert", "distilbert", "roberta", "gpt2"])
def folder(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    make_tokenizer(folder, request.param)
    return folder


@pytest.fixture(scope="module")
def whole(folder):
    return load_tokenizer(folder)


def counts_of(tokenizer, texts):
    pieces = [piece for ids in tokenizer(texts)["input_ids"] for piece in ids]
    return np.bincount(pieces, minlength=len(tokenizer))


def trim(folder, whole, keep, texts, into):
    pieces = choose_pieces(whole, counts_of(whole, texts), keep)
    save_trimmed(folder, pieces, into)
    return pieces, AutoTokenizer.from_pretrained(into)


def names(tokenizer):
    return {number: name for name, number in tokenizer.get_vocab().items()}


# --- which pieces -------------------------------------------------------------------------------


def test_as_many_pieces_are_kept_as_were_asked_for(folder, whole):
    counts = counts_of(whole, TEXTS)
    for keep in (piece_bounds(whole)[0], piece_bounds(whole)[0] + 9, len(whole) - 1, len(whole)):
        pieces = choose_pieces(whole, counts, keep)
        assert len(pieces) == keep
        assert pieces == sorted(set(pieces))
    assert choose_pieces(whole, counts, len(whole)) == list(range(len(whole)))


def test_special_pieces_and_single_characters_are_kept_though_no_text_has_them(whole):
    kept = set(choose_pieces(whole, np.zeros(len(whole), np.int64), piece_bounds(whole)[0]))
    assert set(whole.all_special_ids) <= kept
    single = {number for name, number in whole.get_vocab().items() if len(name.removeprefix("##")) == 1}
    assert len(single) > 50
    assert kept == single | set(whole.all_special_ids)


def test_the_most_frequent_pieces_are_kept_first_and_among_equals_the_lower_number(tmp_path):
    make_tokenizer(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    vocabulary, fewest = tokenizer.get_vocab(), piece_bounds(tokenizer)[0]
    counts = np.zeros(len(tokenizer), np.int64)
    for word, count in (("yes", 5), ("hate", 9), ("film", 5), ("warm", 1)):
        counts[vocabulary[word]] = count
    unused = sorted(vocabulary[word] for word in set(WORDS) - {"a", "hate", "film", "yes", "warm"})
    expected = ["hate", "film", "yes", "warm"]  # "film" stands before "yes" in the vocabulary
    base = set(choose_pieces(tokenizer, counts, fewest))
    for more in range(1, 7):
        added = [vocabulary[word] for word in expected[:more]] + unused[: max(more - 4, 0)]
        assert set(choose_pieces(tokenizer, counts, fewest + more)) - base == set(added)


@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_special_pieces_that_were_added_to_a_models_vocabulary_are_kept_too(tmp_path, family):
    for folder in ("plain", "whole", "trimmed"):
        (tmp_path / folder).mkdir()
    make_tokenizer(tmp_path / "plain", family)
    whole = load_tokenizer(tmp_path / "plain")
    plain = len(whole)
    whole.add_special_tokens({"additional_special_tokens": ["<mark>"]})
    whole.save_pretrained(tmp_path / "whole")
    pieces, trimmed = trim(tmp_path / "whole", whole, piece_bounds(whole)[0] + 9, TEXTS, tmp_path / "trimmed")
    assert plain in pieces
    assert [names(trimmed)[new] for new in range(len(pieces))] == [names(whole)[old] for old in pieces]
    assert len(trimmed) == len(pieces)
    assert trimmed.tokenize("x<mark>x") == whole.tokenize("x<mark>x")
    assert choose_pieces(whole, counts_of(whole, TEXTS), len(whole)) == list(range(plain + 1))


def test_places_that_berts_vocabularies_leave_free_are_never_kept(tmp_path):
    make_tokenizer(tmp_path)
    document = json.loads((tmp_path / "tokenizer.json").read_text())
    vocabulary = document["model"]["vocab"]
    free = [f"[unused{number}]" for number in range(5)]
    for name in free:
        vocabulary[name] = len(vocabulary)
    (tmp_path / "tokenizer.json").write_text(json.dumps(document))
    tokenizer = load_tokenizer(tmp_path)
    counts = np.zeros(len(tokenizer), np.int64)
    counts[[vocabulary[name] for name in free]] = 100
    pieces = choose_pieces(tokenizer, counts, piece_bounds(tokenizer)[0] + 3)
    assert len(pieces) == piece_bounds(tokenizer)[0] + 3
    assert not set(pieces) & {vocabulary[name] for name in free}


@pytest.mark.parametrize("family", ["roberta", "gpt2"])
def test_a_merged_piece_is_kept_with_all_that_it_is_merged_from(tmp_path, family):
    make_tokenizer(tmp_path, family)
    tokenizer = load_tokenizer(tmp_path)
    merges = json.loads((tmp_path / "tokenizer.json").read_text())["model"]["merges"]
    vocabulary = tokenizer.get_vocab()
    for keep in range(piece_bounds(tokenizer)[0], len(tokenizer), 7):
        kept = set(choose_pieces(tokenizer, counts_of(tokenizer, TEXTS), keep))
        assert len(kept) == keep
        ways = {}
        for left, right in merges:
            ways.setdefault(vocabulary[left + right], []).append({vocabulary[left], vocabulary[right]})
        assert all(any(way <= kept for way in ways[piece]) for piece in kept if piece in ways)


@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_too_few_or_too_many_pieces_are_refused_by_the_key(tmp_path, family):
    make_tokenizer(tmp_path, family)
    tokenizer = load_tokenizer(tmp_path)
    counts, fewest, most = np.zeros(len(tokenizer), np.int64), piece_bounds(tokenizer)[0], len(tokenizer)
    for keep in (1, fewest - 1, most + 1):
        message = rf"^student.vocabulary = {keep}: give {fewest} \(.*single characters\) to {most}$"
        with pytest.raises(InputError, match=message):
            choose_pieces(tokenizer, counts, keep)


def test_another_kind_of_tokenizer_is_refused_by_name():
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(Unigram([("a", 0.0), ("b", -1.0)])))
    with pytest.raises(InputError, match=r"^student.vocabulary: a Unigram tokenizer cannot be trimmed"):
        choose_pieces(tokenizer, np.zeros(2, np.int64), 2)


# --- the tokenizer ------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=[0, 25])
def trimmed(request, folder, whole, tmp_path_factory):
    """Old numbers of the pieces kept, and the tokenizer that knows them."""
    into = tmp_path_factory.mktemp("trimmed")
    return trim(folder, whole, piece_bounds(whole)[0] + request.param, TEXTS, into)


def test_pieces_keep_their_names_and_stand_in_their_order(whole, trimmed):
    pieces, tokenizer = trimmed
    before, after = names(whole), names(tokenizer)
    assert [after[number] for number in range(len(pieces))] == [before[piece] for piece in pieces]
    assert len(tokenizer) == tokenizer.vocab_size == len(pieces)


def test_special_pieces_have_their_new_numbers_everywhere(whole, trimmed):
    pieces, tokenizer = trimmed
    number = {piece: place for place, piece in enumerate(pieces)}
    assert tokenizer.pad_token_id == number[whole.pad_token_id]
    for name, piece in whole.special_tokens_map.items():
        assert getattr(tokenizer, name) == piece
        assert getattr(tokenizer, f"{name}_id") == number[getattr(whole, f"{name}_id")]
    assert sorted(tokenizer.all_special_ids) == sorted(number[piece] for piece in whole.all_special_ids)
    for given in (["good"], ["good", "bad"]):  # what the post-processor puts around a text, and between a pair
        expected = [number[piece] for piece in whole(*given)["input_ids"] if piece in whole.all_special_ids]
        found = [piece for piece in tokenizer(*given)["input_ids"] if piece in tokenizer.all_special_ids]
        assert found == expected
    padded = tokenizer(["good", "good bad awful"], padding=True)["input_ids"]
    assert padded[0][-1] == tokenizer.pad_token_id
    assert tokenizer.model_input_names == whole.model_input_names
    assert type(tokenizer) is type(whole)


def test_no_text_of_known_letters_has_an_unknown_piece_or_loses_a_letter(whole, trimmed):
    _, tokenizer = trimmed
    for text in TEXTS:
        ids, before = tokenizer(text)["input_ids"], whole(text)["input_ids"]
        assert len(ids) >= len(before)
        assert tokenizer.unk_token_id not in ids or tokenizer.unk_token_id == tokenizer.eos_token_id
        assert tokenizer.decode(ids, skip_special_tokens=True) == whole.decode(before, skip_special_tokens=True)


def test_byte_level_pieces_lose_no_letter_of_any_script(folder, whole, trimmed):
    _, tokenizer = trimmed
    texts = ["Grüße aus Köln", "映画は最高 🎬", "a\ttab\nand a line", ""]
    for text in texts:
        expected = whole.decode(whole(text)["input_ids"], skip_special_tokens=True)
        assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True) == expected
        if "Ġ" in "".join(names(whole).values()):
            assert expected == text


def test_texts_whose_pieces_are_all_kept_are_cut_as_before(folder, whole, tmp_path):
    pieces, tokenizer = trim(folder, whole, piece_bounds(whole)[0] + 25, TEXTS, tmp_path)
    number = {piece: place for place, piece in enumerate(pieces)}
    kept = [text for text in TEXTS if all(piece in number for piece in whole(text)["input_ids"])]
    changed = [text for text in TEXTS if text not in kept]
    assert kept
    assert changed
    for text in kept:
        assert tokenizer(text)["input_ids"] == [number[piece] for piece in whole(text)["input_ids"]], text
    assert any(len(tokenizer(text)["input_ids"]) > len(whole(text)["input_ids"]) for text in changed)


def test_a_vocabulary_that_keeps_all_its_pieces_cuts_every_text_as_before(folder, whole, tmp_path):
    _, tokenizer = trim(folder, whole, len(whole), TEXTS, tmp_path)
    texts = [*TEXTS, "Grüße, 42?!", ""]
    assert tokenizer(texts, texts)["input_ids"] == whole(texts, texts)["input_ids"]


def test_a_trimmed_tokenizer_neither_pads_nor_truncates_of_itself(folder, whole, tmp_path):
    used = load_tokenizer(folder)
    used(["good", "bad bad"], padding="max_length", truncation=True, max_length=5)  # leaves both switched on inside
    used.save_pretrained(tmp_path / "used")
    _, tokenizer = trim(tmp_path / "used", whole, piece_bounds(whole)[0], TEXTS, tmp_path / "trimmed")
    lengths = [len(ids) for ids in tokenizer(["x", "zebra zebra zebra"])["input_ids"]]
    assert lengths[0] < 5 < lengths[1]


def test_a_trimmed_tokenizer_is_one_file_that_no_other_contradicts(trimmed):
    _, tokenizer = trimmed
    from pathlib import Path

    files = {path.name for path in Path(tokenizer.name_or_path).iterdir()}
    assert "tokenizer.json" in files
    assert not files & {"vocab.txt", "vocab.json", "merges.txt", "added_tokens.json"}
