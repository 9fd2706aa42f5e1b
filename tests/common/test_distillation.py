"""Training is a plain PyTorch loop over its own batches, whatever the weights of the loss's parts."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from common.dataset import Split, load_tokenizer
from common.distillation import begin, pull_back
from common.models import load_teacher
from common.objective import _aligned, batch_of, compared, output_losses
from common.slim import Shape, cut_student
from common.tokens import Tokens
from common.vocabulary import choose_pieces, piece_bounds, save_trimmed
from tests.bare import bare_loop
from tests.conftest import BF16, FP32, make_sentences, make_student, make_teacher, make_tokens
from tests.scene import RECIPE, Forbidden, Scene, bits, weighing


@pytest.fixture(scope="module")
def scene(tiny_teacher):
    return Scene(tiny_teacher)


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
    own = cut([[1], [5, 6, 7], [8, 9], [2]], [[1], [5], [6, 7], [8], [2]])
    taught = cut([[1], [50, 51], [52], [2]], [[1], [53, 54], [55], [56], [57], [2]])
    (first, second, mask), positions = _aligned(own, taught, np.array([0, 1]), "cpu")
    assert first.tolist() == [[0, 1, 4, 6], [0, 1, 2, 0]]
    assert second.tolist() == [[0, 1, 3, 4], [0, 1, 3, 0]]
    assert mask.tolist() == [[1, 1, 1, 1], [1, 1, 1, 0]]
    assert positions == 7


def test_words_of_a_pair_are_aligned_text_by_text():
    """The student reads the first of these texts less far, and all of the second one."""
    own = replace(cut([[1], [5], [6, 7], [8], [2], [9], [10], [2]]), second=np.array([6]))
    taught = replace(cut([[1], [50], [51], [52], [53], [54], [2], [55], [56], [2]]), second=np.array([7]))
    (first, second, _), positions = _aligned(own, taught, np.array([0]), "cpu")
    assert (first.tolist(), second.tolist(), positions) == ([[0, 1, 2, 6, 7, 8]], [[0, 1, 2, 7, 8, 9]], 6)


@pytest.mark.parametrize("family", ["bert", "roberta", "gpt2"])
def test_pairs_that_are_cut_short_are_compared_at_the_same_words(family, tmp_path):
    """With few pieces of its own the student reads each text less far than the teacher."""
    folder = make_teacher(tmp_path / "teacher", family)
    tokenizer = load_tokenizer(folder)
    pieces = choose_pieces(tokenizer, np.zeros(len(tokenizer), np.int64), piece_bounds(tokenizer)[0])
    save_trimmed(folder, pieces, tmp_path)
    texts, rows = make_sentences(60), np.arange(30)
    own, taught = (make_tokens(one, texts[:30], texts[30:], max_length=40) for one in (tmp_path, folder))
    (first, second, mask), positions = _aligned(own, taught, rows, "cpu")
    assert positions == mask.sum() > 150
    shorter = 0
    for row in rows:
        mine, theirs = (named(one, texts[row], texts[30 + row], 40) for one in (tmp_path, folder))
        shorter += set(mine) < set(theirs)
        for a, b in zip(first[row][mask[row] > 0].tolist(), second[row][mask[row] > 0].tolist(), strict=True):
            assert mine[a] == theirs[b]
    assert shorter > 5


def named(folder, text, other, length):
    """The word that each piece is of, as (text, number in it), and the names of special pieces."""
    found = load_tokenizer(folder)(text, other, truncation=True, max_length=length).encodings[0]
    rows = zip(found.sequence_ids, found.word_ids, found.tokens, strict=True)
    return [token if word is None else (of, word) for of, word, token in rows]


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
    pieces = choose_pieces(tokenizer, np.zeros(len(tokenizer), np.int64), piece_bounds(tokenizer)[0] + 20)
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
            ((a, _),), ((b, _),) = own.words(rows), taught.words(rows)
            size = len(a) if len(a) == len(b) else min(len(a), len(b)) - 2
            a, b = a[:size], b[:size]
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


@pytest.mark.parametrize(
    "pairs",
    [
        ((0, 1), (0, 3)),  # a layer of the student twice
        ((0, 0), (1, 0)),  # of the teacher
        ((0, 3), (1, 1)),  # crossed
    ],
)
def test_relations_of_several_pairs_are_the_mean_of_each_alone(sharp_teacher, pairs):
    scene = Scene(sharp_teacher)
    scene.take(cut_student(scene.teacher, Shape.whole(scene.teacher.config, (0, 3))))

    def found(*pairs):
        recipe = replace(weighing(relation=1.0), relation_pairs=pairs, relation_heads=2, epochs=1, lr=1e-9)
        return scene.learn(recipe)[1]["relation"]

    assert found(*pairs) == pytest.approx(sum(map(found, pairs)) / 2, rel=1e-4)


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
