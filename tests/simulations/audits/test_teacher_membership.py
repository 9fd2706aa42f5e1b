"""The loss threshold on the teacher, with outputs that were planted."""

from types import SimpleNamespace

import numpy as np
import pytest

from common.partition import Shard
from common.progress import Silent
from common.texts import Texts
from simulations.audits.halves import draw_halves
from simulations.audits.teacher_membership import TeacherMembership

PRIVATE, PUBLIC = 400, 200
LABELS = np.append(np.arange(PRIVATE) % 2, np.arange(PUBLIC) % 3 - 1)  # a third of the public text has no label


def data():
    shard = Shard(np.arange(PRIVATE), np.arange(0))
    return SimpleNamespace(
        task=SimpleNamespace(name="text", regression=False, multi_label=False),
        eligible=np.array([0]),
        shard=lambda client: shard,
        public=np.arange(PRIVATE, PRIVATE + PUBLIC),
        train=SimpleNamespace(texts=(Texts.of([f"text {row}" for row in range(PRIVATE + PUBLIC)]),), labels=LABELS),
    )


def figures(sure):
    """The attack's rows, private and public, on a teacher that is surer of the label of some rows."""
    asked = []

    def teacher_logits(rows):
        asked.extend(rows)
        own = np.where(sure(rows), 5.0, np.random.default_rng(0).normal(0, 1, len(rows)))
        return np.where(LABELS[rows][:, None] == np.arange(2), own[:, None], 0.0).astype(np.float32)

    lab = SimpleNamespace(
        data=data(), config=SimpleNamespace(seed=0), worker=SimpleNamespace(teacher_logits=teacher_logits), folder=None
    )
    found = {row["variant"]: row for row in TeacherMembership().run(lab, Silent())}
    assert (LABELS[asked] >= 0).all()
    return found["private"], found["public"]


def test_what_the_teacher_was_tuned_on_is_found_and_private_text_is_not():
    private, public = figures(lambda rows: rows >= PRIVATE)
    assert public["auc"] == pytest.approx(1.0)
    assert public["members"] == (LABELS[PRIVATE:] >= 0).sum()
    assert public["others"] == PRIVATE
    assert private["auc"] == pytest.approx(0.5, abs=0.1)
    assert private["members"] + private["others"] == PRIVATE
    assert private["low"] <= private["chance"]


def test_a_teacher_that_had_seen_members_would_be_found_out():
    halves = draw_halves(data(), 1, 0, seed=0)
    members = halves.rows[halves.inside[0]]
    private, public = figures(lambda rows: np.isin(rows, members))
    assert private["auc"] == pytest.approx(1.0)
    assert public["auc"] < 0.5
