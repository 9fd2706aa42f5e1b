"""What a client's worker answers, what it writes down, and what it lets out."""

import json

import numpy as np
import pytest
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity

from clients import resident
from clients.resident import Answers, Audit, answer
from common.wire import pack_arrays, pack_reply

SECRET = 4815162342


@pytest.fixture(autouse=True)
def _inside_an_app(monkeypatch):
    """Flower makes messages inside apps only."""
    for name in ("_run_id", "_node_id", "_task_id"):
        monkeypatch.setattr(TaskIdentity, name, 1)


def context(tmp_path):
    return Context(run_id=1, node_id=1, node_config={"state": str(tmp_path)}, state=RecordDict(), run_config={})


def question(kind="train", **records):
    return Message(RecordDict(records), dst_node_id=1, message_type=kind)


def note(text):
    return ConfigRecord({"json": text})


def test_an_error_leaves_as_its_kind_and_place(tmp_path):
    found = answer(question(instruction=note("no instruction " * 99)), context(tmp_path))
    assert found.has_error()
    assert "no instruction" not in found.error.reason
    assert len(found.error.reason) <= 200


@pytest.mark.parametrize(
    ("name", "leaves"),
    [
        ("clients", True),
        ("update-12", True),
        ("student", True),
        ("texts", False),
        ("update-x", False),
        ("logits", False),
    ],
)
def test_records_of_other_kinds_stay_here(tmp_path, monkeypatch, name, leaves):
    monkeypatch.setattr(
        resident, "app", lambda message, context: Message(RecordDict({name: note("x")}), reply_to=message)
    )
    found = answer(question(), context(tmp_path))
    assert found.has_error() is (name in ("texts", "update-x", "logits"))


def test_the_same_question_gets_the_same_answer_without_work(tmp_path, monkeypatch):
    worked = []

    def work(message, context):
        worked.append(message)
        return Message(pack_reply({"update": {"w": np.full(3, len(worked))}}, []), reply_to=message)

    monkeypatch.setattr(resident, "app", work)
    answers = Answers()
    arrays = pack_arrays({"w": np.arange(4, dtype=np.float32)})
    first = answers.to(question(instruction=note("round 1"), student=arrays), context(tmp_path))
    again = answers.to(question(instruction=note("round 1"), student=arrays), context(tmp_path))
    assert len(worked) == 1
    assert again.content == first.content
    for other in (
        question(instruction=note("round 2"), student=arrays),
        question(instruction=note("round 2"), student=pack_arrays({"w": np.ones(4, np.float32)})),
        question("evaluate", instruction=note("round 2"), student=arrays),
    ):
        before = len(worked)
        answers.to(other, context(tmp_path))
        assert len(worked) == before + 1


def test_the_audit_has_kinds_shapes_bytes_and_hashes_and_no_content(tmp_path):
    audit = Audit(tmp_path / "audit.jsonl")
    message = question(instruction=note("a private sentence"), student=pack_arrays({"w": np.full((2, 3), SECRET)}))
    audit.note("received", message)
    audit.note("sent", answer(message, context(tmp_path)))
    first, second = map(json.loads, (tmp_path / "audit.jsonl").read_text().splitlines())
    assert (first["way"], first["kind"]) == ("received", "train")
    assert first["records"]["student"]["shapes"] == {"w": [2, 3]}
    assert first["records"]["student"]["bytes"] == len(message.content["student"]["w"].data)
    assert len(first["records"]["instruction"]["sha256"]) == 64
    assert (second["way"], "records" in second) == ("sent", False)
    assert "private" not in (tmp_path / "audit.jsonl").read_text()
    assert str(SECRET) not in (tmp_path / "audit.jsonl").read_text()


def test_whatever_goes_wrong_there_is_an_answer(tmp_path, monkeypatch):
    message = question(student=pack_arrays({"bundle": np.zeros(3, np.uint8)}))
    found = resident._handle(message, context(tmp_path), Answers(), Audit(tmp_path / "audit.jsonl"))
    assert found.error.reason.startswith("BundleError")
    full = Audit(tmp_path / "no folder" / "audit.jsonl")  # as a disk that takes no more
    found = resident._handle(question(instruction=note("x")), context(tmp_path), Answers(), full)
    assert found.error.reason.startswith("FileNotFoundError")
    assert str(tmp_path) not in found.error.reason
