"""Teachers are loaded whole and frozen; which layers are kept and compared; what is trained."""

import pytest
import torch
from transformers import AutoModelForSequenceClassification, DistilBertConfig

from common.errors import InputError
from common.families import FAMILIES
from common.models import (
    choose_layers,
    count_parameters,
    freeze_embeddings,
    load_teacher,
    pair_hidden_layers,
)
from tests.conftest import make_student, make_teacher


@pytest.fixture(scope="module", params=FAMILIES)
def folder(request, tmp_path_factory):
    return make_teacher(tmp_path_factory.mktemp(request.param), request.param, labels=3)


@pytest.fixture
def teacher(folder):
    return load_teacher(folder)


def test_frozen_embeddings_are_all_and_only_the_embeddings(teacher):
    student = make_student(teacher, (0, 1))
    trained = freeze_embeddings(student, train_embeddings=False)
    frozen = {name for name, _ in student.named_parameters()} - set(trained)
    family = FAMILIES[student.config.model_type]
    assert {name.split(".")[1] for name in frozen} <= {"embeddings", "embeddings_project", "wte", "wpe"}
    assert not any("embed" in name or ".w" in name.partition("weight")[0] for name in trained)
    assert any(parameter is student.get_input_embeddings().weight for parameter in map(student.get_parameter, frozen))
    assert any(name.startswith(f"{family.layers}.1.") for name in trained)
    assert any(name.startswith(family.classifier) for name in trained)
    for name, parameter in student.named_parameters():
        assert parameter.requires_grad == (name in trained)
    assert set(freeze_embeddings(student, train_embeddings=True)) == set(trained) | frozen


def test_what_turns_the_embedding_into_states_is_frozen_with_it(teacher):
    """ELECTRA's embedding is narrower than its layers."""
    names = {name for name, _ in teacher.named_parameters()} - set(freeze_embeddings(teacher, train_embeddings=False))
    projected = {name for name in names if "embeddings_project" in name}
    assert len(projected) == (2 if teacher.config.model_type == "electra" else 0)


def test_a_teacher_is_frozen(teacher):
    assert not teacher.training
    assert not any(parameter.requires_grad for parameter in teacher.parameters())


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
@pytest.mark.parametrize("selection", ["spaced", "distilbert", "random"])
def test_spaced_layers_reach_from_the_first_to_the_last(selection, keep, have, layers):
    assert choose_layers(selection, keep, have) == layers


def test_neighbours_are_taken_from_the_bottom_or_the_top():
    assert choose_layers("bottom", 3, 12) == (0, 1, 2)
    assert choose_layers("top", 3, 12) == (9, 10, 11)
    assert choose_layers("bottom", 6, 6) == choose_layers("top", 6, 6) == (0, 1, 2, 3, 4, 5)


def test_layers_may_be_named():
    assert choose_layers(" 0, 3,5 ", 3, 6) == (0, 3, 5)


@pytest.mark.parametrize(
    "selection, keep, expected",
    [
        *[(name, 7, "student.layers = 7: the teacher has 6 layers") for name in ("spaced", "bottom", "top", "random")],
        ("middle", 2, "student.layer-selection = 'middle'"),
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
        ("even", 3, 1, ((0, 0), (1, 0), (2, 0))),
        ("even", 3, 2, ((0, 0), (1, 0), (2, 1))),
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
    with pytest.raises(InputError, match=r"distill.relation-layers = "):
        pair_hidden_layers(pairs, 3, 6, "relation-layers")
