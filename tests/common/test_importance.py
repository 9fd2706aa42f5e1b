"""Importance against gates that are really there: multiplied in, differentiated example by example."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import common.importance as module
from common.families import FAMILIES, family_of, layers_of
from common.importance import chosen, importance
from common.slim import Shape, cut_student
from tests.conftest import BF16, FP32, make_teacher
from tests.scene import RECIPE, Scene, weighing


def measured(scene, recipe=RECIPE, compute=FP32, examples=None, client=7):
    return importance(
        scene.student.model, examples or scene.examples, recipe=recipe, compute=compute, seed=0, client=client
    )


def gated(scene, recipe):
    """The mean over examples of each gate's absolute gradient, with a gate of 1 on every head and neuron."""
    model, size = scene.student.model.eval(), 8
    family = family_of(model)
    gates, hooks = [], []
    for layer in layers_of(model):
        for path, width in ((family.mix, size), (family.down, 1)):
            product = layer.get_submodule(path)
            inputs = product.weight.shape[0 if family.classifier == "score" else 1]  # GPT-2's are the other way round
            gates.append(torch.ones(inputs // width, requires_grad=True))

            def close(module_, given, gate=gates[-1], width=width):
                return (given[0] * gate.repeat_interleave(width),)

            hooks.append(product.register_forward_pre_hook(close))
    totals = [torch.zeros_like(gate) for gate in gates]
    for place, row in enumerate(scene.examples.rows):
        logits = model(**scene.examples.data.tokens.batch(np.array([row]))).logits
        soft = torch.from_numpy(scene.examples.soft[place : place + 1])
        p, t = F.softmax(soft / recipe.temperature, -1), recipe.temperature
        kl = t**2 * (p * (p.log() - F.log_softmax(logits / t, -1))).sum()
        hard = F.cross_entropy(logits, torch.tensor([scene.data.labels[row]]))
        trust = F.softmax(soft, -1)[0, scene.data.labels[row]] if recipe.adaptive else 1.0
        on_soft, on_hard = recipe.weights["soft"], recipe.weights["hard"]
        loss = on_soft * trust * kl + (on_hard + on_soft * (1.0 - trust)) * hard
        for total, grad in zip(totals, torch.autograd.grad(loss, gates), strict=True):
            total.add_(grad.abs())
    for hook in hooks:
        hook.remove()
    means = [(total / len(scene.examples.rows)).numpy() for total in totals]
    return np.stack(means[0::2]), np.stack(means[1::2])


@pytest.fixture(scope="module", params=FAMILIES)
def scene(request, tmp_path_factory):
    return Scene(make_teacher(tmp_path_factory.mktemp(request.param), request.param))


@pytest.mark.parametrize(
    "recipe",
    [RECIPE, weighing(hard=0.0), replace(RECIPE, adaptive=True)],
    ids=["with labels", "soft", "adaptive"],
)
def test_importance_is_the_mean_absolute_gradient_of_a_gate_of_each_example(scene, recipe):
    found, expected = measured(scene, recipe), gated(scene, recipe)
    width = layers_of(scene.teacher)[0].get_submodule(family_of(scene.teacher).down).weight.numel() // 16
    assert [part.shape for part in found] == [(2, 2), (2, width)]
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.dtype == np.float32
        np.testing.assert_allclose(ours, theirs, rtol=2e-4, atol=1e-9)
        assert ours.min() >= 0 < ours.max()


def test_absolute_values_are_taken_before_examples_are_added(scene):
    """Else examples that pull a gate in opposite directions would cancel: two groups, and their mean."""
    rows = scene.rows
    parts = [measured(scene, examples=scene.of(scene.data, part)) for part in (rows[:10], rows[10:])]
    both = measured(scene)
    for whole, first, second in zip(both, *parts, strict=True):
        np.testing.assert_allclose(whole, (10 * first + 22 * second) / 32, rtol=1e-4, atol=1e-9)


def test_a_head_that_nothing_reads_does_not_matter(tiny_teacher):
    scene = Scene(tiny_teacher)
    layer = scene.student.model.bert.encoder.layer[1]
    with torch.no_grad():
        layer.attention.output.dense.weight[:, 8:] = 0.0
        layer.output.dense.weight[:, [3, 30]] = 0.0
    heads, neurons = measured(scene)
    assert (heads == 0).tolist() == [[False, False], [False, True]]
    assert np.flatnonzero(neurons[1] == 0).tolist() == [3, 30]


def test_measuring_is_repeatable_and_changes_nothing(scene):
    model = scene.student.model
    flags = [parameter.requires_grad for parameter in model.parameters()]
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    first, again = measured(scene), measured(scene)
    for a, b in zip(first, again, strict=True):
        assert a.tobytes() == b.tobytes()
    assert flags == [parameter.requires_grad for parameter in model.parameters()]
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(module_._forward_pre_hooks for module_ in model.modules())


def test_the_whole_model_may_be_frozen(scene):
    expected = measured(scene)
    scene.student.model.requires_grad_(False)
    try:
        found = measured(scene)
    finally:
        scene.take(scene.student.model)
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-9)


def test_a_narrow_student_is_measured_by_the_heads_that_it_has(tiny_teacher):
    scene = Scene(tiny_teacher)
    shape = replace(Shape.whole(scene.teacher.config, (0, 3)), heads=((1,), (0,)), neurons=((4, 9, 1), (0, 2, 7)))
    scene.take(cut_student(scene.teacher, shape))
    found = measured(scene)
    assert [part.shape for part in found] == [(2, 1), (2, 3)]
    for ours, theirs in zip(found, gated(scene, RECIPE), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=2e-4, atol=1e-9)


def test_half_precision_finds_nearly_the_same(tiny_teacher):
    scene = Scene(tiny_teacher)
    for exact, rough in zip(measured(scene), measured(scene, compute=BF16), strict=True):
        assert np.corrcoef(exact.ravel(), rough.ravel())[0, 1] > 0.98


def test_of_many_examples_some_are_looked_at_chosen_by_seed_and_client(scene, monkeypatch):
    monkeypatch.setattr(module, "MOST", 8)
    few = chosen(32, 0, 7)
    assert len(set(few.tolist())) == 8
    assert few.tolist() == sorted(few) == chosen(32, 0, 7).tolist()
    assert chosen(5, 0, 7).tolist() == [0, 1, 2, 3, 4]
    assert len({tuple(chosen(32, seed, client)) for seed, client in ((0, 7), (1, 7), (0, 8))}) == 3
    limited = measured(scene)
    monkeypatch.setattr(module, "MOST", 256)
    alone = measured(scene, examples=scene.of(scene.data, scene.rows[few]))
    for a, b in zip(limited, alone, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-9)
