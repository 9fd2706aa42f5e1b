"""A worker whose clients' presence is hidden: each update clipped as a whole, of weight 1, and said to be or not."""

import numpy as np
import pytest

import clients.worker as module
from clients.worker import Worker
from common.clipping import BELOW
from common.fixed_point import SCALE
from common.store import cache_folder
from common.wire import NOT_FINITE, Instruction, own_update
from tests.conftest import make_dataset, make_needs, make_reviews, make_teacher

CLIENTS = (0, 1, 2, 3)


@pytest.fixture(scope="module")
def make_worker(tmp_path_factory):
    source = make_reviews(tmp_path_factory.mktemp("reviews") / "reviews.csv", 120)
    teacher = make_teacher(tmp_path_factory.mktemp("teacher"))

    def make(**keys):
        given = {"data__clients": len(CLIENTS), "data__holdout_fraction": 0.3, "student__layers": 2, "rounds": 3}
        config, data = make_dataset(source, teacher, cache_folder(), **{**given, **keys})
        worker = Worker(config, **make_needs(teacher, data, (0, 3)))
        trained = worker.students[0].trained  # each client trains in the same place
        return worker, {name: part.detach().numpy().copy() for name, part in trained.items()}

    return make


def answer(made, clip_norm=0.0, clients=CLIENTS):
    worker, arrays = made
    asked = Instruction("0" * 16, 1, "", clients, (0,) * len(clients), *[""] * 5, clip_norm=clip_norm)
    return worker.train(arrays, asked, lambda count: None)


def own(made, clients=CLIENTS):
    """Each client's update as it was trained, in one row, float64."""
    groups, _ = answer(made, clients=clients)
    return [np.concatenate([np.float64(p).reshape(-1) for p in groups[own_update(c)].values()]) for c in clients]


def test_the_sum_is_that_of_a_loop_that_clips_each_client(make_worker):
    loose = own(make_worker(server__packing="off"))
    bound = float(np.median([np.linalg.norm(update) for update in loose]))
    made = make_worker(privacy__unit="client", privacy__adaptive_clip=0.5)
    groups, lines = answer(made, bound)
    worker, total = made[0], groups["update"]
    expected = sum(update * min(1.0, bound / np.linalg.norm(update)) for update in loose)
    found = np.concatenate([total[name].reshape(-1) for name in sorted(worker.shapes)]) / SCALE
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)
    above = sum(np.linalg.norm(update) > bound for update in loose)
    assert 0 < above < len(CLIENTS)
    assert total[BELOW].tolist() == [int((len(CLIENTS) / 2 - above) * SCALE)]
    assert [line.examples for line in lines] == worker.data.train_sizes[list(CLIENTS)].tolist()


def test_an_update_that_travels_by_itself_is_clipped_too(make_worker):
    groups, _ = answer(make_worker(privacy__unit="client", server__packing="off"), 0.01)
    for client in CLIENTS:
        square = sum(np.square(np.float64(part)).sum() for part in groups[own_update(client)].values())
        assert 0.0099 < np.sqrt(square) <= 0.01


def test_a_client_that_diverges_adds_nothing_and_one_without_a_bound_neither(make_worker, monkeypatch):
    made = make_worker(privacy__unit="client")
    expected, _ = answer(made, 0.5, (0, 1, 3))
    honest = module.distil

    def diverges(student, weights, examples, **given):
        update = honest(student, weights, examples, **given)
        if given["who"][1] == 2:
            next(iter(update.arrays.values())).reshape(-1)[0] = np.nan
        return update

    monkeypatch.setattr(module, "distil", diverges)
    groups, lines = answer(made, 0.5)
    assert {line.client: line.problem for line in lines if line.problem} == {2: NOT_FINITE}
    for name, total in groups["update"].items():
        assert total.tolist() == expected["update"][name].tolist()
    groups, lines = answer(made, 0.0)
    assert all(line.problem for line in lines)
    assert not any(total.any() for total in groups["update"].values())


def test_a_client_scores_no_more_examples_than_its_counts_may_hold(make_worker):
    worker, _ = make_worker(privacy__unit="client", privacy__scores_share=0.5, privacy__scores_examples=3)
    groups, lines = worker.evaluate({}, Instruction("0" * 16, 1, "", CLIENTS, (0,) * 4, *[""] * 5), lambda count: None)
    assert [line.examples for line in lines] == [min(int(n), 3) for n in worker.data.heldout_sizes[list(CLIENTS)]]
    assert groups["student"]["statistics"].sum() == sum(line.examples for line in lines)
