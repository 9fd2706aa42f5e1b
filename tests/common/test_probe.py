"""The budget that is found fits and is fast, and a device that runs out of memory gets smaller parts."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from common.batches import cut
from common.dataset import Split
from common.device import free_memory, is_out_of_memory
from common.distillation import Room, begin, learn, set_gradients, set_gradients_in
from common.objective import Examples, batch_of
from common.probe import Point, choose, find_room, made_up
from common.tokens import Tokens
from tests.common.test_micro_batches import EVERY, RECIPE, Scene
from tests.conftest import FP32, make_sentences, make_tokens


@pytest.fixture(scope="module")
def scene(tiny_teacher):
    return Scene(tiny_teacher)


def allocate(count):
    """Bytes from torch's own allocator."""
    return torch.empty(count, dtype=torch.uint8)


@pytest.fixture
def small_device(scene):
    """A student that cannot take more pieces at once than it is told: the allocator itself refuses."""
    seen = []

    def limit(pieces):
        def check(module, given, named):
            size = named["input_ids"].numel()
            seen.append(size)
            if size > pieces:
                allocate(2**55)

        hooks.append(scene.student.model.register_forward_pre_hook(check, with_kwargs=True))
        return seen

    hooks = []
    yield limit
    for hook in hooks:
        hook.remove()


def test_the_allocators_refusal_is_known_and_other_errors_are_not_taken_for_it():
    with pytest.raises(RuntimeError) as caught:
        allocate(2**55)
    assert is_out_of_memory(caught.value)
    assert is_out_of_memory(MemoryError())
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    assert is_out_of_memory(torch.AcceleratorError("CUDA error: out of memory"))
    assert is_out_of_memory(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"))
    with pytest.raises(RuntimeError) as caught:
        torch.ones(2, 3) @ torch.ones(2, 3)
    assert not is_out_of_memory(caught.value)
    assert not is_out_of_memory(ValueError("not enough memory"))


def test_free_memory_is_less_than_there_is():
    assert 2**20 < free_memory(torch.device("cpu")) < 2**50


SMALL, LARGE = Point(256, 300.0, 2.0), Point(1024, 1068.0, 5.0)  # 44 + 1 a piece; 1 s + 1 s for 256 pieces


@pytest.mark.parametrize(
    ("free", "expected"),
    [(1e9, 8192), (8236, 8192), (8235, 4096), (1068, 1024), (1067, 512), (300, 256), (0, 256)],
)
def test_the_largest_budget_that_fits_is_taken(free, expected):
    """Speed grows with the budget here: 256 / 2 s, 512 / 3 s, ..."""
    assert choose(8192, SMALL, LARGE, free) == expected


def test_a_budget_that_is_too_slow_is_not_taken():
    """1.0 pieces a second at 256; then 0.875 s a piece less than proportional growth allows, or more."""
    fast = Point(256, 0.0, 256.0)
    # 1.05 seconds for each further piece: 8192 pieces take 8589 s, 4.6 % slower for each piece
    assert choose(8192, fast, Point(1024, 0.0, 256 + 768 * 1.05), 1.0) == 8192
    # 1.2 seconds: 512 pieces take 563 s, 9.1 % slower; 1024 take 1178 s, 13 % slower
    assert choose(8192, fast, Point(1024, 0.0, 256 + 768 * 1.2), 1.0) == 512


def test_noise_that_makes_the_larger_batch_cheaper_is_taken_for_no_difference():
    assert choose(1000, Point(256, 9.0, 2.0), Point(1024, 8.0, 1.0), 9.0) == 1000


@pytest.mark.parametrize("embeddings", [False, True], ids=["frozen", "words trained"])
@pytest.mark.parametrize("short", [0, 9], ids=["same pieces", "places of their own"])
def test_probing_finds_a_budget_and_changes_nothing(tiny_teacher, embeddings, short):
    scene = Scene(tiny_teacher, embeddings, short=short)
    recipe = replace(RECIPE, weights=EVERY, micro_budget=256)
    expected, _ = scene.learn(recipe)
    scene.learn(replace(recipe, lr=0.1))
    room = find_room(scene.student, scene.weights, scene.examples, recipe=recipe, compute=FP32, teacher=scene.teacher)
    assert room.pieces in (256, 128, 64, 32)
    assert all(torch.equal(scene.student.trained[name], weight) for name, weight in scene.weights.items())
    found, _ = scene.learn(recipe)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_without_memory_the_least_is_found(scene):
    recipe = replace(RECIPE, micro_budget=256)
    longest = int(scene.lengths.max())
    rooms = [
        find_room(scene.student, scene.weights, scene.examples, recipe=recipe, compute=FP32, teacher=None, share=share)
        for share in (0.0, 0.5)
    ]
    assert 2 * longest <= rooms[0].pieces < 4 * longest
    assert rooms[1].pieces >= rooms[0].pieces


def test_a_budget_of_fewer_than_two_texts_needs_no_probe(scene):
    recipe = replace(RECIPE, micro_budget=2 * int(scene.lengths.max()) - 1)
    room = find_room(scene.student, scene.weights, scene.examples, recipe=recipe, compute=FP32, teacher=None)
    assert room.pieces == recipe.micro_budget


@pytest.mark.parametrize(("limit", "expected"), [(100, 2), (20, 1)], ids=["large probe fails", "both fail"])
def test_a_probe_that_runs_out_of_memory_is_an_answer(scene, small_device, limit, expected):
    small_device(limit)
    recipe = replace(RECIPE, micro_budget=10_000)
    room = find_room(scene.student, scene.weights, scene.examples, recipe=recipe, compute=FP32, teacher=None)
    assert room.pieces == expected * int(scene.lengths.max())


def test_made_up_texts_are_as_many_and_as_long_as_asked_and_of_real_pieces(scene):
    examples = made_up(scene.examples, 3, 20)
    inputs = batch_of(examples, examples.rows, RECIPE, FP32).inputs
    assert inputs["input_ids"].shape == (3, 20)
    assert inputs["attention_mask"].all()
    assert inputs["input_ids"].max() < scene.student.model.config.vocab_size
    assert not (inputs["input_ids"] == examples.data.tokens.pad).any()


def test_made_up_texts_fit_any_labels_and_have_one_window_each(scene):
    """Real examples of up to four windows of 8 pieces and three labels each."""
    tokens = Tokens(
        ids=np.tile(np.arange(5, 13, dtype=np.int32), 10), offsets=np.arange(11) * 8, starts=np.ones(80, dtype=bool),
        second=np.full(10, 8, dtype=np.int32), pad=0, typed=True, first=np.array([0, 4, 7, 9, 10]),
    )  # fmt: skip
    data = Split(tokens, np.ones((4, 3), dtype=np.int8), np.zeros((4, 16), dtype=np.uint8))
    real = Examples(data, np.arange(4), np.ones((4, 3), dtype=np.float32))
    batch = batch_of(made_up(real, 5, 8), np.arange(5), replace(RECIPE, multi_label=True), FP32)
    assert batch.inputs["input_ids"].shape == batch.inputs["token_type_ids"].shape == (5, 8)
    assert batch.soft.shape == batch.hard.shape == (5, 3)
    assert batch.pooling is None
    assert set(batch.inputs["input_ids"].flatten().tolist()) <= set(range(1, 13))


# --- memory runs out while training ----------------------------------------------------------------


def learn_in(scene, room, **changed):
    return learn(
        scene.student, scene.weights, scene.examples, recipe=replace(RECIPE, **changed), compute=FP32, seed=0,
        who=(3, 17), teacher=scene.teacher, room=room,
    )  # fmt: skip


def test_when_memory_runs_out_the_same_batches_are_learnt_in_smaller_parts(scene, small_device):
    expected = learn_in(scene, None)
    weights = {name: weight.detach().clone() for name, weight in expected.trained.items()}
    seen = small_device(100)
    room = Room(256)
    state = learn_in(scene, room)
    assert max(seen) > 100
    assert 32 <= room.pieces <= 100
    assert state.seen == expected.seen == 80
    torch.testing.assert_close(state.totals, expected.totals, rtol=1e-5, atol=1e-7)
    for name, weight in state.trained.items():
        if not name.endswith("key.bias"):  # nothing but noise, and AdamW scales noise to steps
            torch.testing.assert_close(weight.detach(), weights[name], rtol=0, atol=2e-5, msg=name)
    before = len(seen)
    learn_in(scene, room)
    assert max(seen[before:]) <= 100  # what was found stays


def test_a_single_example_that_does_not_fit_ends_it(scene, small_device):
    seen = small_device(int(scene.lengths.max()) - 1)
    with pytest.raises(RuntimeError, match="allocate memory"):
        learn_in(scene, Room(256))
    assert seen[-1] == scene.lengths.max()


def test_a_single_example_that_does_not_fit_ends_it_beside_shorter_ones_that_do(scene, small_device, tiny_teacher):
    """Halving what the long one takes would leave the parts as they are, again and again."""
    first, second, *rest = make_sentences(10)
    data = Split(make_tokens(tiny_teacher, [first, second, " ".join(rest)]), np.zeros(3, int), np.zeros((3, 16), "u1"))
    examples, places = Examples(data, np.arange(3), np.zeros((3, 2), np.float32)), np.arange(3)
    lengths = data.tokens.lengths(places)
    longest = int(lengths.max())
    assert 2 * max(lengths[:2]) <= longest // 2
    seen = small_device(longest - 1)
    state = begin(scene.student, scene.weights, RECIPE)
    with pytest.raises(RuntimeError, match="allocate memory"):
        set_gradients_in(Room(longest), state, examples, places, lengths, recipe=RECIPE, compute=FP32)
    assert len(seen) == 5  # the two together and the long one, then each by itself


def test_a_budget_of_the_users_own_is_never_halved(scene, small_device):
    seen = small_device(100)
    with pytest.raises(RuntimeError, match="allocate memory"):
        learn_in(scene, None, micro_budget=256)
    assert sum(size > 100 for size in seen) == 1


def test_what_was_added_up_before_memory_ran_out_is_forgotten(scene, small_device):
    """The last part, of the longest texts, does not fit: those before it must not count twice."""
    recipe = replace(RECIPE, clip_norm=0.0)
    places = scene.places()
    parts = cut(places, scene.lengths, 85)
    sizes = [len(part) * int(scene.lengths[part].max()) for part in parts]
    assert sizes[-1] > max(sizes[:-1])

    def gradient(budget):
        state = begin(scene.student, scene.weights, recipe)
        batches = [batch_of(scene.examples, part, recipe, FP32) for part in cut(places, scene.lengths, budget)]
        set_gradients(state, batches, recipe=recipe, compute=FP32)
        return np.concatenate(
            [weight.grad.numpy().ravel() for weight in state.trained.values() if weight.grad is not None]
        )

    expected = gradient(85)
    state = begin(scene.student, scene.weights, replace(recipe, lr=0.0))
    small_device(sorted(sizes)[-2])
    lengths = scene.examples.data.tokens.lengths(scene.examples.rows)
    told = set_gradients_in(Room(85), state, scene.examples, places, lengths, recipe=recipe, compute=FP32)
    found = np.concatenate(
        [weight.grad.numpy().ravel() for weight in state.trained.values() if weight.grad is not None]
    )
    assert np.linalg.norm(found - expected) < 1e-5 * np.linalg.norm(expected)
    assert 1 < len(told) <= 40
