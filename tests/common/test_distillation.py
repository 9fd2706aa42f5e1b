"""Training is a plain PyTorch loop over its own batches, whatever the weights of the loss's parts."""

import copy
import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import BertConfig

from common.batches import token_budget_batches
from common.config import from_flat
from common.dataset import Split, load_tokenizer
from common.distillation import begin, learn, learnt, pull_back
from common.errors import InputError
from common.families import FAMILIES
from common.inference import predict
from common.models import load_teacher
from common.objective import _aligned, _outer, batch_of, compared, output_losses
from common.recipe import make_recipe, relation_heads
from common.seeding import generator
from common.slim import Shape, cut_student
from common.tokens import Tokens
from common.vocabulary import choose_pieces, fewest_pieces, save_trimmed
from tests.conftest import BF16, FP32, make_sentences, make_student, make_teacher, make_tokens
from tests.scene import RECIPE, WHO, Forbidden, Scene, bits, weighing


@pytest.fixture(scope="module")
def scene(tiny_teacher):
    return Scene(tiny_teacher)


def bare_loop(scene, recipe):
    """The same training without any of our code but the order of batches: the final weights and the mean loss."""
    model = make_student(scene.teacher, (0, 3)).train()
    start = copy.deepcopy(model)
    trained = [p for name, p in model.named_parameters() if name in scene.weights]
    optimizer = torch.optim.AdamW(trained, lr=recipe.lr, weight_decay=recipe.weight_decay)
    tokens, labels = scene.data.tokens, torch.from_numpy(scene.data.labels)
    lengths = tokens.lengths(scene.rows)
    losses = []
    for epoch in range(recipe.epochs):
        for places in token_budget_batches(lengths, recipe.token_budget, generator(0, "batches", *WHO, epoch)):
            rows = scene.rows[places]
            inputs = tokens.batch(rows)
            output = model(**inputs, output_hidden_states=True)
            teacher = torch.from_numpy(scene.examples.soft[places])
            loss = bare_outer(output.logits, teacher, labels[rows], recipe)
            with torch.no_grad():
                states = scene.teacher(**inputs, output_hidden_states=True).hidden_states
            loss = loss + bare_inner(output.hidden_states, states, inputs["attention_mask"].bool(), recipe)
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


def bare_outer(logits, teacher, labels, recipe):
    """The loss on outputs; adaptive: each example's soft weight times the teacher's trust, the rest to the label."""
    soft_weight, hard_weight, temperature = recipe.weights["soft"], recipe.weights["hard"], recipe.temperature
    if recipe.regression:
        soft = (logits - teacher).square()[:, 0]
        hard = (logits[:, 0] - labels.float()).square()
        trust = (-(teacher[:, 0] - labels.float()).square()).exp()
    else:
        p = F.softmax(teacher / temperature, -1)
        soft = temperature**2 * (p * (p.log() - F.log_softmax(logits / temperature, -1))).sum(-1)
        hard = F.cross_entropy(logits, labels, reduction="none")
        trust = F.softmax(teacher, -1)[torch.arange(len(labels)), labels]
    if recipe.adaptive:
        return (soft_weight * trust * soft + (hard_weight + soft_weight * (1 - trust)) * hard).mean()
    return soft_weight * soft.mean() + hard_weight * hard.mean()


def bare_inner(ours, theirs, real, recipe):
    """The losses on hidden states and on those of the first piece."""
    pairs = [(ours[s + 1], theirs[t + 1]) for s, t in recipe.hidden_pairs]
    if recipe.hidden_loss == "cosine":
        parts = [(1 - F.cosine_similarity(a[real], b[real])).mean() for a, b in pairs]
    else:
        parts = [F.mse_loss(a[real], b[real]) for a, b in pairs]
    first = [(a[:, 0] / a[:, 0].norm(dim=1)[:, None] - b[:, 0] / b[:, 0].norm(dim=1)[:, None]) for a, b in pairs]
    patient = [part.square().sum(1).mean() for part in first]
    return recipe.weights["hidden"] * sum(parts) / len(parts) + recipe.weights["cls"] * sum(patient) / len(patient)


@pytest.mark.parametrize(
    "recipe",
    [
        RECIPE,
        replace(RECIPE, clip_norm=0.0, temperature=5.0),
        weighing(hard=0.0),
        weighing(hidden=2.0),
        replace(weighing(hidden=1.0, soft=0.0), hidden_loss="mse"),
        weighing(cls=3.0),
        weighing(soft=0.0, hard=0.0, cls=1.0, hidden=1.0),
        replace(RECIPE, adaptive=True),
        replace(weighing(hard=0.0), adaptive=True),
        replace(RECIPE, proximal=3.0),
        replace(RECIPE, proximal=1.0, clip_norm=0.0),
    ],
    ids=["usual", "hot", "soft", "hidden", "mse", "cls", "inner", "adaptive", "adaptive soft", "pulled", "unclipped"],
)
def test_distillation_is_a_bare_pytorch_loop(scene, recipe):
    found, told = scene.learn(recipe)
    expected, loss = bare_loop(scene, recipe)
    assert set(found) == set(scene.weights)
    for name, weight in found.items():
        # a key's bias has no gradient but rounding noise (softmax does not see it), which another way to add up
        # the same gradient changes, and AdamW scales noise to steps
        if not (recipe.proximal and name.endswith("key.bias")):
            torch.testing.assert_close(weight, expected[name].detach(), atol=2e-6, rtol=0, msg=name)
    assert told["loss"] == pytest.approx(loss, rel=1e-5)
    if not recipe.adaptive:
        assert told["loss"] == pytest.approx(sum(weight * told[part] for part, weight in recipe.weights.items()))
    assert max((weight - scene.weights[name]).abs().max() for name, weight in found.items()) > recipe.lr


@pytest.mark.parametrize("adaptive", [False, True])
def test_a_score_is_distilled_by_squared_error(tmp_path, adaptive):
    scene = Scene(make_teacher(tmp_path, labels=1), labels=1)
    recipe = replace(RECIPE, regression=True, adaptive=adaptive)
    found, told = scene.learn(recipe)
    expected, loss = bare_loop(scene, recipe)
    assert told["loss"] == pytest.approx(loss, rel=1e-5)
    if not adaptive:
        assert told["loss"] == pytest.approx(0.7 * told["soft"] + 0.3 * told["hard"])
    for name in scene.weights:
        # a key's bias has no gradient but rounding noise (softmax does not see it), and AdamW scales noise to steps
        if not name.endswith("key.bias"):
            assert torch.allclose(found[name], expected[name], atol=2e-6), name


def test_labels_without_weight_are_never_read(scene):
    blind = replace(scene.examples, data=Split(scene.data.tokens, Forbidden(), scene.data.keys))
    recipe = weighing(hard=0.0)
    assert bits(scene.learn(recipe, examples=blind)[0]) == bits(scene.learn(recipe)[0])
    for reads in (RECIPE, replace(recipe, adaptive=True)):
        with pytest.raises(AssertionError, match="a label was read"):
            scene.learn(reads, examples=blind)


@pytest.mark.parametrize("compute", [FP32, BF16], ids=["fp32", "bf16"])
def test_the_same_inputs_give_the_same_bits_whatever_was_done_before(tiny_teacher, compute):
    scene = Scene(tiny_teacher, dropout=0.2)
    first = bits(scene.learn(compute=compute)[0])
    scene.learn(compute=compute, who=(4, 18))
    torch.rand(5)
    assert bits(scene.learn(compute=compute)[0]) == first
    assert bits(Scene(tiny_teacher, dropout=0.2).learn(compute=compute)[0]) == first


def test_seed_round_and_client_change_the_batches(scene):
    asked = [(0, (1, 1)), (1, (1, 1)), (0, (2, 1)), (0, (1, 2))]
    assert len({bits(scene.learn(seed=seed, who=who)[0]) for seed, who in asked}) == 4


def test_only_the_clients_own_rows_matter(scene):
    expected = bits(scene.learn()[0])
    labels = scene.data.labels.copy()
    others = np.setdiff1d(np.arange(60), scene.rows)
    labels[others] = 1 - labels[others]
    changed = replace(scene.examples, data=Split(scene.data.tokens, labels, scene.data.keys))
    assert bits(scene.learn(examples=changed)[0]) == expected


@pytest.mark.parametrize("heads", [1, 2, 4, 8])
def test_a_student_equal_to_its_teacher_learns_nothing_from_it(tiny_teacher, heads):
    """Whatever the number of relation heads; all weights of the loss but the label's."""
    scene = Scene(tiny_teacher)
    scene.take(make_student(scene.teacher, (0, 1, 2, 3)))
    pairs = ((0, 0), (1, 1), (3, 3))
    recipe = weighing(replace(RECIPE, weight_decay=0.0, lr=1e-8), hard=0.0, soft=1.0, hidden=1.0, cls=1.0, relation=1.0)
    recipe = replace(recipe, hidden_pairs=pairs, relation_pairs=pairs, relation_heads=heads)
    _, told = scene.learn(recipe)
    for part in ("loss", "soft", "hidden", "cls", "relation"):
        assert told[part] == pytest.approx(0.0, abs=1e-6)


def test_training_moves_towards_the_teacher(scene):
    losses = [scene.learn(replace(weighing(hard=0.0), epochs=epochs))[1]["soft"] for epochs in (1, 8)]
    assert losses[1] < 0.8 * losses[0]


@pytest.mark.parametrize("part", ["hidden", "cls", "relation"])
def test_training_on_inner_states_alone_moves_towards_the_teachers(scene, part):
    recipe = weighing(soft=0.0, hard=0.0, **{part: 1.0})
    told = [scene.learn(replace(recipe, epochs=epochs))[1] for epochs in (1, 8)]
    assert told[1][part] < 0.9 * told[0][part]
    assert told[1]["loss"] == pytest.approx(told[1][part])


def test_the_size_of_the_soft_gradient_hardly_moves_with_the_temperature(scene):
    """The first step without clipping and decay, by plain gradients."""
    norms = []
    for temperature in (2.0, 4.0, 20.0):
        recipe = replace(RECIPE, temperature=temperature)
        batch = batch_of(scene.examples, np.arange(32), recipe, FP32)
        soft, _ = output_losses(scene.student.model(**batch.inputs).logits, batch, recipe)
        grads = torch.autograd.grad(soft.mean(), list(scene.student.trained.values()))
        norms.append(torch.cat([grad.reshape(-1) for grad in grads]).norm().item())
    assert max(norms) / min(norms) < 1.3


def test_the_learning_rate_falls_linearly_over_the_steps_of_a_call(scene, monkeypatch):
    """From the first to the last step, over all epochs; without an end it stays."""
    seen = []
    honest = scene.student.optimizer.step

    def step():
        seen.append(scene.student.optimizer.param_groups[0]["lr"])
        honest()

    monkeypatch.setattr(scene.student.optimizer, "step", step)
    scene.learn(replace(RECIPE, lr=0.01, last_lr=0.001))
    assert len(seen) > 4
    np.testing.assert_allclose(seen, np.linspace(0.01, 0.001, len(seen)))
    seen.clear()
    scene.learn(replace(RECIPE, lr=0.01))
    assert set(seen) == {0.01}
    seen.clear()
    scene.learn(replace(RECIPE, lr=0.01, last_lr=0.001, epochs=1, token_budget=10_000))
    assert seen == [0.01]


def test_the_resident_optimiser_remembers_nothing_of_the_client_before(tiny_teacher):
    used, fresh = Scene(tiny_teacher), Scene(tiny_teacher)
    for lr in (0.5, 0.001):
        used.learn(replace(RECIPE, lr=lr, last_lr=lr / 2, weight_decay=0.3))
    begin(used.student, used.weights, RECIPE)
    for memory in used.student.optimizer.state.values():
        assert not any(tensor.any() for tensor in memory.values())
    assert used.student.optimizer.param_groups[0]["lr"] == RECIPE.lr
    assert used.student.optimizer.param_groups[0]["weight_decay"] == RECIPE.weight_decay
    assert bits(used.learn()[0]) == bits(fresh.learn()[0])


# --- a word embedding under training ------------------------------------------------------------


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


# --- a student with pieces of its own -----------------------------------------------------------


def cut(*examples):
    """Tokens of examples given as lists of words, each a list of pieces."""
    rows = [[piece for word in words for piece in word] for words in examples]
    starts = [[place == 0 for word in words for place in range(len(word))] for words in examples]
    offsets = np.cumsum([0, *map(len, rows)])
    flat = np.concatenate(rows).astype(np.int32)
    return Tokens(flat, offsets, np.concatenate(starts), np.diff(offsets).astype(np.int32), pad=0, typed=False)


def test_words_are_aligned_at_their_first_pieces_as_far_as_both_hold_them():
    """[CLS] unaffordable rooms [SEP] in two ways; the second text is cut short in the student's pieces."""
    own = cut([[1], [5, 6, 7], [8, 9], [2]], [[1], [5], [6, 7]])
    taught = cut([[1], [50, 51], [52], [2]], [[1], [53, 54], [55], [56], [2]])
    (first, second, mask), positions = _aligned(own, taught, np.array([0, 1]), "cpu")
    assert first.tolist() == [[0, 1, 4, 6], [0, 1, 2, 0]]
    assert second.tolist() == [[0, 1, 3, 4], [0, 1, 3, 0]]
    assert mask.tolist() == [[1, 1, 1, 1], [1, 1, 1, 0]]
    assert positions == 7


def test_states_are_compared_at_the_aligned_places():
    states, theirs = torch.arange(14.0).reshape(1, 7, 2), -torch.arange(10.0).reshape(1, 5, 2)
    first, second = torch.tensor([[0, 1, 4, 6]]), torch.tensor([[0, 1, 3, 4]])
    batch = SimpleNamespace(places=(first, second, torch.ones(1, 4)))
    a, b = compared(states, theirs, batch)
    assert a.tolist() == [[[0, 1], [2, 3], [8, 9], [12, 13]]]
    assert b.tolist() == [[[0, -1], [-2, -3], [-6, -7], [-8, -9]]]


@pytest.fixture(scope="module")
def sharp_teacher(tmp_path_factory):
    """A random teacher whose queries, keys and values are large: relations differ from word to word."""
    folder = make_teacher(tmp_path_factory.mktemp("sharp"))
    model = load_teacher(folder)
    for layer in model.bert.encoder.layer:
        attention = layer.attention.self
        for product in (attention.query, attention.key, attention.value):
            product.weight *= 20.0
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def spelt(sharp_teacher, tmp_path_factory):
    """A student that spells most words in letters, as its own pieces are few."""
    scene, tokenizer = Scene(sharp_teacher), load_tokenizer(sharp_teacher)
    pieces = choose_pieces(tokenizer, np.zeros(len(tokenizer), np.int64), fewest_pieces(tokenizer) + 20)
    folder = tmp_path_factory.mktemp("trimmed")
    save_trimmed(sharp_teacher, pieces, folder)
    shape = replace(Shape.whole(scene.teacher.config, (0, 3)), pieces=len(pieces))
    scene.take(cut_student(scene.teacher, shape, pieces=pieces))
    own = make_tokens(folder, make_sentences(60), max_length=24)  # shorter: some texts end earlier than the teacher's
    scene.own = replace(scene.data, tokens=own)
    scene.examples = scene.of(scene.own, taught=scene.data.tokens)
    return scene


@pytest.mark.parametrize("distance", ["cosine", "mse"])
def test_inner_losses_of_a_student_with_its_own_pieces_are_those_of_a_loop_over_words(spelt, distance):
    recipe = replace(weighing(hidden=1.0, cls=1.0, relation=1.0), hidden_loss=distance, epochs=1, lr=1e-9)
    recipe = replace(recipe, token_budget=100_000)
    _, told = spelt.learn(recipe)
    own, taught = spelt.own.tokens, spelt.data.tokens
    assert (own.lengths(spelt.rows) != taught.lengths(spelt.rows)).any()
    hidden, cls, relation, count = 0.0, 0.0, 0.0, 0
    with torch.no_grad():
        for row in spelt.rows:
            rows = np.array([row])
            (a,), (b,) = own.words(rows), taught.words(rows)
            a, b = (places[: min(len(a), len(b))] for places in (a, b))
            ours, mine = watched(spelt.student.model, own.batch(rows), 1)
            theirs, yours = watched(spelt.teacher, taught.batch(rows), 3)
            for s, t in recipe.hidden_pairs:
                x, y = ours[s + 1][0, a], theirs[t + 1][0, b]
                parts = 1 - F.cosine_similarity(x, y) if distance == "cosine" else (x - y).square().mean(1)
                hidden += parts.sum().item() / 2
                x, y = (F.normalize(states[0, 0], dim=0) for states in (ours[s + 1], theirs[t + 1]))
                cls += (x - y).square().sum().item() / 2
            for x, y in zip(mine, yours, strict=True):
                relation += bare_relation(x[0, a], y[0, b], 2) / 3
            count += len(a)
    assert told["hidden"] == pytest.approx(hidden / count, rel=1e-4)
    assert told["cls"] == pytest.approx(cls / len(spelt.rows), rel=1e-4)
    assert told["relation"] == pytest.approx(relation / (2 * count), rel=1e-4)


def watched(model, inputs, layer):
    """Hidden states, and queries, keys and values of a BERT layer."""
    attention, found = model.bert.encoder.layer[layer].attention.self, []
    products = (attention.query, attention.key, attention.value)
    hooks = [product.register_forward_hook(lambda module, given, output: found.append(output)) for product in products]
    states = model(**inputs, output_hidden_states=True).hidden_states
    for hook in hooks:
        hook.remove()
    return states, found


def bare_relation(ours, theirs, heads):
    """Summed KL(teacher || student) of the relations of (words, width), over words and relation heads."""
    total = 0.0
    for x, y in zip(ours.chunk(heads, dim=1), theirs.chunk(heads, dim=1), strict=True):
        p = torch.softmax(y @ y.T / y.shape[1] ** 0.5, dim=1)
        q = torch.softmax(x @ x.T / x.shape[1] ** 0.5, dim=1)
        total += (p * (p / q).log()).sum().item()
    return total


def test_relations_of_fewer_and_thinner_heads_are_compared(sharp_teacher):
    """One head of 8 against the teacher's two: cut anew into one, two and four relation heads."""
    scene = Scene(sharp_teacher)
    whole = Shape.whole(scene.teacher.config, (0, 3))
    scene.take(cut_student(scene.teacher, replace(whole, heads=((1,), (0,)))))
    for heads in (1, 2, 4):
        recipe = replace(weighing(relation=1.0), relation_heads=heads, epochs=1, token_budget=100_000)
        _, told = scene.learn(recipe)
        expected, count = 0.0, 0
        with torch.no_grad():
            for name, weight in scene.weights.items():
                scene.student.trained[name].copy_(weight)
            for row in scene.rows:
                inputs = scene.data.tokens.batch(np.array([row]))
                mine, yours = (
                    watched(model, inputs, layer)[1] for model, layer in ((scene.student.model, 1), (scene.teacher, 3))
                )
                expected += sum(bare_relation(x[0], y[0], heads) for x, y in zip(mine, yours, strict=True)) / 3
                count += len(inputs["input_ids"][0])
        assert told["relation"] == pytest.approx(expected / (heads * count), rel=1e-4)
        assert told["relation"] > 0.01


# --- recipes ------------------------------------------------------------------------------------


TEACHER = BertConfig(hidden_size=24, num_hidden_layers=6, num_attention_heads=6)
SHAPE = Shape.whole(TEACHER, (0, 2, 5))


def recipe_of(flat, number=1, shape=SHAPE, teacher=TEACHER):
    return make_recipe(from_flat(flat), number, shape, teacher, False)


def test_only_fedprox_pulls():
    for strategy in ("fedavg", "fedavgm", "fedadam", "median"):
        assert recipe_of({"server.strategy": strategy, "client.proximal": 0.3}).proximal == 0.0
    assert recipe_of({"server.strategy": "fedprox", "client.proximal": 0.3}).proximal == 0.3
    assert recipe_of({"server.strategy": "fedprox"}).proximal == 0.01


def test_the_learning_rate_falls_to_a_tenth_or_stays():
    flat = {"rounds": 10, "client.lr": 0.01}
    falling = [recipe_of(flat, number).lr for number in range(1, 11)]
    np.testing.assert_allclose(falling, np.linspace(0.01, 0.001, 10))
    constant = {**flat, "client.lr-decay": "constant"}
    assert {recipe_of(constant, number).lr for number in range(1, 11)} == {0.01}
    assert recipe_of({"rounds": 1, "client.lr": 0.01}).lr == 0.01


def test_over_the_rounds_annealing_takes_the_soft_weight_to_the_label():
    """Of five rounds: 0.8 falls by 0.2 a round, and 0.1 grows by as much."""
    flat = {
        "rounds": 5, "distill.soft-weight": 0.8, "distill.hard-weight": 0.1, "distill.weighting": "annealed",
        "distill.hidden-weight": 3.0,
    }  # fmt: skip
    found = [recipe_of(flat, number).weights for number in range(1, 6)]
    assert [weights["soft"] for weights in found] == pytest.approx([0.8, 0.6, 0.4, 0.2, 0.0])
    assert [weights["hard"] for weights in found] == pytest.approx([0.1, 0.3, 0.5, 0.7, 0.9])
    assert {weights["hidden"] for weights in found} == {3.0}
    assert {recipe_of({**flat, "distill.weighting": "constant"}, number).weights["soft"] for number in (1, 5)} == {0.8}
    assert recipe_of({**flat, "rounds": 1}).weights["soft"] == 0.8


def test_adaptive_weights_by_hand():
    """A teacher that is 3/4 sure of class 0: where that is the label, 0.75 of the soft weight stays, else 0.25."""
    recipe = replace(RECIPE, weights={**RECIPE.weights, "soft": 0.8, "hard": 0.2}, adaptive=True)
    sure = torch.tensor([[math.log(3.0), 0.0]] * 2)
    batch = SimpleNamespace(soft=sure, hard=torch.tensor([0, 1]))
    soft, hard = torch.tensor([1.0, 1.0]), torch.tensor([10.0, 10.0])
    expected = (0.8 * 0.75 * 1 + (0.2 + 0.8 * 0.25) * 10 + 0.8 * 0.25 * 1 + (0.2 + 0.8 * 0.75) * 10) / 2
    assert _outer(soft, hard, batch, recipe, recipe.weights).item() == pytest.approx(expected)
    score = SimpleNamespace(soft=torch.tensor([[2.0], [3.0]]), hard=torch.tensor([2.0, 4.0]))
    trust = math.exp(-1.0)  # a score that is wrong by 1
    expected = (0.8 * 1 + 0.2 * 10 + 0.8 * trust * 1 + (0.2 + 0.8 * (1 - trust)) * 10) / 2
    found = _outer(soft, hard, score, replace(recipe, regression=True), recipe.weights)
    assert found.item() == pytest.approx(expected)


def test_layers_are_paired_as_the_keys_say():
    recipe = recipe_of({"distill.hidden-layers": "0:1,2:4", "distill.relation-layers": "even"})
    assert recipe.hidden_pairs == ((0, 1), (2, 4))
    assert recipe.relation_pairs == ((0, 1), (1, 3), (2, 5))
    assert recipe_of({}).relation_pairs == ((2, 5),)


@pytest.mark.parametrize(
    ("kept", "asked", "found"), [(6, 0, 6), (4, 0, 2), (5, 0, 1), (3, 0, 3), (4, 8, 8), (6, 24, 24)]
)
def test_relation_heads_are_as_many_as_whole_heads_of_both_allow_unless_asked_for(kept, asked, found):
    """Heads are 4 wide: 4 and 6 of them make widths of 16 and 24, which eight relation heads divide."""
    shape = replace(SHAPE, heads=(tuple(range(kept)),) * 3)
    assert relation_heads(asked, shape, TEACHER) == found


@pytest.mark.parametrize(("kept", "asked", "divisor"), [(6, 5, 24), (4, 3, 8), (4, 16, 8), (5, 8, 4)])
def test_relation_heads_that_do_not_divide_both_widths_are_refused(kept, asked, divisor):
    shape = replace(SHAPE, heads=(tuple(range(kept)),) * 3)
    message = (
        f"distill.relation-heads = {asked}: the heads of student and teacher are {4 * kept} and 24 wide together; "
    )
    with pytest.raises(InputError, match=f"^{message}give a divisor of {divisor}$"):
        relation_heads(asked, shape, TEACHER)


# --- FedProx ------------------------------------------------------------------------------------


def test_pulling_back_adds_the_gradient_of_the_proximal_term(scene):
    state = begin(scene.student, scene.weights, RECIPE)
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
    moved = []
    for mu in (0.0, 10.0, 1000.0):
        found, _ = scene.learn(replace(recipe, proximal=mu))
        moved.append(sum((weight - scene.weights[name]).square().sum() for name, weight in found.items()).sqrt())
    assert moved[0] > 1.1 * moved[1] > 1.1**2 * moved[2]


def test_no_pull_is_fedavg_to_the_bit(scene):
    plain = bits(scene.learn()[0])
    assert bits(scene.learn(replace(RECIPE, proximal=0.0))[0]) == plain
    assert bits(scene.learn(replace(RECIPE, proximal=0.1))[0]) != plain
