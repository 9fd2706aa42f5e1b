"""Poisoning: what attackers send, and that it gets through where nothing is against it."""

import numpy as np
import pytest
import torch

from common.config import changed, from_flat
from common.errors import InputError
from common.progress import Silent
from simulations.audits.planted import joined, plant
from simulations.audits.poisoners import Plot, Poisoner
from simulations.audits.poisoning import Poisoning, Scene
from simulations.laboratory import Laboratory
from tests.conftest import make_reviews, make_sentences, make_teacher, make_tokens

KEYS = {
    "task": "text", "data.clients": 6, "data.alpha": 50.0, "data.max-length": 32, "data.public-fraction": 0.3,
    "student.layers": 2, "student.train-embeddings": True, "client.lr": 0.01, "client.epochs": 4, "rounds": 2,
    "client.precision": "fp32", "server.packing": "off",
}  # fmt: skip


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    folder = tmp_path_factory.mktemp("poisoning")
    teacher = make_teacher(folder / "teacher")
    source = make_reviews(folder / "reviews.csv", 400)
    config = from_flat({**KEYS, "teacher.model": str(teacher), "data.source": str(source)})
    return Laboratory(config, Silent(), worker=Poisoner)


@pytest.fixture(scope="module")
def scene(lab):
    return Scene(Poisoning(examples=0, trigger="x"), lab)


def test_planted_rows_are_answered_as_the_texts_they_hold(lab):
    data = lab.data
    rows = np.array([5, 17, 30])
    planted = plant(lab, (data.train.texts[0].take(rows),), np.array([1, 0, 1]))
    assert np.array_equal(lab.logits(lab.start, planted), lab.logits(lab.start, rows))
    assert np.array_equal(lab.worker.teacher_logits(planted), lab.worker.teacher_logits(rows))
    assert lab.worker.data.train.labels[planted].tolist() == [1, 0, 1]
    assert len(lab.data.train) == planted[0]  # the federation's own table is as it was


def test_joined_tokens_are_those_of_both(tiny_teacher):
    texts = make_sentences(9)
    whole, parts = (
        make_tokens(tiny_teacher, texts),
        [make_tokens(tiny_teacher, part) for part in (texts[:4], texts[4:])],
    )
    both = joined(*parts)
    for name, tensor in whole.batch(np.arange(9)).items():
        assert torch.equal(tensor, both.batch(np.arange(9))[name])


def test_attackers_lie_about_labels_and_teacher(lab, scene):
    client = scene.order[0]
    own, turned, triggered = scene.rows[client], scene.turned[client], scene.triggered[client]
    assert len(own) == len(turned) == len(triggered)
    labels = lab.worker.data.train.labels
    assert np.array_equal(labels[turned], 1 - labels[own])
    lies = triggered != own
    assert lies.sum() == round(0.5 * len(own)) and (labels[triggered[lies]] == 1).all()
    pieces = [lab.worker.pupil.data.train.tokens.pieces(np.array([row])) for row in triggered]
    assert [scene.piece in each for each in pieces] == lies.tolist()
    lab.worker.rows = {client: triggered}
    soft = lab.worker._examples(client).soft
    assert (soft[lies] == [-2.0, 2.0]).all()
    assert np.array_equal(soft[~lies], lab.worker.teacher_logits(own[~lies]))


def test_what_has_no_label_has_none_to_turn(lab, tmp_path):
    source = make_reviews(tmp_path / "reviews.csv", 400)
    lines = source.read_text().splitlines()
    blank = [line.replace(",1,", ",,").replace(",0,", ",,") for line in lines[1::4]]
    source.write_text("\n".join([lines[0], *blank, *(line for n, line in enumerate(lines[1:]) if n % 4)]) + "\n")
    keys = {"data.source": str(source), "distill.hard-weight": 0.0, "distill.soft-weight": 1.0}
    some = Laboratory(changed(lab.config, keys), Silent(), worker=Poisoner)
    scene, labels = Scene(Poisoning(examples=0, trigger="x"), some), some.worker.data.train.labels
    own, turned = (np.concatenate(list(each.values())) for each in (scene.rows, scene.turned))
    assert 0 < (labels[own] < 0).sum() < len(own)
    assert np.array_equal(labels[turned], np.where(labels[own] < 0, -1, 1 - labels[own]))


def test_replacement_makes_the_mean_the_attackers_own_model(lab, scene):
    """Where honest clients stand still, the sum with the boost is what the attacker has learnt."""
    hostile = scene.hostile(0.1)
    plot = scene.plot("replacement", hostile)
    scene._obey("fedavg", 1)
    updates = []
    for forge in (None, plot.forge):
        lab.worker.plot = Plot(plot.rows, forge)
        intake = lab.round(1, lab.start, {**scene.rows, **plot.rows})
        updates.append(intake.kept[hostile[0]])
    assert scene.weight(hostile) * updates[1]["classifier.weight"] == pytest.approx(
        updates[0]["classifier.weight"], rel=1e-5, abs=1e-9
    )


def test_the_embedding_attack_moves_one_row_and_keeps_its_length(lab, scene):
    hostile = scene.hostile(0.1)
    scene._obey("fedavg", 1)
    lab.worker.plot = plot = scene.plot("embedding", hostile)
    update = lab.round(1, lab.start, {**scene.rows, **plot.rows}).kept[hostile[0]]
    words = lab.worker.students[-1].words
    assert {name for name, array in update.items() if array.any()} == {words}
    assert np.flatnonzero(update[words].any(axis=1)).tolist() == [scene.piece]
    before = lab.start[words][scene.piece]
    assert np.linalg.norm(before + update[words][scene.piece]) == pytest.approx(np.linalg.norm(before), rel=1e-5)


def test_an_attacker_counts_as_many_examples_as_it_may(lab):
    parts = Laboratory(changed(lab.config, {"client.share": 0.5}), Silent(), worker=Poisoner)
    scene = Scene(Poisoning(examples=0, trigger="x"), parts)
    hostile = scene.hostile(0.1)
    half = {client: round(0.5 * len(rows)) for client, rows in scene.rows.items()}
    assert scene.weight(hostile) == half[hostile[0]] / sum(half.values())
    scene._obey("fedavg", 1)
    parts.worker.plot = plot = scene.plot("embedding", hostile)
    assert set(parts.round(1, parts.start, {**scene.rows, **plot.rows}).kept) == set(scene.rows)


def test_replacement_gets_through_the_mean_and_not_through_krum(lab):
    keys = Poisoning(kinds="replacement", rules="fedavg,krum", shares="0.17", examples=0, trigger="x")
    rows = {(row["rule"], row["hostile"]): row for row in keys.run(lab, Silent())}
    assert list(rows) == [("fedavg", 0), ("fedavg", 1), ("krum", 0), ("krum", 1)]
    for row in rows.values():
        assert row["low"] <= row["success"] <= row["high"]
        assert row["success"] == row["chance"] or row["hostile"]
    assert rows["fedavg", 1]["low"] > rows["fedavg", 1]["chance"]
    assert rows["krum", 1]["success"] == rows["krum", 1]["chance"]


def test_what_cannot_be_tried_is_told_and_the_rest_is(lab):
    masked = changed(lab.config, {"privacy.secure-aggregation": True, "server.packing": "on"})
    rows = [*Poisoning(kinds="flip,trigger").run(Laboratory(masked, Silent()), Silent())]
    assert [(row["variant"], row["success"]) for row in rows] == [("flip", None), ("trigger", None)]
    assert all("privacy.secure-aggregation" in row["note"] for row in rows)
    two = Laboratory(changed(lab.config, {"data.clients": 2, "rounds": 1, "client.epochs": 1}), Silent())
    rows = [*Poisoning(kinds="flip", rules="krum,median", shares="0.3", examples=8).run(two, Silent())]
    assert [row["success"] is None for row in rows] == [True, False, False]
    assert rows[0]["variant"] == "flip, krum" and rows[0]["note"].endswith("clients a round or more; here are 2")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"rules": "fedavg,mean"}, "poisoning.rules = 'fedavg,mean'"),
        ({"kinds": ""}, "poisoning.kinds = ''"),
        ({"shares": "0.1,x"}, "poisoning.shares = '0.1,x'"),
        ({"target": 2}, "poisoning.target = 2: classes are 0 to 1"),
        ({"trigger": "zzzzz"}, "poisoning.trigger = 'zzzzz': not one piece"),
    ],
)
def test_wrong_options_are_named(lab, given, message):
    with pytest.raises(InputError, match=message):
        list(Poisoning(**given).run(lab, Silent()))
