"""General distillation: which pieces are masked, what is guessed, and the triple loss against bare PyTorch."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from common.batches import cut
from common.config import from_flat
from common.dataset import Split, load_tokenizer
from common.distillation import Student, begin, learn, set_gradients
from common.errors import InputError
from common.masking import UNASKED, Masking, guess, keep_guesses, load_masked_teacher, open_masking
from common.models import freeze_embeddings, load_teacher
from common.objective import Examples, batch_of, masked, parts_of
from common.recipe import general_recipe, make_recipe
from common.seeding import generator
from common.slim import Shape, cut_student
from common.tokens import Tokens, tokenize
from common.vocabulary import choose_pieces, piece_bounds, save_trimmed
from tests.conftest import FP32, make_masked_teacher, make_sentences, make_teacher
from tests.scene import RECIPE, Forbidden

FAMILIES = ("bert", "distilbert", "roberta", "electra")
KEYS = from_flat({"rounds": 4, "distill.general-rounds": 2}).distill
GENERAL = replace(general_recipe(RECIPE, KEYS), epochs=1)


class Scene:
    """A masked-LM teacher, a student of two of its four layers and 40 examples; a trimmed one reads other pieces."""

    def __init__(self, folder, trimmed=None, windows=1):
        self.tutor, classifier = load_masked_teacher(folder), load_teacher(folder, complete=False, num_labels=2)
        pieces, own = [], folder
        if trimmed is not None:
            tokenizer = load_tokenizer(folder)
            pieces = choose_pieces(tokenizer, np.zeros(len(tokenizer), dtype=np.int64), piece_bounds(tokenizer)[0] + 9)
            save_trimmed(folder, pieces, trimmed)
            own = trimmed
        shape = Shape.whole(classifier.config, (0, 3))
        shape = replace(shape, pieces=len(pieces) or shape.pieces)
        model = cut_student(classifier, shape, pieces=pieces)
        self.student = Student.of(model, freeze_embeddings(model, False))
        self.weights = {name: weight.detach().clone() for name, weight in self.student.trained.items()}
        self.masking = open_masking(own, 0.15, folder if trimmed is not None else None)
        if self.masking.numbers is not None:
            keep_guesses(self.tutor, self.masking.numbers)
        longest = 64 if windows == 1 else 10
        self.tokens = tokenize((make_sentences(40),), load_tokenizer(own), longest, lambda done: None, windows=windows)
        data = Split(self.tokens, Forbidden(), np.zeros((40, 16), dtype=np.uint8))
        self.examples = Examples(data, np.arange(40), np.zeros((40, 0), dtype=np.float32), masking=self.masking)

    def shown(self, epoch=0):
        return masked(self.examples, generator(0, "masks", 3, 17, epoch))

    def gradients(self, recipe, budget, examples=None):
        """Of one batch of all examples that passes in parts within the budget, and what it adds to the totals."""
        examples, lengths = examples or self.shown(), self.tokens.lengths(np.arange(40))
        places = np.argsort(lengths, kind="stable")
        parts = [batch_of(examples, part, recipe, FP32) for part in cut(places, lengths, budget)]
        state = begin(self.student, self.weights, recipe)
        totals = set_gradients(state, parts, recipe=recipe, compute=FP32, teacher=self.tutor)
        return {name: weight.grad for name, weight in state.trained.items()}, sum(totals), len(parts)

    def learn(self, recipe, seed=0, who=(3, 17)):
        state = learn(
            self.student, self.weights, self.examples, recipe=recipe, compute=FP32, seed=seed, who=who,
            teacher=self.tutor,
        )  # fmt: skip
        return {name: weight.detach().clone() for name, weight in state.trained.items()}, state.totals / state.seen


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_masked_teacher(tmp_path_factory.mktemp("masked"))


@pytest.fixture(scope="module")
def scene(folder):
    return Scene(folder)


# --- masks --------------------------------------------------------------------------------------


def many(count=200, length=50):
    """Examples of pieces 5 to 104 between specials 2 and 3, padded with 0; 4 is the mask."""
    ids = np.random.default_rng(0).integers(5, 105, (count, length), dtype=np.int32)
    ids[:, 0], ids[:, -1] = 2, 3
    offsets = np.arange(count + 1) * length
    return Tokens(ids.ravel(), offsets, np.ones(ids.size, bool), np.full(count, length, np.int32), 0, False)


MASKING = Masking(4, np.arange(5, 105), 0.15)


def test_of_the_pieces_one_in_seven_is_asked_for_and_8_1_1_are_masked_replaced_and_kept():
    tokens = many()
    shown, asked = MASKING.draw(tokens, generator(0))
    chosen = asked.ids != UNASKED
    assert (asked.ids[chosen] == tokens.ids[chosen]).all()
    assert (shown.ids[~chosen] == tokens.ids[~chosen]).all()
    assert not chosen[np.isin(tokens.ids, [2, 3])].any()
    count = chosen.sum() / (200 * 48)
    assert count == pytest.approx(0.15, abs=0.015)
    kept = (shown.ids == tokens.ids)[chosen].mean()
    mask = (shown.ids == 4)[chosen].mean()
    assert (mask, kept) == (pytest.approx(0.8, abs=0.05), pytest.approx(0.1, abs=0.04))
    assert np.isin(shown.ids[chosen & (shown.ids != 4)], MASKING.ordinary).all()


def test_every_example_that_has_a_piece_to_guess_gives_at_least_one():
    rare = replace(MASKING, probability=1e-9)
    _, asked = rare.draw(many(), generator(1))
    assert ((asked.ids != UNASKED).reshape(200, 50).sum(axis=1) == 1).all()
    special = replace(many(2, 3), ids=np.array([2, 2, 3, 2, 7, 3], dtype=np.int32))
    shown, asked = rare.draw(special, generator(2))
    assert asked.ids.tolist() == [UNASKED] * 4 + [7, UNASKED]
    assert shown.ids[:4].tolist() == [2, 2, 3, 2]


def test_rows_are_taken_with_all_their_windows(folder):
    tokens = tokenize((make_sentences(40),), load_tokenizer(folder), 8, lambda done: None, windows=3, stride=2)
    rows = np.array([7, 3, 30, 3])
    taken = tokens.take(rows)
    assert len(taken) == 4
    for name, tensor in taken.batch(np.arange(4)).items():
        assert torch.equal(tensor, tokens.batch(rows)[name])
    assert np.bincount(taken.owners()).tolist() == [len(tokens.pieces(np.array([row]))) for row in rows]


def test_masks_are_of_seed_round_client_and_epoch_and_an_example_keeps_them_in_any_part(scene):
    def asked(*purpose):
        return masked(scene.examples, generator(0, "masks", *purpose)).guessed.ids.tobytes()

    assert asked(3, 17, 0) == asked(3, 17, 0)
    assert len({asked(3, 17, 0), asked(3, 17, 1), asked(3, 18, 0), asked(4, 17, 0)}) == 4
    shown = scene.shown()
    alone = batch_of(shown, np.array([5]), GENERAL, FP32)
    among = batch_of(shown, np.array([4, 5, 6]), GENERAL, FP32)
    width = alone.guessed.shape[1]
    assert torch.equal(alone.guessed[0], among.guessed[1, :width])
    assert torch.equal(alone.inputs["input_ids"][0], among.inputs["input_ids"][1, :width])


# --- the loss -----------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_the_parts_are_those_of_whole_models_in_bare_pytorch(family, tmp_path):
    """The teacher's own forward pass gives the logits; the student's encoder is put under the teacher's head."""
    scene = Scene(make_masked_teacher(tmp_path, family))
    batch = batch_of(scene.shown(), np.arange(20), GENERAL, FP32)
    found = parts_of(scene.student.model.eval(), batch, GENERAL, FP32, teacher=scene.tutor)
    places = batch.guessed >= 0
    assert batch.guesses == places.sum() > 20
    with torch.no_grad():
        whole = scene.tutor(**batch.inputs, output_hidden_states=True)
        own = scene.student.model(**batch.inputs, output_hidden_states=True).hidden_states[-1]
        logits = guess(scene.tutor, own)[places]
    p = F.softmax(whole.logits[places] / 2, -1)
    soft = 4 * (p * (p.log() - F.log_softmax(logits / 2, -1))).sum(-1).mean()
    mlm = F.cross_entropy(logits, batch.guessed[places])
    real = batch.inputs["attention_mask"].bool()
    cosine = (1 - F.cosine_similarity(own[real], whole.hidden_states[-1][real], dim=-1)).mean()
    for name, expected in {"soft": soft, "mlm": mlm, "hidden": cosine}.items():
        assert found[name].item() == pytest.approx(expected.item(), rel=1e-5)
    assert found["soft"] > 0 < found["hidden"]
    _, totals, _ = scene.gradients(GENERAL, 10**6)
    told = (totals / 40).tolist()
    assert told[0] == pytest.approx(5 * told[1] + 2 * told[8] + told[3], rel=1e-5)
    assert [told[place] for place in (2, 4, 5, 6, 7)] == [0] * 5


@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_a_trimmed_student_and_its_teacher_read_the_same_pieces_by_their_own_numbers(family, tmp_path):
    """By the pieces' names; the logits over the student's pieces are those columns of the teacher's."""
    folder = make_masked_teacher(tmp_path / "teacher", family)
    scene, whole = Scene(folder, tmp_path / "own"), load_masked_teacher(folder)
    mine, theirs = load_tokenizer(tmp_path / "own"), load_tokenizer(folder)
    batch = batch_of(scene.shown(), np.arange(40), GENERAL, FP32)
    assert len(mine) < len(theirs)
    pairs = zip(batch.inputs["input_ids"].ravel().tolist(), batch.taught["input_ids"].ravel().tolist(), strict=True)
    for own, taught in set(pairs):
        assert mine.convert_ids_to_tokens(own) == theirs.convert_ids_to_tokens(taught)
    columns = theirs.convert_tokens_to_ids(mine.convert_ids_to_tokens(list(range(len(mine)))))
    with torch.no_grad():
        expected = whole(**batch.taught).logits[..., columns]
        found = guess(scene.tutor, scene.tutor.base_model(**batch.taught).last_hidden_state)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("part", ["soft", "mlm", "hidden", "all"])
@pytest.mark.parametrize("windows", [1, 4])
def test_any_micro_budget_gives_the_gradient_of_the_whole_batch(folder, part, windows):
    scene = Scene(folder, windows=windows)
    weights = GENERAL.weights if part == "all" else {**dict.fromkeys(GENERAL.weights, 0.0), part: 1.3}
    recipe = replace(GENERAL, weights=weights)
    whole, expected, _ = scene.gradients(recipe, 10**6)
    size = torch.cat([one.flatten() for one in whole.values() if one is not None]).norm()
    assert size > 1e-4
    for budget in (1, 90):
        found, totals, count = scene.gradients(recipe, budget)
        assert count > 2
        torch.testing.assert_close(totals, expected, rtol=1e-5, atol=1e-9)
        for name, gradient in found.items():
            assert (gradient is None) == (whole[name] is None)
            if gradient is not None and not name.endswith("key.bias"):  # which has none but rounding noise
                assert (gradient - whole[name]).norm() <= 1e-5 * whole[name].norm() + 1e-8 * size, name


def test_a_part_or_a_batch_without_anything_to_guess_is_no_nan(scene):
    shown = scene.shown()
    nothing = replace(shown, guessed=replace(shown.guessed, ids=np.full_like(shown.guessed.ids, UNASKED)))
    gradients, totals, _ = scene.gradients(GENERAL, 90, nothing)
    assert totals.isfinite().all()
    assert (totals[1], totals[7]) == (0, 0) < (totals[3],)
    assert all(one is None or one.isfinite().all() for one in gradients.values())


def test_the_size_of_the_soft_gradient_hardly_moves_with_the_temperature(scene):
    norms = []
    for temperature in (2.0, 4.0, 20.0):
        recipe = replace(GENERAL, temperature=temperature, weights={**dict.fromkeys(GENERAL.weights, 0.0), "soft": 1.0})
        found, _, _ = scene.gradients(recipe, 10**6)
        norms.append(torch.cat([one.flatten() for one in found.values() if one is not None]).norm().item())
    assert max(norms) / min(norms) < 1.3


def test_the_head_of_the_task_does_not_move_and_no_label_is_read(scene):
    """Nor by weight decay. `Forbidden` labels are in the examples."""
    found, _ = scene.learn(replace(GENERAL, weight_decay=0.5, proximal=1.0))
    still = {name for name, weight in found.items() if torch.equal(weight, scene.weights[name])}
    assert still == {"bert.pooler.dense.weight", "bert.pooler.dense.bias", "classifier.weight", "classifier.bias"}


def test_general_distillation_moves_towards_the_teacher(scene):
    _, first = scene.learn(GENERAL)
    _, last = scene.learn(replace(GENERAL, epochs=12))
    assert last[0] < 0.95 * first[0]
    assert last[3] < first[3]


def test_a_student_equal_to_its_teacher_has_nothing_to_learn_from_it(folder):
    scene = Scene(folder)
    model = cut_student(load_teacher(folder, complete=False), Shape.whole(scene.tutor.config, (0, 1, 2, 3)))
    batch = batch_of(scene.shown(), np.arange(20), GENERAL, FP32)
    parts = parts_of(model.eval(), batch, GENERAL, FP32, teacher=scene.tutor)
    assert (parts["soft"].item(), parts["hidden"].item()) == pytest.approx((0, 0), abs=1e-6)
    assert parts["mlm"] > 1


# --- what does not fit --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "problem"),
    [("bert", "no masked-LM head"), ("electra", "no masked-LM head"), ("gpt2", "'gpt2' guess no")],
)
def test_a_teacher_without_a_masked_lm_head_is_named(family, problem, tmp_path):
    with pytest.raises(InputError, match=f"distill.general-rounds: .*{problem}"):
        load_masked_teacher(make_teacher(tmp_path, family, labels=0))


@pytest.mark.parametrize(
    ("keys", "named"),
    [
        ({"rounds": 2}, "rounds = 2"),
        ({"server.strategy": "fedkd"}, "server.strategy = 'fedkd'"),
        ({"server.strategy": "feddf"}, "server.strategy = 'feddf'"),
        ({"student.tiers": "1/0/0@0.5"}, "student.tiers"),
        ({"student.warm-epochs": 1}, "student.warm-epochs = 1"),
        ({"student.train-embeddings": True}, "student.train-embeddings"),
        ({"client.micro-budget": -1}, "client.micro-budget = -1"),
        ({"client.memory-limit": 4000}, "client.memory-limit = 4000"),
        ({f"distill.general-{part}-weight": 0.0 for part in ("soft", "mlm", "cosine")}, "nothing to learn from"),
    ],
)
def test_keys_that_do_not_fit_general_rounds_are_named(keys, named):
    with pytest.raises(InputError, match=named):
        from_flat({"rounds": 5, "distill.general-rounds": 2, **keys})


def test_annealed_weights_begin_with_the_rounds_of_the_task(tiny_teacher):
    teacher = load_teacher(tiny_teacher).config
    config = from_flat({"rounds": 5, "distill.general-rounds": 2, "distill.weighting": "annealed"})
    shape = Shape.whole(teacher, (0, 3))
    soft = [make_recipe(config, number, shape, teacher, False).weights["soft"] for number in range(1, 6)]
    assert soft == pytest.approx([0.7, 0.7, 0.7, 0.35, 0.0])
