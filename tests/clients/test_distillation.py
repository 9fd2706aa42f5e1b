"""One client's training is a plain PyTorch loop over its own batches; its update is what was learned."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from clients.distillation import (
    Recipe,
    Student,
    TrainingShard,
    client_final,
    client_init,
    distil,
    make_recipe,
    pull_back,
)
from common.batches import token_budget_batches
from common.config import from_flat
from common.dataset import Split
from common.fixed_point import ExactSum, NotFinite, Rows
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

    def __init__(self, folder, labels=2, dropout=0.0, embeddings=False):
        self.teacher = load_teacher(folder)
        model = cut_student(self.teacher, (0, 3), dropout)
        self.student = Student.of(model, freeze_embeddings(model, embeddings))
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
    start = copy.deepcopy(model)
    trained = [p for name, p in model.named_parameters() if name in scene.weights]
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
            told = loss.item()
            if recipe.proximal:
                moved = [
                    (new - old).square().sum() for new, old in zip(model.parameters(), start.parameters(), strict=True)
                ]
                loss = loss + recipe.proximal / 2 * sum(moved)
            optimizer.zero_grad()
            loss.backward()
            if recipe.clip_norm:
                torch.nn.utils.clip_grad_norm_(trained, recipe.clip_norm)
            optimizer.step()
            losses.append((told, len(rows)))
    return dict(model.named_parameters()), np.average([one for one, _ in losses], weights=[n for _, n in losses])


@pytest.mark.parametrize(
    "changed",
    [
        {},
        {"clip_norm": 0.0, "temperature": 5.0},
        {"hard_weight": 0.0},
        {"hidden_weight": 2.0},
        {"hidden_weight": 1.0, "hidden_loss": "mse", "soft_weight": 0.0},
        {"proximal": 3.0},
        {"proximal": 1.0, "clip_norm": 0.0},
    ],
    ids=str,
)
def test_distillation_is_a_bare_pytorch_loop(scene, changed):
    recipe = replace(RECIPE, **changed)
    update = scene.distil(recipe)
    expected, loss = bare_loop(scene, recipe)
    assert set(update.arrays) == set(scene.weights)
    for name, start in scene.weights.items():
        learned = update.arrays[name]
        assert learned.dtype == np.float32
        # a key's bias has no gradient but rounding noise (softmax does not see it), which another way to add up
        # the same gradient changes, and AdamW scales noise to steps
        if not (recipe.proximal and name.endswith("key.bias")):
            np.testing.assert_allclose(start.numpy() + learned, expected[name].detach().numpy(), atol=2e-6)
    assert update.examples == len(scene.rows) == 32
    assert update.losses[0] == pytest.approx(loss, rel=1e-5)
    assert max(np.abs(array).max() for array in update.arrays.values()) > recipe.lr


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
    arrays = [update.arrays[name] for name in sorted(update.arrays)]
    return b"".join(
        array.index.tobytes() + array.values.tobytes() if isinstance(array, Rows) else array.tobytes()
        for array in arrays
    )


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
    scene.student = Student.of(model, freeze_embeddings(model, False))
    scene.weights = {name: weight.detach().clone() for name, weight in scene.student.trained.items()}
    update = scene.distil(replace(RECIPE, hard_weight=0.0, weight_decay=0.0, lr=1e-8))
    assert update.losses[1] == pytest.approx(0.0, abs=1e-7)


def test_training_moves_towards_the_teacher(scene):
    losses = [scene.distil(replace(RECIPE, hard_weight=0.0, epochs=epochs)).losses[1] for epochs in (1, 8)]
    assert losses[1] < 0.8 * losses[0]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e30])
def test_weights_that_are_not_finite_are_refused(scene, bad):
    """Where the update is added up: the sum takes no part of it."""
    state = client_init(scene.student, scene.weights, RECIPE)
    with torch.no_grad():
        scene.student.trained["classifier.bias"][0] = bad
    update = client_final(state, 5)
    total = ExactSum({name: array.shape for name, array in update.arrays.items()})
    with pytest.raises(NotFinite):
        total.add(update.arrays, update.examples)
    assert not any(array.any() for array in total.totals.values())


def test_an_update_is_the_difference_to_the_rounds_weights_and_weighs_as_many_examples(scene):
    state = client_init(scene.student, scene.weights, RECIPE)
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


def test_the_resident_optimiser_remembers_nothing_of_the_client_before(tiny_teacher):
    used, fresh = Scene(tiny_teacher), Scene(tiny_teacher)
    for lr in (0.5, 0.001):
        used.distil(replace(RECIPE, lr=lr, weight_decay=0.3))
    client_init(used.student, used.weights, RECIPE)
    for memory in used.student.optimizer.state.values():
        assert not any(tensor.any() for tensor in memory.values())
    assert used.student.optimizer.param_groups[0]["lr"] == RECIPE.lr
    assert used.student.optimizer.param_groups[0]["weight_decay"] == RECIPE.weight_decay
    assert bits(used.distil()) == bits(fresh.distil())


# --- a word embedding under training ------------------------------------------------------------


WORDS = "bert.embeddings.word_embeddings.weight"


@pytest.fixture(scope="module")
def wordy(tiny_teacher):
    return Scene(tiny_teacher, embeddings=True)


def own_words(scene, rows):
    inputs = scene.data.tokens.batch(rows)
    return set(inputs["input_ids"][inputs["attention_mask"].bool()].tolist())


@pytest.mark.parametrize("changed", [{}, {"clip_norm": 0.0}, {"proximal": 3.0}, {"hidden_weight": 1.0}], ids=str)
def test_training_the_rows_of_the_clients_own_words_is_training_them_all(wordy, changed):
    """Without weight decay: the other rows have no gradient."""
    recipe = replace(RECIPE, weight_decay=0.0, **changed)
    update = wordy.distil(recipe)
    expected, loss = bare_loop(wordy, recipe)
    assert update.losses[0] == pytest.approx(loss, rel=1e-5)
    assert set(update.arrays) == set(wordy.weights) == set(expected)
    for name, start in wordy.weights.items():
        learned = update.arrays[name]
        if name == WORDS:
            learned = learned.dense(start.shape)
        if not name.endswith("key.bias"):  # nothing but noise, see above
            np.testing.assert_allclose(start.numpy() + learned, expected[name].detach().numpy(), atol=2e-6)
    assert np.abs(update.arrays[WORDS].values).max() > recipe.lr / 2


@pytest.mark.parametrize("family", ["roberta", "electra", "distilbert"])
def test_in_every_family_the_clients_own_words_are_enough(family, tmp_path):
    """RoBERTa counts positions from the padding's number, and its padding is not the first piece."""
    scene = Scene(make_teacher(tmp_path, family), embeddings=True)
    recipe = replace(RECIPE, weight_decay=0.0)
    update = scene.distil(recipe)
    expected, loss = bare_loop(scene, recipe)
    assert update.losses[0] == pytest.approx(loss, rel=1e-5)
    for name, start in scene.weights.items():
        learned = update.arrays[name]
        if name == scene.student.words:
            learned = learned.dense(start.shape)
        if not name.endswith(("key.bias", "k_lin.bias")):  # nothing but noise, see above
            np.testing.assert_allclose(start.numpy() + learned, expected[name].detach().numpy(), atol=4e-6)


def test_of_the_word_embedding_only_rows_of_the_clients_own_words_move(wordy):
    update = wordy.distil()
    rows = update.arrays[WORDS]
    moved = set(rows.index[np.abs(rows.values).any(axis=1)].tolist())
    assert (np.diff(rows.index) > 0).all()
    assert own_words(wordy, wordy.rows) <= set(rows.index.tolist())
    assert len(rows.index) < len(wordy.weights[WORDS])
    # decay moves the rows up to the padding's too, as it would all
    assert moved - set(range(wordy.data.tokens.pad + 1)) == own_words(wordy, wordy.rows) - {wordy.data.tokens.pad}


def test_the_whole_word_embedding_is_back_after_training_and_after_a_failure(wordy):
    rows = np.arange(60)  # also of words that the client does not have
    table = wordy.student.trained[WORDS]
    client_init(wordy.student, wordy.weights, RECIPE)
    before = predict(wordy.student.model, wordy.data.tokens, rows, FP32)
    update = wordy.distil()
    assert wordy.student.model.get_input_embeddings().weight is table
    with torch.no_grad():
        for name, weight in wordy.weights.items():
            wordy.student.trained[name].copy_(weight)
    assert predict(wordy.student.model, wordy.data.tokens, rows, FP32).tobytes() == before.tobytes()
    broken = TrainingShard(Split(wordy.data.tokens, Forbidden(), wordy.data.keys), wordy.rows, wordy.shard.soft)
    with pytest.raises(AssertionError, match="a label was read"):
        wordy.distil(shard=broken)
    assert wordy.student.model.get_input_embeddings().weight is table
    assert bits(wordy.distil()) == bits(update)


def test_the_optimiser_keeps_no_memory_of_rows_that_are_gone(wordy):
    for number in range(3):
        wordy.distil(who=(1, number))
    assert len(wordy.student.optimizer.state) == len(wordy.weights)


@pytest.mark.parametrize("compute", [FP32, BF16], ids=["fp32", "bf16"])
def test_with_words_too_the_bits_do_not_depend_on_what_was_done_before(tiny_teacher, compute):
    scene = Scene(tiny_teacher, dropout=0.2, embeddings=True)
    first = bits(scene.distil(compute=compute))
    other = TrainingShard(
        scene.data, np.arange(40, 60), predict(scene.teacher, scene.data.tokens, np.arange(40, 60), FP32)
    )
    scene.distil(compute=compute, who=(4, 18), shard=other)
    assert bits(scene.distil(compute=compute)) == first
    assert bits(Scene(tiny_teacher, dropout=0.2, embeddings=True).distil(compute=compute)) == first


# --- FedProx ------------------------------------------------------------------------------------


def test_pulling_back_adds_the_gradient_of_the_proximal_term(scene):
    state = client_init(scene.student, scene.weights, RECIPE)
    rng = torch.Generator().manual_seed(0)
    trained, mu = scene.student.trained, 0.37
    with torch.no_grad():
        for parameter in trained.values():
            parameter.add_(torch.randn(parameter.shape, generator=rng))
    given = {name: torch.randn(parameter.shape, generator=rng) for name, parameter in trained.items()}
    distance = sum((parameter - scene.weights[name]).square().sum() for name, parameter in trained.items())
    expected = dict(zip(trained, torch.autograd.grad(mu / 2 * distance, list(trained.values())), strict=True))
    for name, parameter in trained.items():
        parameter.grad = given[name].clone()
    trained["classifier.bias"].grad = None  # a weight that the loss does not see is not pulled
    pull_back(state, mu)
    assert trained["classifier.bias"].grad is None
    for name, parameter in trained.items():
        if name != "classifier.bias":
            torch.testing.assert_close(parameter.grad, given[name] + expected[name])


def test_the_more_a_client_is_pulled_the_less_it_moves(scene):
    recipe = replace(RECIPE, epochs=4, clip_norm=0.0)
    moved = [
        np.sqrt(sum(np.square(array).sum() for array in scene.distil(replace(recipe, proximal=mu)).arrays.values()))
        for mu in (0.0, 10.0, 1000.0)
    ]
    assert moved[0] > 1.1 * moved[1] > 1.1**2 * moved[2]


def test_no_pull_is_fedavg_to_the_bit(scene):
    assert bits(scene.distil(replace(RECIPE, proximal=0.0))) == bits(scene.distil())
    assert bits(scene.distil(replace(RECIPE, proximal=0.1))) != bits(scene.distil())


def test_only_fedprox_pulls():
    for strategy in ("fedavg", "fedavgm", "fedadam", "median"):
        config = from_flat({"server.strategy": strategy, "client.proximal": 0.3})
        assert make_recipe(config, 1, (), False).proximal == 0.0
    assert make_recipe(from_flat({"server.strategy": "fedprox", "client.proximal": 0.3}), 1, (), False).proximal == 0.3
    assert make_recipe(from_flat({"server.strategy": "fedprox"}), 1, (), False).proximal == 0.01


def test_the_learning_rate_falls_to_a_tenth_or_stays():
    config = from_flat({"rounds": 10, "client.lr": 0.01})
    falling = [make_recipe(config, number, (), False).lr for number in range(1, 11)]
    np.testing.assert_allclose(falling, np.linspace(0.01, 0.001, 10))
    constant = from_flat({"rounds": 10, "client.lr": 0.01, "client.lr-decay": "constant"})
    assert {make_recipe(constant, number, (), False).lr for number in range(1, 11)} == {0.01}
    assert make_recipe(from_flat({"rounds": 1, "client.lr": 0.01}), 1, (), False).lr == 0.01
