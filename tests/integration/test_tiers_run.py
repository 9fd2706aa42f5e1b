"""A mixed federation through the command line: three sizes of student, exact for any number of workers."""

import json
from pathlib import Path

import numpy as np
from transformers import AutoModelForSequenceClassification

from common.config import load_config
from common.dataset import prepare_dataset
from common.device import choose_compute
from common.inference import predict
from common.progress import Silent
from common.store import cache_folder
from tests.integration.conftest import read_lines, read_summary

TIERS = (
    "-s", "student.layers=3", "-s", "student.tiers=1/1/8@0.4,2/1/16@0.3", "-s", "client.lr-decay=constant",
    "-s", "data.limit=400",
)  # fmt: skip


def test_three_tiers_have_the_same_bits_for_any_workers_and_after_a_stop(fedistill, tiny, tmp_path):
    done = fedistill("simulate", *tiny, *TIERS, "--out", "two")
    assert done.returncode == 0, done.stderr + (tmp_path / "two" / "log.txt").read_text()
    summary = read_summary(tmp_path / "two")
    rows = summary["tiers"]
    assert [(row["layers"], row["heads"], row["neurons"]) for row in rows] == [(1, 1, 8), (2, 1, 16), (3, 2, 32)]
    assert [row["params"] for row in rows] == sorted(row["params"] for row in rows)
    assert sum(row["clients"] for row in rows) == summary["clients"] - summary["clients_left_out"]
    assert sum(row["federated"]["n"] for row in rows) == summary["student"]["federated"]["n"]
    assert rows[-1]["validation"] == summary["student"]["validation"]
    assert rows[-1]["sha256"] == summary["student_sha256"]
    assert "1/1/8" in done.stdout and "2/1/16" in done.stdout
    check_scores(tmp_path / "two", rows)
    scored = [line for line in read_lines(tmp_path / "two") if line["phase"] == "evaluate"]
    assert [row["federated"] for row in scored[-1]["tiers"]] == [row["federated"] for row in rows]

    done = fedistill("export", "two", "--tier", "1", "--out", "small")
    assert done.returncode == 0, done.stderr
    card = json.loads((tmp_path / "small" / "card.json").read_text())
    assert (card["student"]["params"], card["student"]["sha256"]) == (rows[0]["params"], rows[0]["sha256"])
    assert card["tried"]["fp32"]["score"]["accuracy"] == rows[0]["validation"]["accuracy"]

    # one worker, stopped after round 1 and continued
    one = ("-s", "runtime.workers=1")
    assert fedistill("simulate", *tiny, *TIERS, *one, "-s", "rounds=1", "--out", "one").returncode == 0
    assert fedistill("simulate", *tiny, *TIERS, *one, "--out", "one", "--resume").returncode == 0
    again = read_summary(tmp_path / "one")
    assert [row["sha256"] for row in again["tiers"]] == [row["sha256"] for row in rows]
    assert [row["federated"] for row in again["tiers"]] == [row["federated"] for row in rows]


def test_tiers_that_hold_the_whole_change_no_bit(fedistill, tiny, tmp_path):
    keys = ("-s", "student.layers=2", "-s", "student.heads=1", "-s", "data.limit=300", "-s", "rounds=1")
    for name, tiers in (("plain", ""), ("tiers", "2/1/0@0.5")):
        done = fedistill("simulate", *tiny, *keys, "-s", f"student.tiers={tiers}", "--out", name)
        assert done.returncode == 0, done.stderr
    plain, mixed = (read_summary(tmp_path / name) for name in ("plain", "tiers"))
    assert (len(plain["tiers"]), len(mixed["tiers"])) == (0, 2)
    assert mixed["student_sha256"] == plain["student_sha256"]
    assert mixed["student"]["federated"] == plain["student"]["federated"]
    assert {row["sha256"] for row in mixed["tiers"]} == {plain["student_sha256"]}
    assert sum(row["federated"]["n"] for row in mixed["tiers"]) == plain["student"]["federated"]["n"]


def test_only_who_holds_the_whole_trains_it(fedistill, tiny, tmp_path):
    keys = ("-s", "student.tier-mode=exclusive", "-s", "rounds=1", "-s", "runtime.workers=1")
    done = fedistill("simulate", *tiny, *TIERS, *keys, "--out", "run")
    assert done.returncode == 0, done.stderr
    rows = read_summary(tmp_path / "run")["tiers"]
    trained = [line for line in read_lines(tmp_path / "run") if line["phase"] == "train"]
    assert [line["clients"] for line in trained] == [rows[-1]["clients"]]
    assert sum(row["clients"] for row in rows) > rows[-1]["clients"] > 0


def check_scores(run, rows):
    """Each tier's federated accuracy is that of its plain student on its own clients' held-out rows."""
    config = load_config(run / "config.toml")
    data = prepare_dataset(config, Path(config.teacher.model), cache_folder(""), Silent())
    compute = choose_compute(config.runtime.device, config.client.precision)
    tier_of = config.tier_of(data.clients)
    for tier, row in enumerate(rows):
        clients = [client for client in data.eligible if tier_of[client] == tier]
        assert row["clients"] == len(clients)
        held = np.concatenate([data.shard(int(client)).heldout for client in clients])
        folder = run / "tiers" / str(tier + 1) / "student" if tier < 2 else run / "student"
        model = AutoModelForSequenceClassification.from_pretrained(folder)
        right = predict(model, data.train.tokens, held, compute).argmax(axis=1) == data.train.labels[held]
        # filled up with zeros, heads may round otherwise
        assert abs(row["federated"]["accuracy"] - right.mean()) <= 1 / len(held)
