"""A student cut from a teacher holds the teacher's weights and, cut nowhere, computes what it computes."""

import numpy as np
import pytest
import torch
from transformers import AlbertConfig, AutoModelForSequenceClassification, DistilBertConfig

from common.errors import InputError
from common.models import (
    LAYERS,
    check_family,
    choose_layers,
    count_parameters,
    cut_student,
    freeze_embeddings,
    load_teacher,
    pair_hidden_layers,
)
from tests.conftest import make_sentences, make_teacher, make_tokens


@pytest.fixture(scope="module", params=LAYERS)
def folder(request, tmp_path_factory):
    return make_teacher(tmp_path_factory.mktemp(request.param), request.param, labels=3)


@pytest.fixture
def teacher(folder):
    return load_teacher(folder)


def logits(model, folder):
    with torch.no_grad():
        return model(**make_tokens(folder, make_sentences(5)).batch(np.arange(5))).logits


def test_all_layers_without_dropout_compute_what_the_teacher_computes(teacher, folder):
    student = cut_student(teacher, (0, 1, 2, 3))
    assert torch.equal(logits(student, folder), logits(teacher, folder))
    assert torch.equal(logits(student.train(), folder), logits(teacher, folder))  # every dropout is 0
    assert len(logits(teacher, folder).unique()) == 15


def test_a_cut_student_holds_the_teachers_weights_layer_by_layer(teacher, folder):
    student = cut_student(teacher, (0, 2))
    prefix, of_teacher = LAYERS[teacher.config.model_type] + ".", teacher.state_dict()
    for name, weight in student.state_dict().items():
        source = name
        if name.startswith(prefix):
            layer, rest = name.removeprefix(prefix).split(".", 1)
            source = f"{prefix}{(0, 2)[int(layer)]}.{rest}"
        assert torch.equal(weight, of_teacher[source]), name
    assert student.config.num_hidden_layers == 2
    assert teacher.config.num_hidden_layers == 4
    assert not torch.equal(logits(student, folder), logits(teacher, folder))


def test_a_student_shares_no_memory_with_its_teacher(teacher):
    student = cut_student(teacher, (0, 1, 2, 3))
    before = {name: weight.clone() for name, weight in teacher.state_dict().items()}
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(1.0)
    assert all(torch.equal(weight, before[name]) for name, weight in teacher.state_dict().items())


def test_a_saved_student_opens_with_transformers_alone(teacher, folder, tmp_path):
    student = cut_student(teacher, (1, 3), dropout=0.1)
    student.save_pretrained(tmp_path)
    opened = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert torch.equal(logits(opened, folder), logits(student, folder))


def test_dropout_is_on_while_training_only(teacher, folder):
    student = cut_student(teacher, (0, 1), dropout=0.5)
    assert torch.equal(logits(student, folder), logits(student, folder))
    student.train()
    assert not torch.equal(logits(student, folder), logits(student, folder))


def test_cutting_draws_nothing_from_the_global_generator(teacher):
    torch.manual_seed(3)
    before = torch.get_rng_state()
    cut_student(teacher, (0,))
    assert torch.equal(torch.get_rng_state(), before)


def test_frozen_embeddings_are_all_and_only_the_embeddings(teacher):
    student = cut_student(teacher, (0, 1))
    trained = freeze_embeddings(student, train_embeddings=False)
    frozen = {name for name, _ in student.named_parameters()} - set(trained)
    assert {name.split(".")[1] for name in frozen} == {"embeddings"}
    assert not any("word_embeddings" in name for name in trained)
    assert any(name.startswith(f"{LAYERS[student.config.model_type]}.1.") for name in trained)
    assert any(name.startswith("classifier") for name in trained)
    for name, parameter in student.named_parameters():
        assert parameter.requires_grad == (name in trained)
    assert set(freeze_embeddings(student, train_embeddings=True)) == set(trained) | frozen


def test_a_teacher_is_frozen(teacher):
    assert not teacher.training
    assert not any(parameter.requires_grad for parameter in teacher.parameters())


def test_another_family_is_refused_by_name():
    with pytest.raises(InputError, match=r"^teacher.model = 'x': .*'albert'.* bert, distilbert, roberta, electra$"):
        check_family(AlbertConfig(), "teacher.model = 'x'")


def test_parameters_are_counted_once():
    """DistilBERT by hand: words, positions, norm; per layer 4 attention, 2 feed-forward, 2 norms; head."""
    d, f, vocab, places, labels = 8, 12, 50, 16, 3
    config = DistilBertConfig(
        vocab_size=vocab, max_position_embeddings=places, dim=d, n_layers=2, n_heads=2, hidden_dim=f, num_labels=labels
    )
    layer = 4 * (d * d + d) + (d * f + f) + (f * d + d) + 2 * 2 * d
    expected = vocab * d + places * d + 2 * d + 2 * layer + (d * d + d) + (d * labels + labels)
    assert count_parameters(AutoModelForSequenceClassification.from_config(config)) == expected
    tied = torch.nn.ModuleList([torch.nn.Linear(3, 3, bias=False)] * 2)
    assert count_parameters(tied) == 9


@pytest.mark.parametrize(
    "keep, have, layers",
    [
        (6, 12, (0, 2, 4, 7, 9, 11)),  # DistilBERT's
        (3, 6, (0, 2, 5)),
        (1, 6, (0,)),
        (4, 4, (0, 1, 2, 3)),
        (2, 24, (0, 23)),
    ],
)
def test_spaced_layers_reach_from_the_first_to_the_last(keep, have, layers):
    assert choose_layers("spaced", keep, have) == layers


def test_layers_may_be_named():
    assert choose_layers(" 0, 3,5 ", 3, 6) == (0, 3, 5)


@pytest.mark.parametrize(
    "selection, keep, expected",
    [
        ("spaced", 7, "student.layers = 7: the teacher has 6 layers"),
        ("top", 2, "student.layer-selection = 'top'"),
        ("0,,1", 2, "student.layer-selection = '0,,1'"),
        ("-1,2", 2, "student.layer-selection = '-1,2'"),
        ("2,1", 2, "ascending order, from 0 to 5"),
        ("1,1", 2, "ascending order, from 0 to 5"),
        ("0,6", 2, "ascending order, from 0 to 5"),
        ("0,1,2", 2, "3 layers, but student.layers = 2"),
    ],
)
def test_layers_that_are_not_there_are_refused(selection, keep, expected):
    with pytest.raises(InputError, match=expected):
        choose_layers(selection, keep, 6)


@pytest.mark.parametrize(
    "pairs, student, teacher, expected",
    [
        ("even", 3, 12, ((0, 3), (1, 7), (2, 11))),
        ("even", 4, 6, ((0, 0), (1, 2), (2, 3), (3, 5))),
        ("even", 3, 3, ((0, 0), (1, 1), (2, 2))),
        ("last", 3, 12, ((2, 11),)),
        ("0:1, 2:5", 3, 6, ((0, 1), (2, 5))),
    ],
)
def test_hidden_layers_are_paired(pairs, student, teacher, expected):
    assert pair_hidden_layers(pairs, student, teacher) == expected


@pytest.mark.parametrize("pairs", ["first", "0", "0:1:2", "0:1,", "3:0", "0:6", "-1:0"])
def test_pairs_of_layers_that_are_not_there_are_refused(pairs):
    with pytest.raises(InputError, match=r"distill.hidden-layers = "):
        pair_hidden_layers(pairs, 3, 6)
