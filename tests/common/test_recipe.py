"""What the keys make of a round: rates, weights, which layers and heads are compared."""

import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import BertConfig

from common.config import from_flat
from common.errors import InputError
from common.objective import _outer
from common.recipe import make_recipe, relation_heads
from common.slim import Shape
from tests.scene import RECIPE

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
