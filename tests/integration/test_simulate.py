"""A whole federation through the command line, on Flower and Ray, with tiny random models."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
import torch
from sklearn.metrics import accuracy_score
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from common.config import load_config
from common.corpus import load_corpus
from common.dataset import prepare_dataset
from common.device import choose_compute
from common.inference import predict
from common.progress import Silent
from common.store import cache_folder
from tests.integration.conftest import read_lines, read_summary

CONTRACT = {
    "status", "task", "metric", "seed", "rounds", "clients", "cohort", "teacher", "student", "retention", "privacy",
    "cost", "faults", "student_sha256", "versions",
}  # fmt: skip


@pytest.fixture(scope="module")
def bits() -> dict[str, str]:
    """Students of equal runs, by how they were run."""
    return {}


def test_a_run_leaves_the_folder_that_the_contract_names(fedistill, tiny, tmp_path, tiny_teacher, bits):
    done = fedistill("simulate", *tiny, "--out", "run", env={"FEDISTILL_CACHE": str(tmp_path / "cold")})
    assert done.returncode == 0, done.stderr + (tmp_path / "run" / "log.txt").read_text()
    run = tmp_path / "run"
    names = {path.name for path in run.iterdir()}
    assert names >= {
        "config.toml",
        "metrics.jsonl",
        "costs.jsonl",
        "summary.json",
        "checkpoints",
        "student",
        "report.html",
        "shards.json",
        "log.txt",
    }
    summary = read_summary(run)
    assert set(summary) >= CONTRACT
    assert summary["status"] == "completed"
    assert summary["faults"] == {"failed": 0, "rejected": 0, "late": 0, "retried": 0}
    assert summary["cost"]["bytes_up"] > 0
    assert summary["cost"]["examples"] > 0
    assert load_config(run / "config.toml").rounds == 2
    phases = [(line["round"], line["phase"]) for line in read_lines(run)]
    assert phases == [
        (0, "validation"),
        *((1, name) for name in ("teach", "train", "evaluate", "validation")),
        *((2, name) for name in ("train", "evaluate", "validation")),
    ]
    check_costs(run, summary)
    assert max(len(line) for line in done.stdout.splitlines()) <= 100
    assert "Traceback" not in done.stderr + (run / "log.txt").read_text()
    bits["two workers, cold cache"] = summary["student_sha256"]
    check_federated_scores(run, tmp_path / "cold")
    check_student_opens(run)


def check_costs(run: Path, summary: dict[str, Any]) -> None:
    """A line for each phase with clients; times and bytes stand there and nowhere in metrics.jsonl."""
    lines = [json.loads(line) for line in (run / "costs.jsonl").read_text().splitlines()]
    assert [(line["round"], line["phase"]) for line in lines] == [
        *((1, name) for name in ("teach", "train", "evaluate")),
        *((2, name) for name in ("train", "evaluate")),
    ]
    for line in lines:
        assert line["seconds"] > 0
        assert (line["recovered"], line["surplus"]) == ([], [])
        assert len(line["busy"]) == 2  # a share of the time for each worker
    for name in ("bytes_up", "bytes_down"):
        assert summary["cost"][name] == sum(line[name] for line in lines)
    told = {name for line in read_lines(run) for name in line}
    assert not told & {"seconds", "bytes_up", "bytes_down", "busy", "recovered"}


def check_federated_scores(run: Path, cache: Path) -> None:
    """The exact score from sums equals scikit-learn's on the pooled predictions."""
    config = load_config(run / "config.toml")
    data = prepare_dataset(config, Path(config.teacher.model), cache_folder(str(cache)), Silent())
    held = np.concatenate([data.shard(int(client)).heldout for client in data.eligible])
    labels = data.train.labels[held]
    compute = choose_compute(config.runtime.device, config.client.precision)
    summary = read_summary(run)
    for who, folder in (("student", run / "student"), ("teacher", Path(config.teacher.model))):
        model = AutoModelForSequenceClassification.from_pretrained(folder)
        pooled = predict(model, data.train.tokens, held, compute).argmax(axis=1)
        assert abs(summary[who]["federated"]["accuracy"] - accuracy_score(labels, pooled)) < 1e-9
        assert summary[who]["federated"]["n"] == len(held)


def check_student_opens(run: Path) -> None:
    """Plain transformers, nothing of ours, gives the logits of the run's last checkpoint."""
    import safetensors.torch

    model = AutoModelForSequenceClassification.from_pretrained(run / "student").eval()
    tokenizer = AutoTokenizer.from_pretrained(run / "student")
    logits = model(**tokenizer(["the meal was not cold", "a great film"], return_tensors="pt", padding=True)).logits
    weights = safetensors.torch.load_file(run / "checkpoints" / "round-00002" / "student.safetensors")
    for name, tensor in model.state_dict().items():
        if name in weights:
            assert torch.equal(tensor, weights[name]), name
    assert torch.isfinite(logits).all()


@pytest.mark.parametrize("workers", [1, 2, 4])
def test_the_student_has_the_same_bits_for_any_number_of_workers(fedistill, tiny, tmp_path, bits, workers):
    done = fedistill("simulate", *tiny, "-s", f"runtime.workers={workers}", "--out", "run")
    assert done.returncode == 0, done.stderr
    bits[f"{workers} workers, cold, then warm cache"] = read_summary(tmp_path / "run")["student_sha256"]
    assert len(set(bits.values())) == 1, bits


def test_rounds_that_are_not_scored_change_nothing_but_the_scores(fedistill, tiny, tmp_path):
    keys = [*tiny, "-s", "rounds=5"]
    done = fedistill("simulate", *keys, "-s", "server.scores-every=2", "--out", "rare")
    assert done.returncode == 0, done.stderr
    assert fedistill("simulate", *keys, "--out", "each").returncode == 0
    rare, each = ({(line["round"], line["phase"]): line for line in read_lines(tmp_path / name)}
                  for name in ("rare", "each"))  # fmt: skip
    missing = [(number, phase) for number in (1, 3) for phase in ("evaluate", "validation")]
    assert each == rare | {one: each[one] for one in missing}
    assert sorted(set(each) - set(rare)) == missing
    assert read_summary(tmp_path / "rare")["student_sha256"] == read_summary(tmp_path / "each")["student_sha256"]
    told = [line for line in done.stdout.splitlines() if re.match(r"\s*round [1-5]/5: ", line)]
    assert ["accuracy" in line for line in told] == [False, True, False, True, True], told


def test_a_round_equals_the_same_clients_trained_without_flower(fedistill, tiny, tmp_path):
    from clients.worker import Worker
    from common.fixed_point import mean
    from common.wire import Instruction
    from server.aggregation import RunningSum
    from server.assignment import pick_cohort
    from server.preparation import prepare
    from server.rules import fedavg

    done = fedistill("simulate", *tiny, "-s", "server.cohort=5", "-s", "rounds=1", "--out", "run")
    assert done.returncode == 0, done.stderr
    config = load_config(tmp_path / "run" / "config.toml")
    federation = prepare(config, Silent())
    teacher, data = federation.teacher, federation.data
    sizes = {int(client): int(data.train_sizes[client]) for client in data.eligible}
    weights = federation.weights()
    total = RunningSum.zeros({name: array.shape for name, array in weights.items()})
    threads = torch.get_num_threads()
    try:
        needs = {
            "teacher": str(teacher.folder), "teacher_hash": teacher.hash, "dataset": data.key,
            "student": federation.pupil.key, "student_hash": federation.pupil.hash,
        }  # fmt: skip
        worker = Worker(config, **needs)
        for client in reversed(pick_cohort(data.eligible, 5, config.seed, 1)):  # another order
            asked = Instruction("0" * 16, 1, "", (client,), (0,), **needs)
            groups, lines = worker.train(weights, asked, lambda count: None)
            total.fold(groups["update"], lines, sizes)
    finally:
        torch.set_num_threads(threads)
    [line] = [line for line in read_lines(tmp_path / "run") if line["phase"] == "train"]
    assert (line["clients"], line["examples"]) == (5, total.weight)
    update = {name: mean(array, total.weight) for name, array in total.totals.items()}
    saved = safetensors.numpy.load_file(tmp_path / "run" / "checkpoints" / "round-00001" / "student.safetensors")
    for name, array in fedavg(weights, update, {}, config.server).items():
        assert np.array_equal(array, saved[name]), name


def test_a_bare_encoder_is_fine_tuned_and_a_csv_with_four_classes_is_learnt(fedistill, tmp_path):
    from tests.conftest import make_teacher

    make_teacher(tmp_path / "encoder", labels=0, layers=2)
    rows = ["text,topic"]
    topics = {"food": "meal", "phones": "battery", "films": "story", "hotels": "room"}
    for i in range(100):
        rows += [f"the {word} was good {i} times {i * 7 % 13},{topic}" for topic, word in topics.items()]
    (tmp_path / "topics.csv").write_text("\n".join(rows) + "\n")
    keys = {
        "task": "text", "data.source": "topics.csv", "data.label-column": "topic", "teacher.model": "encoder",
        "teacher.lr": 0.01, "teacher.epochs": 40, "teacher.token-budget": 256, "data.clients": 4, "data.alpha": 0.5,
        "student.layers": 1, "rounds": 3, "client.lr": 0.01, "client.epochs": 3, "client.token-budget": 128,
        "data.max-length": 48, "data.public-fraction": 0.4,
    }  # fmt: skip
    settings = [part for key, value in keys.items() for part in ("-s", f"{key}={value}")]
    done = fedistill("simulate", *settings, "--out", "run")
    assert done.returncode == 0, done.stderr
    summary = read_summary(tmp_path / "run")
    assert set(summary["student"]["federated"]) == {"accuracy", "f1_macro", "matthews", "n"}
    assert summary["student"]["federated"]["accuracy"] > 0.6  # the majority class is a quarter
    assert summary["student"]["validation"]["n"] > 0  # a part of the public split that nobody trained on
    names = json.loads((tmp_path / "run" / "student" / "config.json").read_text())["id2label"]
    assert names == {"0": "films", "1": "food", "2": "hotels", "3": "phones"}


def test_unlabelled_clients_learn_from_the_teacher_alone(fedistill, tiny, tmp_path):
    corpus = load_corpus(load_config(None, ["data.limit=300"]))
    lines = [
        json.dumps({"text": text, **({"label": int(label)} if i % 3 == 0 else {})})
        for i, (text, label) in enumerate(zip(corpus.train.texts[0], corpus.train.labels, strict=True))
    ]
    (tmp_path / "some.jsonl").write_text("\n".join(lines) + "\n")
    text = ["-s", "task=text", "-s", "data.source=some.jsonl", "-s", "data.clients=3", "-s", "rounds=1"]
    refused = fedistill("simulate", *tiny, *text, "--out", "run")
    assert refused.returncode == 2
    assert re.search(r"row 2 has no label.*distill.hard-weight = 0", refused.stderr)
    done = fedistill("simulate", *tiny, *text, "-s", "distill.hard-weight=0", "--out", "run")
    assert done.returncode == 0, done.stderr
    scored = read_summary(tmp_path / "run")["student"]["federated"]["n"]
    assert 0 < scored < 60  # only labelled held-out rows are scored
