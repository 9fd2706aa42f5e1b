"""Predictions of a model so small that its logits are worked out by hand: the sum of its words' vectors."""

import hashlib
import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from tokenizers import Tokenizer, models, pre_tokenizers

from clients import predict
from clients.exported import BYTES, CARD, FLOATS, SPEC, TOKENIZER, Spec, open_export, probabilities
from common.errors import InputError
from common.progress import Silent

ROOT = Path(__file__).resolve().parents[2]
VECTORS = {"[PAD]": (9.0, 9.0), "[UNK]": (0.0, 0.0), "good": (0.0, 1.0), "bad": (2.0, 0.0), "very": (0.5, 0.5)}
CLASSES = Spec("tiny", "classes", ("no", "yes"), ("text",), 4, 1, 0, "right", 0, token_types=False)


def write_export(folder, spec, *, scale=1.0):
    """Logits are the sum of VECTORS over real words; of a number, the first of the two."""
    table = scale * np.asarray(list(VECTORS.values()), dtype=np.float32)[:, : spec.outputs]
    nodes = [
        helper.make_node("Gather", ["table", "input_ids"], ["vectors"]),
        helper.make_node("Cast", ["attention_mask"], ["mask"], to=TensorProto.FLOAT),
        helper.make_node("Unsqueeze", ["mask", "last"], ["real"]),
        helper.make_node("Mul", ["vectors", "real"], ["kept"]),
        helper.make_node("ReduceSum", ["kept", "middle"], ["logits"], keepdims=0),
    ]
    given = {"table": table, "last": np.asarray([2]), "middle": np.asarray([1])}
    graph = helper.make_graph(
        nodes, "sum",
        [helper.make_tensor_value_info(name, TensorProto.INT64, ["batch", "length"]) for name in spec.inputs],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", spec.outputs])],
        [numpy_helper.from_array(array, name) for name, array in given.items()],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    folder.mkdir(exist_ok=True)
    onnx.save(model, folder / FLOATS)
    vocabulary = {word: number for number, word in enumerate(VECTORS)}
    cutter = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))  # noqa: S106
    cutter.pre_tokenizer = pre_tokenizers.Whitespace()
    (folder / TOKENIZER).write_text(cutter.to_str())
    (folder / SPEC).write_text(json.dumps(spec.to_json()))
    sign(folder)
    return folder


def sign(folder):
    names = [path.name for path in folder.iterdir() if path.name != CARD]
    files = {name: {"sha256": hashlib.sha256((folder / name).read_bytes()).hexdigest()} for name in names}
    (folder / CARD).write_text(json.dumps({"files": files}))


@pytest.fixture
def folder(tmp_path):
    return write_export(tmp_path / "model", CLASSES)


def said(folder, rows, **given):
    return list(predict.predictions(open_export(folder, **given), rows, Silent()))


def test_a_class_and_its_probability_by_hand(folder):
    first, second, third = said(folder, [("very bad",), ("good",), ("good good bad unheard",)])
    assert first["label"] == "no"  # logits 2.5 and 0.5
    assert first["probability"] == pytest.approx(1 / (1 + math.exp(-2)))
    assert first["probabilities"] == pytest.approx({"no": 0.880797, "yes": 0.119203}, abs=1e-6)
    assert (second["label"], second["probability"]) == ("yes", pytest.approx(0.731059, abs=1e-6))
    assert third["probability"] == pytest.approx(0.5)  # 2 and 2: the first of equals
    assert predict.line_of(first, as_json=False) == "no\t0.8808"
    assert json.loads(predict.line_of(first, as_json=True)) == first


def test_batches_are_padded_without_a_trace_and_keep_the_order(folder):
    exported = open_export(folder)
    texts = ["good", "very bad", "bad bad bad bad", "", "very very"] * 40
    wanted = [[0, 1], [2.5, 0.5], [8, 0], [0, 0], [1, 1]] * 40
    for budget in (1, 6, 1000):
        assert exported.logits((texts,), budget).tolist() == wanted
    assert [each["label"] for each in said(folder, [("good",), ("bad",)] * 1500)] == ["yes", "no"] * 1500


def test_texts_are_read_as_they_were_learnt_from(tmp_path):
    folder = write_export(tmp_path / "model", CLASSES)
    cutter = Tokenizer(models.WordLevel({word: n for n, word in enumerate(VECTORS)}, unk_token="[UNK]"))  # noqa: S106
    cutter.pre_tokenizer = pre_tokenizers.Split(" ", "isolated")  # to which an outer space is a piece
    (folder / TOKENIZER).write_text(cutter.to_str())
    sign(folder)
    exported = open_export(folder)
    outer, inner, surrogate = exported.windows(([" very bad \n", "very  bad", "very bad\ud800"],))
    assert outer == surrogate == exported.windows((["very bad"],))[0]
    assert inner != outer


def test_a_file_without_a_header_is_not_quoted(tmp_path):
    table = tmp_path / "t.csv"
    table.write_text("my diagnosis is private,positive\nanother,negative\n")
    with pytest.raises(InputError, match="no column 'text' among its 2") as error:
        predict.rows_of_file(CLASSES, table, "")
    assert "diagnosis" not in str(error.value)


def test_a_long_text_is_cut_or_read_in_windows(tmp_path):
    text = "good good good good bad bad"  # windows of 4 that share 1: 4 good | good bad bad
    short = open_export(write_export(tmp_path / "one", CLASSES))
    assert short.logits(([text],)).tolist() == [[0, 4]]
    two = open_export(write_export(tmp_path / "two", replace(CLASSES, windows=2, stride=1)))
    assert two.logits(([text, "bad"],)).tolist() == [[(0 + 4) / 2, (4 + 1) / 2], [2, 0]]
    left = open_export(write_export(tmp_path / "left", replace(CLASSES, side="left")))
    assert left.logits(([text],)).tolist() == [[4, 2]]


def test_several_labels_and_scores(tmp_path):
    several = replace(CLASSES, kind="multi-label")
    (both, none) = said(write_export(tmp_path / "several", several, scale=2.0), [("very",), ("unheard",)])
    assert both["labels"] == ["no", "yes"]
    assert both["probabilities"]["yes"] == pytest.approx(1 / (1 + math.exp(-1)))
    assert predict.line_of(both, as_json=False) == "no,yes\tno 0.7311\tyes 0.7311"
    assert predict.line_of(none, as_json=False) == "-\tno 0.5000\tyes 0.5000"  # a half is not above it
    (score,) = said(write_export(tmp_path / "score", replace(CLASSES, kind="score", labels=())), [("very bad",)])
    assert score == {"score": 2.5}
    assert predict.line_of(score, as_json=False) == "2.5000"


def test_probabilities_of_extreme_logits_are_finite():
    found = probabilities(CLASSES, np.asarray([[1e4, -1e4]], dtype=np.float32))
    assert found.tolist() == [[1.0, 0.0]]
    assert probabilities(replace(CLASSES, kind="multi-label"), np.asarray([[-1e4, 1e4]])).tolist() == [[0.0, 1.0]]


PAIRS = replace(CLASSES, columns=("one", "two"))


def test_texts_from_everywhere(tmp_path):
    assert predict.rows_of_arguments(CLASSES, ["a b", "c"], pair=False) == [("a b",), ("c",)]
    assert predict.rows_of_arguments(PAIRS, ["a", "b", "c", "d"], pair=True) == [("a", "b"), ("c", "d")]
    assert list(predict.rows_of_lines(CLASSES, [b"a\tb\r\n", b"\n", "ü".encode()], pair=False)) == [("a\tb",), ("ü",)]
    assert list(predict.rows_of_lines(PAIRS, [b"a\tb\n"], pair=True)) == [("a", "b")]
    table = tmp_path / "t.csv"
    table.write_text('one,two,n\n"a, b",c,1\nd,e,2\n')
    assert predict.rows_of_file(PAIRS, table, "") == [("a, b", "c"), ("d", "e")]
    assert predict.rows_of_file(PAIRS, table, "two, one") == [("c", "a, b"), ("e", "d")]
    lines = tmp_path / "t.jsonl"
    lines.write_text('{"text": "a"}\n{"text": null}\n')
    with pytest.raises(InputError, match=r"t\.jsonl: row 2 has no text in column 'text'"):
        predict.rows_of_file(CLASSES, lines, "")


WRONG = {
    "odd": (lambda t: predict.rows_of_arguments(PAIRS, ["a"], pair=True), "TEXT: 1 texts cannot be read two by two"),
    "pair": (
        lambda t: predict.rows_of_arguments(PAIRS, ["a", "b"], pair=False),
        "reads two texts at a time (one, two)",
    ),
    "no pair": (lambda t: predict.rows_of_arguments(CLASSES, ["a"], pair=True), "one text at a time; leave --pair out"),
    "tabs": (lambda t: list(predict.rows_of_lines(PAIRS, [b"a\n"], pair=True)), "line 1 has 0 tabs; give two texts"),
    "bytes": (lambda t: list(predict.rows_of_lines(CLASSES, [b"\xff"], pair=False)), "line 1 is not UTF-8"),
    "file": (lambda t: predict.rows_of_file(CLASSES, t / "none.csv", ""), "none.csv: no such file"),
    "column": (
        lambda t: predict.rows_of_file(CLASSES, t, "b"),
        "no column 'b' among its 2; is the first line a header? name others with --text-columns",
    ),
    "columns": (lambda t: predict.rows_of_file(CLASSES, t, "text,n"), "--text-columns 'text,n': the task tiny has 1"),
    "twice": (
        lambda t: predict.read_rows(CLASSES, ["a"], t, "", pair=False, lines=None),
        "texts are given as arguments too",
    ),
    "no csv": (
        lambda t: predict.read_rows(CLASSES, [], None, "a", pair=False, lines=None),
        "--text-columns 'a': there is no --csv FILE",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_texts_that_do_not_fit_are_named(tmp_path, name):
    table = tmp_path / "t.csv"
    table.write_text("text,n\na,1\n")
    call, expected = WRONG[name]
    with pytest.raises(InputError) as error:
        call(table if name not in ("file",) else tmp_path)
    assert expected in str(error.value)


def test_the_small_model_is_taken_where_there_is_one(folder):
    (folder / BYTES).write_bytes((write_export(folder.parent / "doubled", CLASSES, scale=2.0) / FLOATS).read_bytes())
    sign(folder)
    assert open_export(folder).logits((["good"],)).tolist() == [[0, 2]]
    assert open_export(folder, fp32=True).logits((["good"],)).tolist() == [[0, 1]]
    (folder / FLOATS).unlink()  # a device needs one of them
    assert open_export(folder).logits((["good"],)).tolist() == [[0, 2]]


@pytest.mark.parametrize("name", [FLOATS, SPEC, TOKENIZER, "card.md"])
def test_a_file_with_one_other_byte_is_named(folder, name):
    (folder / "card.md").write_text("# card")
    sign(folder)
    data = bytearray((folder / name).read_bytes())
    data[len(data) // 2] ^= 1
    (folder / name).write_bytes(data)
    with pytest.raises(InputError, match=rf"{name}: SHA-256 \w+\.\.\., but card\.json says"):
        open_export(folder)


def test_what_is_no_export_is_said_to_be_none(folder):
    with pytest.raises(InputError, match=r"no card\.json in it; give a folder that `fedistill export` wrote"):
        open_export(folder.parent)
    (folder / FLOATS).unlink()
    with pytest.raises(InputError, match=r"model\.fp32\.onnx: No such file"):
        open_export(folder)
    (folder / CARD).write_text("[]")
    with pytest.raises(InputError, match="not a card"):
        open_export(folder)
    (folder / CARD).write_text('{"files": {"../elsewhere": {"sha256": ""}}}')
    with pytest.raises(InputError, match="outside of its folder"):
        open_export(folder)


@pytest.mark.parametrize("change", [{"format": 2}, {"kind": "?"}, {"labels": []}, {"max_length": 0}, {"columns": []}])
def test_a_specification_of_another_version_is_refused(folder, change):
    (folder / SPEC).write_text(json.dumps({**CLASSES.to_json(), **change}))
    sign(folder)
    with pytest.raises(InputError, match=r"model\.json: of another version"):
        open_export(folder)


def test_bench_measures_every_text_once(folder):
    found = predict.bench(open_export(folder), [("very good",), ("bad",)])
    assert (found["texts"], found["pieces"]) == (2, 1.5)
    assert 0 < found["p50_ms"] <= found["p95_ms"]
    assert found["texts_per_s"] > 0
    assert found["token_budget"] in predict.BENCH_BUDGETS
    assert "2, of 2 word pieces" in predict.bench_lines(found)  # 1.5, rounded to even
    assert predict.bench(open_export(folder), [])["texts"] == predict.BENCH_TEXTS


@pytest.fixture
def without_torch(tmp_path):
    """Call the command line in a process in which importing torch or transformers raises."""
    blocked = tmp_path / "blocked"
    blocked.mkdir()
    for name in ("torch", "transformers"):
        (blocked / f"{name}.py").write_text("raise RuntimeError('imported on a device that has none')")
    path = os.pathsep.join([str(blocked), str(ROOT)])

    def call(*arguments, given=""):
        return subprocess.run(
            [sys.executable, "-m", "simulations.cli", "predict", *map(str, arguments)],
            env={**os.environ, "PYTHONPATH": path}, input=given, capture_output=True, text=True, check=False,
        )  # fmt: skip

    return call


def test_the_command_needs_no_torch(folder, without_torch):
    done = without_torch(folder, "very bad", "good")
    assert (done.returncode, done.stdout) == (0, "no\t0.8808\nyes\t0.7311\n"), done.stderr
    done = without_torch(folder, "--json", given="good\n\nbad\n")
    assert [json.loads(line)["label"] for line in done.stdout.splitlines()] == ["yes", "no"]
    done = without_torch(folder, "--csv", "nowhere.csv")
    assert (done.returncode, done.stderr) == (2, "fedistill: --csv nowhere.csv: no such file\n")


def test_a_model_of_pairs_is_measured_without_texts(tmp_path, without_torch):
    done = without_torch(write_export(tmp_path / "pairs", PAIRS), "--bench", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["texts"] == predict.BENCH_TEXTS
