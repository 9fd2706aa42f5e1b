"""Students inside one another: what a smaller one computes, what trains it, and what it leaves alone."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from common.config import from_flat
from common.distillation import begin, set_gradients, step
from common.families import FAMILIES
from common.models import count_parameters, load_teacher
from common.nested import Tiers
from common.objective import Batch
from common.recipe import PARTS, make_recipe
from common.slim import Shape, cut_student, narrow, widen
from tests.conftest import FP32, make_teacher

SIZES = "1/1/8@0.5,2/1/16@0.25"
INPUTS = {
    "input_ids": torch.tensor([[2, 50, 51, 52, 3], [2, 60, 3, 0, 0], [2, 70, 71, 3, 0]]),
    "attention_mask": torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [1, 1, 1, 1, 0]]),
}


def tiers_of(folder, sizes=SIZES, **keys):
    teacher = load_teacher(folder)
    layers = tuple(range(3))
    shape = Shape.whole(teacher.config, layers)
    config = from_flat({"student.layers": 3, "student.tiers": sizes, **keys})
    return config, teacher, Tiers(config, cut_student(teacher, shape), shape)


@pytest.fixture(scope="module")
def teachers(tmp_path_factory):
    folder = tmp_path_factory.mktemp("families")
    found = {family: make_teacher(folder / family, family) for family in ("bert", "distilbert", "roberta", "electra")}
    return {**found, "gpt2": _gpt2(folder / "gpt2")}


def _gpt2(folder):
    import transformers as hf

    config = hf.GPT2Config(
        vocab_size=100, n_positions=32, n_embd=16, n_layer=4, n_head=2, n_inner=32, num_labels=2, pad_token_id=0
    )
    torch.manual_seed(0)
    hf.GPT2ForSequenceClassification(config).save_pretrained(folder)
    return folder


def logits_of(model):
    model.eval()
    with torch.no_grad():
        return model(**INPUTS).logits


def batch(seed=0):
    rng = torch.Generator().manual_seed(seed)
    return Batch(INPUTS, torch.randn(3, 2, generator=rng), torch.tensor([0, 1, 1]), {}, 12)


def recipe_of(config, tiers, teacher, tier):
    recipe = make_recipe(config, 1, tiers[-1].shape, teacher.config, regression=False)
    return tiers.recipe(tier, recipe, config.distill.relation_heads, teacher.config)


def trained_once(config, tiers, teacher, tier, shared, **changes):
    """The learning state after one step of a tier."""
    student = tiers.student(tier)
    recipe = replace(recipe_of(config, tiers, teacher, tier), clip_norm=0.0, **changes)
    state = begin(student, tiers.part(tier, shared), recipe)
    step(state, set_gradients(state, [batch()], recipe=recipe, compute=FP32), 3, recipe)
    return state


def randomised(tiers, seed=0):
    """Shared arrays in which every exit is another."""
    rng = torch.Generator().manual_seed(seed)
    return {name: array + 0.1 * torch.randn(array.shape, generator=rng) for name, array in tiers.initial().items()}


@pytest.mark.parametrize("mode", ["nested", "sliced"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_tier_begins_as_the_narrowed_student_with_fewer_layers(teachers, family, mode):
    _, teacher, tiers = tiers_of(teachers[family], **{"student.tier-mode": mode})
    for tier, (layers, heads, neurons) in enumerate([(1, 1, 8), (2, 1, 16), (3, 2, 32)]):
        slim = cut_student(teacher, Shape.whole(teacher.config, tuple(range(layers))))
        narrow(slim, [range(heads)] * layers, [range(neurons)] * layers)
        model = tiers.load(tier, tiers.initial())
        assert count_parameters(model) == count_parameters(slim)
        assert torch.equal(logits_of(model), logits_of(slim))


@pytest.mark.parametrize("family", FAMILIES)
def test_inside_a_larger_student_a_smaller_one_computes_what_it_does_alone(teachers, family):
    config, teacher, tiers = tiers_of(teachers[family])
    shared = randomised(tiers)
    student = tiers.student(2)
    begin(student, tiers.part(2, shared), recipe_of(config, tiers, teacher, 2))
    alone = [logits_of(tiers.load(tier, randomised(tiers, seed=1))) for tier in (0, 1)]  # must not matter
    for tier in (0, 1):
        inside = student.smaller[tier](INPUTS)
        assert inside.requires_grad
        own = logits_of(tiers.load(tier, shared))
        assert not torch.allclose(own, alone[tier], atol=1e-3)
        torch.testing.assert_close(inside.detach(), own, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_plain_transformers_opens_a_tier(teachers, family):
    _, _, tiers = tiers_of(teachers[family])
    model = tiers.load(0, randomised(tiers))
    plain = widen(model, tiers[0].shape)
    assert plain.config.num_hidden_layers == 1
    torch.testing.assert_close(logits_of(plain), logits_of(model), atol=1e-6, rtol=1e-6)


def test_each_smaller_depth_has_an_exit_and_the_trunk_is_shared(tiny_teacher):
    _, _, tiers = tiers_of(tiny_teacher)
    own = {
        "classifier.weight", "classifier.bias", "bert.pooler.dense.weight", "bert.pooler.dense.bias",
    }  # fmt: skip
    for depth in (1, 2):
        norm = f"bert.encoder.layer.{depth - 1}.output.LayerNorm"
        names = {f"exits.{depth}.{name}" for name in own | {f"{norm}.weight", f"{norm}.bias"}}
        assert {name for name in tiers[depth - 1].held if name.startswith(f"exits.{depth}.")} == names
        assert not own & set(tiers[depth - 1].held)
    assert own <= set(tiers[2].held)
    assert set(tiers[2].held) == set(tiers.shapes)  # who holds the whole holds all exits
    assert set(tiers.initial()) == set(tiers.shapes)
    query = "bert.encoder.layer.0.attention.self.query.weight"
    assert [tier.held[query] for tier in tiers.tiers] == [(8, 16), (8, 16), (16, 16)]
    _, _, sliced = tiers_of(tiny_teacher, **{"student.tier-mode": "sliced"})
    assert set(sliced[0].held) < set(sliced[2].held) == set(sliced.shapes)
    assert not any(name.startswith("exits.") for name in sliced.shapes)


def test_a_device_gets_no_more_than_its_student(tiny_teacher):
    _, _, tiers = tiers_of(tiny_teacher)
    shared = randomised(tiers)
    for tier in range(3):
        sent = tiers.cut(shared, tiers[tier].sent)
        for smaller in range(tier + 1):  # it may also work for smaller ones
            found, wanted = tiers.part(smaller, sent), tiers.part(smaller, shared)
            assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert tiers[0].sent == tiers[0].held
    assert tiers[2].sent == tiers.shapes
    _, _, alone = tiers_of(tiny_teacher, **{"distill.self-weight": 0.0, "distill.inner-weight": 0.0})
    assert not any(name.startswith("exits.") for name in alone[2].held)  # nobody teaches: each trains its own exit
    assert alone[2].sent == alone.shapes


def test_students_of_one_depth_share_their_exit(tiny_teacher):
    _, _, tiers = tiers_of(tiny_teacher, "2/1/8@0.2,2/1/16@0.2,3/1/16@0.2")
    exits = [{name for name in tier.names.values() if name.startswith("exits.")} for tier in tiers.tiers]
    assert exits[0] == exits[1] != set()
    assert exits[2] == exits[3] == set()


def test_training_a_small_student_moves_its_own_part_alone(tiny_teacher):
    config, teacher, tiers = tiers_of(tiny_teacher)
    state = trained_once(config, tiers, teacher, 0, randomised(tiers))
    assert not state.student.smaller
    assert float(state.totals[6]) == 0.0
    for name, parameter in state.trained.items():
        assert parameter.shape == tiers[0].held[name]
        assert parameter.grad is not None and not torch.equal(parameter.detach(), state.start[name]), name


def test_what_only_a_smaller_student_uses_learns_from_its_teacher_inside(tiny_teacher):
    """With no other loss the gradient reaches the beginnings that the smaller students hold, and nothing else."""
    config, teacher, tiers = tiers_of(tiny_teacher)
    nothing = dict.fromkeys(PARTS, 0.0) | {"self": 1.0}
    state = trained_once(config, tiers, teacher, 2, randomised(tiers), weights=nothing)
    grads = {name: parameter.grad for name, parameter in state.trained.items()}
    assert not any(grads[name].any() for name in grads if name.startswith(("classifier", "bert.encoder.layer.2.")))
    up = grads["bert.encoder.layer.1.intermediate.dense.weight"]
    assert up[:16].any() and not up[16:].any()
    query = grads["bert.encoder.layer.0.attention.self.query.weight"]
    assert query[:8].any() and not query[8:].any()
    assert grads["exits.1.classifier.weight"].any()
    # layer 0's own norm is used by the second tier, layer 1's by the whole alone
    assert grads["bert.encoder.layer.0.output.LayerNorm.weight"].any()
    assert not grads["bert.encoder.layer.1.output.LayerNorm.weight"].any()


def test_the_loss_inside_is_that_of_the_formula(tiny_teacher):
    config, teacher, tiers = tiers_of(
        tiny_teacher, **{"distill.self-weight": 0.5, "distill.temperature": 3.0, "distill.inner-weight": 0.0}
    )
    shared = randomised(tiers)
    whole, *inner = [logits_of(tiers.load(tier, shared)) for tier in (2, 0, 1)]
    wanted = 0.0
    for logits in inner:  # T^2 KL(whole || smaller), mean over the batch
        p, q = torch.softmax(whole / 3.0, -1), torch.softmax(logits / 3.0, -1)
        wanted += float((p * (p / q).log()).sum(-1).mean() * 9.0)
    state = trained_once(config, tiers, teacher, 2, shared)
    loss, soft, hard, *_, inside, _, _ = (state.totals / state.seen).tolist()
    assert inside == pytest.approx(wanted, rel=1e-4)
    assert loss == pytest.approx(0.7 * soft + 0.3 * hard + 0.5 * inside, rel=1e-6)


def test_the_students_inside_learn_from_the_teacher_and_the_labels_too(tiny_teacher):
    keys = {"distill.self-weight": 0.0, "distill.inner-weight": 0.25, "distill.temperature": 3.0}
    config, teacher, tiers = tiers_of(tiny_teacher, **keys)
    shared, one = randomised(tiers), batch()
    wanted = 0.0
    for logits in [logits_of(tiers.load(tier, shared)) for tier in (0, 1)]:
        p, q = torch.softmax(one.soft / 3.0, -1), torch.softmax(logits / 3.0, -1)
        soft = float((p * (p / q).log()).sum(-1).mean() * 9.0)
        hard = float(-torch.log_softmax(logits, -1)[torch.arange(len(one.hard)), one.hard].mean())
        wanted += 0.7 * soft + 0.3 * hard
    state = trained_once(config, tiers, teacher, 2, shared)
    loss, soft, hard, *_, inside, _ = (state.totals / state.seen).tolist()
    assert inside == pytest.approx(wanted, rel=1e-4)
    assert loss == pytest.approx(0.7 * soft + 0.3 * hard + 0.25 * inside, rel=1e-6)


def test_a_batch_in_parts_has_the_same_gradient_inside(tiny_teacher):
    """One example and two: each weighs as it does in the whole batch, in the loss inside too."""
    config, teacher, tiers = tiers_of(tiny_teacher)
    recipe, shared, student = recipe_of(config, tiers, teacher, 2), randomised(tiers), tiers.student(2)

    def gradients(*parts):
        whole = batch()
        cut = [
            replace(whole, inputs={n: t[part] for n, t in whole.inputs.items()}, soft=whole.soft[part],
                    hard=whole.hard[part], positions=int(whole.inputs["attention_mask"][part].sum()))
            for part in parts
        ]  # fmt: skip
        state = begin(student, tiers.part(2, shared), recipe)
        told = set_gradients(state, cut, recipe=recipe, compute=FP32)
        return {name: weight.grad.clone() for name, weight in state.trained.items()}, sum(told)

    whole, losses = gradients([0, 1, 2])
    assert float(losses[6]) > 0
    for parts in ([[0], [1, 2]], [[0], [1], [2]]):
        found, told = gradients(*parts)
        torch.testing.assert_close(told, losses, rtol=1e-5, atol=1e-7)
        for name, gradient in found.items():
            torch.testing.assert_close(gradient, whole[name], rtol=1e-4, atol=1e-6, msg=name)


def test_windows_of_a_text_are_taken_together_inside(tiny_teacher):
    """Two texts, the first of two windows: its logits inside are the windows' mean, as the whole student's are."""
    config, teacher, tiers = tiers_of(tiny_teacher)
    shared, recipe = randomised(tiers), recipe_of(config, tiers, teacher, 2)
    pooling = torch.tensor([[0.5, 0.5, 0.0], [0.0, 0.0, 1.0]])
    whole, *inner = [pooling @ logits_of(tiers.load(tier, shared)) for tier in (2, 0, 1)]
    state = begin(tiers.student(2), tiers.part(2, shared), recipe)
    two = replace(batch(), soft=batch().soft[:2], hard=batch().hard[:2], pooling=pooling)
    [told] = set_gradients(state, [two], recipe=recipe, compute=FP32)
    p = torch.softmax(whole / 2.0, -1)
    wanted = sum(float((p * (p.log() - torch.log_softmax(one / 2.0, -1))).sum() * 4.0) for one in inner)
    assert float(told[6]) == pytest.approx(wanted, rel=1e-4)


def test_tiers_of_one_size_are_one_student(tiny_teacher):
    _, _, tiers = tiers_of(tiny_teacher, "1/1/8@0.2,1/1/8@0.2,3/0/0@0.2")
    assert tiers[0].held == tiers[1].held
    assert tiers[2].held == tiers[3].held == tiers.shapes
    assert [len(tiers.student(tier).smaller) for tier in range(4)] == [0, 0, 1, 1]  # nobody teaches its like
    _, _, same = tiers_of(tiny_teacher, "3/2/32@0.5")
    _, _, none = tiers_of(tiny_teacher, "")
    assert same.shapes == none.shapes
    assert not same.student(1).smaller


def test_the_whole_student_does_not_learn_from_those_inside_it(tiny_teacher):
    """The last layer and the head of the whole get the gradient that they get without anyone inside."""
    config, teacher, tiers = tiers_of(tiny_teacher)
    shared = randomised(tiers)
    plain_config, _, plain = tiers_of(tiny_teacher, **{"student.tier-mode": "sliced"})
    nested = trained_once(config, tiers, teacher, 2, shared)
    alone = trained_once(plain_config, plain, teacher, 2, shared)
    held_inside = ("bert.encoder.layer.0.", "bert.encoder.layer.1.")
    for name in alone.trained:
        same = torch.equal(alone.trained[name].grad, nested.trained[name].grad)
        own = not name.startswith(held_inside) or name.startswith("bert.encoder.layer.1.output.LayerNorm")
        assert same == own, name


def test_without_tiers_there_is_the_whole_student_under_its_own_names(tiny_teacher):
    _, _, tiers = tiers_of(tiny_teacher, "")
    assert len(tiers) == 1
    initial = tiers.initial()
    assert all(tiers.part(0, initial)[name] is initial[name] or np.shares_memory(
        tiers.part(0, initial)[name].numpy(), initial[name].numpy()) for name in initial)  # fmt: skip
    student = tiers.student(0)
    assert student.model is tiers[0].model
    assert student.trained == {n: p for n, p in student.model.named_parameters() if p.requires_grad}


def test_layers_keep_their_partners_in_the_teacher(tiny_teacher):
    config, teacher, tiers = tiers_of(
        tiny_teacher, **{"distill.hidden-weight": 1.0, "distill.relation-weight": 1.0, "distill.hidden-layers": "even"}
    )
    recipe = recipe_of(config, tiers, teacher, 1)
    assert recipe.hidden_pairs == ((0, 0), (1, 1))  # of the whole one's 0:0, 1:1, 2:3
    assert recipe.weights["relation"] == 0.0  # the whole compares its last layer, which this tier has not
    assert recipe.weights["hidden"] == 1.0
