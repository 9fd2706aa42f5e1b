"""A batch that passes in parts has the gradient, the losses and the update of the whole batch."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from common.batches import cut, token_budget_batches
from common.config import from_flat
from common.dataset import Split, load_tokenizer
from common.distillation import Student, begin, learn, restore, set_gradients
from common.inference import predict
from common.models import freeze_embeddings, load_teacher
from common.objective import Examples, batch_of
from common.recipe import PARTS, Recipe, make_recipe
from common.seeding import generator
from common.slim import Shape, cut_student
from common.tokens import tokenize
from tests.conftest import FP32, make_sentences, make_teacher, make_tokens

NOTHING = dict.fromkeys(PARTS, 0.0)
RECIPE = Recipe(
    epochs=2, lr=0.003, weight_decay=0.01, clip_norm=1.0, token_budget=256, temperature=2.0,
    weights=NOTHING | {"soft": 0.7, "hard": 0.3}, adaptive=False, hidden_loss="cosine",
    hidden_pairs=((0, 1), (1, 3)), relation_pairs=((1, 3),), relation_heads=2, regression=False,
)  # fmt: skip
EVERY = {"soft": 0.7, "hard": 0.3, "hidden": 1.5, "cls": 0.8, "relation": 1.2, "self": 0.0, "inner": 0.0, "mlm": 0.0}
ALONE = PARTS[:5]  # the others need students inside, or masks: see test_nested.py and test_masking.py


class Scene:
    """A teacher, a student of two of its four layers, and 40 examples of 4 to 26 pieces.

    With ``short`` the student reads only the first pieces of each text, so that inner states are compared at
    places of their own.
    """

    def __init__(self, folder, embeddings=False, labels=2, short=0):
        self.teacher = load_teacher(folder)
        with torch.no_grad():  # as it is made, all relations are nearly uniform: a loss of rounding noise
            for name, weight in self.teacher.named_parameters():
                if weight.ndim == 2 and "classifier" not in name:
                    weight.mul_(10.0)
        model = cut_student(self.teacher, Shape.whole(self.teacher.config, (0, 3)))
        self.student = Student.of(model, freeze_embeddings(model, embeddings))
        self.weights = {name: weight.detach().clone() for name, weight in self.student.trained.items()}
        texts = make_sentences(40)
        taught = make_tokens(folder, texts)
        own = make_tokens(folder, texts, max_length=short) if short else taught
        rng = np.random.default_rng(0)
        truth = rng.integers(0, labels, 40) if labels > 1 else rng.uniform(0, 5, 40)
        rows = np.arange(40)
        soft = predict(self.teacher, taught, rows, FP32)
        data = Split(own, truth, np.zeros((40, 16), dtype=np.uint8))
        self.examples = Examples(data, rows, soft, taught if short else None)
        self.lengths = own.lengths(rows)

    def places(self):
        """All examples, the shortest first."""
        return np.argsort(self.lengths, kind="stable")

    def gradients(self, recipe, budget):
        """Of one batch of all examples that passes in parts within the budget, and what it adds to the totals."""
        parts = [batch_of(self.examples, part, recipe, FP32) for part in cut(self.places(), self.lengths, budget)]
        vocabulary = self.examples.data.tokens.vocabulary(self.examples.rows)
        state = begin(self.student, self.weights, recipe, vocabulary if self.student.words else None)
        try:
            totals = set_gradients(state, parts, recipe=recipe, compute=FP32, teacher=self.teacher)
            found = {
                name: torch.zeros_like(weight) if weight.grad is None else weight.grad.clone()
                for name, weight in state.trained.items()
            }
            return found, sum(totals), len(parts)
        finally:
            restore(self.student)

    def learn(self, recipe):
        """The trained weights and the totals."""
        state = learn(
            self.student, self.weights, self.examples, recipe=recipe, compute=FP32, seed=0, who=(3, 17),
            teacher=self.teacher,
        )  # fmt: skip
        return {name: weight.detach().clone() for name, weight in state.trained.items()}, state


@pytest.fixture(scope="module")
def scene(tiny_teacher):
    return Scene(tiny_teacher)


def same_gradient(scene, recipe, budgets=(1, 90)):
    whole, totals, count = scene.gradients(recipe, 10**6)
    assert count == 1
    size = torch.cat([part.flatten() for part in whole.values()]).norm()
    assert size > 1e-4
    for budget in budgets:
        found, told, count = scene.gradients(recipe, budget)
        assert count > 2
        for name, gradient in found.items():
            # a key's bias has no gradient but rounding noise (softmax does not see it)
            near = 1e-7 * size if name.endswith("key.bias") else 1e-5 * whole[name].norm() + 1e-8 * size
            assert (gradient - whole[name]).norm() <= near, (budget, name)
        torch.testing.assert_close(told, totals, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("part", ALONE)
@pytest.mark.parametrize("hidden", ["cosine", "mse"])
def test_any_micro_budget_gives_the_gradient_of_each_part_of_the_loss(scene, part, hidden):
    if part == "hidden" or hidden == "cosine":
        same_gradient(scene, replace(RECIPE, weights=NOTHING | {part: 1.3}, hidden_loss=hidden))


@pytest.mark.parametrize("short", [0, 9], ids=["same pieces", "places of their own"])
@pytest.mark.parametrize("embeddings", [False, True], ids=["frozen", "words trained"])
@pytest.mark.parametrize("adaptive", [False, True], ids=["constant", "adaptive"])
def test_any_micro_budget_gives_the_gradient_of_all_parts_together(tiny_teacher, embeddings, adaptive, short):
    recipe = replace(RECIPE, weights=EVERY, adaptive=adaptive)
    same_gradient(Scene(tiny_teacher, embeddings, short=short), recipe)


@pytest.mark.parametrize("part", ALONE)
def test_any_micro_budget_gives_the_gradient_of_texts_in_windows(tiny_teacher, part):
    """Some texts have one window, some two: [CLS] states are compared window by window, outputs text by text."""
    scene, rows = Scene(tiny_teacher), np.arange(40)
    tokens = tokenize((make_sentences(40),), load_tokenizer(tiny_teacher), 10, lambda done: None, windows=4, stride=2)
    assert set(np.diff(tokens.first)) >= {1, 2}
    data = replace(scene.examples.data, tokens=tokens)
    scene.examples = Examples(data, rows, predict(scene.teacher, tokens, rows, FP32))
    scene.lengths = tokens.lengths(rows)
    same_gradient(scene, replace(RECIPE, weights=NOTHING | {part: 1.3}))


@pytest.mark.parametrize("adaptive", [False, True], ids=["constant", "adaptive"])
def test_any_micro_budget_gives_the_gradient_of_a_score(tmp_path, adaptive):
    scene = Scene(make_teacher(tmp_path, labels=1), labels=1)
    same_gradient(scene, replace(RECIPE, weights=EVERY, adaptive=adaptive, regression=True))


@pytest.mark.parametrize("changed", [{}, {"proximal": 2.0}, {"clip_norm": 0.0}, {"weights": EVERY}], ids=str)
@pytest.mark.parametrize("embeddings", [False, True], ids=["frozen", "words trained"])
def test_any_micro_budget_gives_the_update_and_the_losses_of_whole_batches(tiny_teacher, embeddings, changed):
    scene = Scene(tiny_teacher, embeddings)
    recipe = replace(RECIPE, **changed)
    whole, expected = scene.learn(recipe)
    for budget in (1, 70):
        found, state = scene.learn(replace(recipe, micro_budget=budget))
        assert state.seen == expected.seen == 80
        torch.testing.assert_close(state.totals, expected.totals, rtol=1e-5, atol=1e-7)
        for name, weight in found.items():
            if not name.endswith("key.bias"):  # nothing but noise, and AdamW scales noise to steps
                torch.testing.assert_close(weight, whole[name], rtol=0, atol=2e-5, msg=name)
    assert max((weight - expected.start[name]).abs().max() for name, weight in whole.items()) > recipe.lr


@pytest.mark.parametrize("weights", [RECIPE.weights, EVERY], ids=["outputs", "every part"])
def test_a_micro_budget_as_large_as_the_batch_changes_no_bit(scene, weights):
    recipe = replace(RECIPE, weights=weights)
    whole, expected = scene.learn(recipe)
    for budget in (recipe.token_budget, 10**6):
        found, state = scene.learn(replace(recipe, micro_budget=budget))
        assert all(torch.equal(found[name], whole[name]) for name in whole)
        assert torch.equal(state.totals, expected.totals)


def test_means_over_positions_weigh_by_positions_and_means_over_examples_by_examples(scene):
    """Two parts of one short and three long examples, from their own losses by hand."""
    places = scene.places()[[0, -3, -2, -1]]
    recipe = replace(RECIPE, weights=EVERY)

    def losses(*parts):
        state = begin(scene.student, scene.weights, recipe)
        batches = [batch_of(scene.examples, part, recipe, FP32) for part in parts]
        told = set_gradients(state, batches, recipe=recipe, compute=FP32, teacher=scene.teacher)
        return (sum(told) / sum(map(len, parts))).tolist()

    short, long = int(scene.lengths[places[0]]), int(scene.lengths[places[1:]].sum())
    assert short * 3 != long
    one, three = losses(places[:1])[1:6], losses(places[1:])[1:6]
    shares = [1 / 4, 1 / 4, short / (short + long), 1 / 4, short / (short + long)]
    expected = [share * a + (1 - share) * b for share, a, b in zip(shares, one, three, strict=True)]
    together = losses(places[:1], places[1:])
    assert together[1:6] == pytest.approx(expected, rel=1e-6)
    assert together[0] == pytest.approx(sum(EVERY[name] * part for name, part in zip(ALONE, expected, strict=True)))
    assert losses(places) == pytest.approx(together, rel=1e-5)


def test_parts_of_a_batch_stay_within_the_budget_and_in_order():
    """Ascending lengths 3 4 4 | 8 | 20: three fit 12 pieces, two of 8 do not."""
    lengths = np.array([20, 4, 8, 3, 4])
    places = np.array([3, 1, 4, 2, 0])
    assert [part.tolist() for part in cut(places, lengths, 12)] == [[3, 1, 4], [2], [0]]
    assert [part.tolist() for part in cut(places, lengths, 1)] == [[3], [1], [4], [2], [0]]
    assert [part.tolist() for part in cut(places, lengths, 100)] == [[3, 1, 4, 2, 0]]
    assert cut(places[:0], lengths, 12) == []


def test_batches_can_be_cut_as_they_are():
    """A batch holds its shortest example first, which is what cutting asks for."""
    lengths = generator(7).integers(5, 60, 200)
    for batch in token_budget_batches(lengths, 512, generator(0)):
        assert (np.diff(lengths[batch]) >= 0).all()


@pytest.mark.parametrize(("micro", "expected"), [(0, 512), (128, 128), (4096, 4096)])
def test_the_key_becomes_the_recipes_micro_budget(scene, micro, expected):
    config = from_flat({"client.token-budget": 512, "client.micro-budget": micro})
    shape = Shape.whole(scene.teacher.config, (0, 3))
    recipe = make_recipe(config, 1, shape, scene.teacher.config, False)
    assert (recipe.token_budget, recipe.micro_budget) == (512, expected)
