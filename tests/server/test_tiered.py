"""The mean over clients that hold different students, by hand; and what such a sum refuses."""

import json
from dataclasses import asdict, replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from flwr.app import ConfigRecord

from common.array_bytes import WireError
from common.config import from_flat
from common.errors import InputError
from common.fixed_point import SCALE, ExactSum
from common.models import load_teacher
from common.nested import Tiers
from common.progress import Silent
from common.slim import Shape, cut_student
from common.wire import ClientLine, pack_reply
from server.aggregation import Rejected
from server.method import Averaging
from server.tiered import TieredSum, check_tiers

SIZES = "1/1/8@0.4,2/1/16@0.3"
TIER_OF = np.array([0, 2, 1, 0])
EXAMPLES = {0: 10, 1: 30, 2: 20, 3: 5}
DOWN = "bert.encoder.layer.0.output.dense.weight"  # (hidden 16, neurons)


@pytest.fixture(scope="module")
def tiers(tiny_teacher):
    teacher = load_teacher(tiny_teacher)
    shape = Shape.whole(teacher.config, (0, 1, 2))
    config = from_flat({"student.layers": 3, "student.tiers": SIZES})
    return Tiers(config, cut_student(teacher, shape), shape)


def update_of(tiers, client, value):
    """One client's update: the same number everywhere."""
    held = tiers[int(TIER_OF[client])].held
    return {name: np.full(shape, value, dtype=np.float32) for name, shape in held.items()}


def reply(tiers, values):
    """What a node returns that works for these clients."""
    sums = {}
    for client, value in values.items():
        tier = int(TIER_OF[client])
        sums.setdefault(tier, ExactSum(tiers[tier].held)).add(update_of(tiers, client, value), EXAMPLES[client])
    lines = [ClientLine(client, EXAMPLES[client], 0.1) for client in values]
    return pack_reply({f"update-tier-{tier}": total.compact for tier, total in sums.items()}, lines)


def intake(tiers, *parts):
    found = TieredSum(tiers, TIER_OF, EXAMPLES)
    for values in parts:
        assert found.take(reply(tiers, values), frozenset(values))[1] == {}
    return found


def test_each_entry_is_the_mean_over_those_who_hold_it(tiers):
    """Client 0 (10 examples) holds the smallest student and moves by 4, client 1 (30) the whole and moves by 2."""
    found = intake(tiers, {0: 4.0, 1: 2.0})
    update = found.update()
    assert (found.examples, len(found.lines)) == (40, 2)
    wanted = np.full((16, 32), 2.0)
    wanted[:, :8] = (10 * 4.0 + 30 * 2.0) / 40  # 2.5, where both hold it
    assert np.array_equal(update[DOWN], wanted)
    query = update["bert.encoder.layer.0.attention.self.query.weight"]  # two heads of width 8
    assert np.array_equal(query, np.repeat([[2.5], [2.0]], 8, axis=0) * np.ones((1, 16)))
    assert (update["classifier.weight"] == 2.0).all()  # of the whole student alone
    assert (update["exits.1.classifier.weight"] == 2.5).all()  # the whole's client trains it, too
    assert (update["exits.2.classifier.weight"] == 2.0).all()
    assert (update["bert.encoder.layer.2.output.dense.weight"] == 2.0).all()


def test_what_nobody_held_does_not_move(tiers):
    update = intake(tiers, {0: 4.0, 3: 1.0}).update()
    assert set(update) == set(tiers.shapes)
    wanted = np.zeros((16, 32))
    wanted[:, :8] = (10 * 4.0 + 5 * 1.0) / 15
    assert np.array_equal(update[DOWN], wanted)
    assert not update["classifier.weight"].any()
    assert not update["exits.2.classifier.weight"].any()
    assert (update["exits.1.classifier.weight"] == 3.0).all()


@pytest.mark.parametrize(
    ("strategy", "path", "moments"),
    [
        ("fedavg", [0.0, 7.0], {}),
        ("fedavgm", [0.0, 7.0], {"first": [0.0, 7.0]}),
        ("fedadagrad", [0.0, 7.0 / (50**0.5 + 1)], {"second": [1.0, 50.0]}),
        ("fedadam", [0.0, 3.5 / 6], {"first": [0.0, 3.5], "second": [1.0, 25.0]}),
        ("fedyogi", [0.0, 3.5 / (25.5**0.5 + 1)], {"first": [0.0, 3.5], "second": [1.0, 25.5]}),
    ],
)
def test_where_nobody_held_an_entry_neither_it_nor_the_rules_memory_moves(tiers, strategy, path, moments):
    """By hand, with lr = tau = 1 and both averages by halves: in round 2 alone a client holds all, and moves by 7."""
    keys = {"lr": 1.0, "tau": 1.0, "momentum": 0.5, "second-momentum": 0.5, "strategy": strategy}
    config = from_flat({"rounds": 4, **{f"server.{name}": value for name, value in keys.items()}})
    method = Averaging(SimpleNamespace(config=config), Silent(), lambda: None, lambda line: None)
    weights, memory = {name: np.zeros(shape, dtype=np.float32) for name, shape in tiers.shapes.items()}, {}
    for number, values in enumerate(({0: 1.0}, {0: 7.0, 1: 7.0}, {0: 7.0}, {3: -1.0}), start=1):
        found = intake(tiers, values)
        weights = method.step(number, weights, found.update(), found, memory)
        moved = int(number >= 2)
        for name, part in (("classifier.weight", np.s_[:]), (DOWN, np.s_[:, 8:])):
            assert weights[name][part] == pytest.approx(np.full_like(weights[name][part], path[moved]), rel=1e-7)
            assert all((memory[f"{kind}/{name}"][part] == known[moved]).all() for kind, known in moments.items())
    assert set(memory) == {f"{kind}/{name}" for kind in moments for name in tiers.shapes}
    if strategy == "fedadam":  # the smallest student is in every round: m = 0.5, 3.75, 5.375
        assert (memory[f"first/{DOWN}"][:, :8] == (5.375 - 1.0) / 2).all()


def test_the_bits_do_not_depend_on_who_came_with_whom(tiers):
    values = {0: 0.1, 1: -0.7, 2: 1e-3, 3: 1 / 3}
    one = intake(tiers, values).update()
    for parts in ([{0: 0.1}, {1: -0.7}, {2: 1e-3}, {3: 1 / 3}], [{3: 1 / 3, 1: -0.7}, {2: 1e-3, 0: 0.1}]):
        other = intake(tiers, *parts).update()
        assert all(np.array_equal(one[name], other[name]) for name in one)
    exact = 10 * np.float64(np.float32(0.1)) - 30 * np.float64(np.float32(0.7)) + 20 * np.float64(np.float32(1e-3))
    exact += 5 * np.float64(np.float32(1 / 3))
    assert abs(one[DOWN][0, 0] - exact / 65) < 4 / SCALE / 65  # one rounding of 2^-33 for each client


def test_queries_keys_and_values_side_by_side_are_each_begun(tmp_path):
    """GPT-2 keeps the three products in one array: the beginning of each is held, not the first columns."""
    import transformers as hf

    torch.manual_seed(0)
    small = {"vocab_size": 50, "n_positions": 16, "n_embd": 8, "n_layer": 2, "n_head": 2, "n_inner": 16}
    model = hf.GPT2ForSequenceClassification(hf.GPT2Config(**small, num_labels=2, pad_token_id=0))
    shape = Shape.whole(model.config, (0, 1))
    config = from_flat({"student.layers": 2, "student.tiers": "1/1/0@0.5"})
    tiers = Tiers(config, cut_student(model, shape), shape)
    total = TieredSum(tiers, np.array([0]), {0: 4})
    sums = ExactSum(tiers[0].held)
    sums.add({name: np.ones(held, dtype=np.float32) for name, held in tiers[0].held.items()}, 4)
    total.take(pack_reply({"update-tier-0": sums.compact}, [ClientLine(0, 4, 0.1)]), frozenset({0}))
    fused = total.update()["transformer.h.0.attn.c_attn.weight"]
    assert np.array_equal(fused[0], [1, 1, 1, 1, 0, 0, 0, 0] * 3)


def broken(tiers, change):
    content = reply(tiers, {0: 1.0, 1: 1.0})
    change(content)
    return content


def miscount(content):
    lines = [asdict(ClientLine(client, EXAMPLES[client] + (client == 1), 0.1)) for client in (0, 1)]
    content["clients"] = ConfigRecord({"json": json.dumps(lines)})


def huge(content):
    record = content["update-tier-2"]
    total = record[DOWN].numpy()
    record[DOWN] = type(record[DOWN])(np.full_like(total, 2**62))


def test_a_refused_reply_leaves_no_trace(tiers):
    before = intake(tiers, {2: 0.5}).update()
    for change, error in (
        (lambda content: content.pop("update-tier-0"), WireError),
        (lambda content: content.update({"update-tier-1": content["update-tier-2"]}), WireError),
        (lambda content: content.update({"update-tier-0": content["update-tier-2"]}), WireError),
        (miscount, Rejected),
        (huge, Rejected),
    ):
        found = intake(tiers, {2: 0.5})
        with pytest.raises(error):
            found.take(broken(tiers, change), frozenset({0, 1}))
        assert found.examples == 20
        assert all(np.array_equal(part, before[name]) for name, part in found.update().items())


def test_a_client_that_failed_has_no_weight(tiers):
    content = reply(tiers, {0: 4.0, 1: 2.0})
    zeros = ExactSum(tiers[0].held).compact
    failed = [replace(ClientLine(0, 0, 0.1), problem="ValueError"), ClientLine(1, 30, 0.1)]
    found = TieredSum(tiers, TIER_OF, EXAMPLES)
    content = pack_reply({"update-tier-0": zeros, "update-tier-2": _sum(tiers)}, failed)
    found.take(content, frozenset({0, 1}))
    assert (found.update()[DOWN] == 2.0).all()


def _sum(tiers):
    total = ExactSum(tiers[2].held)
    total.add(update_of(tiers, 1, 2.0), 30)
    return total.compact


@pytest.mark.parametrize("layers", ["last", "0:1", "even"])
@pytest.mark.parametrize("part", ["hidden", "relation"])
@pytest.mark.parametrize("soft", [0.0, 0.5])
def test_a_tier_without_any_loss_is_refused(tiny_teacher, part, layers, soft):
    teacher = load_teacher(tiny_teacher).config
    keys = {f"distill.{part}-weight": 1.0, f"distill.{part}-layers": layers, "distill.soft-weight": soft}
    config = from_flat({"student.layers": 2, "student.tiers": "1/0/0@0.5", "distill.hard-weight": 0.0, **keys})
    data = SimpleNamespace(clients=4, eligible=np.arange(4), task=SimpleNamespace(regression=False))
    shape = Shape.whole(teacher, (0, 3))
    if soft or layers != "last":
        check_tiers(config, shape, teacher, data)
    else:
        with pytest.raises(InputError, match=r"student.tiers = '1/0/0@0.5': the losses .* that 1 layers do not hold"):
            check_tiers(config, shape, teacher, data)
