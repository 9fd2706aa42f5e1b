"""General distillation through the command line: the first rounds on unlabelled text, then the task's."""

import shutil

import pytest

from tests.conftest import make_masked_teacher, make_teacher
from tests.integration.conftest import read_lines, read_summary

KEYS = (
    "-s", "rounds=4", "-s", "distill.general-rounds=2", "-s", "data.limit=300", "-s", "data.max-length=32",
    "-s", "student.layers=2", "-s", "client.lr=0.01", "-s", "server.keep-checkpoints=9",
    "-s", "student.vocabulary=110", "-s", "student.heads=1", "-s", "student.neurons=16",
)  # fmt: skip


def test_general_rounds_come_first_and_have_the_same_bits_for_any_workers_and_after_a_stop(fedistill, tmp_path):
    """A student with heads, neurons and a vocabulary of its own, of a random masked LM that is fine-tuned first."""
    keys = (*KEYS, "-s", f"teacher.model={make_masked_teacher(tmp_path / 'teacher')}")
    done = fedistill("simulate", *keys, "-s", "runtime.workers=2", "--out", "two")
    assert done.returncode == 0, done.stderr
    trained = [line for line in read_lines(tmp_path / "two") if line["phase"] == "train"]
    general, task = trained[:2], trained[2:]
    assert general[1]["loss"] < general[0]["loss"]
    for line in general:
        assert line["loss"] == pytest.approx(5 * line["soft_loss"] + 2 * line["mlm_loss"] + line["hidden_loss"])
        assert line["hard_loss"] == line["cls_loss"] == 0
    for line in task:
        assert line["loss"] == pytest.approx(0.7 * line["soft_loss"] + 0.3 * line["hard_loss"])
        assert line["mlm_loss"] == line["hidden_loss"] == 0
    assert all(not line["failed"] for line in trained)

    # one worker, then once more from the checkpoint after round 1, in the middle of the general rounds
    assert fedistill("simulate", *keys, "-s", "runtime.workers=1", "--out", "one").returncode == 0
    expected, first = (read_summary(tmp_path / name)["student_sha256"] for name in ("two", "one"))
    assert first == expected
    for number in (2, 3, 4):
        shutil.rmtree(tmp_path / "one" / "checkpoints" / f"round-{number:05}")
    again = fedistill("simulate", "--out", "one", "--resume")
    assert again.returncode == 0, again.stderr
    assert "continues after round 1" in again.stdout
    assert read_summary(tmp_path / "one")["student_sha256"] == expected


def test_a_teacher_that_guesses_no_masked_pieces_is_refused_before_anything_starts(fedistill, tmp_path):
    folder = make_teacher(tmp_path / "teacher", labels=0)
    done = fedistill("simulate", *KEYS, "-s", f"teacher.model={folder}", "--out", "run")
    assert done.returncode == 2
    assert "distill.general-rounds: teacher.model has no masked-LM head" in done.stderr
