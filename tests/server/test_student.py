"""The student before round 1: as large as the keys say, warmed up on public text alone, made once for its keys."""

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch

from common.config import from_flat
from common.dataset import load_tokenizer
from common.errors import InputError
from common.families import FAMILIES
from common.hashing import hash_tensors
from common.models import count_parameters
from common.progress import Silent
from common.slim import FactoredEmbedding, Shape, cut_student
from common.vocabulary import piece_bounds
from server import student as module
from server.lesson import prepare_lesson
from server.student import check_width, choose_width, narrow_student, narrowed, random_width
from server.teacher import find_teacher
from tests.conftest import make_reviews, make_teacher
from tests.school import WARM, School, disagreement, states


def refusal(school, **keys):
    with pytest.raises(InputError) as caught:
        school.student(**keys)
    return str(caught.value)


# --- its size -----------------------------------------------------------------------------------


def test_a_student_without_further_keys_is_its_teachers_layers(school):
    pupil = school.student()
    expected = cut_student(school.lesson.model, Shape.whole(school.lesson.model.config, (0, 3)))
    assert pupil.shape == Shape.whole(school.lesson.model.config, (0, 3))
    assert hash_tensors(states(pupil)) == pupil.hash == hash_tensors(expected.state_dict())
    assert pupil.taught is None


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("rank", [0, 6])
def test_a_target_is_met_to_within_a_row_of_the_embedding(family, rank, tmp_path):
    school = School(make_teacher(tmp_path / "t", family), make_reviews(tmp_path / "a.csv", 60), tmp_path / "cache")
    whole, untrimmed = count_parameters(school.lesson.model), school.student(student__embedding_rank=rank).model
    width = untrimmed.get_input_embeddings().weight.shape[1]
    for gone in (12.5, 40.0):
        ratio = (count_parameters(untrimmed) - gone * width) / whole
        pupil = school.student(student__target_ratio=ratio, student__embedding_rank=rank)
        found = count_parameters(pupil.model)
        assert ratio * whole - width < found <= ratio * whole * (1 + 1e-12)
        assert pupil.shape.pieces == pupil.model.config.vocab_size < school.lesson.model.config.vocab_size
        assert isinstance(pupil.model.get_input_embeddings(), FactoredEmbedding) == (rank > 0)
        assert pupil.taught is school.lesson.data.train.tokens


def test_a_target_counts_the_heads_and_neurons_that_will_be_cut(school):
    keys = {"student__heads": 1, "student__neurons": 8, "student__layers": 3, "student__target_ratio": 0.5}
    wide = school.student(**keys)
    config = school.config(**keys)
    final = narrow_student(config, school.lesson, wide, random_width(config, wide.shape), Silent())
    whole = count_parameters(school.lesson.model)
    assert 0.5 * whole - 16 < count_parameters(final.model) <= 0.5 * whole < count_parameters(wide.model)
    assert (len(final.shape.heads[0]), len(final.shape.neurons[0])) == (1, 8)


def test_a_target_that_the_whole_vocabulary_meets_leaves_it_whole_and_a_larger_one_is_refused(school):
    message = refusal(school, student__target_ratio=0.99)
    assert message.startswith("student.target-ratio = 0.99: with all word pieces this student has 0.")
    most = float(message.split("has ")[1].split(" ")[0])
    pupil = school.student(student__target_ratio=most)
    assert pupil.shape == Shape.whole(school.lesson.model.config, (0, 3))
    assert pupil.taught is None


def test_a_target_that_is_too_small_is_refused_with_the_smallest(school):
    message = refusal(school, student__target_ratio=0.2)
    assert message.startswith("student.target-ratio = 0.2: this student has 0.")
    assert "student.layers" in message
    least = float(message.split("has ")[1].split(" ")[0])
    pupil = school.student(student__target_ratio=least + 0.002)
    assert count_parameters(pupil.model) <= (least + 0.002) * count_parameters(school.lesson.model)
    assert "student.target-ratio" in refusal(school, student__target_ratio=least - 0.002)


@pytest.mark.parametrize(
    ("keys", "told"),
    [
        ({"student__heads": 3}, "student.heads = 3: the teacher has 2;"),
        ({"student__neurons": 33}, "student.neurons = 33: the teacher has 32;"),
        ({"student__embedding_rank": 17}, "student.embedding-rank = 17: the teacher has 16;"),
        ({"student__vocabulary": 1}, "student.vocabulary = 1: give "),
        ({"student__vocabulary": 10_000}, "student.vocabulary = 10000: give "),
        ({"student__layers": 5}, "student.layers = 5: the teacher has 4 layers"),
        ({"distill__relation_heads": 5}, "distill.relation-heads = 5: "),
        ({"distill__relation_heads": 16, "student__heads": 1}, "distill.relation-heads = 16: "),
    ],
    ids=str,
)
def test_a_student_that_is_larger_than_its_teacher_is_refused_by_the_key(school, keys, told):
    assert refusal(school, **keys).startswith(told)


def test_electras_rank_is_at_most_the_width_of_its_embedding(tmp_path):
    school = School(make_teacher(tmp_path / "t", "electra"), make_reviews(tmp_path / "a.csv", 60), tmp_path / "cache")
    assert refusal(school, student__embedding_rank=9).startswith("student.embedding-rank = 9: the teacher has 8;")
    assert school.student(student__embedding_rank=8).model.get_input_embeddings().weight.shape[1] == 8


def test_a_rank_is_at_most_the_number_of_pieces(school):
    shape = replace(Shape.whole(school.lesson.model.config, (0, 3)), pieces=5)
    with pytest.raises(InputError, match=r"student.embedding-rank = 6: the teacher has 5"):
        check_width(school.config(student__embedding_rank=6), shape, school.lesson.model.config)


def test_private_text_has_no_say_in_the_vocabulary(school):
    """Two federations whose public texts are the same: private rows count nothing."""
    data = school.lesson.data
    tokens = data.train.tokens
    ids = np.asarray(tokens.ids).copy()
    private = np.setdiff1d(np.arange(len(data.train)), np.asarray(data.public))
    for row in private:
        ids[tokens.offsets[row] : tokens.offsets[row + 1]] = ids.max()
    other = replace(data, train=replace(data.train, tokens=replace(tokens, ids=ids)))
    keep = {"student__vocabulary": 120}
    expected = school.student(**keep).model.get_input_embeddings().weight
    found = school.student(replace(school.lesson, data=other), **keep).model.get_input_embeddings().weight
    assert torch.equal(found, expected)
    assert expected.shape[0] == 120


def test_public_text_has_a_say_in_the_vocabulary(school):
    tokenizer = load_tokenizer(school.lesson.teacher.folder)
    fewest = piece_bounds(tokenizer)[0]
    plain = school.student(student__vocabulary=fewest + 1)
    kept = set(load_tokenizer(plain.folder).get_vocab())
    other = next(piece for piece in tokenizer.get_vocab() if piece.isalpha() and len(piece) > 2 and piece not in kept)
    lesson = replace(school.lesson, text=tuple(f"{other} {number}" for number in range(10_000, 20_000)))
    pupil = school.student(lesson, student__vocabulary=fewest + 1)
    assert other in load_tokenizer(pupil.folder).get_vocab()


# --- its key ------------------------------------------------------------------------------------


def test_a_student_is_made_once_for_its_keys(school, monkeypatch):
    first = school.student(**WARM)
    monkeypatch.setattr(module, "warm_up", lambda *given: pytest.fail("warmed up again"))
    again = school.student(**WARM, rounds=9, client__lr=0.5, server__cohort=2, client__weight_decay=0.1)
    assert (again.key, again.hash) == (first.key, first.hash)
    assert all(torch.equal(states(again)[name], weight) for name, weight in states(first).items())


def test_the_same_keys_in_another_cache_give_the_same_bits(school, strong_teacher, tmp_path):
    other = School(strong_teacher, school.flat["data.source"], tmp_path)
    assert other.student(**WARM).hash == school.student(**WARM).hash


@pytest.mark.parametrize(
    "keys",
    [
        {"student__warm_epochs": 1},
        {"student__warm_lr": 0.02},
        {"student__vocabulary": 121},
        {"student__embedding_rank": 7},
        {"student__layer_selection": "bottom"},
        {"student__dropout": 0.1},
        {"student__train_embeddings": True},
        {"distill__temperature": 3.0},
        {"distill__hidden_weight": 1.0},
        {"client__token_budget": 128},
        {"student__warm_token_budget": 64},
    ],
    ids=str,
)
def test_whatever_changes_the_student_changes_its_key(school, keys):
    first, other = school.student(**WARM), school.student(**{**WARM, **keys})
    assert other.key != first.key
    assert other.hash != first.hash or "student__dropout" in keys


def test_the_parts_of_a_batch_that_pass_at_once_are_in_the_key_of_a_warm_start(school):
    """Dropout draws anew for each."""
    keys = {**WARM, "student__warm_token_budget": 512, "student__dropout": 0.1}
    parts = [{"client__token_budget": 64}, {"client__token_budget": 128}, {"client__micro_budget": 64}]
    first, second, third = (school.student(**keys, **part).hash for part in parts)
    assert first == third != second


def test_too_few_clients_to_hide_one_another_are_found_before_the_teacher_is_made(school):
    few = {"data__clients": 3, "data__min_examples": 100, "data__partition": "zipf", "data__alpha": 6.0}
    config = school.config(**few, privacy__secure_aggregation=True)
    with pytest.raises(InputError, match=r"secure-aggregation = true: 1 of 3 clients hold .* fewer than 3 hide nobody"):
        prepare_lesson(config, find_teacher(config.teacher.model), Silent())
    config = school.config(**few, client__grow_batch=True, client__lr_decay="constant")
    with pytest.raises(InputError, match=r"grow-batch = true: 1 of 3 clients .* one has no noise scale"):
        prepare_lesson(config, find_teacher(config.teacher.model), Silent())


def test_the_teacher_of_a_run_of_real_clients_is_made_without_them(school):
    keys = {"data__private": "at-clients", "data__partition": "natural", "data__clients": 3, "server__cohort": 2}
    config = school.config(**keys)
    lesson = prepare_lesson(config, find_teacher(config.teacher.model), Silent())
    assert len(lesson.data.train) == len(lesson.data.public) + lesson.validation["n"]


def test_without_a_warm_start_its_keys_do_not_matter(school):
    keys = {"student__warm_lr": 0.02, "distill__temperature": 3.0, "client__weight_decay": 0.1}
    assert school.student(**keys).key == school.student().key


def test_labels_that_are_not_all_there_are_not_read(school):
    labels = np.asarray(school.lesson.data.train.labels).copy()
    labels[school.lesson.data.public[3]] = -1
    data = replace(school.lesson.data, train=replace(school.lesson.data.train, labels=labels))
    lesson = replace(school.lesson, data=data)
    found = school.student(lesson, **WARM)
    soft = school.student(**WARM, distill__hard_weight=0.0)
    assert found.hash == soft.hash != school.student(**WARM).hash
    adaptive = school.student(lesson, **WARM, distill__weighting="adaptive")
    assert adaptive.hash == soft.hash


def test_a_random_student_is_drawn_from_the_runs_seed(strong_teacher, school, tmp_path):
    keys = {"student__layer_selection": "random"}
    first = school.student(**keys)
    torch.rand(7)
    assert School(strong_teacher, school.flat["data.source"], tmp_path).student(**keys).hash == first.hash
    other = school.student(**keys, seed=1)
    assert other.hash != first.hash != school.student().hash
    for name in ("bert.embeddings.word_embeddings.weight", "classifier.weight"):
        assert torch.equal(states(first)[name], states(school.student())[name])


# --- its width ----------------------------------------------------------------------------------


def test_the_most_important_are_kept_in_their_order_and_among_equals_the_lower():
    config = from_flat({"student.heads": 2, "student.neurons": 3})
    heads = np.array([[0.1, 0.4, 0.3], [0.5, 0.5, 0.5]])
    neurons = np.array([[1.0, 3.0, 2.0, 3.0], [0.0, 0.0, 0.0, 1.0]])
    assert choose_width(config, heads, neurons) == (((1, 2), (0, 1)), ((1, 3, 2), (3, 0, 1)))


def test_where_no_number_is_given_all_are_kept_in_their_order():
    heads, neurons = choose_width(from_flat({"student.heads": 1}), np.array([[1.0, 2.0]]), np.array([[1.0, 3.0, 2.0]]))
    assert heads == ((1,),)
    assert neurons == ((1, 2, 0),)


def test_a_smaller_width_is_a_beginning_of_a_larger_one():
    rng = np.random.default_rng(0)
    importance = rng.random((3, 12)), rng.random((3, 50))
    found = [choose_width(from_flat({"student.heads": n, "student.neurons": 4 * n}), *importance) for n in (3, 6, 9)]
    for small, large in pairwise(found):
        for few, many in zip(small, large, strict=True):
            assert all(b[: len(a)] == a for a, b in zip(few, many, strict=True))


def test_a_random_width_comes_from_the_seed():
    shape = Shape.whole(Wide, (0, 3))
    flat = {"student.heads": 3, "student.neurons": 9}
    found = [random_width(from_flat({**flat, "seed": seed}), shape) for seed in (0, 0, 1)]
    assert found[0] == found[1] != found[2]
    for heads, neurons in found:
        assert [len(set(kept)) for kept in heads] == [3, 3]
        assert [len(set(kept)) for kept in neurons] == [9, 9]
        assert neurons[0] != neurons[1]
        assert max(map(max, neurons)) < 64
        assert max(map(max, heads)) < 8


class Wide:
    """A configuration."""

    model_type, hidden_size, num_attention_heads, intermediate_size, vocab_size = "bert", 32, 8, 64, 100


def test_a_narrowed_student_is_the_wide_one_cut(school):
    wide = school.student(student__vocabulary=120)
    config = school.config(student__vocabulary=120, student__heads=1, student__neurons=3)
    width = (((1,), (0,)), ((5, 2, 9), (7, 31, 0)))
    before = hash_tensors(states(wide))
    found = narrow_student(config, school.lesson, wide, width, Silent())
    assert hash_tensors(states(wide)) == before
    assert (found.shape.heads, found.shape.neurons) == width
    assert (found.shape.layers, found.shape.pieces) == (wide.shape.layers, 120)
    words = "bert.embeddings.word_embeddings.weight"
    assert torch.equal(states(found)[words], states(wide)[words])
    up, prefix = "intermediate.dense.weight", "bert.encoder.layer.1"
    assert torch.equal(states(found)[f"{prefix}.{up}"], states(wide)[f"{prefix}.{up}"][[7, 31, 0]])
    assert found.taught is wide.taught
    rows = np.arange(5)
    own = [pupil.data.train.tokens.batch(rows)["input_ids"].tolist() for pupil in (found, wide)]
    assert own[0] == own[1]
    again = narrow_student(config, school.lesson, wide, width, Silent())
    assert again.key == found.key
    other = narrow_student(config, school.lesson, wide, (width[0], ((5, 2, 8), (7, 31, 0))), Silent())
    assert other.key != found.key


def test_a_narrowed_student_is_warmed_up_again(school):
    keys = {**WARM, "student__heads": 1, "student__warm_epochs": 40, "distill__hard_weight": 0.0}
    wide, width = school.student(**keys), (((1,), (0,)), (tuple(range(32)),) * 2)
    warm = narrow_student(school.config(**keys), school.lesson, wide, width, Silent())
    cold = narrow_student(school.config(**{**keys, "student__warm_epochs": 0}), school.lesson, wide, width, Silent())
    assert warm.hash != cold.hash
    assert disagreement(school, warm) < 0.8 * disagreement(school, cold)


def test_how_narrow_a_student_will_be_is_known_before_it_is():
    shape = Shape.whole(Wide, (0, 3))
    found = narrowed(from_flat({"student.heads": 2, "student.neurons": 5}), shape)
    assert [len(kept) for kept in found.heads] == [2, 2]
    assert [len(kept) for kept in found.neurons] == [5, 5]
    assert narrowed(from_flat({}), shape) == shape
