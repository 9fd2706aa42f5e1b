"""FedDF against a bare loop: the ensemble of two clients' own models, and a student that learns from it."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from common.compression import compress, wire_for
from common.config import from_flat
from common.errors import InputError
from common.fixed_point import ExactSum, mean
from common.progress import Silent
from common.public import public_rows
from common.wire import ClientLine, own_update, pack_reply
from server.ensemble import rows_of_round
from server.feddf import FedDF, ensemble
from server.intake import Kept
from server.preparation import prepare
from tests.conftest import make_reviews

TEMPERATURE = 2.0


@pytest.fixture(scope="module")
def make_federation(tmp_path_factory, tiny_teacher):
    reviews = make_reviews(tmp_path_factory.mktemp("reviews") / "reviews.csv", 120)

    def make(**keys):
        flat = {
            "task": "text", "data.source": str(reviews), "data.clients": 3, "data.max-length": 64,
            "teacher.model": str(tiny_teacher),
            "student.layers": 2, "client.precision": "fp32", "client.token-budget": 4096, "server.strategy": "feddf",
            "server.public-lr": 0.01, "distill.temperature": TEMPERATURE, "rounds": 3,
        }  # fmt: skip
        return prepare(from_flat({**flat, **keys}), Silent())

    return make


def updates_of(weights, clients, seed=0):
    rng = np.random.default_rng(seed)
    return {
        client: {name: (0.5 * rng.normal(size=array.shape)).astype(np.float32) for name, array in weights.items()}
        for client in clients
    }


def fused(federation, weights, updates, sizes, *, order, told=None):
    """The weights after round 2, in which each client has answered by itself."""
    method = FedDF(federation, Silent(), lambda: None, (told if told is not None else []).append)
    intake = method.intake(2, weights, sizes)
    wire = wire_for(method.config.server, 2, method.config.rounds)
    for client in order:
        parts = compress(updates[client], wire, np.random.default_rng(client))
        lines = [ClientLine(client, sizes[client], 0.1)]
        _, refused = intake.take(pack_reply({own_update(client): parts}, lines), frozenset([client]))
        assert not refused
    return method.step(2, weights, intake.update(), intake, {})


def test_the_ensemble_is_the_plain_mean_of_logits():
    logits = np.array([[[1.0, 0.0], [4.0, -2.0]], [[3.0, 1.0], [0.0, 0.0]]])
    assert ensemble(logits).tolist() == [[2.0, 0.5], [2.0, -1.0]]
    assert ensemble(logits).dtype == np.float32


def put(model, weights):
    """Into a bare module, by name."""
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, array in weights.items():
            parameters[name].copy_(torch.from_numpy(array))


@pytest.mark.parametrize("at_clients", ["adamw", "sgd"])
def test_a_step_is_that_of_a_bare_loop_on_the_mean_of_two_clients_logits(make_federation, at_clients):
    """One batch, one epoch: one AdamW step from the weighted average along the ensemble's soft targets."""
    federation, told = make_federation(**{"client.optimizer": at_clients}), []
    weights, sizes = federation.weights(), {0: 30, 2: 10}
    updates = updates_of(weights, sizes)
    found = fused(federation, weights, updates, sizes, order=[2, 0], told=told)

    data, rows = federation.data, np.asarray(federation.data.public)
    inputs = data.train.tokens.batch(rows)
    logits = []
    model = copy.deepcopy(federation.student).eval()
    for client in sizes:
        put(model, {name: weights[name] + updates[client][name] for name in weights})
        with torch.no_grad():
            logits.append(model(**inputs).logits)
    target = (logits[0] + logits[1]) / 2
    total = ExactSum({name: array.shape for name, array in weights.items()})
    for client, size in sizes.items():
        total.add(updates[client], size)
    put(model, {name: (weights[name] + mean(total.totals[name], 40)).astype(np.float32) for name in weights})
    trained = {name: parameter for name, parameter in model.named_parameters() if name in weights}
    optimizer = torch.optim.AdamW(trained.values(), lr=0.01, weight_decay=0.01)
    own = model(**inputs).logits / TEMPERATURE
    loss = F.kl_div(F.log_softmax(own, -1), F.softmax(target / TEMPERATURE, -1), reduction="batchmean")
    loss = loss * TEMPERATURE**2
    loss.backward()
    torch.nn.utils.clip_grad_norm_(trained.values(), 1.0)
    optimizer.step()
    compared = 0
    for name, parameter in trained.items():
        sure = parameter.grad.abs() > 1e-5  # Adam's first step is the sign of the gradient
        compared += int(sure.sum())
        np.testing.assert_allclose(found[name][sure], parameter.detach()[sure], atol=2e-4)
    assert compared > 300
    (line,) = told
    assert (line["round"], line["phase"], line["clients"], line["examples"]) == (2, "fuse", 2, len(rows))
    assert line["loss"] == pytest.approx(loss.item(), rel=1e-3)


@pytest.mark.parametrize("wire", ["fp32", "int8"])
def test_the_order_of_arrival_changes_no_bit(make_federation, wire):
    federation = make_federation(**{"server.wire": wire})
    sizes = {0: 30, 1: 17, 2: 10}
    weights = federation.weights()
    updates = updates_of(weights, sizes)
    first = fused(federation, weights, updates, sizes, order=[0, 1, 2])
    again = fused(federation, weights, updates, sizes, order=[2, 0, 1])
    assert all(first[name].tobytes() == again[name].tobytes() for name in first)
    assert all((first[name] != weights[name]).any() for name in first)


def test_fused_students_come_closer_to_their_ensemble(make_federation):
    federation, told = make_federation(**{"server.public-epochs": 15, "client.token-budget": 128}), []
    sizes = {0: 30, 2: 10}
    weights = federation.weights()
    updates = updates_of(weights, sizes)
    fused(federation, weights, updates, sizes, order=[0, 2], told=told)
    once = []
    fused(make_federation(**{"client.token-budget": 128}), weights, updates, sizes, order=[0, 2], told=once)
    assert told[0]["loss"] < 0.7 * once[0]["loss"]  # the mean over all passes


def test_trained_word_embeddings_are_fused_too(make_federation):
    federation = make_federation(**{"student.train-embeddings": True})
    sizes, weights = {0: 30, 2: 10}, federation.weights()
    updates = updates_of(weights, sizes)
    found = fused(federation, weights, updates, sizes, order=[0, 2])
    (words,) = (name for name in weights if name.endswith("word_embeddings.weight"))
    pieces = federation.data.train.tokens.vocabulary(np.asarray(federation.data.public))
    average = weights[words] + (0.75 * updates[0][words] + 0.25 * updates[2][words])
    moved = (np.abs(found[words] - average) > 1e-4).any(axis=1)
    assert pieces[0] == 0  # padding, which has no gradient
    assert moved[pieces[1:]].all()
    assert not np.delete(moved, pieces[1:]).any()


def test_a_warm_start_keeps_the_words_that_it_has_trained(make_federation):
    """The same steps on the same text, at the server too: rows of words that it holds move, and no others."""
    cold, warm = (make_federation(**{"student.train-embeddings": True, "student.warm-epochs": n}) for n in (0, 1))
    (words,) = (name for name in cold.weights() if name.endswith("word_embeddings.weight"))
    moved = (cold.weights()[words] != warm.weights()[words]).any(axis=1)
    pieces = cold.data.train.tokens.vocabulary(np.asarray(cold.data.public))
    assert np.flatnonzero(moved).tolist() == pieces[1:].tolist()


# --- public rows and keys ------------------------------------------------------------------------


def test_a_sample_is_drawn_anew_each_round_and_the_same_each_time():
    public = np.arange(100, 200)
    drawn = [public_rows(public, 30, 5, number).tolist() for number in (1, 2, 1)]
    assert drawn[0] == drawn[2] != drawn[1]
    assert all(len(set(rows)) == 30 and rows == sorted(rows) and set(rows) <= set(public) for rows in drawn)
    assert drawn[0] != public_rows(public, 30, 6, 1).tolist()
    assert public_rows(public, 0, 5, 1).tolist() == public_rows(public, 500, 5, 1).tolist() == public.tolist()


def test_a_round_learns_on_its_sample(make_federation):
    federation, told = make_federation(**{"server.public-sample": 5}), []
    sizes = {0: 30, 2: 10}
    weights = federation.weights()
    fused(federation, weights, updates_of(weights, sizes), sizes, order=[0, 2], told=told)
    assert told[0]["examples"] == len(rows_of_round(federation, 2)) == 5


def test_updates_are_kept_for_the_ensemble_alone(make_federation):
    federation = make_federation()
    assert federation.config.server.packing == "off"
    method = FedDF(federation, Silent(), lambda: None, lambda line: None)
    assert type(method.intake(1, federation.weights(), {})) is Kept


@pytest.mark.parametrize(
    ("keys", "told"),
    [
        ({"server.packing": "on"}, "server.packing = 'on': server.strategy = 'feddf' needs each client's own update"),
        ({"data.public-fraction": 0.0}, "data.public-fraction = 0.0: server.strategy = 'feddf' learns on public text"),
    ],
)
def test_what_makes_no_sense_with_it_is_refused_by_name(keys, told):
    with pytest.raises(InputError) as refusal:
        from_flat({"server.strategy": "feddf", **keys})
    assert told in str(refusal.value)


def test_a_public_split_without_an_example_is_refused(make_federation):
    with pytest.raises(InputError, match=r"^data.public-fraction = 0.001: no example is public"):
        make_federation(**{"data.public-fraction": 0.001})
