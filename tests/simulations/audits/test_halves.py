"""Who is a member."""

from types import SimpleNamespace

import numpy as np
import pytest

from common.errors import InputError
from common.partition import Shard
from common.texts import Texts
from simulations.audits.halves import draw_halves

ROWS, MODELS = 600, 40
WORDS = [f"text {row % 500}" for row in range(ROWS)]  # the last hundred say again what the first did
WORDS[599] = "  TEXT  99 "


def data(labels=None, **task):
    shards = [Shard(np.arange(0, 290), np.arange(290, 300)), Shard(np.arange(300, 590), np.arange(590, 600))]
    return SimpleNamespace(
        task=SimpleNamespace(**{"name": "text", "regression": False, "multi_label": False, **task}),
        eligible=np.array([0, 1]),
        shard=lambda client: shards[client],
        train=SimpleNamespace(
            texts=(Texts.of(WORDS),), labels=np.zeros(ROWS, dtype=np.int64) if labels is None else labels
        ),
    )


def test_an_example_is_in_about_half_of_the_models_and_each_draws_for_itself():
    halves = draw_halves(data(), MODELS, 0, seed=0)
    share = halves.inside.mean()
    assert abs(share - 0.5) < 4 * 0.5 / np.sqrt(500 * MODELS)
    # fair coins: of 40 models an example is in 20 on average, with a variance of 10, not in 20 always
    assert 8 < halves.inside.sum(axis=0).var() < 12
    assert (draw_halves(data(), MODELS + 3, 0, seed=0).inside[:MODELS] == halves.inside).all()


def test_equal_texts_are_on_one_side_whoever_owns_them():
    halves = draw_halves(data(), MODELS, 0, seed=0)
    place = {int(row): number for number, row in enumerate(halves.rows)}
    for row in range(500, 590):
        assert (halves.inside[:, place[row]] == halves.inside[:, place[row - 500]]).all()


def test_each_client_trains_on_its_members_and_on_what_is_not_attacked():
    halves = draw_halves(data(), MODELS, 150, seed=0)
    assert 90 < len(halves.rows) < 220
    for model in (0, 7):
        trained = halves.trained(model)
        for client, rows in ((0, range(290)), (1, range(300, 590))):
            outside = set(halves.rows[(halves.owner == client) & ~halves.inside[model]].tolist())
            assert set(trained[client].tolist()) == set(rows) - outside
            assert len(trained[client]) == len(rows) - len(outside)
    assert halves.population.tolist() == [*range(290, 300), *range(590, 600)]


def test_examples_without_a_label_are_trained_on_and_not_attacked():
    labels = np.arange(ROWS) % 3 - 1
    halves = draw_halves(data(labels), MODELS, 0, seed=0)
    assert (labels[halves.rows] >= 0).all() and (labels[halves.population] >= 0).all()
    assert len(halves.rows) == (labels[np.r_[0:290, 300:590]] >= 0).sum() and len(halves.population)
    for client, rows in ((0, range(290)), (1, range(300, 590))):
        assert {row for row in rows if labels[row] < 0} <= set(halves.trained(3)[client].tolist())


@pytest.mark.parametrize("task", [{"regression": True}, {"multi_label": True}])
def test_a_task_whose_examples_have_no_class_each_is_refused(task):
    with pytest.raises(InputError, match="task = 'text': membership attacks need one class"):
        draw_halves(data(**task), MODELS, 0, seed=0)
