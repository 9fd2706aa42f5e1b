"""The noise scale is what it is estimated to be; a batch grows with it, never down, never too fast, the same again."""

import json
from dataclasses import asdict

import numpy as np
import pytest

from common.compression import Wire, compress
from common.config import from_flat
from common.errors import InputError
from common.fixed_point import ExactSum, NotFinite, Rows
from common.noise import SQUARES, SQUARES_SHAPE, squares_of
from common.wire import ClientLine, Instruction, own_update, pack, pack_reply, unpack_instruction
from server.growth import Growth, estimate
from server.intake import intake_for

SHAPES = {"a": (40, 7), "b": (9,), "c": ()}
SIZES = {0: 5, 1: 17, 2: 3}
FP32 = Wire("fp32", 0.02, 0.9)


def test_two_clients_by_hand():
    """Updates (3, 0) and (1, 0) of one example each: |d|^2 = 4, a = 5, so tr(Sigma) = 2 and |G|^2 = 3."""
    mean = {"a": np.array([2.0]), "b": np.array([0.0])}
    assert estimate(mean, 5.0, 2, 2) == (3.0, 2.0)
    # the paper's formulas with batches of 1 and 2 examples
    assert (2 * 4 - 1 * 5) / (2 - 1) == 3.0
    assert (5 - 4) / (1 / 1 - 1 / 2) == 2.0


def test_unequal_clients_by_hand():
    """4 from one example and 2 from three: d = 10/4, a = 28/4, so tr(Sigma) = 4 (7 - 6.25), |G|^2 = 12.5 - 7."""
    assert estimate({"a": np.array(2.5)}, 7.0, 2, 4) == (5.5, 3.0)


@pytest.mark.parametrize("sizes", [[10] * 8, [1, 2, 3, 50, 4, 30, 7, 9]], ids=["equal", "unequal"])
def test_the_estimates_have_no_bias(sizes):
    """Against known |G|^2 and tr(Sigma), within four standard errors of 3,000 draws."""
    rng, sizes = np.random.default_rng(0), np.array(sizes)
    truth = np.array([0.3, -0.2, 0.1, 0.0, 0.05])
    deviations = np.array([1.0, 2.0, 0.5, 0.1, 3.0])
    found = []
    for _ in range(3000):
        updates = truth + deviations * rng.normal(size=(len(sizes), 5)) / np.sqrt(sizes)[:, None]
        mean, square = np.average(updates, axis=0, weights=sizes), np.average((updates**2).sum(1), weights=sizes)
        found.append(estimate({"w": mean}, square, len(sizes), sizes.sum()))
    found = np.array(found)
    errors = found.std(axis=0) / np.sqrt(len(found))
    expected = [(truth**2).sum(), (deviations**2).sum()]
    assert (np.abs(found.mean(axis=0) - expected) < 4 * errors).all()
    assert (errors < [0.02, 0.2]).all()


def rounds(growth, signals, noises):
    """Rounds whose estimates are these; the budget of each next one."""
    budgets = []
    for signal, noise in zip(signals, noises, strict=True):  # of 2 clients, 10 examples
        growth.note({"w": np.array(np.sqrt(signal + noise / 10))}, signal + noise / 5, 2, 10)
        budgets.append(growth.budget)
    return budgets


def test_the_budget_grows_as_the_noise_scale_does():
    """Signals 1, 1, 0.05 smoothed: 0.3, 0.51, 0.372; noises 10 each: 3, 5.1, 6.57; so scales of 10, 10, 17.66."""
    growth = Growth(start=1000, most=8000)
    assert growth.note({"w": np.array(np.sqrt(2.0))}, 3.0, 2, 10) == {
        "token_budget": 1000,
        "noise_scale": pytest.approx(10.0),
    }
    assert rounds(growth, [1.0, 0.05], [10.0, 10.0])[-1] == 1766
    assert growth.scale == pytest.approx(6.57 / 0.372)


def test_it_never_falls_never_more_than_doubles_and_ends_at_the_most():
    growth = Growth(start=1000, most=5000)
    budgets = rounds(
        growth, [1.0, 1e-4, 1e-4, 1e-4, 1e-4, 1.0, 1.0, 1.0, 1.0], [1.0, 9.0, 30.0, 90.0, 900.0, *[0.1] * 4]
    )
    assert budgets[0] == 1000
    assert budgets[1:5] == [2000, 4000, 5000, 5000]
    assert budgets[5:] == [5000] * 4


@pytest.mark.parametrize(("signal", "noise"), [(-1.0, 100.0), (1.0, -1.0)])
def test_without_a_noise_scale_the_budget_stays(signal, noise):
    growth = Growth(start=1000, most=5000)
    large = signal + noise / 10
    told = growth.note({"w": np.array(np.sqrt(large))}, signal + noise / 5, 2, 10)
    assert told == {"token_budget": 1000, "noise_scale": None}
    assert growth.note({"w": np.array(1.0)}, 1.0, 1, 10) == told  # one client says nothing of noise
    assert growth.budget == 1000
    assert growth.first == 0.0


def test_what_a_checkpoint_keeps_continues_with_the_same_bits():
    rng = np.random.default_rng(1)
    signals, noises = rng.uniform(0.1, 1.0, 12) * 0.7 ** np.arange(12), rng.uniform(1.0, 2.0, 12)
    whole = Growth(start=100, most=9000)
    expected = rounds(whole, signals, noises)
    assert expected[-1] > expected[0]
    part = Growth(start=100, most=9000)
    rounds(part, signals[:5], noises[:5])
    part = Growth(**json.loads(json.dumps(asdict(part))))
    assert rounds(part, signals[5:], noises[5:]) == expected[5:]
    assert part == whole


# --- how the squares travel -------------------------------------------------------------------------


def updates():
    rng = np.random.default_rng(0)
    found = {
        client: {name: rng.normal(size=shape).astype(np.float32) for name, shape in SHAPES.items()} for client in SIZES
    }
    for client, update in found.items():
        update["a"][: 30 - client] = 0.0
    return found


def test_the_squared_norm_of_some_rows_has_the_bits_of_the_whole():
    for update in updates().values():
        index = np.flatnonzero(update["a"].any(axis=1))
        rows = {**update, "a": Rows(index, update["a"][index])}
        whole, some = squares_of(update)[SQUARES], squares_of(rows)[SQUARES]
        assert whole.tobytes() == some.tobytes()
        assert whole.shape == SQUARES_SHAPE[SQUARES]
        assert float(whole[0]) == pytest.approx(sum(float((part.astype(float) ** 2).sum()) for part in update.values()))


@pytest.mark.parametrize("value", [np.nan, np.inf, 3e38])
def test_an_update_whose_square_is_no_number_is_refused(value):
    total = ExactSum(SQUARES_SHAPE)
    with pytest.raises(NotFinite):
        total.add(squares_of({"a": np.array([value], dtype=np.float32)}), 1)


def test_the_mean_square_has_the_same_bits_from_any_packing():
    found, seen = updates(), set()
    lines = [ClientLine(client, size, 0.1) for client, size in SIZES.items()]
    for groups in ([[0, 1, 2]], [[2], [0, 1]], [[1], [2], [0]]):
        intake = intake_for(from_flat({}).server, FP32, SHAPES, SIZES, squares=True)
        for group in groups:
            total = ExactSum({**SHAPES, **SQUARES_SHAPE})
            for client in group:
                total.add(found[client] | squares_of(found[client]), SIZES[client])
            intake.take(pack_reply({"update": total.compact}, [lines[client] for client in group]), frozenset(group))
        seen.add(intake.update()[SQUARES].tobytes())
    intake = intake_for(from_flat({"server.packing": "off"}).server, FP32, SHAPES, SIZES, squares=True)
    for client in SIZES:  # own updates: the server has their norms without being told
        sent = compress(found[client], FP32, np.random.default_rng(0))
        intake.take(pack_reply({own_update(client): sent}, [lines[client]]), frozenset([client]))
    seen.add(intake.update()[SQUARES].tobytes())
    assert len(seen) == 1
    squares = [float(squares_of(found[client])[SQUARES][0]) for client in SIZES]
    assert float(intake.update()[SQUARES][0]) == pytest.approx(np.average(squares, weights=list(SIZES.values())))


def test_a_budget_travels_only_where_there_is_one():
    plain = Instruction("0" * 16, 1, "{}", (1,), (0,), "t", "h", "d", "s", "h")
    assert "budget" not in pack(plain, None)["instruction"]["json"]
    assert unpack_instruction(pack(plain, None)) == plain
    grown = Instruction("0" * 16, 1, "{}", (1,), (0,), "t", "h", "d", "s", "h", token_budget=2048)
    assert unpack_instruction(pack(grown, None)) == grown
    for wrong in (-1, 2.5, True, "9"):
        bad = Instruction("0" * 16, 1, "{}", (1,), (0,), "t", "h", "d", "s", "h", token_budget=wrong)
        with pytest.raises(ValueError, match="token budget"):
            unpack_instruction(pack(bad, None))


@pytest.mark.parametrize(
    ("keys", "named"),
    [
        ({}, "client.lr-decay"),
        ({"client.lr-decay": "constant", "client.max-token-budget": 512}, "client.max-token-budget = 512"),
        ({"client.lr-decay": "constant", "server.strategy": "median"}, "server.strategy = 'median'"),
    ],
)
def test_keys_that_do_not_fit_growth_are_named(keys, named):
    with pytest.raises(InputError, match=named):
        from_flat({"client.grow-batch": True, **keys})
