"""The warm start: on public text alone, by itself or in pairs, before a client has a say."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from common.errors import InputError
from common.hashing import hash_tensors
from common.progress import Silent
from server.lesson import prepare_lesson
from server.student import narrow_student, random_width
from server.teacher import find_teacher
from server.warm_start import _all_public_text
from tests.conftest import make_sentences
from tests.school import WARM, School, disagreement, states

EMBEDDING = "bert.embeddings.word_embeddings.weight"


def test_a_warm_start_brings_the_student_closer_to_its_teacher(school):
    cold = school.student(student__vocabulary=120)
    warm = school.student(**{**WARM, "student__warm_epochs": 10, "distill__hard_weight": 0.0})
    assert disagreement(school, warm) < 0.7 * disagreement(school, cold)
    assert hash_tensors(states(warm)) == warm.hash != cold.hash
    assert torch.equal(states(warm)[EMBEDDING], states(cold)[EMBEDDING])  # frozen


def distance(school, pupil):
    """Mean cosine distance of the last hidden states at the first piece from the teacher's, on the public rows."""
    rows = np.asarray(school.lesson.data.public)
    own, theirs = (
        model(**tokens.batch(rows), output_hidden_states=True).hidden_states[-1][:, 0].detach()
        for model, tokens in (
            (pupil.model, pupil.data.train.tokens),
            (school.lesson.model, school.lesson.data.train.tokens),
        )
    )
    return float((1 - torch.cosine_similarity(own, theirs)).mean())


def test_general_distillation_brings_the_hidden_states_closer(school):
    cold = school.student(student__vocabulary=120)
    warm = school.student(student__vocabulary=120, student__general_epochs=10, student__warm_lr=0.01)
    assert distance(school, warm) < 0.7 * distance(school, cold)
    assert disagreement(school, warm) < 0.7 * disagreement(school, cold)


def test_general_distillation_reads_no_label_and_depends_on_the_text(school):
    keys = {"student__vocabulary": 120, "student__general_epochs": 1}
    first = school.student(**keys)
    labels = np.full_like(school.lesson.data.train.labels, -1)
    data = replace(school.lesson.data, train=replace(school.lesson.data.train, labels=labels))
    assert school.student(replace(school.lesson, data=data), **keys).hash == first.hash
    lesson = replace(school.lesson, text=("a fine movie",))
    longer = school.student(lesson, **keys)
    assert longer.key != first.key
    assert longer.hash != first.hash


def test_general_distillation_needs_no_public_split_but_public_text(school):
    nothing = replace(school.lesson.data, public=np.zeros(0, dtype=np.int64))
    lesson = replace(school.lesson, data=nothing, text=("a fine movie", "a dull plot"))
    keys = {"student__general_epochs": 2, "student__warm_epochs": 3}
    assert school.student(lesson, **keys).hash != school.student(lesson).hash
    config = school.config(student__general_epochs=2, data__public_fraction=0.0)
    with pytest.raises(InputError, match=r"student\.general-epochs = 2: no public text; give data\.public-text"):
        prepare_lesson(config, find_teacher(config.teacher.model), Silent())


def test_of_a_task_on_pairs_general_distillation_reads_pairs(strong_teacher, tmp_path):
    texts = make_sentences(240)
    sides = zip(texts[::2], texts[1::2], strict=True)
    rows = "".join(f"{one},{other},{number % 2}\n" for number, (one, other) in enumerate(sides))
    (tmp_path / "pairs.csv").write_text(f"one,other,label\n{rows}")
    pairs = School(strong_teacher, tmp_path / "pairs.csv", tmp_path / "cache", **{"data.text-columns": "one,other"})
    cold = pairs.student(student__vocabulary=120)
    warm = pairs.student(student__vocabulary=120, student__general_epochs=5, student__warm_lr=0.01)
    assert distance(pairs, warm) < 0.7 * distance(pairs, cold)
    read = _all_public_text(pairs.lesson, cold, 0, Silent()).data.tokens
    assert (read.batch(np.arange(len(read)))["token_type_ids"].max(dim=1).values == 1).all()


def test_a_warm_start_needs_a_public_split(school):
    config = school.config(student__warm_epochs=3, data__public_fraction=0.0)
    with pytest.raises(InputError, match=r"student\.warm-epochs = 3: no example is public; give a larger data\.public"):
        prepare_lesson(config, find_teacher(config.teacher.model), Silent())


def test_general_distillation_waits_for_the_last_heads_and_neurons(school):
    keys = {"student__heads": 1, "student__general_epochs": 2}
    wide, config = school.student(**keys), school.config(**keys)
    assert wide.hash == school.student().hash
    width = random_width(config, wide.shape)
    final = narrow_student(config, school.lesson, wide, width, Silent())
    cold = narrow_student(school.config(student__heads=1), school.lesson, wide, width, Silent())
    assert final.hash != cold.hash


def test_a_warm_start_trains_the_embeddings_where_they_are_trained(school):
    """Of the rows in public text, and of the padding, which decays; the others stay."""
    cold = school.student(student__vocabulary=120)
    warm = school.student(**WARM, student__train_embeddings=True)
    moved = (states(warm)[EMBEDDING] != states(cold)[EMBEDDING]).any(dim=1)
    batch = cold.data.train.tokens.batch(np.asarray(cold.data.public))
    used = batch["input_ids"].unique()
    assert torch.equal(torch.nonzero(moved).reshape(-1), used)
    assert len(used) < 120
