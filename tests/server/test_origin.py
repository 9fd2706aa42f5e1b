"""A student cut from another model than its teacher: its size, its head, its pieces, and what does not fit."""

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoTokenizer

from common.config import from_flat
from common.dataset import load_tokenizer
from common.distillation import PROJECTION
from common.errors import InputError
from common.models import count_parameters, load_teacher
from common.progress import Silent
from common.pupil import EXITS, load_exits
from common.vocabulary import choose_pieces, piece_bounds, save_trimmed
from server.student import narrow_student, random_width
from tests.conftest import make_reviews, make_teacher
from tests.school import School


@pytest.fixture(scope="module")
def school(tmp_path_factory):
    """The teacher is 32 wide, with four layers."""
    folder = tmp_path_factory.mktemp("origin")
    teacher = make_teacher(folder / "teacher", width=32, seed=1)
    return School(teacher, make_reviews(folder / "reviews.csv", 200), folder / "cache")


@pytest.fixture(scope="module")
def narrow(tmp_path_factory):
    """A bare encoder 16 wide with three layers and the teacher's tokenizer."""
    return make_teacher(tmp_path_factory.mktemp("narrow"), labels=0, layers=3)


def student(school, model, **keys):
    return school.student(student__model=str(model), **keys)


def refusal(school, model, **keys):
    with pytest.raises(InputError) as caught:
        student(school, model, **keys)
    return str(caught.value)


def test_it_is_cut_from_that_model_and_gets_a_head_of_the_tasks_labels(school, narrow):
    pupil, bare = student(school, narrow), load_teacher(narrow, complete=False)
    assert (pupil.model.config.hidden_size, pupil.shape.layers, pupil.shape.head_size) == (16, (0, 2), 8)
    assert pupil.model.config.num_labels == 2
    assert list(pupil.model.config.id2label.values()) == list(school.lesson.data.task.labels)
    state, whole = pupil.model.state_dict(), bare.state_dict()
    assert torch.equal(
        state["bert.encoder.layer.1.output.dense.weight"], whole["bert.encoder.layer.2.output.dense.weight"]
    )
    assert pupil.taught is None  # both read the same pieces
    assert student(school, narrow).hash == pupil.hash != student(school, narrow, seed=1).hash


def test_a_head_of_its_own_is_kept(school, tmp_path):
    folder = make_teacher(tmp_path, layers=3, seed=3)
    found = student(school, folder).model.classifier.weight
    assert torch.equal(found, load_teacher(folder).classifier.weight)


def test_a_target_is_a_share_of_the_teachers_parameters(school, narrow):
    pupil = student(school, narrow, student__target_ratio=0.19)
    whole = count_parameters(school.lesson.model)
    assert 0.19 * whole - 16 < count_parameters(pupil.model) <= 0.19 * whole
    assert pupil.taught is school.lesson.data.train.tokens


def test_heads_and_neurons_are_cut_as_from_a_teacher(school, narrow):
    keys = {"student__model": str(narrow), "student__heads": 1, "student__neurons": 8}
    wide, config = school.student(**keys), school.config(**keys)
    found = narrow_student(config, school.lesson, wide, random_width(config, wide.shape), Silent())
    assert (len(found.shape.heads[0]), len(found.shape.neurons[0]), found.shape.head_size) == (1, 8, 8)
    assert "student.model has 2" in refusal(school, narrow, student__heads=3)


def test_a_tokenizer_of_its_own_cuts_the_text_and_words_are_compared(school, tmp_path):
    """Of the same kind with fewer pieces: as if the vocabulary had been trimmed."""
    folder = make_teacher(tmp_path / "other", labels=0)
    tokenizer = load_tokenizer(folder)
    pieces = choose_pieces(tokenizer, np.zeros(len(tokenizer), dtype=np.int64), piece_bounds(tokenizer)[0] + 5)
    save_trimmed(make_teacher(tmp_path / "same", labels=0), pieces, folder)
    pupil = student(school, folder, distill__hidden_weight=1.0, student__warm_epochs=1)
    assert pupil.taught is school.lesson.data.train.tokens
    text, own = "battery", pupil.data.train.tokens
    assert len(AutoTokenizer.from_pretrained(folder).tokenize(text)) > len(tokenizer.tokenize(text)) == 1
    assert len(own.ids) > len(pupil.taught.ids)


def test_another_family_with_the_same_pieces_gets_its_own_inputs(school, tmp_path):
    """DistilBERT takes no token types, BERT does; words are compared all the same."""
    folder = make_teacher(tmp_path, "distilbert", labels=0)
    pupil = student(school, folder, distill__hidden_weight=1.0, distill__relation_weight=1.0, student__warm_epochs=1)
    assert (pupil.data.train.tokens.typed, pupil.taught.typed) == (False, True)
    assert np.array_equal(pupil.data.train.tokens.ids, pupil.taught.ids)


def test_a_narrowed_student_goes_on_with_the_projection_that_the_wide_one_has_learnt(school, narrow):
    keys = {"student__model": str(narrow), "student__heads": 1, "distill__hidden_weight": 1.0}
    keys |= {"student__warm_epochs": 1, "student__warm_lr": 1e-9}
    wide, config = school.student(**keys), school.config(**keys)
    save_file({PROJECTION: torch.full((32, 16), 0.25)}, wide.folder / EXITS)
    found = narrow_student(config, school.lesson, wide, random_width(config, wide.shape), Silent())
    torch.testing.assert_close(load_exits(found)[PROJECTION], torch.full((32, 16), 0.25), atol=1e-6, rtol=0)


def test_a_warm_start_trains_the_projection_along_and_keeps_it(school, narrow):
    keys = {"student__model": str(narrow), "distill__hidden_weight": 1.0}
    assert load_exits(school.student(**keys)) == {}
    found = load_exits(school.student(**keys, student__warm_epochs=1))
    assert {name: tuple(tensor.shape) for name, tensor in found.items()} == {PROJECTION: (32, 16)}


def test_what_does_not_fit_is_named(school, narrow, tmp_path):
    assert refusal(school, tmp_path / "no").startswith("student.model = ")
    three = make_teacher(tmp_path / "three", labels=3)
    assert refusal(school, three).startswith("student.model: its head has 3 labels")
    roberta = make_teacher(tmp_path / "roberta", "roberta", labels=0)
    assert "distill.relation-weight: the tokenizer" in refusal(school, roberta, distill__relation_weight=1.0)
    student(school, roberta)  # outputs alone: any tokenizer
    gpt2 = make_teacher(tmp_path / "gpt2", "gpt2", labels=0)
    assert "distill.cls-weight = 1.0" in refusal(school, gpt2, distill__cls_weight=1.0)
    wide = refusal(school, narrow, distill__relation_weight=1.0, distill__relation_heads=32)
    assert wide.startswith("distill.relation-heads = 32: the heads of student and teacher are 16 and 32 wide")
    student(school, narrow, distill__relation_weight=1.0, distill__relation_heads=16)


@pytest.mark.parametrize(
    "keys",
    [{"server.strategy": "fedkd"}, {"server.strategy": "feddf"}, {"student.tiers": "1/0/0@0.5"},
     {"distill.general-rounds": 1}],
)  # fmt: skip
def test_keys_that_do_not_fit_a_student_of_another_model_are_named(keys):
    (key,) = keys
    with pytest.raises(InputError, match=rf"student.model = 'small': {key} = "):
        from_flat({"student.model": "small", **keys})
