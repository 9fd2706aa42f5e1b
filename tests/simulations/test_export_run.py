"""A run's student is given out as it answers on validation text, or not at all."""

import json
import math
import resource
import shutil
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from clients.exported import BYTES, CARD, FLOATS, SPEC, open_export
from common.config import from_flat, load_config
from common.dataset import load_tokenizer
from common.errors import ExportFailed, InputError
from common.hashing import hash_file, hash_tensors
from common.inference import predict
from common.models import load_teacher
from common.progress import Lines, Silent
from common.slim import Shape, cut_student, load_slim, save_slim
from common.tasks import text_task
from simulations import cli
from simulations.export_card import spending_words
from simulations.export_run import ON_CPU, check_drop, check_options, export_run, open_student, read_run, summary_of
from simulations.export_trial import _check_classes
from tests.conftest import make_sentences, make_teacher, make_tokens, stir

LABELS = ("bad", "good")
TEXTS = make_sentences(300, seed=5)


def make_run(folder, spoil=lambda student: None):
    """A completed run whose validation labels are the answers of its own student, half of either class."""
    teacher = make_teacher(folder / "teacher")
    model = load_teacher(teacher)
    shape = Shape.whole(model.config, (0, 2))
    student = cut_student(model, shape)
    stir(student)
    spoil(student)
    tokens = make_tokens(teacher, TEXTS, max_length=32)
    logits = predict(student, tokens, np.arange(len(TEXTS)), ON_CPU)
    middle = float(np.median(logits[:, 1] - logits[:, 0]))
    with torch.no_grad():  # so that neither class is the usual answer
        student.classifier.bias += torch.tensor([middle, 0.0])
    logits = predict(student, tokens, np.arange(len(TEXTS)), ON_CPU)
    said = [LABELS[place] for place in logits.argmax(axis=1)]
    assert abs(said.count("good") - 150) < 30
    for name, rows in (("train", slice(0, 300)), ("validation", slice(0, 300))):
        lines = [f'"{text}",{label}' for text, label in zip(TEXTS[rows], said[rows], strict=True)]
        (folder / f"{name}.csv").write_text("\n".join(["text,label", *lines]) + "\n")
    run = folder / "run"
    save_slim(student, shape, run / "slim")
    load_tokenizer(teacher).save_pretrained(run / "slim")
    keys = {"task": "text", "data.source": str(folder / "train.csv"), "data.validation": str(folder / "validation.csv"),
            "data.clients": 3, "data.max-length": 32, "teacher.model": str(teacher)}  # fmt: skip
    (run / "config.toml").write_text(from_flat(keys).toml())
    scores = {"validation": {"accuracy": 1.0}, "federated": {"accuracy": math.nan}}
    summary = {
        "status": "completed", "task": "text", "metric": "accuracy", "seed": 0, "rounds": 2, "clients": 3, "cohort": 3,
        "teacher": {"params": 100, **scores}, "student": {"params": 40, "params_ratio": 0.4, **scores},
        "student_sha256": hash_tensors(student.state_dict()),
        "privacy": {"unit": "client", "epsilon": 2.5, "delta": 1e-5, "accountant": "rdp"},
    }  # fmt: skip
    (run / "summary.json").write_text(json.dumps(summary))
    return run


def test_a_tiers_student_has_figures_of_its_own():
    rows = [
        {"layers": n, "heads": n, "neurons": 8 * n, "params": 10 * n, "federated": {"accuracy": n / 10},
         "teacher": {"accuracy": 0.9}, "validation": {"accuracy": n / 20}, "sha256": str(n)}
        for n in (1, 2)
    ]  # fmt: skip
    every = {"accuracy": 0.15}
    shape = {"layers": [0, 2], "heads": 2, "neurons": 16, "pieces": 120, "rank": 0}
    student = {"params": 20, "params_ratio": 0.2, "federated": every, "validation": {"accuracy": 0.1}, "shape": shape}
    summary = {"teacher": {"params": 100, "federated": {"accuracy": 0.8}}, "student": student, "student_sha256": "2"}
    mixed = {**summary, "tiers": rows}
    small, whole = (summary_of(mixed, from_flat({}), tier) for tier in (1, 0))
    assert (small["student"]["params_ratio"], small["student_sha256"]) == (0.1, "1")
    assert small["student"]["shape"] == {"layers": [0], "heads": 1, "neurons": 8, "pieces": 120, "rank": 0}
    assert (small["student"]["federated"], small["student"]["validation"]) == ({"accuracy": 0.1}, {"accuracy": 0.05})
    assert small["teacher"]["federated"] == {"accuracy": 0.9}
    assert whole == summary_of(mixed, from_flat({}), 2)
    assert whole["student"] == {**student, "federated": {"accuracy": 0.2}}
    assert summary_of({**summary, "tiers": []}, from_flat({}), 0)["student"] == student
    for tiers, words in ((rows, "the run has tiers 1 to 2"), ([], "the run has no tiers")):
        with pytest.raises(InputError, match=f"--tier 3: {words}"):
            summary_of({**summary, "tiers": tiers}, from_flat({}), 3)


def test_a_student_that_no_client_has_scored_has_no_score_of_clients():
    summary = {"teacher": {"federated": {"accuracy": 0.8}}, "student": {"federated": {"accuracy": 0.7}}, "tiers": []}
    votes = from_flat({"server.strategy": "fedmd", "distill.hard-weight": 0.5})
    assert summary_of(summary, votes, 0)["student"]["federated"] == {}


def blow_up(student):
    """One inner state a thousand times as large as the others, which only 32-bit weights can bear."""
    with torch.no_grad():
        norm = student.bert.encoder.layer[-1].output.LayerNorm
        norm.weight[0], norm.bias[0] = 0.0, 1e5
        student.bert.pooler.dense.weight[:, 0] = 0.0


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("run"))


def export(run, out, **given):
    return export_run(run, out, progress=Silent(), **{"int8": False, "max_drop": 0.5, **given})


def test_a_card_claims_no_epsilon_of_another_federation():
    spent = {"unit": "client", "epsilon": 2.5, "delta": 1e-5, "accountant": "rdp"}
    assert spending_words(spent) == "epsilon 2.500 at delta 1e-05, unit client, accountant rdp."
    assert spending_words(spent | {"noise_cohort": 9}).startswith("Simulated, it holds for no client of this run: eps")


def test_an_export_answers_as_its_student_and_says_so(run, tmp_path):
    folder = export(run, tmp_path / "out", int8=True, max_drop=5.0)
    assert sorted(path.name for path in folder.iterdir()) == [
        "card.json", "card.md", "model.fp32.onnx", "model.int8.onnx", "model.json", "tokenizer.json",
    ]  # fmt: skip
    card = json.loads((folder / CARD).read_text())
    assert card["tried"]["on"] == "the public validation split"
    assert card["tried"]["texts"] == 300
    assert card["tried"]["fp32"]["score"]["accuracy"] == 1.0  # the labels are the student's own answers
    assert card["tried"]["fp32"]["largest_difference"] < 1e-4
    assert card["tried"]["int8_drop"] == pytest.approx(100 * (1 - card["tried"]["int8"]["score"]["accuracy"]))
    assert set(card["latency_ms"]) == {"teacher", "student", "fp32", "int8"}
    assert card["privacy"]["epsilon"] == 2.5
    assert card["student"]["federated"]["accuracy"] is None  # not defined
    assert card["bytes"]["int8"] == sum(
        (folder / name).stat().st_size for name in (BYTES, SPEC, "tokenizer.json")
    )  # what a device needs
    files = {path.name: hash_file(path) for path in folder.iterdir() if path.name != CARD}
    assert {name: entry["sha256"] for name, entry in card["files"].items()} == files
    text = (folder / "card.md").read_text()
    assert "epsilon 2.500 at delta 1e-05, unit client, accountant rdp." in text
    assert "| fp32 | " in text
    model = open_export(folder, fp32=True)
    assert model.spec.labels == LABELS
    wanted = predict(
        load_slim(run / "slim")[0], make_tokens(run / "slim", TEXTS, max_length=32), np.arange(300), ON_CPU
    )
    assert np.abs(model.logits((TEXTS,)) - wanted).max() < 1e-4


def test_eight_bits_that_cost_too_much_are_refused_and_nothing_is_left(tmp_path):
    run = make_run(tmp_path, blow_up)
    with pytest.raises(ExportFailed, match=r"--int8: accuracy is 0\.\d+, with fp32 1\.0000: \d+\.\d+ hundredths less"):
        export(run, tmp_path / "made" / "out", int8=True)
    assert list((tmp_path / "made").iterdir()) == []
    export(run, tmp_path / "made" / "out")  # fp32 alone is as good as ever
    assert not (tmp_path / "made" / "out" / BYTES).exists()


def test_where_no_text_is_at_hand_the_card_says_so(run, tmp_path):
    moved = tmp_path / "run"
    shutil.copytree(run, moved)
    keys = (moved / "config.toml").read_text()
    source = str(load_config(moved / "config.toml").data.source)
    teacher = str(load_config(moved / "config.toml").teacher.model)
    (moved / "config.toml").write_text(keys.replace(source, "gone.csv").replace(teacher, "./gone"))
    with (tmp_path / "log").open("w") as log:
        folder = export_run(moved, None, int8=True, max_drop=0.5, progress=Lines(log))
    assert folder == moved / "export"
    assert "no validation text is at hand: data.source = 'gone.csv'" in (tmp_path / "log").read_text()
    card, text = json.loads((folder / CARD).read_text()), (folder / "card.md").read_text()
    assert card["tried"]["on"] == "texts made by the program"
    assert card["tried"]["fp32"]["score"] == {}
    assert card["tried"]["fp32"]["largest_difference"] < 1e-4
    assert "No validation text was at hand: the export is not scored." in text
    assert "The teacher was not at hand." in text
    assert open_export(folder).spec.columns == ("text",)


def test_a_drop_is_in_hundredths_of_the_headline_score():
    check_drop("f1", {"f1": 0.81}, {"f1": 0.8051}, 0.5)
    check_drop("f1", {"f1": 0.8}, {"f1": 0.9}, 0.0)
    check_drop("pearson", {"pearson": math.nan}, {"pearson": math.nan}, 0.0)
    check_drop("f1", {}, {}, 0.0)
    with pytest.raises(ExportFailed, match=r"f1 is 0\.8049, with fp32 0\.8100: 0\.51 hundredths less"):
        check_drop("f1", {"f1": 0.81}, {"f1": 0.8049}, 0.5)
    with pytest.raises(ExportFailed, match="pearson is nan"):
        check_drop("pearson", {"pearson": 0.8}, {"pearson": math.nan}, 99.0)


def test_what_cannot_be_exported_is_named(run, tmp_path):
    broken = tmp_path / "run"
    with pytest.raises(InputError, match="no finished run there"):
        read_run(tmp_path)
    shutil.copytree(run, broken)
    summary = json.loads((broken / "summary.json").read_text())
    with pytest.raises(InputError, match=r"slim: its weights hash to \w+\.\.\., but summary\.json has 0+"):
        open_student(broken / "slim", {**summary, "student_sha256": "0" * 64})
    (broken / "slim" / "shape.json").write_text("{}")
    with pytest.raises(InputError, match="no student loads from it"):
        open_student(broken / "slim", summary)
    (broken / "slim" / "model.safetensors").unlink()
    with pytest.raises(InputError, match="slim: no student there"):
        open_student(broken / "slim", summary)
    (broken / "summary.json").write_text(json.dumps({**summary, "status": "interrupted"}))
    with pytest.raises(InputError, match=r"status = 'interrupted' in summary\.json; give a completed run"):
        read_run(broken)
    for given, expected in ((("tflite", 0.5), "--format 'tflite': give onnx"), (("onnx", -1.0), "--max-drop -1.0")):
        with pytest.raises(InputError, match=expected):
            check_options(*given)


def test_the_command_leaves_what_is_there_alone(run, tmp_path, capfd):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / FLOATS).write_text("mine")
    with pytest.raises(SystemExit) as left:
        cli.main(["export", str(run), "--out", str(tmp_path / "out")])
    assert left.value.code == 2
    assert capfd.readouterr().err.endswith("out: exists already; give a new folder\n")
    assert (tmp_path / "out" / FLOATS).read_text() == "mine"


def test_a_full_disk_leaves_nothing(run, tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))  # bytes of a file: less than the model has
    try:
        with pytest.raises(ExportFailed, match="out: cannot be written: File too large"):
            export(run, tmp_path / "made" / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list((tmp_path / "made").iterdir()) == []


@pytest.mark.parametrize(
    ("learnt", "there", "fits"),
    [
        (("bad", "good"), ("bad", "good"), True),
        (("LABEL_0", "LABEL_1"), ("bad", "good"), True),  # a head of before names them as it likes
        (("Bad", "good"), ("bad", "Good"), True),
        (("bad", "good", "ok"), ("good", "ok", "superb"), False),
        (("bad", "good"), ("good", "bad"), False),
        (("LABEL_0", "LABEL_1"), ("bad", "good", "ok"), False),
    ],
)
def test_a_file_that_was_written_over_with_other_classes_names_none_of_a_students(learnt, there, fits):
    student = SimpleNamespace(config=SimpleNamespace(id2label=dict(enumerate(learnt)), num_labels=len(learnt)))
    with nullcontext() if fits else pytest.raises(InputError, match=r"data\.source has other classes by now"):
        _check_classes(text_task(("text",), there, "label", False), student)
