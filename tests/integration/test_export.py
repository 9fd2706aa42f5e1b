"""From a finished run to a prediction on a device that has no torch."""

import json
import os

import numpy as np

from clients.exported import open_export
from common.dataset import load_tokenizer
from common.inference import predict
from common.slim import load_slim
from common.tokens import tokenize
from tests.conftest import FP32
from tests.integration.conftest import ROOT

TEXTS = ["The staff was very kind.", "cold soup, rude service and a long wait " * 3]


def test_a_run_is_exported_and_predicts_without_torch(fedistill, tiny, tmp_path):
    width = ["student.heads=1", "student.neurons=20", "student.embedding-rank=8"]
    keys = [*tiny, *(part for key in width for part in ("-s", key))]
    done = fedistill("simulate", *keys, "--out", "run")
    assert done.returncode == 0, done.stderr
    done = fedistill("export", "run", "--format", "onnx", "--int8", "--out", "device", "--max-drop", "100")
    assert done.returncode == 0, done.stderr
    assert "fp32: accuracy " in done.stdout
    card = json.loads((tmp_path / "device" / "card.json").read_text())
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert card["student"]["sha256"] == summary["student_sha256"]
    assert card["tried"]["texts"] == summary["student"]["validation"]["n"]

    blocked = tmp_path / "blocked"
    blocked.mkdir()
    for name in ("torch", "transformers"):
        (blocked / f"{name}.py").write_text("raise RuntimeError('imported on a device that has none')")
    path = os.pathsep.join([str(blocked), str(ROOT)])
    done = fedistill("predict", "device", "--json", "--fp32", *TEXTS, env={"PYTHONPATH": path})
    assert done.returncode == 0, done.stderr
    answers = [json.loads(line) for line in done.stdout.splitlines()]

    model, tokenizer = load_slim(tmp_path / "run" / "slim")[0], load_tokenizer(tmp_path / "run" / "slim")
    tokens = tokenize((TEXTS,), tokenizer, 32, lambda amount: None)
    logits = predict(model, tokens, np.arange(2), FP32).astype(np.float64)
    wanted = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    assert np.abs([list(answer["probabilities"].values()) for answer in answers] - wanted).max() < 1e-4
    assert open_export(tmp_path / "device").spec.labels == ("negative", "positive")

    done = fedistill("predict", "device", "--bench", env={"PYTHONPATH": path})
    assert done.returncode == 0, done.stderr
    assert "one text at a time  p50 " in done.stdout
    (tmp_path / "device" / "model.int8.onnx").write_bytes(b"")
    done = fedistill("predict", "device", "a", env={"PYTHONPATH": path})
    assert done.returncode == 2
    assert "model.int8.onnx: SHA-256 e3b0c44298fc1c14..." in done.stderr
