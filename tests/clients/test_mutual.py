"""Mutual distillation: mentor and mentee against a bare loop whose adaptive weights are worked out in NumPy."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from clients.mutual import MutualWorker, learn_together, mutual_loss
from common.compression import compress, decompress, wire_for
from common.config import from_flat
from common.dataset import Split, load_tokenizer
from common.distillation import Student
from common.errors import InputError
from common.inference import predict
from common.models import freeze_embeddings, load_teacher
from common.objective import Examples
from common.progress import Silent
from common.tokens import tokenize
from common.wire import ClientLine, own_update, pack_reply
from server.intake import intake_for
from server.preparation import prepare
from tests.clients.kept import CLIENTS, asked, nobody, worker_of
from tests.conftest import FP32, make_reviews, make_sentences, make_student, make_teacher
from tests.scene import RECIPE, weighing

SOFT, HARD, TEMPERATURE = 0.7, 0.3, 2.0


@pytest.fixture(scope="module")
def federation_of(tmp_path_factory, tiny_teacher):
    reviews = make_reviews(tmp_path_factory.mktemp("reviews") / "reviews.csv", 120)

    def make(**keys):
        flat = {
            "task": "text", "data.source": str(reviews), "data.clients": 3, "data.max-length": 64, "data.alpha": 10.0,
            "teacher.model": str(tiny_teacher), "student.layers": 2, "client.precision": "fp32", "client.lr": 0.01,
            "client.token-budget": 4096, "distill.temperature": TEMPERATURE, "server.strategy": "fedkd", "rounds": 3,
        }  # fmt: skip
        return prepare(from_flat({**flat, **keys}), Silent())

    return make


def mentor_on_disk(worker, run, client, number):
    return load_file(worker.cache / "mentors" / run / str(client) / f"round-{number:05d}.safetensors")


def same(first, second):
    return all((first[name] == second[name]).all() for name in first)


# --- the losses ----------------------------------------------------------------------------------


def kl(target, own):
    """T^2 KL(softmax(target / T) || softmax(own / T)), mean over rows."""
    p, q = (np.exp(z / TEMPERATURE) / np.exp(z / TEMPERATURE).sum(1, keepdims=True) for z in (target, own))
    return TEMPERATURE**2 * (p * np.log(p / q)).sum(axis=1).mean()


def cross_entropy(logits, labels):
    return -np.log(np.exp(logits) / np.exp(logits).sum(1, keepdims=True))[np.arange(len(labels)), labels].mean()


def test_the_adaptive_weight_is_one_over_both_task_losses():
    values = {"soft": 0.6, "hard": 0.5, "hidden": 0.2, "both": 2.0}
    weights = {"soft": 0.7, "hard": 0.3, "hidden": 1.5}
    found = mutual_loss(**{name: torch.tensor(value) for name, value in values.items()}, weights=weights)
    assert float(found) == pytest.approx(0.3 * 0.5 + (0.7 * 0.6 + 1.5 * 0.2) / 2.0)
    nothing = torch.zeros(())
    assert float(mutual_loss(soft=nothing, hard=nothing, hidden=nothing, both=nothing, weights=weights)) == 0.0


@pytest.mark.parametrize("hidden", [0.0, 0.5])
def test_both_take_the_step_of_a_bare_loop(federation_of, hidden):
    """One batch, one epoch; weights of the mutual terms by hand from both models' logits."""
    federation = federation_of(**{"distill.hidden-weight": hidden, "client.mentor-layers": 3})
    worker = worker_of(MutualWorker, federation)
    data, examples = worker.data.train, worker._examples(0)
    models = [copy.deepcopy(student.model).eval() for student in (worker.students[0], worker.mentor)]
    starts = [
        {name: tensor.detach().clone() for name, tensor in student.trained.items()}
        for student in (worker.students[0], worker.mentor)
    ]
    states = learn_together(
        (worker.students[0], starts[0]), (worker.mentor, starts[1]), examples,
        recipe=worker._recipe(1), compute=worker.compute, seed=0, who=(1, 0),
    )  # fmt: skip

    inputs, labels = data.tokens.batch(examples.rows), torch.from_numpy(np.array(data.labels[examples.rows]))
    outputs = [model(**inputs, output_hidden_states=True) for model in models]
    logits = [output.logits for output in outputs]
    plain = [z.detach().double().numpy() for z in logits]
    both = sum(cross_entropy(z, labels.numpy()) for z in plain)
    expected = HARD * cross_entropy(plain[0], labels.numpy()) + SOFT * kl(plain[1], plain[0]) / both
    for mine, other in ((0, 1), (1, 0)):
        target = torch.softmax(logits[other].detach() / TEMPERATURE, -1)
        soft = F.kl_div(F.log_softmax(logits[mine] / TEMPERATURE, -1), target, reduction="batchmean") * TEMPERATURE**2
        loss = HARD * F.cross_entropy(logits[mine], labels) + SOFT * soft / both
        if hidden:  # mentee's layers 0 and 1 beside the mentor's 0 and 2
            mask, far = inputs["attention_mask"], 0.0
            for layers in ((0, 0), (1, 2)):
                pair = [outputs[who].hidden_states[layers[who] + 1] for who in (mine, other)]
                distance = 1 - F.cosine_similarity(pair[0], pair[1].detach(), dim=-1)
                far = far + (distance * mask).sum() / mask.sum() / 2
            loss = loss + hidden * far / both
            expected += hidden * float(far.detach()) / both if mine == 0 else 0.0
        trained = {name: tensor for name, tensor in models[mine].named_parameters() if name in starts[mine]}
        optimizer = torch.optim.AdamW(trained.values(), lr=0.01, weight_decay=0.01)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained.values(), 1.0)
        optimizer.step()
        compared = 0
        for name, parameter in trained.items():
            sure = parameter.grad.abs() > 1e-5  # Adam's first step is the sign of the gradient
            compared += int(sure.sum())
            found = states[mine].trained[name].detach()
            np.testing.assert_allclose(found[sure], parameter.detach()[sure], atol=2e-4)
        assert compared > 300
    assert float(states[0].totals[0]) / states[0].seen == pytest.approx(expected, rel=1e-4)
    assert states[0].seen == len(examples.rows)


@pytest.fixture(scope="module")
def long_texts(tmp_path_factory):
    """A teacher of three classes, and twelve texts of several windows with any number of them; its own are others."""
    folder = make_teacher(tmp_path_factory.mktemp("three"), labels=3)
    tokenizer, texts = load_tokenizer(folder), make_sentences(12, seed=3, longest=18)
    own, taught = (
        tokenize((texts,), tokenizer, length, nobody, windows=windows, stride=2)
        for length, windows in ((8, 4), (12, 2))
    )
    labels = (np.random.default_rng(0).random((12, 3)) < 0.4).astype(np.int64)
    data = Split(own, labels, np.zeros((12, 16), np.uint8))
    return load_teacher(folder), Examples(data, np.arange(12), np.zeros((12, 3), np.float32), taught)


def both_learn(teacher, examples, recipe):
    """Mentee, mentor, and what they have learnt from."""
    students = []
    for layers in ((0, 3), (0, 2, 3)):
        model = make_student(teacher, layers)
        students.append(Student.of(model, freeze_embeddings(model, False)))
    pairs = [(one, {name: part.detach().clone() for name, part in one.trained.items()}) for one in students]
    states = learn_together(*pairs, examples, recipe=recipe, compute=FP32, seed=0, who=(1, 0))
    return students, states


def test_each_reads_its_own_windows_and_any_number_of_classes(long_texts):
    teacher, examples = long_texts
    recipe = replace(RECIPE, epochs=1, token_budget=10**6, multi_label=True, clip_norm=0.0)
    _, (state, _) = both_learn(teacher, examples, recipe)
    models, labels = [make_student(teacher, layers) for layers in ((0, 3), (0, 2, 3))], examples.data.labels
    tokens = examples.data.tokens, examples.taught
    z = [predict(model, own, examples.rows, FP32).astype(float) for model, own in zip(models, tokens, strict=True)]
    chances = [1 / (1 + np.exp(-one)) for one in z]
    hard = [-np.log(np.where(labels > 0, p, 1 - p)).mean() for p in chances]
    q, p = (1 / (1 + np.exp(-one / TEMPERATURE)) for one in z)
    soft = TEMPERATURE**2 * (p * np.log(p / q) + (1 - p) * np.log((1 - p) / (1 - q))).mean()
    assert float(state.totals[0]) / state.seen == pytest.approx(HARD * hard[0] + SOFT * soft / sum(hard), rel=1e-4)


def test_a_batch_in_parts_has_the_gradients_of_the_whole(long_texts):
    """The adaptive weight is that of the whole batch."""
    teacher, examples = long_texts
    examples, found = replace(examples, taught=None), []
    for micro in (0, 40):
        recipe = replace(
            weighing(RECIPE, hidden=0.5), epochs=1, token_budget=10**6, micro_budget=micro, multi_label=True,
            clip_norm=0.0, hidden_pairs=((0, 0), (1, 2)),
        )  # fmt: skip
        found.append(both_learn(teacher, examples, recipe))
    for one, other in zip(found[0][0], found[1][0], strict=True):
        for name, parameter in one.trained.items():
            torch.testing.assert_close(other.trained[name].grad, parameter.grad, atol=1e-6, rtol=1e-3)
    totals = [states[0].totals for _, states in found]
    assert (totals[0][:4] > 0).all()
    torch.testing.assert_close(totals[1], totals[0], atol=1e-5, rtol=1e-5)


# --- the wire ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("number", "expected"),
    [(1, {(0, 0): 1.5, (2, 2): 0.5}), (3, {(0, 0): 1.5, (1, 1): 0.75, (2, 2): 0.5, (3, 3): 0.25})],
)
def test_two_clients_updates_of_singular_values_2_and_1_by_hand(number, expected):
    """4 of 5 squares are enough in round 1, not in the last; the server means what arrived, by examples."""
    keys = from_flat({"server.strategy": "fedkd", "server.svd-energy-start": 0.7, "server.svd-energy-end": 0.95}).server
    wire, sizes = wire_for(keys, number, 3), {0: 30, 2: 10}
    intake = intake_for(keys, wire, {"w": (8, 8)}, sizes)
    for client, first in ((2, 2), (0, 0)):
        update = np.zeros((8, 8), np.float32)
        update[first, first], update[first + 1, first + 1] = 2.0, 1.0
        parts = compress({"w": update}, wire, np.random.default_rng(0))
        content = pack_reply({own_update(client): parts}, [ClientLine(client, sizes[client], 0.1)])
        assert not intake.take(content, frozenset([client]))[1]
    matrix = np.zeros((8, 8))
    for place, value in expected.items():
        matrix[place] = value
    np.testing.assert_allclose(intake.update()["w"], matrix, atol=1e-6)


# --- the worker ----------------------------------------------------------------------------------


def test_a_clients_mentor_goes_on_from_the_round_that_the_server_names(federation_of, run):
    worker = worker_of(MutualWorker, federation_of())
    arrays = {name: tensor.detach().numpy().copy() for name, tensor in worker.students[0].trained.items()}
    assert len(worker.mentor.model.bert.encoder.layer) == 4  # the whole teacher
    worker.train(arrays, asked(run, 1, (0, 0)), nobody)
    mentors = [mentor_on_disk(worker, run, client, 1) for client in CLIENTS]
    assert not same(*mentors)
    assert not same(mentors[0], worker.prepared)
    groups, lines = worker.train(arrays, asked(run, 2, (1, 1)), nobody)
    second = mentor_on_disk(worker, run, 0, 2)
    assert not same(second, mentors[0])
    again, _ = worker_of(MutualWorker, federation_of()).train(arrays, asked(run, 2, (1, 1), (2, 0)), nobody)
    assert same(second, mentor_on_disk(worker, run, 0, 2))
    for client in CLIENTS:
        assert same(again[own_update(client)], groups[own_update(client)])
    assert all(line.loss > 0 and line.hidden_loss == 0 and not line.problem for line in lines)


def test_the_mentees_update_travels_as_thin_factors(federation_of, run):
    federation = federation_of()
    assert (federation.config.server.wire, federation.config.server.packing) == ("svd", "off")
    worker = worker_of(MutualWorker, federation)
    arrays = {name: tensor.detach().numpy().copy() for name, tensor in worker.students[0].trained.items()}
    groups, _ = worker.train(arrays, asked(run, 1, (0, 0)), nobody)
    assert any(name.endswith("|left") for name in groups[own_update(0)])
    update = decompress(groups[own_update(0)], worker.shapes, wire_for(federation.config.server, 1, 3))
    assert {name: array.shape for name, array in update.items()} == worker.shapes
    assert not any("embeddings" in name for name in update)


def test_a_client_whose_mentor_is_gone_says_so_and_the_others_go_on(federation_of, run):
    worker = worker_of(MutualWorker, federation_of(**{"server.wire": "fp32"}))
    arrays = {name: tensor.detach().numpy().copy() for name, tensor in worker.students[0].trained.items()}
    _, lines = worker.train(arrays, asked(run, 5, (4, 0)), nobody)
    assert [line.problem for line in lines] == ["mentor of round 4 is missing", ""]


@pytest.mark.parametrize("hidden", [0.0, 0.5])
def test_a_mentee_with_a_vocabulary_of_its_own_and_trained_words_learns_beside_its_mentor(federation_of, run, hidden):
    keys = {"student.vocabulary": 130, "student.train-embeddings": True, "distill.hidden-weight": hidden}
    worker = worker_of(MutualWorker, federation_of(**keys, **{"client.epochs": 2, "client.token-budget": 200}))
    assert worker.pupil.taught is not None
    arrays = {name: tensor.detach().numpy().copy() for name, tensor in worker.students[0].trained.items()}
    _, lines = worker.train(arrays, asked(run, 1, (0, 0)), nobody)
    assert [line.problem for line in lines] == ["", ""]
    assert all((line.hidden_loss > 0) == (hidden > 0) for line in lines)
    assert not any("embeddings" in name for name in mentor_on_disk(worker, run, 0, 1))


# --- keys ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "value", "told"),
    [
        ("distill.hard-weight", 0.0, "distill.hard-weight = 0.0: server.strategy = 'fedkd'"),
        ("distill.weighting", "annealed", "distill.weighting = 'annealed': server.strategy = 'fedkd'"),
        ("distill.cls-weight", 1.0, "distill.cls-weight = 1.0: server.strategy = 'fedkd'"),
        ("distill.relation-weight", 1.0, "distill.relation-weight = 1.0: server.strategy = 'fedkd'"),
        ("server.packing", "on", "server.packing = 'on': server.wire = 'svd' needs each client's own update"),
    ],
)
def test_what_makes_no_sense_with_mentors_is_refused_by_name(key, value, told):
    with pytest.raises(InputError) as refusal:
        from_flat({"server.strategy": "fedkd", key: value})
    assert str(refusal.value).startswith(told)


def test_a_mentor_has_no_more_layers_than_the_teacher(federation_of):
    with pytest.raises(InputError, match=r"^client.mentor-layers = 5: the teacher has 4 layers"):
        federation_of(**{"client.mentor-layers": 5})


def test_only_fedkd_sends_factors_by_itself():
    assert from_flat({}).server.wire == from_flat({"server.strategy": "feddf"}).server.wire == "fp32"
    assert from_flat({"server.strategy": "fedkd", "server.wire": "int8"}).server.wire == "int8"
