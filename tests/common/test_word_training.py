"""Of a word embedding only the rows of a client's own words are trained, and that is training all of it."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from common.dataset import Split
from common.distillation import begin, learn, learnt
from common.families import FAMILIES
from common.inference import predict
from common.slim import Shape, cut_student
from tests.bare import bare_loop
from tests.conftest import BF16, FP32, make_teacher
from tests.scene import RECIPE, WHO, Forbidden, Scene, bits, weighing

WORDS = "bert.embeddings.word_embeddings.weight"


@pytest.fixture(scope="module")
def wordy(tiny_teacher):
    return Scene(tiny_teacher, embeddings=True)


def own_words(scene, rows):
    inputs = scene.data.tokens.batch(rows)
    return set(inputs["input_ids"][inputs["attention_mask"].bool()].tolist())


@pytest.mark.parametrize(
    "recipe",
    [RECIPE, replace(RECIPE, clip_norm=0.0), replace(RECIPE, proximal=3.0), weighing(hidden=1.0)],
    ids=["usual", "unclipped", "pulled", "hidden"],
)
def test_training_the_rows_of_the_clients_own_words_is_training_them_all(wordy, recipe):
    """Without weight decay: the other rows have no gradient."""
    recipe = replace(recipe, weight_decay=0.0)
    found, told = wordy.learn(recipe)
    expected, loss = bare_loop(wordy, recipe)
    assert told["loss"] == pytest.approx(loss, rel=1e-5)
    assert set(found) == set(wordy.weights) == set(expected)
    for name, weight in found.items():
        if not name.endswith("key.bias"):  # nothing but noise, see above
            torch.testing.assert_close(weight, expected[name].detach(), atol=2e-6, rtol=0, msg=name)
    assert (found[WORDS] - wordy.weights[WORDS]).abs().max() > recipe.lr / 2


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "bert"])
def test_in_every_family_the_clients_own_words_are_enough(family, tmp_path):
    """RoBERTa counts positions from the padding's number, and its padding is not the first piece."""
    scene = Scene(make_teacher(tmp_path, family), embeddings=True)
    recipe = replace(RECIPE, weight_decay=0.0)
    found, told = scene.learn(recipe)
    expected, loss = bare_loop(scene, recipe)
    assert told["loss"] == pytest.approx(loss, rel=1e-5)
    for name, weight in found.items():
        expected_weight = expected[name].detach()
        if name.endswith("c_attn.bias"):  # queries, keys and values side by side
            found, expected_weight = (torch.cat([part[:16], part[32:]]) for part in (weight, expected_weight))
        else:
            found = weight
        if not name.endswith(("key.bias", "k_lin.bias")):  # nothing but noise, see above
            torch.testing.assert_close(found, expected_weight, atol=4e-6, rtol=0, msg=name)


def test_of_the_word_embedding_only_rows_of_the_clients_own_words_move(wordy):
    found, _ = wordy.learn()
    moved = set(np.flatnonzero((found[WORDS] != wordy.weights[WORDS]).any(dim=1)).tolist())
    # decay moves the rows up to the padding's too, as it would all
    assert moved - set(range(wordy.data.tokens.pad + 1)) == own_words(wordy, wordy.rows) - {wordy.data.tokens.pad}


def test_the_whole_word_embedding_is_back_after_training_and_after_a_failure(wordy):
    rows = np.arange(60)  # also of words that the client does not have
    table = wordy.student.trained[WORDS]
    begin(wordy.student, wordy.weights, RECIPE)
    before = predict(wordy.student.model, wordy.data.tokens, rows, FP32)
    found, _ = wordy.learn()
    assert wordy.student.model.get_input_embeddings().weight is table
    with torch.no_grad():
        for name, weight in wordy.weights.items():
            wordy.student.trained[name].copy_(weight)
    assert predict(wordy.student.model, wordy.data.tokens, rows, FP32).tobytes() == before.tobytes()
    broken = replace(wordy.examples, data=Split(wordy.data.tokens, Forbidden(), wordy.data.keys))
    with pytest.raises(AssertionError, match="a label was read"):
        wordy.learn(examples=broken)
    assert wordy.student.model.get_input_embeddings().weight is table
    assert bits(wordy.learn()[0]) == bits(found)


def test_what_is_learnt_of_words_stands_in_the_whole_embedding_beside_the_others(wordy):
    found, _ = wordy.learn()
    before = bits(wordy.weights)
    state = learn(
        wordy.student, wordy.weights, wordy.examples, recipe=RECIPE, compute=FP32, seed=0, who=WHO
    )  # fmt: skip
    assert bits(learnt(state, wordy.weights)) == bits(found)
    assert bits(wordy.weights) == before


def test_the_optimiser_keeps_no_memory_of_rows_that_are_gone(wordy):
    for number in range(3):
        wordy.learn(who=(1, number))
    assert len(wordy.student.optimizer.state) == len(wordy.weights)


@pytest.mark.parametrize("compute", [FP32, BF16], ids=["fp32", "bf16"])
def test_with_words_too_the_bits_do_not_depend_on_what_was_done_before(tiny_teacher, compute):
    scene = Scene(tiny_teacher, dropout=0.2, embeddings=True)
    first = bits(scene.learn(compute=compute)[0])
    scene.learn(compute=compute, who=(4, 18), examples=scene.of(scene.data, np.arange(40, 60)))
    assert bits(scene.learn(compute=compute)[0]) == first
    assert bits(Scene(tiny_teacher, dropout=0.2, embeddings=True).learn(compute=compute)[0]) == first


def test_of_a_factored_embedding_the_rows_of_the_clients_own_words_are_trained_and_the_other_factor(tiny_teacher):
    scene = Scene(tiny_teacher)
    shape = replace(Shape.whole(scene.teacher.config, (0, 3)), rank=5)
    scene.take(cut_student(scene.teacher, shape), embeddings=True)
    found, _ = scene.learn(replace(RECIPE, weight_decay=0.0))
    changed = found[WORDS] != scene.weights[WORDS]
    assert changed.shape[1] == 5
    assert set(np.flatnonzero(changed.any(dim=1)).tolist()) == own_words(scene, scene.rows) - {scene.data.tokens.pad}
    factor = WORDS.replace("weight", "project.weight")
    assert (found[factor] != scene.weights[factor]).any()
