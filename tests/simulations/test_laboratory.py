"""The laboratory trains what a run trains: beside a loop of one distillation after the other, written here."""

import numpy as np
import pytest
import torch

from clients.distillation import distil
from common.config import from_flat
from common.dataset import open_dataset
from common.errors import InputError
from common.fixed_point import ExactSum, mean
from common.inference import predict
from common.models import load_teacher
from common.objective import Examples
from common.progress import Silent
from common.recipe import make_recipe
from common.store import cache_folder
from simulations.laboratory import Laboratory
from tests.conftest import FP32, make_reviews

ROUNDS = 2


@pytest.fixture(scope="module")
def config(tiny_teacher, tmp_path_factory):
    source = make_reviews(tmp_path_factory.mktemp("data") / "reviews.csv")
    return from_flat(
        {
            "task": "text", "data.source": str(source), "data.clients": 3, "data.max-length": 64, "data.alpha": 10.0,
            "teacher.model": str(tiny_teacher), "student.layers": 2, "rounds": ROUNDS, "client.lr": 0.01,
            "client.precision": "fp32", "server.packing": "off",
        }
    )  # fmt: skip


@pytest.fixture(scope="module")
def lab(config):
    return Laboratory(config, Silent())


def by_hand(lab, rows_of):
    """FedAvg: each client distils from the same weights, the updates are added up with their examples as weights."""
    config, federation = lab.config, lab.federation
    data, compute = open_dataset(cache_folder(), federation.data.key), FP32
    teacher, weights = load_teacher(federation.teacher.folder), dict(lab.start)
    for number in range(1, ROUNDS + 1):
        recipe = make_recipe(config, number, federation.pupil.shape, teacher.config, regression=False)
        total = ExactSum({name: array.shape for name, array in weights.items()})
        count = 0
        for client, rows in rows_of.items():
            examples = Examples(data.train, rows, predict(teacher, data.train.tokens, rows, compute))
            start = {name: torch.from_numpy(array.copy()) for name, array in weights.items()}
            update = distil(
                federation.tiers.student(0), start, examples, recipe=recipe, compute=compute, seed=config.seed,
                who=(number, client), teacher=teacher,
            )  # fmt: skip
            total.add(update.arrays, len(rows))
            count += len(rows)
        weights = {name: (weights[name] + mean(total.totals[name], count)).astype(np.float32) for name in weights}
    return weights


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, array in found.items():
        np.testing.assert_array_equal(array, expected[name])


def test_it_gives_the_weights_of_a_loop_over_clients(lab):
    rows = {int(client): lab.data.shard(int(client)).train for client in lab.data.eligible}
    assert_same(lab.train(), by_hand(lab, rows))


def test_clients_train_on_the_rows_that_they_are_given_and_a_second_student_begins_where_the_first_did(lab):
    rows = {int(client): lab.data.shard(int(client)).train[::2] for client in lab.data.eligible}
    lab.logits(lab.train(), lab.data.shard(0).heldout)  # puts other weights into the module
    assert_same(lab.train(rows), by_hand(lab, rows))


def test_without_rows_a_client_stays_away(lab):
    rows = {int(client): lab.data.shard(int(client)).train for client in lab.data.eligible}
    missing = {**rows, 1: np.zeros(0, dtype=np.int64)}
    del rows[1]
    assert_same(lab.train(missing), by_hand(lab, rows))


def test_each_clients_update_can_be_watched(lab):
    seen = {}

    def watch(number, before, intake):
        after = {name: before[name] + intake.update()[name].astype(np.float32) for name in before}
        seen[number] = sorted(intake.kept), before, after

    weights = lab.train(watch=watch)
    assert [seen[number][0] for number in (1, 2)] == [[0, 1, 2]] * 2
    assert_same(seen[1][1], lab.start)
    for name, array in weights.items():
        np.testing.assert_allclose(seen[2][2][name], array, atol=1e-6)


@pytest.mark.parametrize(
    ("keys", "told"),
    [
        ({"server.strategy": "feddf"}, r"server\.strategy = 'feddf': .* give server\.strategy = 'fedavg'"),
        ({"server.strategy": "fedkd"}, r"server\.strategy = 'fedkd': .* give server\.strategy = 'fedavg'"),
        ({"distill.general-rounds": 1}, r"distill\.general-rounds = 1: .* give 0"),
        ({"client.grow-batch": True, "client.lr-decay": "constant"}, r"client\.grow-batch = true: .* give false"),
    ],
)
def test_a_run_whose_rounds_it_does_not_make_is_refused(config, keys, told):
    other = from_flat({**config.flat(), "server.packing": "auto", "server.wire": "auto", **keys})
    with pytest.raises(InputError, match=told):
        Laboratory(other, Silent())


@pytest.mark.parametrize("strategy", ["fedmd", "ds-fl"])
def test_where_no_weights_travel_nothing_is_trained(config, strategy):
    votes = Laboratory(from_flat({**config.flat(), "server.packing": "auto", "server.strategy": strategy}), Silent())
    with pytest.raises(InputError, match=rf"server\.strategy = '{strategy}': no weights travel"):
        votes.train()
