"""Hidden states of unequal width: a learned projection between them, by hand and in parts, and none where it is not."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from common.batches import cut
from common.config import from_flat
from common.dataset import Split
from common.distillation import PROJECTION, begin, learn, set_gradients
from common.inference import predict
from common.models import load_teacher
from common.nested import Tiers
from common.objective import Examples, batch_of
from common.recipe import PARTS
from common.slim import Shape, cut_student
from tests.conftest import FP32, make_sentences, make_teacher, make_tokens
from tests.scene import RECIPE

INNER = {"student.layers": 2, "distill.hidden-weight": 1.0}
NOTHING = dict.fromkeys(PARTS, 0.0)


class Scene:
    """A teacher 32 wide and a student of two layers of a model 16 wide with the same pieces."""

    def __init__(self, folder, **keys):
        self.teacher = load_teacher(make_teacher(folder / "teacher", width=32, seed=1))
        model = load_teacher(make_teacher(folder / "narrow"))
        shape = Shape.whole(model.config, (0, 3))
        self.tiers = Tiers(from_flat({**INNER, **keys}), cut_student(model, shape), shape, 32)
        self.weights = {name: weight.clone() for name, weight in self.tiers.initial().items()}
        self.student = self.tiers.student(0)
        tokens, rows = make_tokens(folder / "teacher", make_sentences(24)), np.arange(24)
        data = Split(tokens, np.zeros(24, dtype=np.int64), np.zeros((24, 16), dtype=np.uint8))
        self.examples = Examples(data, rows, predict(self.teacher, tokens, rows, FP32))

    def gradients(self, recipe, budget=10**6):
        lengths = self.examples.data.tokens.lengths(self.examples.rows)
        parts = cut(np.argsort(lengths, kind="stable"), lengths, budget)
        state = begin(self.student, self.weights, recipe)
        batches = [batch_of(self.examples, part, recipe, FP32) for part in parts]
        totals = set_gradients(state, batches, recipe=recipe, compute=FP32, teacher=self.teacher)
        grads = {name: weight.grad for name, weight in state.trained.items() if weight.grad is not None}
        return {name: grad.clone() for name, grad in grads.items()}, sum(totals), batches


@pytest.fixture(scope="module")
def scene(tmp_path_factory):
    return Scene(tmp_path_factory.mktemp("scene"))


def recipe_of(**weights):
    return replace(RECIPE, weights=NOTHING | weights, hidden_loss="mse")


def test_value_and_gradient_are_those_worked_out_by_hand(scene):
    """Of mean |W a - b|^2 / 32 over n positions, d/dW = 2 / (32 n) sum (W a - b) a^T; of two pairs the mean."""
    grads, totals, (batch,) = scene.gradients(recipe_of(hidden=1.0))
    projection, real = scene.weights[PROJECTION].double(), batch.inputs["attention_mask"].bool()
    with torch.no_grad():
        ours = scene.student.model(**batch.inputs, output_hidden_states=True).hidden_states
        theirs = scene.teacher(**batch.inputs, output_hidden_states=True).hidden_states
    value, gradient = 0.0, torch.zeros(32, 16, dtype=torch.float64)
    for own, taught in ((1, 2), (2, 4)):
        a, b = ours[own][real].double(), theirs[taught][real].double()
        error = a @ projection.T - b
        value += error.square().sum().item() / (32 * len(a)) / 2
        gradient += 2 / (32 * len(a)) * error.T @ a / 2
    assert totals[1 + PARTS.index("hidden")].item() / 24 == pytest.approx(value, rel=1e-5)
    torch.testing.assert_close(grads[PROJECTION], gradient.float(), rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("part", ["hidden", "cls", "relation"])
def test_any_micro_budget_gives_the_gradient_of_the_whole_batch(scene, part):
    whole, expected, _ = scene.gradients(recipe_of(**{part: 1.3}))
    assert (PROJECTION in whole) == (part != "relation")
    for budget in (1, 90):
        found, totals, parts = scene.gradients(recipe_of(**{part: 1.3}), budget)
        assert len(parts) > 2
        torch.testing.assert_close(totals, expected, rtol=1e-5, atol=1e-6)
        for name in (PROJECTION,) if part != "relation" else ():
            assert (found[name] - whole[name]).norm() <= 1e-5 * whole[name].norm()


def test_the_projection_is_trained_along_and_brings_the_states_nearer(scene):
    told = []
    for epochs in (1, 10):
        state = learn(
            scene.student, scene.weights, scene.examples, recipe=replace(recipe_of(hidden=1.0), epochs=epochs),
            compute=FP32, seed=0, who=(1, 2), teacher=scene.teacher,
        )  # fmt: skip
        told.append((state.totals / state.seen)[0].item())
    assert told[1] < 0.9 * told[0]
    assert not torch.equal(state.trained[PROJECTION], scene.weights[PROJECTION])


def test_it_is_drawn_from_the_seed_and_is_no_part_of_the_model(tmp_path, scene):
    again, other = Scene(tmp_path / "again"), Scene(tmp_path / "other", seed=1)
    assert scene.tiers.shapes[PROJECTION] == (32, 16)
    assert torch.equal(again.weights[PROJECTION], scene.weights[PROJECTION])
    assert not torch.equal(other.weights[PROJECTION], scene.weights[PROJECTION])
    assert scene.weights[PROJECTION].abs().max() <= 1 / 4 < 4.2 * scene.weights[PROJECTION].abs().max()
    assert PROJECTION not in scene.tiers.load(0, scene.weights).state_dict()


@pytest.mark.parametrize("keys", [INNER, {"student.layers": 2}], ids=["equally wide", "not compared"])
def test_equal_widths_or_states_that_are_not_compared_have_none(tiny_teacher, keys):
    model = load_teacher(tiny_teacher)
    shape = Shape.whole(model.config, (0, 3))
    student, width = cut_student(model, shape), 16 if keys is INNER else 32
    plain, found = Tiers(from_flat(keys), student, shape), Tiers(from_flat(keys), student, shape, width)
    assert found.shapes == plain.shapes == {name: tuple(w.shape) for name, w in plain.initial().items()}
    assert found[0].held == found[0].sent == plain.shapes
    assert all(torch.equal(weight, plain.initial()[name]) for name, weight in found.initial().items())
