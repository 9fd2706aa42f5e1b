"""DP-SGD: clipped per example, one draw of noise a lot, lots that nobody can foresee."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from clients.private_steps import Lots, PrivateSteps, _noted, clipped_sum
from common.distillation import begin, learn
from common.objective import batch_of, each_loss, parts_of
from common.slim import Shape, cut_student
from tests.conftest import FP32, make_teacher, stir
from tests.scene import RECIPE, WHO, Scene, weighing

FAMILIES = ["bert", "distilbert", "roberta", "electra", "gpt2"]
SHORT = np.arange(12)


@pytest.fixture(scope="module")
def scene(tmp_path_factory):
    return Scene(make_teacher(tmp_path_factory.mktemp("t")))


def narrow(scene):
    """The scene with a student that has lost heads and neurons."""
    config = scene.teacher.config
    whole = Shape.whole(config, (0, 3))
    scene.take(cut_student(scene.teacher, replace(whole, heads=((1,), (0,)), neurons=(tuple(range(0, 32, 3)),) * 2)))
    return scene


def stirred(scene):
    """The scene with a student that is far from its teacher."""
    stir(scene.student.model)
    scene.weights = {name: weight.detach().clone() for name, weight in scene.student.trained.items()}
    return scene


def loop(scene, recipe, clip_norm, places=SHORT):
    """The same from one gradient after the other, in float64."""
    weights = list(scene.student.trained.values())
    total, norms = [torch.zeros_like(weight, dtype=torch.float64) for weight in weights], []
    for place in places:
        batch = batch_of(scene.examples, np.array([place]), recipe, FP32)
        found = parts_of(scene.student.model, batch, recipe, FP32)
        loss = each_loss(found["soft"], found["hard"], batch, recipe, recipe.weights).sum()
        grads = [grad.double() for grad in torch.autograd.grad(loss, weights)]
        norms.append(float(torch.cat([grad.flatten() for grad in grads]).norm()))
        for whole, grad in zip(total, grads, strict=True):
            whole.add_(grad * min(1.0, clip_norm / norms[-1]))
    return total, norms


def clipped(scene, recipe, clip_norm, places=SHORT):
    begin(scene.student, scene.weights, recipe)
    weights = list(scene.student.trained.values())
    batch = batch_of(scene.examples, places, recipe, FP32)
    return clipped_sum(scene.student.model, weights, batch, recipe=recipe, compute=FP32, clip_norm=clip_norm)


def off(found, wanted):
    """How far apart, as a share."""
    a, b = (torch.cat([part.flatten().double() for part in parts]) for parts in (found, wanted))
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("family", FAMILIES)
def test_the_clipped_sum_is_that_of_a_loop_over_examples(tmp_path, family):
    scene = stirred(narrow(Scene(make_teacher(tmp_path, family))))
    begin(scene.student, scene.weights, RECIPE)
    _, norms = loop(scene, RECIPE, 1.0)
    clip_norm = float(np.median(norms))  # half of them are clipped
    wanted, _ = loop(scene, RECIPE, clip_norm)
    assert off(clipped(scene, RECIPE, clip_norm), wanted) < 1e-6


@pytest.mark.parametrize(
    "labels, recipe",
    [
        (2, replace(RECIPE, adaptive=True)), (2, weighing(hard=0.0)), (1, replace(RECIPE, regression=True)),
        (3, replace(RECIPE, temperature=5.0)),
    ],
)  # fmt: skip
def test_every_loss_on_outputs_is_clipped_by_its_own_example(tmp_path, labels, recipe):
    scene = stirred(Scene(make_teacher(tmp_path, labels=labels), labels=labels))
    begin(scene.student, scene.weights, recipe)
    _, norms = loop(scene, recipe, 1.0)
    clip_norm = float(np.median(norms))
    assert off(clipped(scene, recipe, clip_norm), loop(scene, recipe, clip_norm)[0]) < 1e-6


def test_no_example_moves_the_sum_by_more_than_the_norm(scene):
    for place in SHORT:
        one = clipped(scene, RECIPE, 0.01, np.array([place]))
        assert float(torch.cat([part.flatten() for part in one]).double().norm()) <= 0.01 * (1 + 1e-5)


def test_an_example_whose_gradient_is_not_finite_counts_as_zero_and_spoils_no_other(scene):
    soft = scene.examples.soft.copy()
    soft[SHORT[3]] = np.nan
    spoilt = replace(scene.examples, soft=soft)
    begin(scene.student, scene.weights, RECIPE)
    weights = list(scene.student.trained.values())
    batch = batch_of(spoilt, SHORT, RECIPE, FP32)
    found = clipped_sum(scene.student.model, weights, batch, recipe=RECIPE, compute=FP32, clip_norm=1.0)
    assert off(found, loop(scene, RECIPE, 1.0, np.delete(SHORT, 3))[0]) < 1e-6
    alone = batch_of(spoilt, SHORT[3:4], RECIPE, FP32)
    found = clipped_sum(scene.student.model, weights, alone, recipe=RECIPE, compute=FP32, clip_norm=1.0)
    assert not any(part.any() for part in found)


@pytest.mark.parametrize("shared", [False, True], ids=["module", "weight"])
def test_a_weight_that_is_used_twice_is_refused(shared):
    """Its examples' gradients have no norm before both uses are added up."""
    first, second = torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)
    if shared:
        second.weight = first.weight
    model = torch.nn.Sequential(first, second if shared else first)
    with pytest.raises(ValueError, match="a weight of a Linear is used twice"), _noted(model):
        model(torch.zeros(2, 3, 4))
    assert not first._forward_hooks and not second._forward_hooks


def test_a_lot_in_parts_is_the_lot_and_gets_its_noise_once(scene):
    def gradients(budget):
        recipe = replace(RECIPE, micro_budget=budget)
        steps = PrivateSteps(Lots(12, 32), noise=1.0, clip_norm=0.5, rng=np.random.default_rng(3))
        state = begin(scene.student, scene.weights, recipe)
        places = SHORT[np.argsort(scene.data.tokens.lengths(scene.rows)[SHORT], kind="stable")]
        parts = [batch_of(scene.examples, part, recipe, FP32) for part in np.array_split(places, budget)]
        steps.set_gradients(state, parts, recipe=recipe, compute=FP32)
        return [weight.grad.clone() for weight in state.trained.values()]

    assert off(gradients(1), gradients(5)) < 1e-6


@pytest.mark.parametrize("noise, clip_norm", [(1.3, 0.5), (0.4, 2.0)])
def test_the_noise_is_as_wide_as_calibrated_and_an_empty_lot_is_noise_alone(scene, noise, clip_norm):
    steps = PrivateSteps(Lots(8, 32), noise=noise, clip_norm=clip_norm)
    state, drawn = begin(scene.student, scene.weights, RECIPE), []
    for _ in range(20):
        steps.set_gradients(state, [], recipe=RECIPE, compute=FP32)
        drawn.append(torch.cat([weight.grad.flatten().clone() for weight in state.trained.values()]))
    found = torch.stack(drawn) * 8  # the expected lot
    assert found.numel() > 50_000
    assert float(found.std()) == pytest.approx(noise * clip_norm, rel=0.02)
    assert abs(float(found.mean())) < 0.02 * noise * clip_norm
    # and not the same again
    assert abs(float(torch.corrcoef(found[:2])[0, 1])) < 0.1


def test_an_example_is_in_a_lot_by_itself_with_the_rate():
    steps = PrivateSteps(Lots(10, 40), noise=1.0, clip_norm=1.0, rng=np.random.default_rng(0))
    lengths = np.arange(40)[::-1].copy()
    lots = [lot for _, lot in steps.lots(lengths, 500)]
    assert len(lots) == 500 * 4
    held = np.zeros((len(lots), 40))
    for row, lot in enumerate(lots):
        held[row, lot] = 1
        assert (np.diff(lengths[lot]) >= 0).all()  # the shortest first
    assert np.abs(held.mean(axis=0) - 0.25).max() < 0.05
    sizes = held.sum(axis=1)  # binomial: mean 10, variance 40 * 0.25 * 0.75
    assert sizes.mean() == pytest.approx(10, abs=0.3)
    assert sizes.var() == pytest.approx(7.5, rel=0.15)
    assert np.abs(np.corrcoef(held.T) - np.eye(40)).max() < 0.12


def test_a_client_smaller_than_a_lot_is_whole_in_each():
    lots = Lots(64, 40)
    assert (lots.rate, lots.steps) == (1.0, 1)
    steps = PrivateSteps(lots, noise=1.5, clip_norm=1.0)
    assert [len(lot) for _, lot in steps.lots(np.ones(40), 2)] == [40, 40]
    assert steps.spending(3) == (1.5, 1.0, 3)


@pytest.mark.parametrize("sgd", [False, True])
def test_without_noise_and_a_clip_that_is_never_reached_it_is_plain_training_on_whole_batches(scene, sgd):
    recipe = replace(RECIPE, clip_norm=0.0, token_budget=10**6, sgd=sgd, epochs=3)
    steps = PrivateSteps(Lots(len(scene.rows), len(scene.rows)), noise=0.0, clip_norm=1e6)
    way = {"recipe": recipe, "compute": FP32, "seed": 0, "who": WHO}
    learn(scene.student, scene.weights, scene.examples, private=steps, **way)
    private = [weight.detach().clone() for weight in scene.student.trained.values()]
    learn(scene.student, scene.weights, scene.examples, **way)
    assert off(private, [weight.detach() for weight in scene.student.trained.values()]) < 1e-4
    assert (steps.done, steps.seen) == (3, 3 * len(scene.rows))


def test_the_run_s_seed_does_not_give_the_noise_again_and_nothing_is_told_of_the_loss(scene):
    def learnt():
        steps = PrivateSteps(Lots(8, 32), noise=1.0, clip_norm=1.0)
        state = learn(
            scene.student, scene.weights, scene.examples, recipe=RECIPE, compute=FP32, seed=0, who=WHO, private=steps
        )
        assert not state.totals.any()
        return [weight.detach().clone() for weight in scene.student.trained.values()]

    assert off(learnt(), learnt()) > 1e-4


def test_the_student_is_left_as_it_was(scene):
    clipped(scene, RECIPE, 1.0)
    for module in scene.student.model.modules():
        assert not module._forward_hooks and not module._backward_hooks
    for weight in scene.student.model.parameters():
        assert not vars(weight) and weight.grad is None
