"""An example of several windows counts as one: its logits are the mean of theirs, everywhere."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import AutoTokenizer

from common.batches import token_budget_batches
from common.config import from_flat
from common.dataset import Split, in_pieces_of
from common.distillation import Student, begin, set_gradients, step
from common.errors import InputError
from common.importance import importance
from common.inference import predict
from common.models import freeze_embeddings, load_teacher
from common.objective import Examples, batch_of
from common.recipe import make_recipe
from common.slim import Shape, cut_student
from common.tokens import tokenize
from server.preparation import check_windows
from tests.conftest import FP32, make_dataset, make_reviews, make_sentences

KEYS = {"client.token-budget": 64, "client.clip-norm": 0.0, "student.layers": 2, "client.precision": "fp32"}


@pytest.fixture(scope="module")
def teacher(tiny_teacher):
    return load_teacher(tiny_teacher)


@pytest.fixture(scope="module")
def tokens(tiny_teacher):
    """Twelve examples of 1 to 4 windows of 8 pieces."""
    texts = make_sentences(12, seed=3, longest=18)
    return tokenize((texts,), AutoTokenizer.from_pretrained(tiny_teacher), 8, lambda amount: None, windows=4, stride=2)


@pytest.fixture
def scene(teacher, tokens):
    shape = Shape.whole(teacher.config, (0, 3))
    model = cut_student(teacher, shape, pieces=[], dropout=0.0)
    labels = np.arange(12) % 2
    data = Split(tokens, labels, np.zeros((12, 16), np.uint8))
    rows = np.arange(12)
    examples = Examples(data, rows, predict(teacher, tokens, rows, FP32))
    return model, shape, examples


def by_hand(model, tokens, row):
    """The mean over an example's windows, each run alone and unpadded."""
    windows, _ = tokens.windows(np.array([row]))
    return torch.stack([model(**tokens.window_batch(windows[k : k + 1])).logits[0] for k in range(len(windows))]).mean(
        0
    )


def test_logits_of_an_example_are_the_mean_of_its_windows_in_any_company(teacher, tokens):
    counts = tokens.windows(np.arange(12))[1]
    assert set(counts) == {1, 2, 3, 4}
    found = predict(teacher, tokens, np.arange(12), FP32)
    assert found.shape == (12, 2)
    with torch.no_grad():
        expected = torch.stack([by_hand(teacher, tokens, row) for row in range(12)]).numpy()
    np.testing.assert_allclose(found, expected, atol=1e-5)
    for rows in (np.arange(12)[::-1], *np.arange(12)[:, None], np.array([3, 7, 3])):
        assert predict(teacher, tokens, rows, FP32).tobytes() == found[rows].tobytes()


def test_progress_counts_examples_not_windows(teacher, tokens):
    seen = []
    predict(teacher, tokens, np.arange(12), FP32, seen.append)
    assert sum(seen) == 12


def test_a_step_has_one_loss_per_example_and_gradients_through_the_mean(teacher, scene):
    model, shape, examples = scene
    recipe = make_recipe(from_flat({**KEYS, "distill.soft-weight": 0.0, "distill.hard-weight": 1.0}), 1, shape,
                         teacher.config, False)  # fmt: skip
    bare = copy.deepcopy(model).train()
    trained = freeze_embeddings(bare, False)
    logits = torch.stack([by_hand(bare, examples.data.tokens, row) for row in (0, 5, 2)])
    loss = F.cross_entropy(logits, torch.tensor([0, 1, 0]))
    loss.backward()

    student = Student.of(model, freeze_embeddings(model, False))
    state = begin(student, {name: p.detach().clone() for name, p in student.trained.items()}, recipe)
    batch = batch_of(examples, np.array([0, 5, 2]), recipe, FP32)
    step(state, set_gradients(state, [batch], recipe=recipe, compute=FP32), 3, recipe)
    assert state.seen == 3
    assert float(state.totals[0]) / 3 == pytest.approx(loss.item(), abs=1e-5)
    for name, parameter in trained.items():
        torch.testing.assert_close(student.trained[name].grad, parameter.grad, atol=2e-5, rtol=1e-3)


def test_batches_keep_their_budget_with_all_windows_counted(tokens):
    everyone = np.arange(12)
    batches = token_budget_batches(tokens.lengths(everyone), 64, np.random.default_rng(0))
    assert sorted(np.concatenate(batches)) == everyone.tolist()
    sizes = [tokens.batch(places)["input_ids"].numel() for places in batches]
    assert max(sizes) <= 64
    assert len(batches) <= sum(sizes) / 32


@pytest.mark.parametrize("part", ["hidden", "cls", "relation"])
def test_losses_on_inner_states_are_those_of_the_windows(teacher, scene, part):
    model, shape, examples = scene
    off = {"distill.soft-weight": 0.0, "distill.hard-weight": 0.0, f"distill.{part}-weight": 1.0}
    recipe = make_recipe(from_flat({**KEYS, **off}), 1, shape, teacher.config, False)
    student = Student.of(model, freeze_embeddings(model, False))
    weights = {name: p.detach().clone() for name, p in student.trained.items()}
    state = begin(student, weights, recipe)
    rows = np.array([0, 5, 2])
    batch = batch_of(examples, rows, recipe, FP32)
    step(state, set_gradients(state, [batch], recipe=recipe, compute=FP32, teacher=teacher), 3, recipe)

    # the same windows as examples of their own
    tokens = examples.data.tokens
    windows, _ = tokens.windows(rows)
    flat = copy.copy(tokens)
    object.__setattr__(flat, "first", None)
    many = len(flat)
    alone = Examples(Split(flat, np.zeros(many, np.int64), np.zeros((many, 16), np.uint8)), windows,
                     np.zeros((len(windows), 2), np.float32))  # fmt: skip
    other = begin(student, weights, recipe)
    batch = batch_of(alone, np.arange(len(windows)), recipe, FP32)
    step(other, set_gradients(other, [batch], recipe=recipe, compute=FP32, teacher=teacher), len(windows), recipe)
    assert float(state.totals[0]) > 0
    assert float(state.totals[0]) / 3 == pytest.approx(float(other.totals[0]) / len(windows), rel=1e-6)


def test_importance_is_taken_per_example_before_it_is_added(teacher, scene):
    model, shape, examples = scene
    recipe = make_recipe(from_flat(KEYS), 1, shape, teacher.config, False)

    def of(rows):
        some = Examples(examples.data, np.asarray(rows), examples.soft[rows])
        return importance(model, some, recipe=recipe, compute=FP32, seed=0, client=0)

    together, single = of([4, 5, 6]), [of([row]) for row in (4, 5, 6)]
    for place in (0, 1):
        mean = np.mean([one[place] for one in single], axis=0)
        np.testing.assert_allclose(together[place], mean, rtol=1e-3, atol=1e-7)


def test_the_data_is_cut_into_windows_once_and_for_a_trimmed_student_too(tmp_path, tiny_teacher):
    source = make_reviews(tmp_path / "reviews.csv")
    _, data = make_dataset(source, tiny_teacher, tmp_path, data__max_length=8, data__windows=3, data__stride=1)
    counts = data.train.tokens.windows(np.arange(len(data.train)))[1]
    assert counts.max() == 3
    assert (data.windows, data.stride) == (3, 1)
    again = in_pieces_of(tiny_teacher, data, tmp_path)
    for name in ("ids", "offsets", "first"):
        assert np.array_equal(getattr(again.train.tokens, name), getattr(data.train.tokens, name))


def test_pairs_and_a_stride_without_room_are_refused(tmp_path, tiny_teacher):
    source = make_reviews(tmp_path / "reviews.csv")
    with pytest.raises(InputError, match=r"data.windows = 2: .* pairs"):
        make_dataset(source, tiny_teacher, tmp_path, data__windows=2, data__text_columns="text,owner")
    with pytest.raises(InputError, match=r"data.stride = 6: .* room for 6"):
        make_dataset(source, tiny_teacher, tmp_path, data__windows=2, data__max_length=8, data__stride=6)
    with pytest.raises(InputError, match=r"data.stride = 3: with data.windows = 1"):
        from_flat({"data.stride": 3})


def test_inner_states_of_a_student_with_its_own_windows_are_refused():
    keys = {"data.windows": 2, "student.vocabulary": 100, "distill.relation-weight": 1.0}
    with pytest.raises(InputError, match=r"data.windows = 2: .* student.vocabulary .* distill.relation-weight"):
        check_windows(from_flat(keys))
    for key in keys:
        check_windows(from_flat({other: value for other, value in keys.items() if other != key}))
