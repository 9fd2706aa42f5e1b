"""Secure aggregation in real Flower on Ray: the same student, and what the server is told on the way."""

import json

from tests.integration.conftest import read_lines, read_summary

CLIENTS = ("-s", "data.clients=4", "-s", "data.min-examples=2", "-s", "server.scores=cohort")


def test_a_run_under_masks_is_the_run_without_bit_for_bit(fedistill, tiny, tmp_path):
    for name, secure in (("plain", "false"), ("masked", "true")):
        done = fedistill("simulate", *tiny, *CLIENTS, "-s", f"privacy.secure-aggregation={secure}", "--out", name)
        assert done.returncode == 0, done.stderr + (tmp_path / name / "log.txt").read_text()
    plain, masked = (read_summary(tmp_path / name) for name in ("plain", "masked"))
    assert masked["student_sha256"] == plain["student_sha256"]
    assert masked["student"]["federated"] == plain["student"]["federated"]
    assert masked["teacher"]["federated"] == plain["teacher"]["federated"]
    assert masked["cost"]["examples"] == plain["cost"]["examples"]
    assert masked["faults"] == {"failed": 0, "rejected": 0, "late": 0, "retried": 0}
    ours, theirs = (
        [line for line in read_lines(tmp_path / name) if line["phase"] == "train"] for name in ("masked", "plain")
    )
    for one, other in zip(ours, theirs, strict=True):
        assert one["examples"] == other["examples"]
        assert abs(one["loss"] - other["loss"]) < 1e-6
    costs = [json.loads(line)["phase"] for line in (tmp_path / "masked" / "costs.jsonl").read_text().splitlines()]
    assert costs.count("keys") == costs.count("shares") == costs.count("unmask") == 4  # a sum each to train and score


def test_narrowing_by_importance_adds_up_under_masks_too(fedistill, tiny, tmp_path):
    for name, secure in (("plain", "false"), ("masked", "true")):
        keys = ("-s", "student.heads=1", "-s", "rounds=1", "-s", f"privacy.secure-aggregation={secure}")
        done = fedistill("simulate", *tiny, *CLIENTS, *keys, "--out", name)
        assert done.returncode == 0, done.stderr
    plain, masked = (read_summary(tmp_path / name) for name in ("plain", "masked"))
    assert masked["student_sha256"] == plain["student_sha256"]
