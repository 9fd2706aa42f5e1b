"""Data is cut and tokenised once, mapped afterwards, and keeps public, private and held-out texts apart."""

import csv
from pathlib import Path

import numpy as np
import pytest

from common import dataset
from common.dataset import in_pieces_of, load_tokenizer, open_dataset
from common.errors import InputError
from common.vocabulary import choose_pieces, piece_bounds, save_trimmed
from tests.conftest import make_dataset, make_reviews, make_sentences, make_tokens


@pytest.fixture(scope="module")
def reviews(tmp_path_factory) -> Path:
    return make_reviews(tmp_path_factory.mktemp("reviews") / "reviews.csv", 300)


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("data")


def read(path, column="text"):
    with path.open(newline="") as stream:
        return [row[column] for row in csv.DictReader(stream)]


def rows_of(data):
    shards = [data.shard(client) for client in range(data.clients)]
    return np.concatenate([s.train for s in shards]), np.concatenate([s.heldout for s in shards])


def test_a_row_keeps_its_tokens_label_and_key_through_the_cut(reviews, tiny_teacher, cache):
    _, data = make_dataset(reviews, tiny_teacher, cache)
    tokens, tokenizer = data.train.tokens, load_tokenizer(tiny_teacher)
    assert data.train.labels.tolist() == [int(label) for label in read(reviews, "label")]
    for row in (0, 7, 299):
        ids = tokens.batch(np.array([row]))["input_ids"][0]
        assert tokenizer.decode(ids, skip_special_tokens=True) == read(reviews)[row]
    assert len({key.tobytes() for key in data.train.keys}) == 300


def test_rows_are_public_or_in_one_shard(reviews, tiny_teacher, cache):
    _, data = make_dataset(reviews, tiny_teacher, cache, data__partition="iid", data__clients=4)
    train, heldout = rows_of(data)
    validation = data.validation["validation"]
    # 300 rows: 60 public, of which a fifth is scored; 240 private
    assert (len(data.public), len(validation), len(train) + len(heldout)) == (48, 12, 240)
    everyone = [*data.public, *train, *heldout]
    assert len(set(everyone)) == len(everyone) == 288
    left = set(range(300)) - set(everyone)
    keys = data.train.keys
    assert {keys[row].tobytes() for row in left} == {key.tobytes() for key in validation.keys}
    assert data.train_sizes.tolist() == [48] * 4
    assert data.eligible.tolist() == [0, 1, 2, 3]


def test_sizes_of_all_clients_are_those_of_their_shards(reviews, tiny_teacher, cache):
    _, data = make_dataset(reviews, tiny_teacher, cache, data__partition="zipf", data__clients=6, data__alpha=1.5)
    shards = [data.shard(client) for client in range(6)]
    assert data.train_sizes.tolist() == [len(shard.train) for shard in shards]
    assert data.heldout_sizes.tolist() == [len(shard.heldout) for shard in shards]
    assert data.heldout_sizes.dtype == data.train_sizes.dtype == np.int64
    # 240 private rows: one each, and 234 in proportion to 1 / rank^1.5; a fifth of each is held out
    assert (data.train_sizes + data.heldout_sizes).tolist() == [129, 47, 26, 17, 12, 9]
    assert data.heldout_sizes.tolist() == [26, 9, 5, 3, 2, 2]


def test_a_second_preparation_opens_what_is_there(reviews, tiny_teacher, cache, monkeypatch):
    _, first = make_dataset(reviews, tiny_teacher, cache, seed=9)
    monkeypatch.setattr(dataset, "tokenize", lambda *arguments: pytest.fail("tokenised again"))
    _, second = make_dataset(reviews, tiny_teacher, cache, seed=9)
    assert second.key == first.key
    assert second.shards.order.tolist() == first.shards.order.tolist()
    assert second.task == first.task
    assert isinstance(second.train.tokens.ids, np.memmap)


@pytest.mark.parametrize(
    "keys",
    [{"seed": 1}, {"data__clients": 4}, {"data__alpha": 2.0}, {"data__max_length": 32}, {"data__limit": 100},
     {"data__holdout_fraction": 0.3}],
    ids=str,
)  # fmt: skip
def test_whatever_changes_the_data_changes_its_key(reviews, tiny_teacher, cache, keys):
    assert (
        make_dataset(reviews, tiny_teacher, cache, **keys)[1].key != make_dataset(reviews, tiny_teacher, cache)[1].key
    )


def test_the_name_of_a_file_and_keys_of_training_leave_the_data_alone(reviews, tiny_teacher, cache, tmp_path):
    copy = tmp_path / "copy.csv"
    copy.write_bytes(reviews.read_bytes())
    _, first = make_dataset(reviews, tiny_teacher, cache)
    assert make_dataset(copy, tiny_teacher, cache, client__lr=0.1, rounds=9)[1].key == first.key


def test_clients_that_are_too_small_are_left_out_and_the_rest_stays(tiny_teacher, cache, tmp_path):
    texts = make_sentences(60)
    path = tmp_path / "a.csv"
    with path.open("w", newline="") as stream:
        rows = [(text, i % 2, "small" if i < 5 else "large") for i, text in enumerate(texts)]
        csv.writer(stream).writerows([("text", "label", "who"), *rows])
    keys = {"data__partition": "natural", "data__partition_by": "who", "data__clients": 0, "data__public_fraction": 0.0}
    _, data = make_dataset(path, tiny_teacher, cache, **keys)
    assert (data.clients, data.eligible.tolist(), data.train_sizes.tolist()) == (2, [0], [44, 0])
    assert len(data.shard(1)) == 0
    with pytest.raises(InputError, match=r"data.min-examples = 56: no client has that many of the 60 private"):
        make_dataset(path, tiny_teacher, cache, data__min_examples=56, **keys)


def test_no_text_is_both_public_and_private_or_trained_on_and_held_out(tiny_teacher, cache, tmp_path):
    """Every sentence occurs in several pairs, spelled in several ways."""
    texts, rng = make_sentences(150), np.random.default_rng(0)
    path = tmp_path / "pairs.csv"
    with path.open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["q", "p", "label"])
        for number in range(100):
            pair = [texts[number // 2], texts[100 + int(rng.integers(0, 50))] if number % 4 == 0 else f"own {number}"]
            writer.writerow([pair[0].upper() if number % 2 else pair[0], pair[1].replace(" ", "  "), number % 2])
    _, data = make_dataset(path, tiny_teacher, cache, data__text_columns="q,p", data__min_examples=2)
    columns = [[" ".join(text.lower().split()) for text in read(path, name)] for name in ("q", "p")]

    def of(rows):
        return {column[row] for column in columns for row in rows}

    train, heldout = rows_of(data)
    public, validated = data.public, {key.tobytes() for key in data.validation["validation"].keys}
    scored = [row for row, key in enumerate(data.train.keys) if key.tobytes() in validated]
    sides = [of(public), of(train), of(heldout), of(scored)]
    assert all(sides)
    assert sum(map(len, sides)) == len(set().union(*sides))


def test_a_handful_of_public_examples_leaves_none_for_validation(tiny_teacher, cache, tmp_path):
    path = make_reviews(tmp_path / "few.csv", 12)
    _, data = make_dataset(path, tiny_teacher, cache, data__clients=2, data__partition="iid", data__min_examples=2)
    assert len(data.public) == 2
    assert data.validation == {}


def test_ten_thousand_clients_are_prepared(tiny_teacher, cache, tmp_path):
    path = make_reviews(tmp_path / "many.csv", 25_000)
    keys = {"data__clients": 10_000, "data__min_examples": 2, "data__public_fraction": 0.0}
    _, data = make_dataset(path, tiny_teacher, cache, data__partition="iid", **keys)
    assert data.clients == len(data.eligible) == 10_000
    assert set(data.train_sizes) <= {1, 2}
    assert set(data.heldout_sizes) == {1}
    assert sorted(data.shards.order.tolist()) == list(range(25_000))
    _, skewed = make_dataset(path, tiny_teacher, cache, data__partition="dirichlet", data__alpha=0.5, **keys)
    assert skewed.clients == 10_000 > len(skewed.eligible)
    assert (skewed.train_sizes + skewed.heldout_sizes).sum() == len(skewed.shards.order) < 25_000


def test_a_dataset_that_is_not_here_is_said_so(cache):
    with pytest.raises(FileNotFoundError):
        open_dataset(cache, "0" * 32)


def test_a_folder_without_tokenizer_is_refused(tmp_path):
    with pytest.raises(InputError, match=f"{tmp_path}: no tokenizer"):
        load_tokenizer(tmp_path)


def test_tokens_are_cut_to_the_maximum_length(tiny_teacher):
    tokens = make_tokens(tiny_teacher, ["good " * 50, "good"], ["bad " * 50, "bad"], max_length=16)
    assert tokens.lengths(np.arange(2)).tolist() == [16, 5]


# --- texts, and the same examples in other pieces -----------------------------------------------


def test_a_row_keeps_its_text_through_the_cut(reviews, tiny_teacher, cache):
    _, data = make_dataset(reviews, tiny_teacher, cache)
    (column,) = data.train.texts
    assert column.all() == read(reviews)
    (scored,) = data.validation["validation"].texts
    assert set(scored.all()) < set(read(reviews))
    assert len(scored) == len(data.validation["validation"])


@pytest.fixture(scope="module")
def trimmed(tiny_teacher, tmp_path_factory):
    """A tokenizer that spells everything but single letters."""
    folder, tokenizer = tmp_path_factory.mktemp("trimmed"), load_tokenizer(tiny_teacher)
    fewest = piece_bounds(tokenizer)[0]
    save_trimmed(tiny_teacher, choose_pieces(tokenizer, np.zeros(len(tokenizer), np.int64), fewest), folder)
    return folder


def test_in_other_pieces_every_row_is_the_same_example(reviews, tiny_teacher, trimmed, cache):
    _, data = make_dataset(reviews, tiny_teacher, cache)
    own = in_pieces_of(trimmed, data, cache)
    tokenizer = load_tokenizer(trimmed)
    assert own.train.tokens.pad == tokenizer.pad_token_id
    assert own.train.tokens.typed == data.train.tokens.typed
    for split, before in ((own.train, data.train), (own.validation["validation"], data.validation["validation"])):
        assert len(split) == len(split.tokens) == len(before)
        assert split.labels is before.labels
        assert split.keys is before.keys
        texts = before.texts[0].all()
        for row in (0, 5, len(split) - 1):
            ids = split.tokens.batch(np.array([row]))["input_ids"][0].tolist()
            assert ids == tokenizer(texts[row], truncation=True, max_length=64)["input_ids"]
            assert len(ids) > before.tokens.lengths(np.array([row]))[0]
    assert (own.key, own.shards, own.task) == (data.key, data.shards, data.task)


def test_pairs_in_other_pieces_are_pairs(tiny_teacher, trimmed, cache, tmp_path):
    path, texts = tmp_path / "pairs.csv", make_sentences(60, longest=4)
    with path.open("w", newline="") as stream:
        rows = [(a, b, i % 2) for i, (a, b) in enumerate(zip(texts[::2], texts[1::2], strict=True))]
        csv.writer(stream).writerows([("q", "p", "label"), *rows])
    keys = {"data__text_columns": "q,p", "data__clients": 2, "data__min_examples": 2}
    _, data = make_dataset(path, tiny_teacher, cache, **keys)
    own, tokenizer = in_pieces_of(trimmed, data, cache), load_tokenizer(trimmed)
    for row in (0, 29):
        batch, expected = own.train.tokens.batch(np.array([row])), tokenizer(*rows[row][:2])
        assert {name: tensor[0].tolist() for name, tensor in batch.items()} == dict(expected)


def test_other_pieces_are_prepared_once(reviews, tiny_teacher, trimmed, cache, monkeypatch):
    _, data = make_dataset(reviews, tiny_teacher, cache, seed=3)
    first = in_pieces_of(trimmed, data, cache)
    monkeypatch.setattr(dataset, "tokenize", lambda *arguments: pytest.fail("tokenised again"))
    again = in_pieces_of(trimmed, data, cache)
    assert isinstance(again.train.tokens.ids, np.memmap)
    assert (np.asarray(again.train.tokens.ids) == first.train.tokens.ids).all()
