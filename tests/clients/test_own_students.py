"""Clients that share outputs on public text: two of them against bare steps, and the server that averages them."""

from functools import partial

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from clients.consensus import ConsensusWorker
from common.array_bytes import WireError
from common.config import from_flat
from common.distillation import learn, learnt
from common.inference import predict
from common.metrics import tally
from common.objective import Examples
from common.progress import Silent
from common.public import public_recipe, public_rows
from common.recipe import make_recipe
from common.seeding import seed_for
from common.tiers import group_name
from common.wire import ClientLine, pack_reply
from server.aggregation import Rejected
from server.consensus import Consensus
from server.ensemble import put
from server.intake import Chances
from server.preparation import prepare
from tests.clients.kept import CLIENTS, asked, nobody, worker_of
from tests.conftest import make_reviews

PUBLIC_LR, SAMPLE = 0.003, 12


@pytest.fixture(scope="module")
def federation_of(tmp_path_factory, tiny_teacher):
    reviews = make_reviews(tmp_path_factory.mktemp("reviews") / "reviews.csv", 120)

    def make(strategy, **keys):
        flat = {
            "task": "text", "data.source": str(reviews), "data.clients": 3, "data.max-length": 64, "data.alpha": 10.0,
            "teacher.model": str(tiny_teacher), "student.layers": 2, "client.precision": "fp32", "client.lr": 0.01,
            "server.strategy": strategy, "server.public-sample": SAMPLE, "server.public-lr": PUBLIC_LR, "rounds": 3,
        }  # fmt: skip
        return prepare(from_flat({**flat, **keys}), Silent())

    return make


@pytest.fixture(scope="module")
def fedmd(federation_of):
    return federation_of("fedmd")


def rows_of(federation, number):
    return public_rows(federation.data.public, SAMPLE, 0, number)


def student_on_disk(worker, run, client, number):
    found = load_file(worker.cache / "own-students" / run / str(client) / f"round-{number:05d}.safetensors")
    return {name: tensor.numpy() for name, tensor in found.items()}


def outputs(federation, weights, rows):
    """By the server's module, which no worker shares."""
    put(federation, weights)
    return predict(federation.student, federation.pupil.data.train.tokens, rows, federation.compute)


def exact_sum(parts):
    return sum(np.rint(part.astype(np.float64) * 2.0**32).astype(np.int64) for part in parts)


def consensus_of(seed=0):
    return np.random.default_rng(seed).normal(size=(SAMPLE, 2)).astype(np.float32)


# --- a client ------------------------------------------------------------------------------------


def test_students_of_different_shapes_vote_together(federation_of, run):
    federation = federation_of("fedmd", **{"student.tiers": "1/1/16@0.5", "student.width-selection": "random"})
    everyone, tier_of = (0, 1, 2), federation.tier_of
    assert set(tier_of.tolist()) == {0, 1}
    worker = worker_of(ConsensusWorker, federation)
    groups, lines = worker.train({}, asked(run, 1, (0, 0, 0), everyone), nobody)
    assert not any(line.problem for line in lines)
    logits, sizes = [], []
    for client in everyone:
        own = {name: torch.from_numpy(array) for name, array in student_on_disk(worker, run, client, 1).items()}
        sizes.append(sum(tensor.numel() for tensor in own.values()))
        model = federation.tiers.load(int(tier_of[client]), own)
        logits.append(predict(model, federation.pupil.data.train.tokens, rows_of(federation, 1), federation.compute))
    assert groups["update"]["votes"].tolist() == exact_sum(logits).tolist()
    assert (np.array(sizes) < max(sizes)).tolist() == (tier_of == 0).tolist()
    groups, lines = worker.evaluate({}, asked(run, 1, (1, 1, 1), everyone), nobody)
    assert not any(line.problem for line in lines)
    assert set(groups) == {group_name(who, tier, 2) for who in ("student", "teacher") for tier in (0, 1)}


@pytest.mark.parametrize("strategy", ["fedmd", "ds-fl"])
def test_a_nodes_sum_is_what_its_clients_own_students_say_of_the_rounds_texts(federation_of, run, strategy):
    federation = federation_of(strategy)
    worker = worker_of(ConsensusWorker, federation)
    groups, lines = worker.train({}, asked(run, 1, (0, 0)), nobody)
    logits = [
        outputs(federation, student_on_disk(worker, run, client, 1), rows_of(federation, 1)) for client in CLIENTS
    ]
    if strategy == "ds-fl":
        exps = [np.exp(rows.astype(np.float64) - rows.max(axis=1, keepdims=True)) for rows in logits]
        logits = [(rows / rows.sum(axis=1, keepdims=True)).astype(np.float32) for rows in exps]
    assert groups["update"]["votes"].tolist() == exact_sum(logits).tolist()
    assert [(line.client, line.examples, line.problem) for line in lines] == [
        (client, federation.data.train_sizes[client], "") for client in CLIENTS
    ]
    assert (logits[0] != logits[1]).any()


def test_a_client_first_digests_the_last_rounds_texts_and_then_revisits_its_own(fedmd, run):
    """The same bits as two bare trainings, one after the other, from the student of its last round."""
    worker, consensus = worker_of(ConsensusWorker, fedmd), consensus_of()
    worker.train({}, asked(run, 1, (0, 0)), nobody)
    first = student_on_disk(worker, run, 2, 1)
    worker.train({"consensus": consensus}, asked(run, 2, (1, 1)), nobody)

    data, config = fedmd.pupil.data.train, fedmd.config
    recipe = make_recipe(config, 2, fedmd.pupil.shape, fedmd.lesson.model.config, False)
    bare = partial(learn, worker.students[0], compute=worker.compute, who=(2, 2))
    start = {name: torch.from_numpy(array) for name, array in first.items()}
    public = public_recipe(recipe, config.server, config.distill.temperature)
    assert (public.lr, public.last_lr, public.labelled) == (PUBLIC_LR, PUBLIC_LR / 10, False)
    state = bare(start, Examples(data, rows_of(fedmd, 1), consensus), recipe=public, seed=seed_for(0, "digest"))
    digested = {name: tensor.clone() for name, tensor in learnt(state, start).items()}
    rows = fedmd.data.shard(2).train
    state = bare(digested, Examples(data, rows, worker.teacher_logits(rows)), recipe=recipe, seed=0)
    expected = learnt(state, digested)
    second = student_on_disk(worker, run, 2, 2)
    assert all(second[name].tobytes() == expected[name].numpy().tobytes() for name in expected)


def test_digesting_brings_a_student_to_the_consensus(federation_of, run):
    keys = {"server.public-epochs": 40, "server.public-lr": 0.01, "client.lr": 1e-9}
    federation = federation_of("fedmd", **keys)
    worker, consensus = worker_of(ConsensusWorker, federation), consensus_of()
    rows = rows_of(federation, 1)
    worker.train({}, asked(run, 1, (0, 0)), nobody)
    worker.train({"consensus": consensus}, asked(run, 2, (1, 1)), nobody)
    gaps = [np.ptp(outputs(federation, student_on_disk(worker, run, 0, n), rows) - consensus, axis=1) for n in (1, 2)]
    assert gaps[1].mean() < 0.5 * gaps[0].mean()


def test_a_round_that_is_done_again_begins_with_the_student_that_the_server_names(fedmd, run):
    worker, consensus = worker_of(ConsensusWorker, fedmd), consensus_of()
    worker.train({}, asked(run, 1, (0, 0)), nobody)
    groups, _ = worker.train({"consensus": consensus}, asked(run, 2, (1, 1)), nobody)
    before = student_on_disk(worker, run, 0, 2)
    again, _ = worker_of(ConsensusWorker, fedmd).train({"consensus": consensus}, asked(run, 2, (1, 1), (2, 0)), nobody)
    assert again["update"]["votes"].tolist() == groups["update"]["votes"].tolist()
    after = student_on_disk(worker, run, 0, 2)
    assert all(before[name].tobytes() == after[name].tobytes() for name in before)
    other, _ = worker.train({"consensus": consensus}, asked(run, 3, (2, 1)), nobody)
    lost, _ = worker.train({"consensus": consensus}, asked(run, 3, (1, 1)), nobody)  # its answer of round 2 was lost
    assert other["update"]["votes"].tolist() != lost["update"]["votes"].tolist()


def test_a_client_whose_student_is_gone_says_so_and_the_others_go_on(fedmd, run):
    worker = worker_of(ConsensusWorker, fedmd)
    alone, _ = worker.train({}, asked(run, 1, (0,), (2,)), nobody)
    groups, lines = worker.train({}, asked(run, 1, (4, 0)), nobody)
    assert lines[0].problem == "own student of round 4 is missing"
    assert groups["update"]["votes"].tolist() == alone["update"]["votes"].tolist()


def test_scores_are_of_each_clients_own_student(fedmd, run):
    worker = worker_of(ConsensusWorker, fedmd)
    worker.train({}, asked(run, 1, (0, 0)), nobody)
    groups, lines = worker.evaluate({}, asked(run, 1, (1, 0, 1), (0, 1, 2)), nobody)
    expected = 0
    for client, weights in (
        (0, student_on_disk(worker, run, 0, 1)),
        (1, {name: tensor.numpy() for name, tensor in worker.prepared[0].items()}),  # took no part yet
        (2, student_on_disk(worker, run, 2, 1)),
    ):
        rows = fedmd.data.shard(client).heldout
        expected = expected + tally(worker.spec, outputs(fedmd, weights, rows), fedmd.data.train.labels[rows])
    assert groups["student"]["statistics"].tolist() == expected.tolist()
    assert [line.examples for line in lines] == fedmd.data.heldout_sizes.tolist()


def test_any_grouping_of_clients_has_the_same_sum(fedmd, run):
    worker = worker_of(ConsensusWorker, fedmd)
    together, _ = worker.train({}, asked(run, 1, (0, 0)), nobody)
    parts = [
        worker_of(ConsensusWorker, fedmd).train({}, asked(run, 1, (0,), (client,)), nobody)[0] for client in (2, 0)
    ]
    assert sum(part["update"]["votes"] for part in parts).tolist() == together["update"]["votes"].tolist()


# --- the server ----------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", ["fedmd", "ds-fl"])
def test_the_server_averages_two_clients_and_learns_from_what_they_agree_on(federation_of, run, strategy):
    federation = federation_of(strategy)
    worker, told, memory = worker_of(ConsensusWorker, federation), [], {}
    method = Consensus(federation, Silent(), lambda: None, told.append)
    weights = federation.weights()
    assert method.sends("train", 1, weights, memory) == {}
    sizes = {client: int(federation.data.train_sizes[client]) for client in CLIENTS}
    intake = method.intake(1, weights, sizes)
    for client in (2, 0):
        groups, lines = worker.train({}, asked(run, 1, (0,), (client,)), nobody)
        intake.take(pack_reply(groups, lines), frozenset([client]))
    found = method.step(1, weights, intake.update(), intake, memory)
    logits = np.stack(
        [outputs(federation, student_on_disk(worker, run, client, 1), rows_of(federation, 1)) for client in CLIENTS]
    ).astype(np.float64)
    if strategy == "fedmd":
        expected = logits.mean(axis=0)
    else:
        exps = np.exp(logits)
        expected = (exps / exps.sum(axis=-1, keepdims=True)).mean(axis=0) / 0.1
    np.testing.assert_allclose(memory["consensus"], expected, rtol=1e-5)
    sent = method.sends("train", 2, found, memory)["consensus"]
    assert sent.dtype == np.float32
    assert sent.shape == worker.expects("train", asked(run, 2, (0, 0)))["consensus"] == (SAMPLE, 2)
    assert method.sends("evaluate", 1, found, memory) == {} == worker.expects("evaluate", asked(run, 1, (0, 0)))
    assert any((found[name] != weights[name]).any() for name in weights)
    (line,) = told
    assert {**line, "loss": 0} == {"round": 1, "phase": "fuse", "clients": 2, "examples": SAMPLE, "loss": 0}


def test_memory_that_went_through_a_checkpoint_is_the_same(fedmd):
    memory = {"consensus": consensus_of().astype(np.float64)}
    method = Consensus(fedmd, Silent(), lambda: None, lambda line: None)
    assert method.sends("train", 2, {}, memory)["consensus"].tobytes() == consensus_of().tobytes()


@pytest.mark.parametrize("whole", [True, False])
def test_what_no_clients_can_say_together_is_refused_and_leaves_no_trace(whole):
    """Two clients' probabilities of two texts and three classes, in units of 2^-32."""
    votes = exact_sum(np.array([[[0.2, 0.3, 0.5], [1.0, 0.0, 0.0]], [[1 / 3, 1 / 3, 1 / 3], [0.0, 0.9, 0.1]]], "f4"))
    lines = [ClientLine(0, 30, 0.1), ClientLine(2, 10, 0.1)]
    wrong = {(1, 1): -1, (1, 0): 2**33 + 1, (0, 0): 2**62}
    wrong |= {(0, 1): 2**32} if whole else {}  # adds up to more than 2
    for place, value in wrong.items():
        intake, some = Chances({"votes": (2, 3)}, {0: 30, 2: 10}, whole=whole), votes.copy()
        some[place] = value
        with pytest.raises(Rejected, match="probabilities of 2 clients"):
            intake.take(pack_reply({"update": {"votes": some}}, lines), frozenset([0, 2]))
        intake.take(pack_reply({"update": {"votes": votes}}, lines), frozenset([0, 2]))
        np.testing.assert_allclose(intake.update()["votes"], votes / 2.0**33, rtol=1e-12)
    for part in (votes[:1], votes.astype(np.float64)):
        with pytest.raises(WireError, match="update/votes"):
            intake.take(pack_reply({"update": {"votes": part}}, lines), frozenset([0, 2]))


def test_a_consensus_that_is_not_finite_is_not_digested(fedmd, run):
    worker, consensus = worker_of(ConsensusWorker, fedmd), consensus_of()
    consensus[3, 1] = np.nan
    groups, lines = worker.train({"consensus": consensus}, asked(run, 2, (0, 0)), nobody)
    assert [line.problem for line in lines] == ["the consensus is not finite"] * 2
    assert not groups["update"]["votes"].any()
