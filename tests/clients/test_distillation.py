"""One client's training is a plain PyTorch loop over its own batches; its update is what was learned, encoded."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from clients.distillation import Recipe, Student, TrainingShard, client_final, client_init, distil, make_recipe
from common.batches import token_budget_batches
from common.config import from_flat
from common.dataset import Split
from common.fixed_point import NotFinite, encode
from common.inference import predict
from common.models import cut_student, freeze_embeddings, load_teacher
from common.seeding import generator
from tests.conftest import BF16, FP32, make_sentences, make_teacher, make_tokens

RECIPE = Recipe(
    epochs=2, lr=0.003, weight_decay=0.01, clip_norm=1.0, token_budget=128, temperature=2.0, soft_weight=0.7,
    hard_weight=0.3, hidden_weight=0.0, hidden_loss="cosine", hidden_pairs=((0, 1), (1, 3)), regression=False,
)  # fmt: skip
WHO = (3, 17)


class Scene:
    """A teacher, a student cut from it, and one client's rows of a larger table."""

    def __init__(self, folder, labels=2, dropout=0.0):
        self.teacher = load_teacher(folder)
        model = cut_student(self.teacher, (0, 3), dropout)
        self.student = Student(model, freeze_embeddings(model, False))
        self.weights = {name: weight.detach().clone() for name, weight in self.student.trained.items()}
        tokens = make_tokens(folder, make_sentences(60))
        rng = np.random.default_rng(0)
        truth = rng.integers(0, labels, 60) if labels > 1 else rng.uniform(0, 5, 60)
        self.data = Split(tokens, truth, np.zeros((60, 16), dtype=np.uint8))
        self.rows = np.array([*range(5, 35), 50, 41])
        self.shard = TrainingShard(self.data, self.rows, predict(self.teacher, tokens, self.rows, FP32))

    def distil(self, recipe=RECIPE, compute=FP32, seed=0, who=WHO, shard=None):
        return distil(
            self.student, self.weights, shard or self.shard, recipe=recipe, compute=compute, seed=seed, who=who,
            teacher=self.teacher,
        )  # fmt: skip


@pytest.fixture(scope="module")
def scene(tiny_teacher):
    return Scene(tiny_teacher)


def bare_loop(scene, recipe):
    """The same training without any of our code but the order of batches; the model's final weights."""
    model = cut_student(scene.teacher, (0, 3)).train()
    trained = [p for name, p in model.named_parameters() if not name.startswith("bert.embeddings.")]
    optimizer = torch.optim.AdamW(trained, lr=recipe.lr, weight_decay=recipe.weight_decay)
    tokens, labels, temperature = scene.data.tokens, torch.from_numpy(scene.data.labels), recipe.temperature
    lengths = tokens.lengths(scene.rows)
    losses = []
    for epoch in range(recipe.epochs):
        for places in token_budget_batches(lengths, recipe.token_budget, generator(0, "batches", *WHO, epoch)):
            rows = scene.rows[places]
            inputs = tokens.batch(rows)
            output = model(**inputs, output_hidden_states=True)
            teacher = torch.from_numpy(scene.shard.soft[places])
            if recipe.regression:
                soft = (output.logits - teacher).square().mean()
                hard = (output.logits[:, 0] - labels[rows].float()).square().mean()
            else:
                p = F.softmax(teacher / temperature, -1)
                soft = temperature**2 * (p * (p.log() - F.log_softmax(output.logits / temperature, -1))).sum(-1).mean()
                hard = F.cross_entropy(output.logits, labels[rows])
            loss = recipe.soft_weight * soft + recipe.hard_weight * hard
            if recipe.hidden_weight:
                with torch.no_grad():
                    states = scene.teacher(**inputs, output_hidden_states=True).hidden_states
                real = inputs["attention_mask"].bool()
                pairs = [(output.hidden_states[s + 1][real], states[t + 1][real]) for s, t in recipe.hidden_pairs]
                if recipe.hidden_loss == "cosine":
                    parts = [(1 - F.cosine_similarity(a, b)).mean() for a, b in pairs]
                else:
                    parts = [F.mse_loss(a, b) for a, b in pairs]
                loss = loss + recipe.hidden_weight * sum(parts) / len(parts)
            optimizer.zero_grad()
            loss.backward()
            if recipe.clip_norm:
                torch.nn.utils.clip_grad_norm_(trained, recipe.clip_norm)
            optimizer.step()
            losses.append((loss.item(), len(rows)))
    return dict(model.named_parameters()), np.average([one for one, _ in losses], weights=[n for _, n in losses])


@pytest.mark.parametrize(
    "changed",
    [
        {},
        {"clip_norm": 0.0, "temperature": 5.0},
        {"hard_weight": 0.0},
        {"hidden_weight": 2.0},
        {"hidden_weight": 1.0, "hidden_loss": "mse", "soft_weight": 0.0},
    ],
    ids=str,
)
def test_distillation_is_a_bare_pytorch_loop(scene, changed):
    recipe = replace(RECIPE, **changed)
    update = scene.distil(recipe)
    expected, loss = bare_loop(scene, recipe)
    assert set(update.arrays) == set(scene.weights)
    for name, start in scene.weights.items():
        learned = update.arrays[name] / (len(scene.rows) * 2.0**32)
        np.testing.assert_allclose(start.numpy() + learned, expected[name].detach().numpy(), atol=2e-6)
    assert update.examples == len(scene.rows) == 32
    assert update.losses[0] == pytest.approx(loss, rel=1e-5)
    assert max(np.abs(array).max() for array in update.arrays.values()) > 32 * 2**32 * recipe.lr


def test_a_score_is_distilled_by_squared_error(tmp_path):
    scene = Scene(make_teacher(tmp_path, labels=1), labels=1)
    recipe = replace(RECIPE, regression=True)
    update = scene.distil(recipe)
    expected, loss = bare_loop(scene, recipe)
    assert update.losses[0] == pytest.approx(loss, rel=1e-5)
    assert update.losses[0] == pytest.approx(0.7 * update.losses[1] + 0.3 * update.losses[2])
    for name in scene.weights:
        # a key's bias has no gradient but rounding noise (softmax does not see it), and AdamW scales noise to steps
        if not name.endswith("key.bias"):
            assert torch.allclose(scene.student.trained[name], expected[name], atol=2e-6), name


class Forbidden:
    """Labels nobody may look at."""

    def __getattr__(self, name):
        raise AssertionError("a label was read")

    __getitem__ = __array__ = __len__ = __iter__ = __getattr__


def test_labels_without_weight_are_never_read(scene):
    blind = TrainingShard(Split(scene.data.tokens, Forbidden(), scene.data.keys), scene.rows, scene.shard.soft)
    recipe = replace(RECIPE, hard_weight=0.0)
    found, expected = scene.distil(recipe, shard=blind), scene.distil(recipe)
    assert all((found.arrays[name] == expected.arrays[name]).all() for name in expected.arrays)
    with pytest.raises(AssertionError, match="a label was read"):
        scene.distil(shard=blind)


def bits(update):
    return b"".join(update.arrays[name].tobytes() for name in sorted(update.arrays))


@pytest.mark.parametrize("compute", [FP32, BF16], ids=["fp32", "bf16"])
def test_the_same_inputs_give_the_same_bits_whatever_was_done_before(tiny_teacher, compute):
    scene = Scene(tiny_teacher, dropout=0.2)
    first = bits(scene.distil(compute=compute))
    scene.distil(compute=compute, who=(4, 18))
    torch.rand(5)
    assert bits(scene.distil(compute=compute)) == first
    assert bits(Scene(tiny_teacher, dropout=0.2).distil(compute=compute)) == first


def test_seed_round_and_client_change_the_batches(scene):
    found = {
        bits(scene.distil(seed=seed, who=who)) for seed, who in [(0, (1, 1)), (1, (1, 1)), (0, (2, 1)), (0, (1, 2))]
    }
    assert len(found) == 4


def test_only_the_clients_own_rows_matter(scene):
    expected = bits(scene.distil())
    labels = scene.data.labels.copy()
    others = np.setdiff1d(np.arange(60), scene.rows)
    labels[others] = 1 - labels[others]
    shard = TrainingShard(Split(scene.data.tokens, labels, scene.data.keys), scene.rows, scene.shard.soft)
    assert bits(scene.distil(shard=shard)) == expected


def test_a_student_equal_to_its_teacher_learns_nothing_from_it(tiny_teacher):
    scene = Scene(tiny_teacher)
    model = cut_student(scene.teacher, (0, 1, 2, 3))
    scene.student = Student(model, freeze_embeddings(model, False))
    scene.weights = {name: weight.detach().clone() for name, weight in scene.student.trained.items()}
    update = scene.distil(replace(RECIPE, hard_weight=0.0, weight_decay=0.0, lr=1e-8))
    assert update.losses[1] == pytest.approx(0.0, abs=1e-7)


def test_training_moves_towards_the_teacher(scene):
    losses = [scene.distil(replace(RECIPE, hard_weight=0.0, epochs=epochs)).losses[1] for epochs in (1, 8)]
    assert losses[1] < 0.8 * losses[0]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e30])
def test_weights_that_are_not_finite_are_refused(scene, bad):
    state = client_init(scene.student, scene.weights, RECIPE)
    with torch.no_grad():
        scene.student.trained["classifier.bias"][0] = bad
    with pytest.raises(NotFinite):
        client_final(state, 5)


def test_an_update_is_the_difference_to_the_rounds_weights_times_the_examples(scene):
    state = client_init(scene.student, scene.weights, RECIPE)
    with torch.no_grad():
        scene.student.trained["classifier.bias"] += 0.5
    update = client_final(state, 12)
    change = scene.student.trained["classifier.bias"].detach().numpy() - scene.weights["classifier.bias"].numpy()
    assert update.arrays["classifier.bias"].tolist() == encode(change, 12).tolist()
    assert change == pytest.approx([0.5, 0.5], abs=1e-6)
    assert not update.arrays["classifier.weight"].any()


def test_the_learning_rate_falls_to_a_tenth_or_stays():
    config = from_flat({"rounds": 10, "client.lr": 0.01})
    falling = [make_recipe(config, number, (), False).lr for number in range(1, 11)]
    np.testing.assert_allclose(falling, np.linspace(0.01, 0.001, 10))
    constant = from_flat({"rounds": 10, "client.lr": 0.01, "client.lr-decay": "constant"})
    assert {make_recipe(constant, number, (), False).lr for number in range(1, 11)} == {0.01}
    assert make_recipe(from_flat({"rounds": 1, "client.lr": 0.01}), 1, (), False).lr == 0.01
