"""Clients with tables of their own: one that knows its table alone finds what a simulation of all of them finds."""

import csv
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from common.config import changed, from_flat
from common.corpus import Corpus, Table, labelled, load_corpus, own_table
from common.dataset import prepare_dataset
from common.errors import InputError
from common.partition import cut_private, text_groups
from common.progress import Silent
from tests.conftest import make_sentences


def write(path: Path, rows: list[tuple[str, object]], header=("text", "label")) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(header)
        writer.writerows(rows)
    return path


@pytest.fixture
def files(tmp_path) -> Path:
    """Public text and three files of 12, 20 and 9 examples; the last two share their first text, twice."""
    texts = iter(make_sentences(200, seed=5))
    write(tmp_path / "public.csv", [(next(texts), ("bad", "good")[i % 2]) for i in range(30)])
    for name, count in (("a", 12), ("b", 19), ("c", 7)):
        rows = [(next(texts), ("bad", "good")[i % 2]) for i in range(count)]
        if name != "a":
            rows += [("the same words", "good"), ("The  same WORDS", "good")][: 1 if name == "b" else 2]
        write(tmp_path / "private" / f"{name}.csv", rows)
    (tmp_path / "private" / "notes.txt").write_text("not a table")
    return tmp_path


def config_of(files, **more):
    flat = {"task": "text", "data.source": str(files / "public.csv"), "data.private": str(files / "private")}
    return from_flat(flat | {"data.max-length": 32} | more)


def test_files_are_clients_in_the_order_of_their_names_and_the_source_is_public(files, tiny_teacher, tmp_path):
    data = prepare_dataset(config_of(files), tiny_teacher, tmp_path / "cache", Silent())
    assert data.clients == 3
    assert [len(data.shard(client)) for client in range(3)] == [12, 20, 9]
    public = set(np.asarray(data.public).tolist())
    assert public < set(range(30))  # the others are scored on
    assert len(data.validation["validation"]) == 30 - len(public)
    assert sorted(row for shard in data.shards for part in (shard.train, shard.heldout) for row in part) == list(
        range(30, 71)
    )
    assert data.heldout_sizes.tolist() == [2, 4, 2]  # a fifth


def test_a_client_by_itself_finds_the_same_cut_and_the_same_examples(files, tiny_teacher, tmp_path):
    config = config_of(files)
    together = prepare_dataset(config, tiny_teacher, tmp_path / "cache", Silent())
    corpus = load_corpus(config)
    for client, name in enumerate("abc"):
        table = own_table(files / "private" / f"{name}.csv", corpus.task, config)
        empty = Table(([],), table.labels[:0])
        alone = prepare_dataset(
            config_of(files, **{"data.private": "at-clients", "data.clients": 3}),
            tiny_teacher,
            tmp_path / "another cache",
            Silent(),
            Corpus(replace(corpus.task, validation=()), empty, {}, private={client: table}),
        )
        assert [len(alone.shard(other)) > 0 for other in range(3)] == [other == client for other in range(3)]
        for side in ("train", "heldout"):
            here, there = getattr(alone.shard(client), side), getattr(together.shard(client), side)
            assert np.array_equal(alone.train.keys[here], together.train.keys[there])
            assert np.array_equal(alone.train.labels[here], together.train.labels[there])
            lengths = alone.train.tokens.lengths(here), together.train.tokens.lengths(there)
            assert np.array_equal(*lengths)


def test_of_clients_elsewhere_the_server_knows_the_sizes_alone(files, tiny_teacher, tmp_path):
    config = config_of(files, **{"data.private": "at-clients", "data.clients": 4})
    corpus = replace(load_corpus(config), sizes={0: (10, 2), 3: (5, 1)})
    data = prepare_dataset(config, tiny_teacher, tmp_path / "cache", Silent(), corpus)
    assert data.train_sizes.tolist() == [10, 0, 0, 5]
    assert data.heldout_sizes.tolist() == [2, 0, 0, 1]
    assert data.eligible.tolist() == [0, 3]
    assert len(data.train) == 30


def test_the_public_part_of_a_run_of_real_clients_can_be_had_alone_and_no_simulation_begins(
    files, tiny_teacher, tmp_path
):
    from server.preparation import prepare

    config = config_of(files, **{"data.private": "at-clients", "data.clients": 4})
    data = prepare_dataset(config, tiny_teacher, tmp_path / "cache", Silent())
    assert len(data.validation["validation"]) == 6
    assert data.eligible.tolist() == []
    with pytest.raises(InputError, match="the private texts are with the clients; use `fedistill edge run`"):
        prepare(config, Silent())


def test_one_text_stays_on_one_side_and_small_clients_are_left_out():
    groups = {0: np.array([0, 0, 1, 2, 3, 4, 5, 6, 7, 0]), 2: np.arange(3)}
    shards = cut_private(groups, 3, 0.3, 4, seed=1)
    assert shards.train_sizes.tolist() == [7, 0, 0]
    train, heldout = shards[0].train, shards[0].heldout
    assert not set(groups[0][train]) & set(groups[0][heldout])
    assert sorted([*train, *heldout]) == list(range(10))
    with_another = cut_private({**groups, 1: np.arange(8)}, 3, 0.3, 4, seed=1)
    assert np.array_equal(with_another[0].heldout, heldout)
    assert with_another[1].train.min() >= 10  # rows lie one behind the other


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"data.private": "nowhere"}, "no such folder"),
        ({"data.clients": 2}, "data.private holds 3 files; give 0 or 3"),
        ({"data.partition": "iid"}, "data.partition = 'iid' does not fit that"),
        ({"data.limit": 10}, "data.limit = 10 does not fit that"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(files, keys, words):
    with pytest.raises(InputError, match=words):
        load_corpus(config_of(files, **keys))


def test_an_empty_folder_is_refused(files, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="no file of examples in it"):
        load_corpus(config_of(files, **{"data.private": str(tmp_path / "empty")}))


@pytest.mark.parametrize(
    ("rows", "header", "words"),
    [
        ([("secret words", "ugly")], ("text", "label"), r"row 1: the label is none of the 2 classes"),
        ([("secret words", "")], ("text", "label"), r"row 1 has no label"),
        ([("", "good")], ("text", "label"), r"row 1 has no text in text"),
        ([("secret words", "good")], ("review", "label"), r"no column 'text' among its 2"),
    ],
)
def test_a_clients_file_is_checked_and_not_quoted(files, tmp_path, rows, header, words):
    config = config_of(files)
    task = load_corpus(config).task
    path = write(tmp_path / "mine.csv", rows, header)
    with pytest.raises(InputError, match=words) as error:
        own_table(path, task, config)
    assert "secret" not in str(error.value)
    assert "ugly" not in str(error.value)


def test_a_glue_tasks_file_has_its_columns(tmp_path):
    config = from_flat({"task": "stsb", "data.private": "at-clients", "data.clients": 1})
    from common.tasks import GLUE

    path = write(tmp_path / "mine.csv", [("a", "b", "2.5"), ("c", "d", 5)], ("sentence1", "sentence2", "label"))
    table = own_table(path, GLUE["stsb"], config)
    assert table.texts == (["a", "c"], ["b", "d"])
    assert table.labels.tolist() == [2.5, 5.0]
    assert text_groups(table).tolist() == [0, 1]
    write(path, [("a", "b", "2.5"), ("c", "d", "")], ("sentence1", "sentence2", "label"))
    with pytest.raises(InputError, match=r"row 2 has no label; give one, or set distill\.hard-weight = 0"):
        own_table(path, GLUE["stsb"], config)
    taught = changed(config, {"distill.hard-weight": 0.0, "distill.weighting": "constant"})
    assert labelled(own_table(path, GLUE["stsb"], taught).labels).tolist() == [True, False]
    write(path, [("a", "1"), ("b", "")], ("sentence", "label"))
    assert own_table(path, GLUE["cola"], changed(taught, {"task": "cola"})).labels.tolist() == [1, -1]
    write(path, [("a", "b", "6")], ("sentence1", "sentence2", "label"))
    with pytest.raises(InputError, match="the label is outside 0 to 5"):
        own_table(path, GLUE["stsb"], config)
