"""Every mistake in data is found before the run, named by file, column and row, and never quoted."""

import csv
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from common.config import from_flat
from common.corpus import Table, labelled, load_corpus
from common.errors import InputError

PRIVATE = "Xaverl Zwockt Krebs"
ROWS = [("NA", "no"), ("null", "yes"), ("007", "no"), ("a, b\nc", "maybe"), ('say "x"', "yes"), ("  padded  ", "no")]


def write(path, names, rows):
    if path.suffix == ".csv":
        with path.open("w", newline="") as stream:
            csv.writer(stream).writerows([names, *[["" if value is None else value for value in row] for row in rows]])
    elif path.suffix == ".jsonl":
        path.write_text("\n".join(json.dumps(dict(zip(names, row, strict=True))) for row in rows))
    else:
        columns = zip(*rows, strict=True)
        pq.write_table(pa.table({name: list(column) for name, column in zip(names, columns, strict=True)}), path)
    return path


def text(path, **keys):
    flat = {"task": "text", "data.source": str(path)}
    return load_corpus(from_flat(flat | {key.replace("__", ".").replace("_", "-"): v for key, v in keys.items()}))


def refusal(call, *arguments, **keys):
    with pytest.raises(InputError) as caught:
        call(*arguments, **keys)
    message = str(caught.value)
    assert not any(word in message for word in PRIVATE.split())
    return message


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
def test_the_same_rows_give_the_same_table_from_every_format(tmp_path, suffix):
    rows = [(*row, owner) for row, owner in zip(ROWS, [3, 3, 7, 7, 11, 11], strict=True)]
    path = write(tmp_path / f"a{suffix}", ["text", "label", "who"], rows)
    corpus = text(path, data__partition="natural", data__partition_by="who")
    assert corpus.train.texts == (["NA", "null", "007", "a, b\nc", 'say "x"', "padded"],)
    assert corpus.train.labels.tolist() == [1, 2, 1, 0, 2, 1]
    assert corpus.train.owners == ["3", "3", "7", "7", "11", "11"]
    assert corpus.task.labels == ("maybe", "no", "yes")
    assert corpus.validation == {}


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
def test_classes_that_are_numbers_stand_in_numeric_order(tmp_path, suffix):
    path = write(tmp_path / f"a{suffix}", ["text", "label"], [("a", 10), ("b", 9), ("c", 2), ("d", 10), ("e", 0)])
    corpus = text(path)
    assert corpus.task.labels == ("0", "2", "9", "10")
    assert corpus.task.num_labels == 4
    assert corpus.train.labels.tolist() == [3, 2, 1, 3, 0]


def test_numeric_classes_that_are_equal_as_numbers_have_one_order(tmp_path):
    path = write(tmp_path / "a.csv", ["text", "label"], [("a", "07"), ("b", "7"), ("c", "007")])
    assert text(path).task.labels == ("007", "07", "7")


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
def test_rows_without_label_are_allowed_when_labels_have_no_weight(tmp_path, suffix):
    path = write(tmp_path / f"a{suffix}", ["text", "label"], [("a", 1), ("b", None), ("c", 2)])
    assert f"{path}: row 2 has no label" in refusal(text, path)
    table = text(path, distill__hard_weight=0.0).train
    assert table.labels.tolist() == [0, -1, 1]
    assert labelled(table.labels).tolist() == [True, False, True]


def test_two_columns_make_pairs(tmp_path):
    path = write(tmp_path / "a.csv", ["q", "p", "y"], [("a", "b", 0), ("c", "d", 1)])
    corpus = text(path, data__text_columns="p, q", data__label_column="y")
    assert corpus.train.texts == (["b", "d"], ["a", "c"])
    assert corpus.task.text_columns == ("p", "q")


def test_a_limit_draws_rows_by_the_seed_and_keeps_their_order(tmp_path):
    path = write(tmp_path / "a.csv", ["text", "label"], [(f"t{i:02}", i % 2) for i in range(50)])
    tables = {seed: text(path, data__limit=20, seed=seed).train for seed in (0, 0, 1)}
    first = tables[0].texts[0]
    assert len(first) == 20
    assert first == sorted(first)
    assert text(path, data__limit=20).train.texts[0] == first != tables[1].texts[0]


@pytest.mark.parametrize(
    "names, rows, expected",
    [
        (["body", "label"], [(PRIVATE, 0)], "no column 'text' among its 2"),
        (["text", "klass"], [(PRIVATE, 0)], "no column 'label' among its 2"),
        (["text", "label"], [("fine", 0), ("  ", 1), (PRIVATE, 0)], "row 2 has no text in text"),
        (["text", "label"], [(PRIVATE, PRIVATE), ("x", PRIVATE)], "data.label-column = 'label': 1 different values"),
        (["text", "label"], [(f"{PRIVATE} {i}", f"{PRIVATE} {i}") for i in range(300)], "300 different values"),
        (["text", "label"], [], "no rows"),
    ],
)
def test_what_is_wrong_in_a_file_is_named_and_never_quoted(tmp_path, names, rows, expected):
    path = write(tmp_path / "a.csv", names, rows)
    message = refusal(text, path)
    assert expected in message
    assert str(path) in message or "data.label-column" in message


def test_a_file_without_header_does_not_leak_its_first_row(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text(f'"{PRIVATE}",1\n"x",0\n')
    assert "is the first line a header, and the key right?" in refusal(text, path)


def test_a_missing_file_or_a_folder_is_refused_by_key(tmp_path):
    assert refusal(text, tmp_path / "no.csv").startswith("data.source = ")
    assert refusal(text, tmp_path).startswith("data.source = ")
    path = write(tmp_path / "a.csv", ["text", "label"], [("a", 0), ("b", 1)])
    assert refusal(text, path, data__validation="no.csv").startswith("data.validation = ")


def test_a_row_without_an_owner_belongs_to_nobody_and_is_refused(tmp_path):
    path = write(tmp_path / "a.jsonl", ["text", "label", "who"], [("a", 0, "x"), (PRIVATE, 1, None)])
    message = refusal(text, path, data__partition="natural", data__partition_by="who")
    assert f"{path}: row 2 has no value in who" in message
    assert "no column 'city'" in refusal(text, path, data__partition="natural", data__partition_by="city")


def test_a_pair_needs_both_texts(tmp_path):
    path = write(tmp_path / "a.csv", ["q", "p", "label"], [("a", "b", 0), (PRIVATE, "", 1)])
    assert "row 2 has no text in q or p" in refusal(text, path, data__text_columns="q,p")
    assert "data.text-columns" in refusal(text, path, data__text_columns="q,p,label")


def test_validation_may_only_hold_classes_of_train(tmp_path):
    train = write(tmp_path / "a.csv", ["text", "label"], [("a", "no"), ("b", "yes")])
    other = write(tmp_path / "b.csv", ["text", "label"], [("c", "yes"), ("d", PRIVATE)])
    message = refusal(text, train, data__validation=str(other))
    assert message == f"{other}: row 2: the label is none of the 2 classes of data.source"
    other = write(tmp_path / "c.csv", ["text", "label"], [("c", "yes"), ("d", "")])
    assert text(train, data__validation=str(other)).validation["validation"].labels.tolist() == [1, -1]


# GLUE


def glue(folder, task="sst2", *, skip=(), **changed):
    columns = {"sst2": {"sentence": ["a", PRIVATE], "label": [0, 1]}}
    columns["stsb"] = {"sentence1": ["a", "b"], "sentence2": ["c", PRIVATE], "label": [0.0, 5.0]}
    (folder / task).mkdir(parents=True, exist_ok=True)
    for split in {"train", "validation"} - set(skip):
        content = columns[task] | (changed if split == "train" else {})
        pq.write_table(pa.table(content), folder / task / f"{split}-00000-of-00001.parquet")
    return load_corpus(from_flat({"task": task, "data.source": str(folder)}))


def test_several_labels_are_no_name_of_a_class(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a", "label": "x"}\n{"text": "b", "label": ["x", "y"]}\n')
    assert "row 2 has several labels; set data.multi-label = true" in refusal(text, path)


def test_a_glue_folder_gives_train_and_validation(tmp_path):
    corpus = glue(tmp_path)
    assert corpus.train.texts == (["a", PRIVATE],)
    assert corpus.validation["validation"].labels.tolist() == [0, 1]
    assert glue(tmp_path, "stsb").train.labels.tolist() == [0.0, 5.0]
    assert glue(tmp_path, "stsb").train.labels.dtype == np.float64


@pytest.mark.parametrize(
    "task, changed, expected",
    [
        ("sst2", {"label": [0, 2]}, "row 2: the label is outside 0 to 1"),
        ("sst2", {"label": [-1, 1]}, "row 1: the label is outside 0 to 1"),
        ("sst2", {"label": [1, None]}, "row 2 of the column label is no number"),
        ("sst2", {"label": [1.0, 0.5]}, "row 2: the label is outside 0 to 1"),
        ("sst2", {"label": ["0", PRIVATE]}, "row 2 of the column label is no number"),
        ("stsb", {"label": [5.0, 5.1]}, "row 2: the label is outside 0 to 5"),
        ("stsb", {"label": [float("nan"), 1.0]}, "row 1: the label is outside 0 to 5"),
        ("sst2", {"sentence": ["a", " "]}, "row 2 has no text in sentence"),
        ("sst2", {"sentence": [PRIVATE, None]}, "row 2 has no text in sentence"),
    ],
)
def test_what_is_wrong_in_a_glue_file_is_named_and_never_quoted(tmp_path, task, changed, expected):
    assert expected in refusal(glue, tmp_path, task, **changed)


def test_what_is_missing_in_a_glue_folder_is_named(tmp_path):
    assert "no folder sst2 for task = sst2; found no folder" in refusal(
        load_corpus, from_flat({"task": "sst2", "data.source": str(tmp_path)})
    )
    assert "no train-*.parquet" in refusal(glue, tmp_path / "a", skip=("train",))
    assert "no validation-*.parquet" in refusal(glue, tmp_path / "b", skip=("validation",))
    assert "no such folder" in refusal(load_corpus, from_flat({"task": "sst2", "data.source": str(tmp_path / "c")}))


# Tables


def test_an_example_has_the_same_key_wherever_it_stands():
    table = Table((["a", "b", "a", "a"], ["x", "x", "x", "y"]), np.zeros(4, dtype=np.int64))
    keys = [row.tobytes() for row in Table.keys(table)]
    assert keys[0] == keys[2]
    assert len(set(keys)) == 3
    assert [row.tobytes() for row in Table.keys(table.take(np.array([3, 0])))] == [keys[3], keys[0]]


def test_where_one_text_ends_and_the_next_begins_is_part_of_the_key():
    table = Table((["a\x1fb", "a"], ["c", "b\x1fc"]), np.zeros(2, dtype=np.int64))
    assert table.keys()[0].tobytes() != table.keys()[1].tobytes()


def test_a_fingerprint_changes_with_texts_labels_owners_and_order():
    def table(texts=("a", "b"), labels=(0, 1), owners=("x", "y")):
        return Table((list(texts),), np.array(labels), owners and list(owners)).fingerprint()

    found = [table(), table(texts=("a", "c")), table(labels=(0, 0)), table(owners=("x", "x")), table(owners=None)]
    found.append(table(texts=("b", "a"), labels=(1, 0), owners=("y", "x")))
    assert len(set(found)) == len(found)
    assert table() == table()
