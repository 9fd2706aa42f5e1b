"""Costs against torch's own counts: operations, weights, and what a backward pass keeps."""

import math
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf
from torch.utils.flop_counter import FlopCounterMode

from common.config import from_flat
from common.cost import Cost, Part, Speed, Work, predict_cost
from common.dataset import load_tokenizer
from common.devices import PRESETS, DeviceProfile
from common.distillation import begin, set_gradients
from common.models import freeze_embeddings, set_training
from common.nested import Tiers
from common.objective import Batch
from common.recipe import make_recipe
from common.size import (
    Size,
    activation_bytes,
    forward_flops,
    operations_per_piece,
    reference,
    size_of,
    training_flops,
    weight_bytes,
)
from common.slim import Shape, build
from common.tokens import tokenize
from tests.conftest import FP32, make_tokenizer

ROWS, LENGTH = 8, 16
USUAL: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 64}
NO_DROPOUT: dict[str, Any] = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
SMALL: dict[str, Any] = {"vocab_size": 50, "max_position_embeddings": 40, "num_labels": 3, "pad_token_id": 0}
CONFIGS = {
    "bert": lambda: hf.BertConfig(**SMALL, **USUAL, **NO_DROPOUT),
    "roberta": lambda: hf.RobertaConfig(**SMALL, **USUAL, **NO_DROPOUT, bos_token_id=1, eos_token_id=2),
    "electra": lambda: hf.ElectraConfig(**SMALL, **USUAL, **NO_DROPOUT, embedding_size=8),
    "distilbert": lambda: hf.DistilBertConfig(
        **SMALL, dim=32, n_layers=3, n_heads=4, hidden_dim=64, dropout=0.0, attention_dropout=0.0,
        seq_classif_dropout=0.0,
    ),
    "gpt2": lambda: hf.GPT2Config(
        vocab_size=50, n_positions=40, n_embd=32, n_layer=3, n_head=4, num_labels=3, pad_token_id=0, bos_token_id=1,
        eos_token_id=2, resid_pdrop=0.0, attn_pdrop=0.0, embd_pdrop=0.0,
    ),
}  # fmt: skip


def narrow_shape(config: Any, rank: int = 0, layers: int = 2) -> Shape:
    """Of 3 layers some, of 4 heads 3, of 64 neurons 24."""
    return Shape(tuple(range(layers)), ((0, 1, 2),) * layers, (tuple(range(24)),) * layers, config.vocab_size, rank)


def student_of(config: Any, shape: Shape, train_embeddings: bool) -> Any:
    config.num_hidden_layers = len(shape.layers)
    student = build(config, shape)
    freeze_embeddings(student, train_embeddings)
    set_training(student)
    return student


def inputs() -> dict[str, torch.Tensor]:
    pieces = torch.arange(ROWS * LENGTH).reshape(ROWS, LENGTH) % 47 + 3
    return {"input_ids": pieces, "attention_mask": torch.ones_like(pieces)}


@pytest.mark.parametrize("train_embeddings", [False, True])
@pytest.mark.parametrize("rank", [0, 4])
@pytest.mark.parametrize("family", CONFIGS)
def test_operations_and_weights_are_those_that_torch_counts(family, rank, train_embeddings):
    if family == "electra" and rank:
        rank = 6  # below its narrow embedding
    config = CONFIGS[family]()
    shape = narrow_shape(config, rank)
    size = size_of(config, shape, train_embeddings)
    student = student_of(config, shape, train_embeddings)
    with FlopCounterMode(display=False) as forward:
        logits = student(**inputs()).logits
    with FlopCounterMode(display=False) as backward:
        logits.sum().backward()
    assert forward_flops(size, ROWS, LENGTH) == forward.get_total_flops()
    assert training_flops(size, ROWS, LENGTH) == forward.get_total_flops() + backward.get_total_flops()
    assert weight_bytes(size) == sum(weight.nbytes for weight in student.parameters())
    assert size.trained == sum(weight.numel() for weight in student.parameters() if weight.requires_grad)


def test_operations_of_a_layer_by_hand():
    config = CONFIGS["bert"]()
    one, two = (forward_flops(size_of(config, narrow_shape(config, layers=n)), 1, 10) for n in (1, 2))
    # 3 heads of width 8: 4 products of 32 x 24, 2 of 32 x 24, at 10 positions; 10 x 10 x 24, twice
    assert two - one == 2 * 10 * (4 * 32 * 24 + 2 * 32 * 24) + 2 * (2 * 10 * 10 * 24)


# of 3 layers, 4 heads and 64 neurons; the second and the third are of one depth
INSIDE = "1/1/8@0.2,2/2/16@0.2,2/3/48@0.2"


def tiers_of(family: str, rank: int = 0, sizes: str = INSIDE, **keys: float) -> tuple[Tiers, list[Size], Part]:
    """A mixed federation's students, their sizes, and what the device of the whole one does."""
    config = CONFIGS[family]()
    shape = replace(Shape.whole(config, (0, 1, 2)), rank=rank)
    run = from_flat({"student.layers": 3, "student.tiers": sizes, **keys})
    tiers = Tiers(run, student_of(config, shape, train_embeddings=False), shape)
    found = [size_of(config, tier.shape) for tier in tiers.tiers]
    return tiers, found, Part.of(found[-1], found, Work.of(run))


def begun(tiers: Tiers, tier: int) -> tuple[Any, Any]:
    """A tier's student, ready for a step, and its recipe."""
    recipe = make_recipe(from_flat({"student.layers": 3}), 1, tiers[-1].shape, tiers[-1].model.config, regression=False)
    return begin(tiers.student(tier), tiers.part(tier, tiers.initial()), recipe), recipe


@pytest.mark.parametrize(("family", "rank"), [("bert", 0), ("bert", 4), ("electra", 0), ("distilbert", 0), ("gpt2", 0)])
def test_a_step_costs_what_torch_counts_with_the_smaller_students_inside(family, rank):
    tiers, sizes, part = tiers_of(family, rank)
    state, recipe = begun(tiers, 3)
    labels = torch.arange(ROWS) % 3
    batch = Batch(inputs(), torch.zeros(ROWS, 3), labels, {}, ROWS * LENGTH)
    with FlopCounterMode(display=False) as counted:
        set_gradients(state, [batch], recipe=recipe, compute=FP32)
    assert part.inner == tuple(sizes[:3])
    assert sum(training_flops(one, ROWS, LENGTH) for one in (part.size, *part.inner)) == counted.get_total_flops()
    assert counted.get_total_flops() > 1.5 * training_flops(part.size, ROWS, LENGTH)


@pytest.mark.parametrize("taught", [0.0, 1.0])
@pytest.mark.parametrize("family", CONFIGS)
def test_a_device_holds_and_sends_what_a_mixed_federation_makes_of_it(family, taught):
    keys = {"distill.self-weight": taught, "distill.inner-weight": 0.0}
    tiers, sizes, _ = tiers_of(family, **keys)
    work = Work.of(from_flat(keys))
    models = {weight.data_ptr(): weight.numel() for tier in tiers.tiers for weight in tier.model.parameters()}
    for number, tier in enumerate(tiers.tiers):
        part = Part.of(sizes[number], sizes, work)
        assert part.trained == sum(map(math.prod, tier.held.values()))
        assert part.received == sum(map(math.prod, tier.sent.values()))
        exits = set(tiers.student(number).trained) - set(tier.names.values())
        assert part.held == sum(models.values()) + sum(math.prod(tier.held[name]) for name in exits)
        assert len(part.inner) == len(tiers.student(number).smaller)


@pytest.mark.parametrize("family", [family for family in CONFIGS if family != "gpt2"])  # its fused weights are copied
def test_a_layer_inside_keeps_for_the_backward_pass_what_torch_saves(family):
    saved, predicted = [], []
    for layers in (1, 2):
        tiers, sizes, _ = tiers_of(family, sizes=f"{layers}/3/24@0.5")
        state, _ = begun(tiers, 1)
        predicted.append(activation_bytes(sizes[0], ROWS * LENGTH, LENGTH))
        saved.append(saved_bytes(state.student.smaller[0], state.trained.values()))
    assert predicted[1] - predicted[0] == saved[1] - saved[0]


@pytest.mark.parametrize("family", CONFIGS)
def test_a_layer_keeps_for_the_backward_pass_what_torch_saves(family):
    saved, predicted = [], []
    for layers in (1, 2):
        config = CONFIGS[family]()
        shape = narrow_shape(config, layers=layers)
        predicted.append(activation_bytes(size_of(config, shape), ROWS * LENGTH, LENGTH))
        student = student_of(config, shape, train_embeddings=False)
        saved.append(saved_bytes(lambda given, model=student: model(**given).logits, student.parameters()))
    assert predicted[1] - predicted[0] == saved[1] - saved[0]


def saved_bytes(student: Callable[[dict[str, torch.Tensor]], torch.Tensor], weights: Iterable[torch.Tensor]) -> int:
    """Bytes of the storages that autograd keeps of a forward pass, weights apart."""
    own = {weight.untyped_storage().data_ptr() for weight in weights}
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        logits = student(inputs())  # kept alive, or storages would share places
    assert logits.requires_grad
    return sum(storage.nbytes() for storage in kept.values())


def cost_of(profile: dict[str, float], **keys: Any) -> tuple[Cost, DeviceProfile]:
    device = DeviceProfile.model_validate({**PRESETS["laptop"], **profile})
    flat = {key.replace("__", ".").replace("_", "-"): value for key, value in keys.items()}
    return predict_cost(reference(), reference(), device, Work.of(from_flat(flat))), device


def test_a_device_trains_the_reference_at_the_speed_that_it_says():
    per_piece, _ = operations_per_piece()
    device = DeviceProfile.model_validate({**PRESETS["laptop"], "tokens-per-s": 1000.0, "training-layer-ms": 0.0})
    assert Speed.of(device).training == pytest.approx(1000 * per_piece)
    assert Speed.of(device).step(reference(), 32, 32) == pytest.approx(32 * 32 / 1000)


def test_a_round_by_hand():
    # 86 examples of 32 pieces, 14 % padding on top: 100 rows, 3,200 pieces, 4 batches of at most 1,024
    profile = {"tokens-per-s": 1000, "layer-ms": 10, "training-layer-ms": 100, "examples": 86, "length": 32}
    cost, device = cost_of({**profile, "bandwidth-mbit": 8, "watts": 3}, server__packing="off")
    megabytes = 4 * reference().trained / 1e6
    # a fifth of the shard is held out, a quarter of what is trained on: 25 padded rows, 800 pieces pass forward alone
    training, reading = operations_per_piece()
    assert cost.compute_s == pytest.approx(3.2 + 4 * 3 * 0.1 + 0.8 * reading / training)
    assert cost.up_mb == pytest.approx(megabytes)
    assert cost.down_mb == pytest.approx(2 * megabytes)  # to be trained, and to be scored
    assert cost.transfer_s == pytest.approx(3 * megabytes)  # 8 Mbit/s are a megabyte a second
    assert cost.energy_j == pytest.approx(3 * (cost.compute_s + cost.transfer_s))
    assert cost.latency_ms == pytest.approx(32 / device.single_tokens_per_s * 1e3 + 3 * 10)


def test_what_is_scored_seldom_comes_down_and_is_read_seldom():
    """Of ten rounds the fourth, the eighth and the last are scored; with nothing held out nothing is read."""
    always, seldom = (cost_of({}, rounds=10, server__scores_every=every)[0] for every in (1, 4))
    unread = cost_of({}, rounds=10, data__holdout_fraction=0.0)[0]
    assert seldom.down_mb == pytest.approx(1.3 * always.down_mb / 2)
    assert seldom.compute_s - unread.compute_s == pytest.approx(0.3 * (always.compute_s - unread.compute_s))
    assert always.compute_s > unread.compute_s


def test_a_round_over_a_part_of_the_shard_costs_that_part():
    part = cost_of({"examples": 8600}, client__share=0.01, data__holdout_fraction=0.0)[0]
    assert part == cost_of({"examples": 86}, data__holdout_fraction=0.0)[0]


def test_the_wire_decides_what_travels_up():
    plain = cost_of({}, server__packing="off")[0].up_mb
    assert cost_of({})[0].up_mb == pytest.approx(2 * plain)  # exact sums are int64
    assert cost_of({}, server__wire="fp16")[0].up_mb == pytest.approx(plain / 2)
    assert cost_of({}, server__wire="int8")[0].up_mb == pytest.approx(plain / 4)
    assert cost_of({}, server__wire="svd")[0].up_mb == pytest.approx(plain / 2)
    assert cost_of({}, server__wire="topk", server__topk=0.01)[0].up_mb == pytest.approx(plain / 4 * (0.03 + 1 / 255))


def test_plain_steps_need_no_moments():
    adaptive, plain = cost_of({})[0], cost_of({}, client__optimizer="sgd")[0]
    assert adaptive.training_mb - plain.training_mb == pytest.approx(8 * reference().trained / 1e6)


def test_losses_on_inner_states_cost_the_teacher_beside_the_student():
    plain, deep = cost_of({})[0], cost_of({}, distill__hidden_weight=1.0)[0]
    assert deep.compute_s > plain.compute_s * 1.3  # a forward pass to a forward and a backward pass
    assert deep.training_mb > plain.training_mb


def test_batches_in_parts_take_less_memory_and_more_passes():
    whole, parts = cost_of({}, client__token_budget=1024)[0], cost_of({}, client__micro_budget=256)[0]
    assert parts.training_mb == cost_of({}, client__token_budget=256)[0].training_mb < whole.training_mb
    assert parts.compute_s > whole.compute_s
    assert cost_of({}, client__micro_budget=4096)[0] == whole == cost_of({}, client__micro_budget=-1)[0]


def test_the_windows_of_a_text_are_in_memory_together():
    one, many = cost_of({}, data__max_length=64)[0], cost_of({}, data__max_length=64, data__windows=64)[0]
    assert many.training_mb == cost_of({}, data__max_length=64, client__token_budget=4096)[0].training_mb
    assert many.training_mb > one.training_mb


@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_texts_have_the_windows_that_the_tokenizer_cuts(tmp_path, family):
    make_tokenizer(tmp_path, family)
    tokenizer = load_tokenizer(tmp_path)
    special = tokenizer.num_special_tokens_to_add(pair=False)
    assert special == {"bert": 2, "gpt2": 0}[family]
    texts = (["good " * count for count in range(1, 40)],)
    whole = tokenize(texts, tokenizer, 512, lambda amount: None)
    for stride in (0, 3):
        work = Work.of(from_flat({"data.max-length": 8, "data.windows": 6, "data.stride": stride}), special)
        cut = tokenize(texts, tokenizer, 8, lambda amount: None, windows=6, stride=stride)
        for row in range(len(cut)):
            windows, _ = cut.windows(np.array([row]))
            found = len(windows), int(cut.widths(windows).max())
            assert work.cut(int(whole.widths(np.array([row]))[0])) == found


def test_each_window_of_a_text_costs_a_pass():
    """Of 102 pieces two are special; windows of 32 have room for 30, and share 5: 30, 55, 80, 105 are reached."""
    keys = {"data__max_length": 32, "data__windows": 8, "data__stride": 5, "client__token_budget": 1024}
    fixed = {"layer-ms": 10.0, "training-layer-ms": 0.0}
    one, four = (cost_of({"length": length, **fixed}, **keys)[0] for length in (32, 102))
    assert four.compute_s == pytest.approx(4 * one.compute_s)
    assert four.latency_ms - 30 == pytest.approx(4 * (one.latency_ms - 30))  # three layers, each passed once
    weights = weight_bytes(reference()) / 1e6
    assert four.inference_mb - weights == pytest.approx(4 * (one.inference_mb - weights))
    few = {**keys, "data__windows": 3}
    assert cost_of({"length": 102, **fixed}, **few)[0].compute_s == pytest.approx(3 * one.compute_s)


def test_a_text_is_in_one_batch_with_all_its_windows():
    """Ten texts of four windows of 32 pieces, of which one alone fills the batch: twelve steps with the padding."""
    keys = {"data__max_length": 32, "data__windows": 4, "client__token_budget": 64}
    profile = {"length": 122, "examples": 10}
    slow, quick = (cost_of({**profile, "training-layer-ms": fixed}, **keys)[0] for fixed in (1000.0, 0.0))
    assert slow.compute_s - quick.compute_s == pytest.approx(12 * 3 * 1.0)


def test_what_is_smaller_costs_less():
    config = CONFIGS["bert"]()
    large = Shape.whole(config, (0, 1, 2))
    device = DeviceProfile.model_validate(PRESETS["pi"])
    work = Work.of(from_flat({}))
    teacher = size_of(config, large)
    for small in (
        replace(large, layers=large.layers[:2], heads=large.heads[:2], neurons=large.neurons[:2]),
        replace(large, heads=((0, 1),) * 3),
        replace(large, neurons=(tuple(range(32)),) * 3),
    ):
        less, more = (predict_cost(size_of(config, shape), teacher, device, work) for shape in (small, large))
        for name in ("training_mb", "latency_ms", "compute_s", "transfer_s", "up_mb", "energy_j"):
            assert getattr(less, name) < getattr(more, name), name
