"""A worker's sums are the sums of its clients, whoever shares the process with whom; a failing client is left out."""

from dataclasses import replace
from itertools import permutations

import numpy as np
import pytest
import torch

import clients.worker as module
from clients.distillation import distil
from clients.worker import ClientRefused, Worker
from common.compression import decompress, wire_for
from common.fixed_point import ExactSum, Rows
from common.hashing import hash_tensors
from common.inference import predict
from common.metrics import scores, tally
from common.models import load_teacher
from common.objective import Examples
from common.recipe import make_recipe
from common.store import cache_folder
from common.wire import NOT_FINITE, Instruction, own_update
from tests.conftest import FP32, make_dataset, make_needs, make_reviews, make_sentences, make_teacher, make_tokens

CLIENTS = (0, 1, 2, 3, 4, 5)
RUN = "0123456789abcdef"


@pytest.fixture(scope="module")
def reviews(tmp_path_factory):
    return make_reviews(tmp_path_factory.mktemp("reviews") / "reviews.csv", 240)


@pytest.fixture(scope="module")
def balanced(tmp_path_factory):
    """A tiny random teacher that says yes as often as no."""
    folder = make_teacher(tmp_path_factory.mktemp("balanced"))
    model = load_teacher(folder)
    logits = predict(model, make_tokens(folder, make_sentences(100, seed=1)), np.arange(100), FP32)
    model.classifier.bias -= torch.from_numpy(np.median(logits, axis=0))
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def make_worker(reviews, balanced):
    def make(teacher=balanced, **keys):
        given = {"data__clients": len(CLIENTS), "data__holdout_fraction": 0.3, "student__layers": 2, "rounds": 3}
        config, data = make_dataset(reviews, teacher, cache_folder(), **{**given, **keys})
        return Worker(config, **make_needs(teacher, data, (0, 3)))

    return make


@pytest.fixture(scope="module")
def worker(make_worker):
    return make_worker()


def arrays_of(worker, noise=0.05):
    """The student's arrays as they travel, a little away from the teacher's."""
    rng = np.random.default_rng(0)
    return {
        name: (parameter.detach().numpy() + noise * rng.normal(size=parameter.shape)).astype(np.float32)
        for name, parameter in worker.students[0].trained.items()
    }


@pytest.fixture(scope="module")
def arrays(worker):
    """Of a student that says yes as often as no."""
    found = arrays_of(worker)
    for name, parameter in worker.students[0].trained.items():
        parameter.data.copy_(torch.from_numpy(found[name]))
    logits = predict(
        worker.students[0].model, worker.data.train.tokens, np.arange(len(worker.data.train)), worker.compute
    )
    found["classifier.bias"] -= np.median(logits, axis=0)
    return found


def instruction(clients, number=1, feedback=None, run=RUN):
    return Instruction(run, number, "", tuple(clients), tuple(feedback or (0 for _ in clients)), *[""] * 5)


def nobody(count):
    return None


def whole(worker, groups):
    """A packed group with every array whole, as bytes by name."""
    return {
        name: (array.dense(worker.shapes[name]) if isinstance(array, Rows) else array).tobytes()
        for name, array in groups["update"].items()
    }


def problems(lines):
    return {line.client: line.problem for line in lines if line.problem}


# --- scoring ------------------------------------------------------------------------------------


def scored(worker, arrays, clients):
    groups, lines = worker.evaluate(arrays, instruction(clients), nobody)
    return groups["student"]["statistics"], groups["teacher"]["statistics"], lines


def test_statistics_are_those_of_all_held_out_predictions_together(worker, arrays):
    student, teacher, lines = scored(worker, arrays, CLIENTS)
    rows = np.concatenate([worker.data.shard(client).heldout for client in CLIENTS])
    labels = worker.data.train.labels[rows]
    for model, statistics in ((worker.students[0].model, student), (worker.teacher, teacher)):
        logits = predict(model, worker.data.train.tokens, rows, worker.compute)
        assert statistics.tolist() == tally(worker.spec, logits, labels).tolist()
        assert scores(worker.spec, statistics)["n"] == len(rows) > 40
        assert statistics.min() > 0  # both classes are there, and are predicted
    assert (student != teacher).any()
    assert [line.client for line in lines] == list(CLIENTS)
    assert [line.examples for line in lines] == worker.data.heldout_sizes[list(CLIENTS)].tolist()
    assert problems(lines) == {}


@pytest.mark.parametrize("at_once", [1, 20, 256])
def test_clients_in_any_grouping_and_order_have_the_same_statistics(worker, arrays, monkeypatch, at_once):
    expected = scored(worker, arrays, CLIENTS)
    alone = {client: scored(worker, arrays, [client]) for client in CLIENTS}
    monkeypatch.setattr(module, "AT_ONCE", at_once)
    for order in ([5, 4, 3, 2, 1, 0], [2, 0, 5, 1, 4, 3]):
        for cut in (1, 3, 6):
            parts = [scored(worker, arrays, part) for part in (order[:cut], order[cut:]) if part]
            for which in (0, 1):
                assert sum(part[which] for part in parts).tolist() == expected[which].tolist()
            for line in (line for part in parts for line in part[2]):
                own = alone[line.client][2][0]
                assert replace(line, seconds=0) == replace(own, seconds=0)
    for which in (0, 1):
        assert sum(one[which] for one in alone.values()).tolist() == expected[which].tolist()


@pytest.mark.parametrize(("at_once", "told"), [(1, [1] * 6), (25, [3, 3]), (256, [6])])
def test_clients_are_scored_together_up_to_a_number_of_examples(worker, arrays, monkeypatch, at_once, told):
    """Small shards alone would fill no batch, and all shards at once would fill the memory."""
    sizes = dict.fromkeys(CLIENTS, 10)
    monkeypatch.setattr(module, "AT_ONCE", at_once)
    assert [len(chunk) for chunk in worker._together(CLIENTS, sizes.__getitem__)] == told
    done = []
    worker.evaluate(arrays, instruction(CLIENTS), done.append)
    assert sum(done) == len(CLIENTS)
    assert (len(done) > 1) == (at_once < 256)


def test_a_client_without_held_out_examples_scores_nothing(make_worker):
    worker = make_worker(data__holdout_fraction=0.0)
    student, teacher, lines = scored(worker, arrays_of(worker), CLIENTS)
    assert not student.any()
    assert not teacher.any()
    assert all((line.examples, line.score, line.problem) == (0, None, "") for line in lines)


@pytest.mark.parametrize("bad", CLIENTS)
def test_a_client_that_cannot_be_scored_leaves_the_others(worker, arrays, monkeypatch, bad):
    others = [client for client in CLIENTS if client != bad]
    expected = scored(worker, arrays, others)
    honest, rows = module.held_out_statistics, worker.data.shard(bad).heldout.tolist()

    def fails(spec, data, own, logits):
        if own.tolist() == rows:
            raise RuntimeError("patient Smith has a cough")
        return honest(spec, data, own, logits)

    monkeypatch.setattr(module, "held_out_statistics", fails)
    done = []
    groups, lines = worker.evaluate(arrays, instruction(CLIENTS), done.append)
    assert groups["student"]["statistics"].tolist() == expected[0].tolist()
    assert groups["teacher"]["statistics"].tolist() == expected[1].tolist()
    assert problems(lines) == {bad: "RuntimeError"}
    assert [line.client for line in lines] == list(CLIENTS)
    assert sum(done) == len(CLIENTS)


# --- training -----------------------------------------------------------------------------------


def test_a_packed_sum_is_the_sum_of_its_clients_in_any_grouping(worker, arrays):
    alone = {client: worker.train(arrays, instruction([client]), nobody) for client in CLIENTS}
    together, lines = worker.train(arrays, instruction([4, 1, 0, 5, 3, 2]), nobody)
    assert list(together) == ["update"]
    for name, total in together["update"].items():
        assert total.tolist() == sum(groups["update"][name] for groups, _ in alone.values()).tolist()
        assert total.dtype == np.int64
    assert [line.client for line in lines] == [4, 1, 0, 5, 3, 2]
    for line in lines:
        assert replace(line, seconds=0) == replace(alone[line.client][1][0], seconds=0)
        assert line.examples == worker.data.train_sizes[line.client]
        assert line.loss == pytest.approx(0.7 * line.soft_loss + 0.3 * line.hard_loss)
    for order in list(permutations((0, 2, 4)))[1:]:
        found, _ = worker.train(arrays, instruction(order), nobody)
        first, _ = worker.train(arrays, instruction((0, 2, 4)), nobody)
        assert whole(worker, found) == whole(worker, first)


def bare_updates(worker, arrays, number):
    """What each client learns, without the worker's way of adding up."""
    weights = {name: torch.from_numpy(array.copy()) for name, array in arrays.items()}
    recipe = make_recipe(worker.config, number, worker.pupil.shape, worker.teacher.config, worker.data.task.regression)
    found = {}
    for client in CLIENTS:
        rows = worker.data.shard(client).train
        examples = Examples(
            worker.data.train, rows, predict(worker.teacher, worker.data.train.tokens, rows, worker.compute)
        )
        update = distil(
            worker.students[0], weights, examples, recipe=recipe, compute=worker.compute, seed=worker.config.seed,
            who=(number, client), teacher=worker.teacher,
        )  # fmt: skip
        found[client] = {
            name: array.dense(worker.shapes[name]) if isinstance(array, Rows) else array.copy()
            for name, array in update.arrays.items()
        }
    return found


@pytest.mark.parametrize("embeddings", [False, True], ids=["", "with embeddings"])
def test_packed_or_each_on_its_own_the_updates_are_what_each_client_has_learnt(make_worker, embeddings):
    packed = make_worker(student__train_embeddings=embeddings)
    single = make_worker(student__train_embeddings=embeddings, server__packing="off")
    arrays = arrays_of(packed)
    expected, total = bare_updates(packed, arrays, 2), ExactSum(packed.shapes)
    for client in CLIENTS:
        total.add(expected[client], int(packed.data.train_sizes[client]))
    groups, lines = packed.train(arrays, instruction(CLIENTS, 2), nobody)
    assert whole(packed, groups) == {name: array.tobytes() for name, array in total.totals.items()}
    assert any(isinstance(array, Rows) for array in groups["update"].values()) == embeddings
    groups, others = single.train(arrays, instruction(CLIENTS, 2), nobody)
    assert set(groups) == {own_update(client) for client in CLIENTS}
    wire = wire_for(single.config.server, 2, 3)
    for client in CLIENTS:
        found = decompress(groups[own_update(client)], single.shapes, wire)
        assert {name: array.tobytes() for name, array in found.items()} == {
            name: array.tobytes() for name, array in expected[client].items()
        }
    assert [replace(line, seconds=0) for line in lines] == [replace(line, seconds=0) for line in others]


def test_a_round_starts_from_the_arrays_of_the_message_whatever_was_done_before(worker, arrays):
    first, _ = worker.train(arrays, instruction([3]), nobody)
    before = {name: array.copy() for name, array in arrays.items()}
    worker.train({name: array + 1 for name, array in arrays.items()}, instruction([1, 2], 2), nobody)
    scored(worker, arrays, [0])
    again, _ = worker.train(arrays, instruction([3]), nobody)
    assert whole(worker, again) == whole(worker, first)
    assert all((arrays[name] == before[name]).all() for name in arrays)


def test_arrays_that_may_not_be_written_to_are_enough(worker, arrays):
    """They lie in the message."""
    frozen = {name: np.frombuffer(array.tobytes(), np.float32).reshape(array.shape) for name, array in arrays.items()}
    assert not any(array.flags.writeable for array in frozen.values())
    expected, _ = worker.train(arrays, instruction([3]), nobody)
    found, _ = worker.train(frozen, instruction([3]), nobody)
    assert whole(worker, found) == whole(worker, expected)
    assert scored(worker, frozen, CLIENTS)[0].tolist() == scored(worker, arrays, CLIENTS)[0].tolist()


@pytest.mark.parametrize("packing", ["on", "off"])
@pytest.mark.parametrize("bad", [0, 3, 5])
def test_a_client_that_cannot_be_trained_leaves_the_others(make_worker, monkeypatch, packing, bad):
    worker = make_worker(server__packing=packing)
    arrays, others = arrays_of(worker), [client for client in CLIENTS if client != bad]
    expected, _ = worker.train(arrays, instruction(others), nobody)
    honest, done = module.distil, []

    def fails(student, weights, examples, **given):
        if given["who"][1] == bad:
            raise RuntimeError("patient Smith has a cough")
        return honest(student, weights, examples, **given)

    monkeypatch.setattr(module, "distil", fails)
    groups, lines = worker.train(arrays, instruction(CLIENTS), done.append)
    assert problems(lines) == {bad: "RuntimeError"}
    assert [line.examples for line in lines if line.problem] == [0]
    assert done == [1] * len(CLIENTS)
    assert set(groups) == set(expected)
    for name, arrays_ in expected.items():
        assert all((groups[name][key] == array).all() for key, array in arrays_.items())


@pytest.mark.parametrize("packing", ["on", "off"])
@pytest.mark.parametrize("place", [0, -1], ids=["first array", "last array"])
def test_a_client_whose_training_diverges_is_refused_and_leaves_the_others(make_worker, monkeypatch, packing, place):
    worker = make_worker(server__packing=packing)
    arrays, honest = arrays_of(worker), module.distil
    expected, _ = worker.train(arrays, instruction([0, 1, 3, 4, 5]), nobody)

    def diverges(student, weights, examples, **given):
        update = honest(student, weights, examples, **given)
        if given["who"][1] == 2:
            list(update.arrays.values())[place].reshape(-1)[0] = np.nan
        return update

    monkeypatch.setattr(module, "distil", diverges)
    groups, lines = worker.train(arrays, instruction(CLIENTS), nobody)
    assert problems(lines) == {2: NOT_FINITE}
    assert set(groups) == set(expected)
    for name, arrays_ in expected.items():
        assert all((groups[name][key] == array).all() for key, array in arrays_.items())


def test_a_client_without_training_examples_says_so(worker, arrays, monkeypatch):
    nothing = replace(worker.data.shard(1), train=np.zeros(0, dtype=np.int64))
    monkeypatch.setattr(
        type(worker.data), "shard", lambda data, client: nothing if client == 1 else data.shards[client]
    )
    _, lines = worker.train(arrays, instruction([0, 1, 2]), nobody)
    assert problems(lines) == {1: "no training examples"}


def test_training_learns_the_teachers_answers(make_worker):
    """Three rounds of one client alone, along its own updates."""
    worker = make_worker(client__lr=0.01, client__epochs=5)
    arrays = arrays_of(worker, 0.3)
    losses = []
    for number in (1, 2, 3):
        groups, (line,) = worker.train(arrays, instruction([0], number), nobody)
        arrays = {
            name: (arrays[name] + total / (line.examples * 2.0**32)).astype(np.float32)
            for name, total in groups["update"].items()
        }
        losses.append(line.soft_loss)
    assert losses[2] < 0.7 * losses[0]


# --- lossy wires and their memory ---------------------------------------------------------------


@pytest.mark.parametrize("kind", ["fp16", "int8", "topk", "svd"])
def test_a_lossy_update_is_the_same_in_any_company_and_its_rest_comes_later(make_worker, kind):
    worker = make_worker(server__wire=kind)
    arrays, wire = arrays_of(worker), wire_for(worker.config.server, 1, 3)
    together, lines = worker.train(arrays, instruction(CLIENTS, run="a" * 16), nobody)
    alone, _ = worker.train(arrays, instruction([4], run="b" * 16), nobody)
    assert problems(lines) == {}
    for name, part in alone[own_update(4)].items():
        assert together[own_update(4)][name].tobytes() == part.tobytes()
    truth = bare_updates(worker, arrays, 1)[4]
    sent = decompress(alone[own_update(4)], worker.shapes, wire)
    left = module.ErrorFeedback(worker.cache / "error-feedback" / ("b" * 16), 2).load(4, 1, worker.shapes)
    for name, array in truth.items():
        np.testing.assert_allclose(sent[name] + left[name], array, atol=1e-7)
    assert any(array.any() for array in left.values())


def test_an_update_is_made_up_with_the_rest_of_the_round_that_the_server_took(make_worker):
    """Told that round 1 was taken, the rest of round 1 goes along; told that none was, nothing does."""
    worker = make_worker(server__wire="topk", server__topk=0.5)
    arrays, run = arrays_of(worker), "c" * 16
    worker.train(arrays, instruction([0], 1, run=run), nobody)
    fresh, _ = worker.train(arrays, instruction([0], 2, [0], run=run), nobody)
    other, _ = worker.train(arrays, instruction([0], 2, [0], run="d" * 16), nobody)
    made_up, _ = worker.train(arrays, instruction([0], 2, [1], run=run), nobody)

    def sent(groups):
        return {name: part.tobytes() for name, part in groups[own_update(0)].items()}

    assert sent(fresh) == sent(other)
    assert sent(made_up) != sent(fresh)


def test_a_client_whose_memory_is_missing_says_so_and_leaves_the_others(make_worker):
    worker = make_worker(server__wire="int8")
    groups, lines = worker.train(arrays_of(worker), instruction([0, 1], 3, [2, 0], run="e" * 16), nobody)
    assert problems(lines) == {0: "error feedback of round 2 is missing"}
    assert set(groups) == {own_update(1)}


# --- the teacher --------------------------------------------------------------------------------


def test_what_the_teacher_was_asked_before_it_is_not_asked_again(make_worker, monkeypatch, tmp_path):
    worker = make_worker(runtime__threads=1, data__max_length=40)  # outputs of its own
    done = []
    lines = worker.teach(CLIENTS, done.append)
    assert [(line.client, line.examples) for line in lines] == [
        (client, len(worker.data.shard(client))) for client in CLIENTS
    ]
    assert sum(done) == len(CLIENTS)
    honest, arrays = module.predict, arrays_of(worker)

    def only_students(model, *given):
        assert model is not worker.teacher
        return honest(model, *given)

    monkeypatch.setattr(module, "predict", only_students)
    _, lines = worker.train(arrays, instruction(CLIENTS), nobody)
    assert problems(lines) == {}
    assert problems(worker.evaluate(arrays, instruction(CLIENTS), nobody)[1]) == {}
    rows = worker.data.shard(2).train[::-1].copy()
    expected = predict(worker.teacher, worker.data.train.tokens, rows, worker.compute)
    assert worker.teacher_logits(rows).tobytes() == expected.tobytes()


def test_another_teacher_in_the_folder_is_refused(worker, balanced, tmp_path):
    other = make_teacher(tmp_path, seed=1)
    needs = make_needs(balanced, worker.data, (0, 3))
    for folder, known in ((other, balanced), (balanced, other)):
        digest = hash_tensors(load_teacher(known).state_dict())
        with pytest.raises(ValueError, match="the teacher's weights are not those of this run"):
            Worker(worker.config, **{**needs, "teacher": str(folder), "teacher_hash": digest})


def test_another_student_in_the_cache_is_refused(worker, balanced):
    needs = make_needs(balanced, worker.data, (0, 3))
    other = make_needs(balanced, worker.data, (1, 2))
    assert needs["student_hash"] != other["student_hash"]
    with pytest.raises(ValueError, match="the student's weights are not those of this run"):
        Worker(worker.config, **{**needs, "student": other["student"]})


# --- importance ---------------------------------------------------------------------------------


def test_how_much_heads_matter_is_the_sum_over_clients_in_any_grouping(make_worker):
    worker = make_worker(student__heads=1)
    alone = {client: worker.weigh([client], nobody) for client in CLIENTS}
    together, lines = worker.weigh((4, 1, 0, 5, 3, 2), nobody)
    assert {name: total.shape for name, total in together["update"].items()} == {"heads": (2, 2), "neurons": (2, 32)}
    for name, total in together["update"].items():
        assert total.tolist() == sum(groups["update"][name] for groups, _ in alone.values()).tolist()
        assert total.dtype == np.int64
        assert total.any()
    assert [(line.client, line.examples) for line in lines] == [
        (client, worker.data.train_sizes[client]) for client in (4, 1, 0, 5, 3, 2)
    ]


def test_weighing_leaves_training_as_it_was(make_worker):
    fresh, used = make_worker(student__heads=1), make_worker(student__heads=1)
    arrays = arrays_of(fresh)
    used.weigh(CLIENTS, nobody)
    expected, _ = fresh.train(arrays, instruction([3]), nobody)
    found, lines = used.train(arrays, instruction([3]), nobody)
    assert problems(lines) == {}
    assert whole(used, found) == whole(fresh, expected)


@pytest.mark.parametrize("bad", [0, 5])
def test_a_client_that_cannot_be_weighed_leaves_the_others(make_worker, monkeypatch, bad):
    worker = make_worker(student__heads=1)
    expected, _ = worker.weigh([client for client in CLIENTS if client != bad], nobody)
    honest, done = module.importance, []

    def fails(model, examples, **given):
        if given["client"] == bad:
            raise RuntimeError("patient Smith has a cough")
        return honest(model, examples, **given)

    monkeypatch.setattr(module, "importance", fails)
    found, lines = worker.weigh(CLIENTS, done.append)
    assert problems(lines) == {bad: "RuntimeError"}
    assert done == [1] * len(CLIENTS)
    assert all((found["update"][name] == total).all() for name, total in expected["update"].items())


def test_the_shift_of_a_clients_classes_is_its_own(make_worker):
    worker = make_worker(**{"distill.prior-correction": True})
    labels, public = worker.data.train.labels, np.asarray(worker.data.public)
    there = np.bincount(labels[public], minlength=2) + 1
    shifts = set()
    for client in worker.data.eligible:
        own = np.bincount(labels[worker.data.shard(client).train], minlength=2) + 1
        shift = worker._examples(client).shift
        np.testing.assert_allclose(shift, np.log(own / own.sum() / (there / there.sum())), rtol=1e-6)
        shifts.add(tuple(shift))
    assert len(shifts) > 1
    assert make_worker()._examples(0).shift is None


@pytest.mark.parametrize("keys", [{}, {"student__heads": 1, "student__width_selection": "random"}])
def test_a_server_that_asks_what_the_run_has_no_use_for_is_refused(make_worker, keys):
    with pytest.raises(ClientRefused, match="the keys of this run have no heads and neurons chosen"):
        make_worker(**keys).weigh([0], nobody)


def test_a_student_with_a_dropout_of_its_own_is_refused(make_worker, monkeypatch):
    """Its configuration is in no hash of weights."""
    from clients import worker as module

    def dropping(*given):
        pupil = open_pupil(*given)
        pupil.model.config.hidden_dropout_prob = 0.1
        return pupil

    open_pupil = module.open_pupil
    monkeypatch.setattr(module, "open_pupil", dropping)
    with pytest.raises(ValueError, match="the student's dropout is not that of this run"):
        make_worker()
