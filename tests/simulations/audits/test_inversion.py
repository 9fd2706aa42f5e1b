from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from common.dataset import load_tokenizer
from common.objective import Examples
from common.recipe import PARTS
from simulations.audits.embedding_rows import found_pieces, longest_text, moved_rows, words_of
from simulations.audits.inversion import likeliest_longest
from simulations.audits.inversion_table import interval, summed_up, verdicts
from simulations.audits.label_counts import Signals, count_labels, head_bias, signals_of
from simulations.audits.language import Bigrams
from simulations.audits.matching import Match, _other, ends_of, exchange
from simulations.audits.reconstruction import Judge, token_scores
from simulations.audits.span import distances, pieces_in, span_of, text_in
from simulations.audits.victim import WHOLE, Seen, Setting, clip_and_noise, dense
from tests.conftest import BF16, FP32, make_sentences, make_teacher, make_tokens, stir
from tests.scene import RECIPE, Scene

HARD = {**dict.fromkeys(PARTS, 0.0), "hard": 1.0}
STEP = replace(RECIPE, epochs=1, lr=0.1, clip_norm=0.0, token_budget=WHOLE, sgd=True, weights=HARD)  # one of FedSGD


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """A teacher whose inputs have more dimensions than a short text has pieces."""
    return make_teacher(tmp_path_factory.mktemp("wide"), width=64)


def seen_of(scene, recipe, rows, *, steps=1, noise=0.0, compute=FP32, clip=0.0):
    """What the server sees of the client's own code on these rows."""
    update = scene.distil(recipe, compute, examples=scene.of(scene.data, np.asarray(rows)))
    arrays = dense(update.arrays, {name: tuple(weight.shape) for name, weight in scene.weights.items()})
    with torch.no_grad():
        for name, parameter in scene.student.trained.items():
            parameter.copy_(scene.weights[name])
    clip = clip or float(noise > 0)
    arrays, deviation = clip_and_noise([arrays], clip, noise, np.random.default_rng(0))
    return Seen(scene.student.model, arrays, recipe, compute, len(rows), steps, 1, deviation, clip > 0)


def stirred(folder):
    """A student whose attention tells one piece from another, as that of a trained one does."""
    scene = Scene(folder)
    model = scene.student.model
    stir(model)
    scene.take(model)
    return scene


def special_of(folder):
    return np.unique(load_tokenizer(folder).all_special_ids)


@pytest.mark.parametrize("recipe", [RECIPE, STEP], ids=["adamw", "sgd"])
def test_the_rows_that_moved_are_the_clients_pieces(tiny_teacher, recipe):
    scene, special = Scene(tiny_teacher, embeddings=True), special_of(tiny_teacher)
    rows = [3, 11, 12, 40, 7, 19]
    seen = seen_of(scene, recipe, rows)
    found = found_pieces(seen.model, seen.update, special)
    assert found.tolist() == np.setdiff1d(scene.data.tokens.pieces(np.array(rows)), special).tolist()
    assert longest_text(seen.model, seen.update) == scene.data.tokens.lengths(np.array(rows)).max()


def test_frozen_embeddings_send_no_rows(tiny_teacher):
    seen = seen_of(Scene(tiny_teacher), STEP, [3, 11])
    assert found_pieces(seen.model, seen.update, special_of(tiny_teacher)) is None
    assert longest_text(seen.model, seen.update) is None


def test_noise_hides_rows_when_it_is_larger_than_they_are(tiny_teacher):
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((2000, 16)).astype(np.float32)
    update = np.zeros_like(weight)
    update[[5, 700]] = 0.1
    noise = rng.standard_normal(weight.shape).astype(np.float32)
    assert set(moved_rows(update + 0.001 * noise, weight)) >= {5, 700}
    assert len(moved_rows(update + 0.001 * noise, weight)) <= 6
    assert not {5, 700} & set(moved_rows(update + 10 * noise, weight))
    assert moved_rows(update - 3e-6 * weight, weight).tolist() == [5, 700]  # weight decay is known to be that


def test_rows_that_stand_still_say_that_there_is_no_noise():
    rng = np.random.default_rng(0)
    weight, moved = rng.standard_normal((60, 16)).astype(np.float32), rng.permutation(60)[:50]
    update = np.zeros_like(weight)
    update[moved] = 0.01 * rng.standard_normal((50, 16))
    assert moved_rows(update, weight).tolist() == sorted(moved)
    assert moved_rows(update - 3e-6 * weight, weight).tolist() == sorted(moved)


def test_labels_of_a_batch_are_counted_while_the_head_is_fresh(tiny_teacher):
    scene = Scene(tiny_teacher, labels=2)
    with torch.no_grad():
        scene.weights["classifier.weight"].mul_(0.001)
    rows, public = np.arange(16), np.arange(20, 60)
    seen = seen_of(scene, STEP, rows)
    examples = Examples(scene.data, public, np.zeros((40, 2), dtype=np.float32))
    labels = scene.data.labels
    known = Signals.of(signals_of(seen.model, examples, STEP, FP32), labels[public], 2)
    found = count_labels(seen.gradient(head_bias(seen.model, seen.update)).numpy(), 16, known)
    assert found.tolist() == np.bincount(labels[rows]).tolist()


def test_the_label_of_one_example_is_read_off_for_any_head(tiny_teacher):
    scene = Scene(tiny_teacher, labels=2)
    public, labels = np.arange(20, 60), scene.data.labels
    for row in range(6):
        seen = seen_of(scene, STEP, [row])
        examples = Examples(scene.data, public, np.zeros((40, 2), dtype=np.float32))
        known = Signals.of(signals_of(seen.model, examples, STEP, FP32), labels[public], 2)
        found = count_labels(seen.gradient(head_bias(seen.model, seen.update)).numpy(), 1, known)
        assert found[labels[row]] == 1


def test_the_longest_of_several_texts_is_guessed_by_hand():
    lengths = np.array([3, 5, 3, 3])
    assert likeliest_longest(lengths, 1) == (3, 0.75)
    assert likeliest_longest(lengths, 2) == (3, 9 / 16)
    assert likeliest_longest(lengths, 3) == (5, 37 / 64)


def test_three_classes_are_counted_from_a_signal_worked_by_hand():
    # p = (1/2, 1/4, 1/4) for every example: dL/dz of class c is p - onehot(c)
    p = np.array([0.5, 0.25, 0.25])
    known = Signals(p - np.eye(3), np.zeros((3, 3, 3)), np.full(3, 1 / 3))
    counts = np.array([1, 5, 2])
    assert count_labels(p - counts / 8, 8, known).tolist() == [1, 5, 2]


def test_the_span_of_one_step_holds_one_text_and_no_other_piece(wide):
    scene = stirred(wide)
    pieces = np.arange(len(load_tokenizer(wide)))
    for row in (0, 8, 21):
        seen = seen_of(scene, STEP, [row])
        span = span_of(seen, 0)
        text = scene.data.tokens.pieces(np.array([row]))
        assert span.basis.shape[1] == len(text)
        found = text_in(distances(seen.model, span, pieces, 16, FP32), pieces, 0.01)
        assert found == text.tolist()


@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_how_far_an_update_was_scaled_down_is_read_off_its_keys_biases(tmp_path, family):
    scene = stirred(make_teacher(tmp_path / "teacher", family, width=64))
    whole, clipped = (seen_of(scene, STEP, [0], clip=clip) for clip in (0.0, 0.01))
    length = sum(float(np.square(array).sum()) for array in whole.update.values()) ** 0.5
    assert whole.factor == 1.0 and clipped.factor == pytest.approx(0.01 / length, rel=1e-3) and length > 0.02
    name = next(name for name in whole.update if name.endswith(("query.weight", "c_attn.weight")))
    np.testing.assert_allclose(clipped.descent(name), whole.descent(name), rtol=1e-4, atol=1e-6)
    assert span_of(clipped, 0).basis.shape[1] == span_of(whole, 0).basis.shape[1] < 64


def test_the_second_text_of_a_pair_is_in_the_span_as_what_it_is(wide):
    scene, pieces = stirred(wide), np.arange(len(load_tokenizer(wide)))
    tokens = make_tokens(wide, make_sentences(60), make_sentences(60, seed=1))
    scene.data = replace(scene.data, tokens=tokens)
    for row in (0, 21):
        seen, text = seen_of(scene, STEP, [row]), tokens.pieces(np.array([row]))
        near = distances(seen.model, span_of(seen, 0), pieces, len(text), FP32, types=2)
        assert text_in(near, pieces, 0.01) == text.tolist()
        far = distances(seen.model, span_of(seen, 0), pieces, len(text), FP32)
        assert len(text_in(far, pieces, 0.01)) <= tokens.second[row] < len(text)


def test_the_rounding_of_bfloat16_is_no_direction(wide):
    scene, pieces = stirred(wide), np.arange(len(load_tokenizer(wide)))
    for row in (0, 21):
        seen, text = seen_of(scene, STEP, [row], compute=BF16), scene.data.tokens.pieces(np.array([row]))
        span = span_of(seen, 0)
        assert span.basis.shape[1] == len(text)
        assert text_in(distances(seen.model, span, pieces, 16, BF16), pieces, 0.01) == text.tolist()


def test_the_span_of_a_batch_holds_its_pieces(wide):
    scene, rows = stirred(wide), [0, 8, 21]
    seen = seen_of(scene, STEP, rows)
    pieces = np.arange(len(load_tokenizer(wide)))
    found = pieces_in(distances(seen.model, span_of(seen, 0), pieces, 16, FP32), pieces, 0.01)
    assert found.tolist() == np.unique(scene.data.tokens.pieces(np.array(rows))).tolist()


def test_the_span_tells_nothing_beyond_its_rank_after_adamw_or_under_noise(wide, tiny_teacher):
    assert span_of(seen_of(stirred(tiny_teacher), STEP, range(30)), 0).full  # 16 dimensions
    assert span_of(seen_of(stirred(wide), replace(STEP, sgd=False, lr=0.003), [0]), 0).full
    assert span_of(seen_of(stirred(wide), STEP, [0], noise=1.0), 0).basis.shape[1] == 0


def test_the_true_text_has_the_gradient_that_is_matched(wide):
    scene = stirred(wide)
    seen = seen_of(scene, STEP, [0])
    seen.model.eval()
    first, last = ends_of(load_tokenizer(wide))
    text = scene.data.tokens.pieces(np.array([0]))[len(first) : -len(last)]
    pieces = np.arange(len(load_tokenizer(wide)))
    match = Match.of(seen, pieces, first, last)
    signal = seen.gradient(head_bias(seen.model, seen.update)).float()[None]

    def losses(said):
        found = match.gradients(match.vectors[torch.from_numpy(said.astype(np.int64))][None], signal, False)
        return float(match.cosine(found).detach()), float(match.squares(found).detach())

    truth, other = losses(text), losses(np.roll(text, 1))
    assert truth[0] < 1e-4 and truth[1] < 1e-3
    assert other[0] > 100 * truth[0] and other[1] > 10 * truth[1]
    assert match.read(match.vectors[torch.from_numpy(text.astype(np.int64))][None])[0].tolist() == text.tolist()


def test_a_text_that_is_half_found_is_found(wide):
    """Frozen embeddings: no row tells which pieces it has, and at each place those are tried that the slope names."""
    scene = Scene(wide)
    seen = seen_of(scene, STEP, [0])
    seen.model.eval()
    seen.model.set_attn_implementation("eager")
    first, last = ends_of(load_tokenizer(wide))
    text = scene.data.tokens.pieces(np.array([0]))[len(first) : -len(last)].astype(np.int64)
    match = Match.of(seen, np.arange(len(load_tokenizer(wide))), first, last)
    signal = seen.gradient(head_bias(seen.model, seen.update)).float()[None]
    said = text.copy()
    said[[1, 4]], said[[2, 3]] = [60, 77], text[[3, 2]]

    def loss_of(vectors, graph=False):
        return match.cosine(match.gradients(vectors, signal, graph))

    assert exchange(match, said[None], loss_of, sweeps=4).tolist() == [text.tolist()]


def test_pieces_are_exchanged_until_none_is_better():
    match = SimpleNamespace(pieces=np.arange(9), vectors=torch.arange(9.0)[:, None])
    truth = torch.tensor([[[3.0], [1.0], [4.0], [1.0]], [[5.0], [2.0], [6.0], [5.0]]])
    said = np.array([[0, 4, 1, 1], [5, 2, 6, 5]])

    def loss_of(vectors, graph=False):
        return (vectors - truth).square().sum()

    assert exchange(match, said, loss_of, sweeps=2).tolist() == [[3, 1, 4, 1], [5, 2, 6, 5]]
    assert exchange(match, said, loss_of, sweeps=0) is said


def test_rearrangements_keep_every_piece():
    rng = np.random.default_rng(0)
    for length in (2, 3, 9):
        for _ in range(50):
            assert sorted(_other(length, rng)) == list(range(length))


def test_bigrams_are_mixed_with_single_pieces(tiny_teacher):
    tokens = Scene(tiny_teacher).data.tokens
    prior = Bigrams.of(tokens, np.arange(60), 200)
    a, b = tokens.pieces(np.array([4]))[1:3]
    texts = [tokens.pieces(np.array([row])).tolist() for row in range(60)]
    after = [y for text in texts for x, y in pairwise(text) if x == a]
    total = sum(map(len, texts))
    alone = (sum(text.count(b) for text in texts) + 1) / (total + 200)
    assert prior.surprise([a, b]) == pytest.approx(-np.log(0.9 * after.count(b) / len(after) + 0.1 * alone))


def test_token_scores_by_hand():
    scores = token_scores([1, 1, 2, 9], [1, 2, 2, 3])
    assert scores == {"recall": 0.5, "precision": 0.5, "set_recall": 2 / 3, "set_precision": 2 / 3}
    assert token_scores([], [1])["precision"] == 0.0


def test_texts_are_set_against_those_that_fit_and_nothing_found_is_the_guess(tiny_teacher):
    scene, tokenizer = Scene(tiny_teacher), load_tokenizer(tiny_teacher)
    judge = Judge(tokenizer, special_of(tiny_teacher), scene.data.tokens, np.arange(60))
    texts = ["the film was good", "we had a room"]
    truth = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    said = [truth[1], tokenizer("the film is good", add_special_tokens=False)["input_ids"]]
    rouge = judge.rouge(said, truth)
    assert rouge == pytest.approx({"rouge1": (0.75 + 1) / 2, "rouge2": (1 / 3 + 1) / 2, "rougeL": (0.75 + 1) / 2})
    guess = judge.of_tokens(judge.usual(2), truth)
    assert guess["set_recall"] == guess["guess_set_recall"]


def test_clipping_comes_before_the_mean_and_noise_after():
    one, other = {"w": np.full(400, 3.0, dtype=np.float32)}, {"w": np.full(400, 0.01, dtype=np.float32)}
    mean, deviation = clip_and_noise([one, other], 1.0, 0.0, np.random.default_rng(0))
    assert mean["w"] == pytest.approx(np.full(400, (1 / 20 + 0.01) / 2)) and deviation == 0.0
    large = [{"w": np.zeros(200_000, dtype=np.float32)}] * 4
    mean, deviation = clip_and_noise(large, 2.0, 0.5, np.random.default_rng(0))
    assert deviation == 0.25 and mean["w"].std() == pytest.approx(0.25, rel=0.02)


def test_the_table_puts_what_is_no_better_than_chance_in_brackets():
    rows = [
        summed_up("rows", Setting(), [{"set_recall": 1.0, "guess_set_recall": 0.3}] * 2),
        summed_up("rows", Setting(embeddings="frozen"), [{"set_recall": 0.3, "guess_set_recall": 0.3, "nothing": 1.0}]),
    ]
    assert rows[0]["success"] == rows[0]["low"] == 1.0 and rows[1]["low"] is None
    text = verdicts(rows)
    assert text[1].split() == ["one", "SGD", "step", "100"] and text[2].split()[-1] == "(30)"
    assert all(len(line) <= 80 for line in text)


def test_the_share_of_victims_of_whom_nothing_was_found_is_of_all_victims():
    found = [{"set_recall": 0.3, "nothing": 1.0}, *[{"set_recall": 1.0}] * 3]
    assert summed_up("rows", Setting(), found)["nothing"] == 0.25


def test_the_interval_of_two_victims_by_hand():
    low, high = interval([0.5, 0.6])  # t(0.975, 1) = 12.706, deviation of the mean 0.05
    assert (low, high) == (0.0, 1.0)
    low, high = interval([0.5, 0.501])
    assert (low, high) == pytest.approx((0.5005 - 12.7062 * 0.0005, 0.5005 + 12.7062 * 0.0005), abs=1e-6)


def test_the_word_embedding_is_found_by_what_it_is(tiny_teacher):
    assert words_of(Scene(tiny_teacher).student.model) == "bert.embeddings.word_embeddings.weight"
