"""What leaves a client after its training: the difference that it made, and nothing that cannot be added up."""

import numpy as np
import pytest
import torch

from clients.distillation import client_final
from common.distillation import begin
from common.fixed_point import ExactSum, NotFinite, Rows
from common.wire import LOSSES
from tests.scene import RECIPE, Scene, weighing

WORDS = "bert.embeddings.word_embeddings.weight"


@pytest.fixture(scope="module")
def scene(tiny_teacher):
    return Scene(tiny_teacher)


@pytest.fixture(scope="module")
def wordy(tiny_teacher):
    return Scene(tiny_teacher, embeddings=True)


def dense(update, weights):
    return {
        name: array.dense(weights[name].shape) if isinstance(array, Rows) else array
        for name, array in update.arrays.items()
    }


@pytest.mark.parametrize("name", ["scene", "wordy"])
def test_an_update_is_what_training_has_changed(name, request):
    scene = request.getfixturevalue(name)
    update = scene.distil()
    arrays = {key: array.copy() for key, array in dense(update, scene.weights).items()}
    found, _ = scene.learn()
    assert set(arrays) == set(scene.weights)
    for key, start in scene.weights.items():
        assert arrays[key].dtype == np.float32
        assert arrays[key].tobytes() == (found[key] - start).numpy().tobytes(), key
    assert update.examples == len(scene.rows) == 32
    assert max(np.abs(array).max() for array in arrays.values()) > RECIPE.lr


def test_an_updates_losses_are_those_of_its_training_by_the_names_that_travel(scene):
    recipe = weighing(hidden=1.0, cls=0.5, relation=0.25)
    losses = scene.distil(recipe).losses
    _, told = scene.learn(recipe)
    assert tuple(losses) == LOSSES
    assert list(losses.values()) == list(told.values())
    parts = {"soft": 0.7, "hard": 0.3, "hidden": 1.0, "cls": 0.5, "relation": 0.25}
    assert losses["loss"] == pytest.approx(sum(weight * losses[f"{part}_loss"] for part, weight in parts.items()))
    assert min(losses.values()) > 0


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e30])
def test_weights_that_are_not_finite_are_refused(scene, bad):
    """Where the update is added up: the sum takes no part of it."""
    state = begin(scene.student, scene.weights, RECIPE)
    with torch.no_grad():
        scene.student.trained["classifier.bias"][0] = bad
    update = client_final(state, 5)
    total = ExactSum({name: array.shape for name, array in update.arrays.items()})
    with pytest.raises(NotFinite):
        total.add(update.arrays, update.examples)
    assert not any(array.any() for array in total.totals.values())


def test_an_update_is_the_difference_to_the_rounds_weights_and_weighs_as_many_examples(scene):
    state = begin(scene.student, scene.weights, RECIPE)
    with torch.no_grad():
        scene.student.trained["classifier.bias"] += 0.5
    update = client_final(state, 12)
    change = scene.student.trained["classifier.bias"].detach().numpy() - scene.weights["classifier.bias"].numpy()
    assert update.arrays["classifier.bias"].tolist() == change.tolist()
    assert change == pytest.approx([0.5, 0.5], abs=1e-6)
    assert not update.arrays["classifier.weight"].any()
    assert update.examples == 12
    total = ExactSum({name: array.shape for name, array in update.arrays.items()})
    total.add(update.arrays, update.examples)
    expected = np.rint(change.astype(np.float64) * 12 * 2.0**32)
    assert total.totals["classifier.bias"].tolist() == expected.tolist()


def test_of_the_word_embedding_rows_of_the_clients_own_words_leave(wordy):
    rows = wordy.distil().arrays[WORDS]
    inputs = wordy.data.tokens.batch(wordy.rows)
    own = set(inputs["input_ids"][inputs["attention_mask"].bool()].tolist())
    moved = set(rows.index[np.abs(rows.values).any(axis=1)].tolist())
    assert (np.diff(rows.index) > 0).all()
    assert own <= set(rows.index.tolist())
    assert len(rows.index) < len(wordy.weights[WORDS])
    # decay moves the rows up to the padding's too, as it would all
    assert moved - set(range(wordy.data.tokens.pad + 1)) == own - {wordy.data.tokens.pad}
