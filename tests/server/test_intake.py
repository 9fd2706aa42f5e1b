"""Three ways to take a round's replies in: the same FedAvg from each, and one bad update costs only its own client."""

from itertools import permutations

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord

from common.array_bytes import WireError
from common.compression import Wire, compress, decompress
from common.config import from_flat
from common.fixed_point import ExactSum, Rows
from common.wire import ClientLine, own_update, pack_arrays, pack_reply
from server.aggregation import Rejected
from server.intake import Collected, Streamed, Summed, intake_for

SHAPES = {"a": (2, 3), "b": (4,), "c": ()}
SIZES = {0: 5, 1: 17, 2: 3, 3: 101, 4: 12}
FP32 = Wire("fp32", 0.02, 0.9)


def keys(**given):
    return from_flat({f"server.{name.replace('_', '-')}": value for name, value in given.items()}).server


def updates(seed=0, scale=1e-2):
    rng = np.random.default_rng(seed)
    return {
        client: {name: (scale * rng.normal(size=shape)).astype(np.float32) for name, shape in SHAPES.items()}
        for client in SIZES
    }


def lines(clients, sizes=SIZES, problems=()):
    return [
        ClientLine(client, 0, 0.1, problem="OSError") if client in problems else ClientLine(client, sizes[client], 0.1)
        for client in clients
    ]


def packed(found, clients, sizes=SIZES):
    """A reply with the sum of some clients' updates."""
    total = ExactSum(SHAPES)
    for client in clients:
        total.add(found[client], sizes[client])
    return pack_reply({"update": total.totals}, lines(clients, sizes))


def own(found, clients, sizes=SIZES, wire=FP32, **changed):
    """A reply with each client's own update; ``changed`` arrays replace some of client 1's."""
    rng = np.random.default_rng(0)
    groups = {own_update(client): compress(found[client], wire, rng) for client in clients}
    if changed:
        groups[own_update(1)] = {**groups[own_update(1)], **changed}
    return pack_reply(groups, lines(clients, sizes))


def intakes(sizes=SIZES, rule="median", **given):
    """One of each kind that takes own updates."""
    return Streamed(keys(**given), FP32, SHAPES, sizes), Collected(keys(strategy=rule, **given), FP32, SHAPES, sizes)


def take_all(intake, replies):
    for content, clients in replies:
        _, refused = intake.take(content, frozenset(clients))
        assert not refused
    return intake


def bits(update):
    assert {name: array.shape for name, array in update.items()} == SHAPES
    assert all(array.dtype == np.float64 for array in update.values())
    return b"".join(update[name].tobytes() for name in sorted(update))


# --- the same update from each ------------------------------------------------------------------


def test_the_keys_decide_how_updates_are_taken():
    for given, kind in (
        ({}, Summed),
        ({"strategy": "fedadam"}, Summed),
        ({"packing": "off"}, Streamed),
        ({"wire": "int8"}, Streamed),
        ({"norm_bound": 1.0}, Streamed),
        ({"strategy": "median"}, Collected),
        ({"strategy": "krum", "wire": "int8", "norm_bound": 1.0}, Collected),
    ):
        assert type(intake_for(keys(**given), FP32, SHAPES, SIZES)) is kind


GROUPINGS = [[[0, 1, 2, 3, 4]], [[0], [1], [2], [3], [4]], [[3, 1], [4, 0, 2]], [[2], [0, 4, 3, 1]]]


def test_added_up_by_nodes_or_by_the_server_fedavg_has_the_same_bits_in_any_order_and_grouping():
    found, seen = updates(), set()
    for grouping in GROUPINGS:
        for order in list(permutations(grouping))[:24]:
            summed = take_all(Summed(SHAPES, SIZES), [(packed(found, group), group) for group in order])
            streamed = take_all(Streamed(keys(), FP32, SHAPES, SIZES), [(own(found, group), group) for group in order])
            for intake in (summed, streamed):
                seen.add(bits(intake.update()))
                assert intake.examples == sum(SIZES.values()) == 138
                assert sorted(line.client for line in intake.lines) == [0, 1, 2, 3, 4]
    assert len(seen) == 1
    weights = list(SIZES.values())
    for name in SHAPES:
        mean = np.average([found[client][name].astype(np.float64) for client in SIZES], axis=0, weights=weights)
        np.testing.assert_allclose(summed.update()[name], mean, rtol=1e-6, atol=1e-9)


def test_a_rule_that_trims_nothing_gives_fedavg_too_when_all_weigh_the_same():
    """On numbers with few bits, of four clients, every sum and the division are exact."""
    sizes = dict.fromkeys(range(4), 8)
    rng = np.random.default_rng(0)
    found = {
        client: {name: np.float32(rng.integers(-64, 64, shape) / 1024) for name, shape in SHAPES.items()}
        for client in sizes
    }
    streamed, collected = intakes(sizes, "trimmed-mean", byzantine=0)
    summed, seen = Summed(SHAPES, sizes), set()
    for group in ([2], [0, 3], [1]):
        summed.take(packed(found, group, sizes), frozenset(group))
        for intake in (streamed, collected):
            intake.take(own(found, group, sizes), frozenset(group))
    for intake in (summed, streamed, collected):
        seen.add(bits(intake.update()))
        assert intake.examples == 32
    assert len(seen) == 1


def test_rows_of_an_array_in_a_nodes_sum_count_as_the_whole():
    shapes = {"words": (5, 2)}
    rows = Rows(np.array([1, 4]), np.array([[2**32, 0], [0, 3 * 2**32]]))
    intake = Summed(shapes, {0: 2, 1: 2})
    intake.take(pack_reply({"update": {"words": rows}}, lines([0], {0: 2})), frozenset({0}))
    intake.take(pack_reply({"update": {"words": rows.dense((5, 2))}}, lines([1], {1: 2})), frozenset({1}))
    assert intake.update()["words"].tolist() == [[0, 0], [0.5, 0], [0, 0], [0, 0], [0, 1.5]]


def test_nobodys_update_is_no_update():
    for intake in (Summed(SHAPES, SIZES), *intakes()):
        assert (intake.examples, intake.lines) == (0, [])
        with pytest.raises(ValueError):
            intake.update()


def test_a_robust_rule_that_has_too_few_updates_says_so():
    collected = Collected(keys(strategy="krum", byzantine=1), FP32, SHAPES, SIZES)
    collected.take(own(updates(), [0, 1, 2, 3]), frozenset(range(4)))
    with pytest.raises(ValueError, match="4 updates came; krum needs at least 2 x 1 \\+ 3 = 5"):
        collected.update()


# --- one bad update -----------------------------------------------------------------------------


def header(text, data=b""):
    raw = text.encode() + b"\n"
    return b"\x93NUMPY\x01\x00" + len(raw).to_bytes(2, "little") + raw + data


def hostile(text, data):
    return Array(dtype="float32", shape=(4,), stype="numpy.ndarray", data=header(text, data))


NAN, INF = np.array([0, np.nan, 0, 0], np.float32), np.array([0, 0, 0, -np.inf], np.float32)
BAD = {
    "NaN": {"b|values": NAN},
    "infinite": {"b|values": INF},
    "NaN alone": {"c|values": np.array(np.nan, dtype=np.float32)},
    "other shape": {"b|values": np.zeros(5, np.float32)},
    "one number for all": {"b|values": np.ones(1, np.float32)},
    "other kind": {"b|values": np.zeros(4, np.float64)},
    "whole numbers": {"b|values": np.zeros(4, np.int32)},
    "unknown array": {"d|values": np.zeros(4, np.float32)},
    "part of another wire": {"b|scale": np.zeros(1, np.float32)},
}


def check_that_only_client_1_is_refused(content, intake, what=""):
    """And that it leaves no trace: the update is that of the others alone."""
    clients = frozenset(SIZES)
    found, refused = intake.take(content, clients)
    assert sorted(line.client for line in found) == sorted(clients)
    assert list(refused) == [1]
    assert what in refused[1]
    assert refused[1].isprintable()
    assert sorted(line.client for line in intake.lines) == [0, 2, 3, 4]
    assert intake.examples == 138 - 17
    others = intakes()[isinstance(intake, Collected)]
    others.take(own(updates(), [0, 2, 3, 4]), frozenset([0, 2, 3, 4]))
    assert bits(intake.update()) == bits(others.update())


@pytest.mark.parametrize("kind", BAD)
@pytest.mark.parametrize("which", [0, 1], ids=["streamed", "collected"])
def test_a_bad_update_refuses_its_own_client_only(kind, which):
    check_that_only_client_1_is_refused(own(updates(), SIZES, **BAD[kind]), intakes()[which])


@pytest.mark.parametrize("which", [0, 1], ids=["streamed", "collected"])
@pytest.mark.parametrize("examples", [0, 16, 18, 2**31 - 1])
def test_a_wrong_count_refuses_its_own_client_only(examples, which):
    content = own(updates(), SIZES, SIZES | {1: examples})
    check_that_only_client_1_is_refused(content, intakes()[which], f"client 1 counts {examples} examples; it has 17")


@pytest.mark.parametrize("which", [0, 1], ids=["streamed", "collected"])
def test_an_update_that_is_not_there_or_lacks_an_array_refuses_its_own_client_only(which):
    content = own(updates(), SIZES)
    del content[own_update(1)]
    check_that_only_client_1_is_refused(content, intakes()[which], "not there")
    content = own(updates(), SIZES)
    del content[own_update(1)]["c|values"]
    check_that_only_client_1_is_refused(content, intakes()[which], "c|values")


@pytest.mark.parametrize("which", [0, 1], ids=["streamed", "collected"])
@pytest.mark.parametrize(
    ("text", "data"),
    [
        ("{'descr': '<f4', 'fortran_order': False, 'shape': (5000000000000,)}", b""),
        ("{'descr': '<f4', 'fortran_order': False, 'shape': (4, True)}", bytes(16)),
        ("{'descr': '<f4', 'fortran_order': False, 'shape': (0, 1180591620717411303424)}", b""),
        ("{'descr': '|O', 'fortran_order': False, 'shape': (4,)}", bytes(32)),
        ("no header", b""),
    ],
    ids=["huge", "True for 1", "empty and huge", "objects", "none"],
)
def test_hostile_bytes_refuse_their_own_client_only(text, data, which):
    content = own(updates(), SIZES)
    content[own_update(1)] = ArrayRecord({**content[own_update(1)], "b|values": hostile(text, data)})
    check_that_only_client_1_is_refused(content, intakes()[which])


@pytest.mark.parametrize("which", [0, 1], ids=["streamed", "collected"])
def test_a_name_that_plays_with_the_terminal_refuses_its_own_client_in_words_that_do_not(which):
    content = own(updates(), SIZES)
    content[own_update(1)] = ArrayRecord({**content[own_update(1)], "\x1b[2J": hostile("no header", b"")})
    check_that_only_client_1_is_refused(content, intakes()[which])


def test_a_value_too_large_to_add_up_refuses_its_own_client_only():
    big = updates()
    big[1] = {name: np.full(shape, 1e30, dtype=np.float32) for name, shape in SHAPES.items()}
    content = own(updates(), [0, 2, 3, 4])
    content[own_update(1)] = pack_arrays({f"{name}|values": array for name, array in big[1].items()})
    content["clients"] = pack_reply({}, lines(SIZES))["clients"]
    check_that_only_client_1_is_refused(content, intakes()[0])


@pytest.mark.parametrize("which", [0, 1], ids=["streamed", "collected"])
def test_a_client_with_a_problem_has_no_part_and_no_record(which):
    clients = [0, 2, 3, 4]
    content = own(updates(), clients)
    content["clients"] = pack_reply({}, lines(SIZES, problems=[1]))["clients"]
    intake = intakes()[which]
    found, refused = intake.take(content, frozenset(SIZES))
    assert (len(found), refused, intake.examples) == (5, {}, 121)
    with pytest.raises(WireError, match="unexpected records: 1"):
        content[own_update(1)] = content[own_update(0)]
        intakes()[which].take(content, frozenset(SIZES))


# --- a bad reply --------------------------------------------------------------------------------


@pytest.mark.parametrize("which", [0, 1], ids=["streamed", "collected"])
def test_a_reply_with_another_clients_update_is_refused_whole(which):
    intake = intakes()[which]
    content = own(updates(), [0, 1, 2])
    content["clients"] = pack_reply({}, lines([0, 1]))["clients"]
    with pytest.raises(WireError, match="unexpected records: 1"):
        intake.take(content, frozenset([0, 1]))
    with pytest.raises(WireError, match="not one for each client that was asked"):
        intake.take(own(updates(), [0, 1, 2]), frozenset([0, 1]))
    with pytest.raises(WireError, match="unexpected records: 1"):
        content = own(updates(), [0, 1])
        content["update"] = pack_arrays({"a": np.zeros(1)})
        intake.take(content, frozenset([0, 1]))
    assert (intake.examples, intake.lines) == (0, [])


def test_a_nodes_sum_with_anything_wrong_is_refused_whole_and_leaves_no_trace():
    found = updates()
    intake = Summed(SHAPES, SIZES)
    intake.take(packed(found, [0, 4]), frozenset([0, 4]))
    before = bits(intake.update())
    good = packed(found, [1, 2])
    for name, array in (("a", np.zeros((3, 2), np.int64)), ("b", np.zeros(4)), ("d", np.zeros(1, np.int64))):
        content = packed(found, [1, 2])
        content["update"] = ArrayRecord({**good["update"], name: Array(array)})
        with pytest.raises(WireError):
            intake.take(content, frozenset([1, 2]))
    with pytest.raises(Rejected, match="client 1 counts 18 examples"):
        intake.take(packed(found, [1, 2], SIZES | {1: 18}), frozenset([1, 2]))
    with pytest.raises(WireError, match="unexpected records"):
        intake.take(own(found, [1, 2]), frozenset([1, 2]))
    assert bits(intake.update()) == before
    assert intake.examples == 17
    assert sorted(line.client for line in intake.lines) == [0, 4]


# --- robust rules and bounds --------------------------------------------------------------------


@pytest.mark.parametrize("rule", ["median", "trimmed-mean", "krum", "multi-krum"])
def test_a_robust_rule_sees_the_clients_in_their_order_not_in_that_of_arrival(rule):
    found, seen = updates(scale=1.0), set()
    for order in permutations(SIZES):
        intake = Collected(keys(strategy=rule), FP32, SHAPES, SIZES)
        take_all(intake, [(own(found, [client]), [client]) for client in order])
        seen.add(bits(intake.update()))
    assert len(seen) == 1


def test_of_updates_that_krum_likes_equally_the_first_clients_is_taken():
    """Two pairs of equal updates, as far from each other as from the fifth: ids decide, not arrival."""
    signs = {0: 1.0, 1: -1.0, 2: 1.0, 3: -1.0, 4: 0.0}
    found = {
        client: {name: np.full(shape, sign, dtype=np.float32) for name, shape in SHAPES.items()}
        for client, sign in signs.items()
    }
    for order in ([1, 0, 2, 3, 4], [3, 1, 4, 2, 0]):
        intake = Collected(keys(strategy="krum"), FP32, SHAPES, SIZES)
        take_all(intake, [(own(found, [client]), [client]) for client in order])
        assert intake.update()["c"] == 1.0


def test_a_clients_update_is_scaled_down_to_the_norm_bound_before_it_weighs_in():
    """Norms 5 and 0.5, bound 1: the first counts a fifth of itself, the second as it is."""
    shapes, sizes = {"a": (1,), "b": (1,)}, {0: 30, 1: 10}
    found = {
        0: {"a": np.array([3.0], np.float32), "b": np.array([4.0], np.float32)},
        1: {"a": np.array([-0.5], np.float32), "b": np.array([0.0], np.float32)},
    }
    intake = intake_for(keys(norm_bound=1.0), FP32, shapes, sizes)
    intake.take(own(found, [0, 1], sizes), frozenset([0, 1]))
    assert float(intake.update()["a"][0]) == pytest.approx((30 * 0.6 - 10 * 0.5) / 40, abs=1e-7)
    assert float(intake.update()["b"][0]) == pytest.approx(30 * 0.8 / 40, abs=1e-7)
    median = intake_for(keys(strategy="median", norm_bound=1.0), FP32, shapes, sizes)
    median.take(own(found, [0, 1], sizes), frozenset([0, 1]))
    assert float(median.update()["b"][0]) == pytest.approx(0.4, abs=1e-7)


def test_within_the_bound_nothing_changes():
    found = updates()
    bounded = Streamed(keys(norm_bound=1e6), FP32, SHAPES, SIZES)
    take_all(bounded, [(own(found, SIZES), SIZES)])
    assert bits(bounded.update()) == bits(take_all(Summed(SHAPES, SIZES), [(packed(found, SIZES), SIZES)]).update())


@pytest.mark.parametrize("kind", ["fp16", "int8", "topk", "svd"])
def test_what_travelled_with_loss_is_added_up_as_it_arrives(kind):
    wire, found = Wire(kind, 0.5, 0.9), updates()
    rng = np.random.default_rng(0)
    arrived = {client: decompress(compress(found[client], wire, rng), SHAPES, wire) for client in SIZES}
    intake = intake_for(keys(wire=kind), wire, SHAPES, SIZES)
    take_all(intake, [(own(found, SIZES, wire=wire), SIZES)])
    assert bits(intake.update()) == bits(take_all(Summed(SHAPES, SIZES), [(packed(arrived, SIZES), SIZES)]).update())
    with pytest.raises(WireError):
        intake.take(packed(found, [0]), frozenset([0]))
