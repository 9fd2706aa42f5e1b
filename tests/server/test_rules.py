"""Server rules against torch's optimisers, hand-worked rounds and Flower's own strategies."""

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, MetricRecord, RecordDict
from flwr.serverapp.strategy import FedAdagrad, FedAdam, FedAvgM, FedYogi
from safetensors.numpy import load_file, save_file

from common.config import from_flat, load_config
from common.errors import InputError
from common.progress import Silent
from server.method import Averaging
from server.rules import SERVER_RULES, learning_rate

SHAPES = {"layer.weight": (3, 4), "layer.bias": (4,), "scale": ()}
ROUNDS = 6


def keys(strategy, **given):
    flat = {f"server.{name.replace('_', '-')}": value for name, value in given.items()}
    return from_flat({"server.strategy": strategy, **flat}).server


def arrays(seed, spread=1.0, dtype=np.float64):
    rng = np.random.default_rng(seed)
    return {name: np.asarray(rng.normal(scale=spread, size=shape), dtype=dtype) for name, shape in SHAPES.items()}


def mean_updates(seed=0):
    """Six rounds of updates that differ a hundredfold in size: the adaptive rules must follow."""
    return [arrays(seed + number, 10.0 ** -(number % 3)) for number in range(ROUNDS)]


def follow(strategy, updates, given, state=None, weights=None):
    """The weights after each round."""
    state, weights = {} if state is None else state, weights or arrays(99, dtype=np.float32)
    found = []
    for update in updates:
        weights = SERVER_RULES[strategy](weights, update, state, given)
        found.append(weights)
    return found


def one_number(strategy, updates, **given):
    """The path of a single weight that starts at 0."""
    rounds = [{"w": np.array([update])} for update in updates]
    start = {"w": np.zeros(1, dtype=np.float32)}
    return [float(weights["w"][0]) for weights in follow(strategy, rounds, keys(strategy, **given), weights=start)]


# --- against torch ------------------------------------------------------------------------------


def torch_rounds(make_optimizer, updates, found, prepare=lambda optimizer, parameters: None):
    """What torch's optimiser does with minus the mean update as gradient, from our weights of the round before."""
    start = arrays(99, dtype=np.float32)
    parameters = {name: torch.nn.Parameter(torch.zeros(shape, dtype=torch.float64)) for name, shape in SHAPES.items()}
    optimizer = make_optimizer(parameters.values())
    prepare(optimizer, parameters.values())
    for update, before, after in zip(updates, [start, *found], found, strict=False):
        for name, parameter in parameters.items():
            parameter.data.copy_(torch.from_numpy(before[name].astype(np.float64)))
            parameter.grad = -torch.from_numpy(update[name])
        optimizer.step()
        for name, parameter in parameters.items():
            expected = parameter.detach().numpy().astype(np.float32)
            np.testing.assert_allclose(after[name], expected, rtol=2e-7, atol=1e-9)


@pytest.mark.parametrize("strategy", ["fedavg", "fedprox"])
def test_fedavg_is_sgd(strategy):
    found = follow(strategy, mean_updates(), keys(strategy, lr=0.5))
    torch_rounds(lambda parameters: torch.optim.SGD(parameters, lr=0.5), mean_updates(), found)


@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.9])
def test_fedavgm_is_sgd_with_momentum(momentum):
    found = follow("fedavgm", mean_updates(), keys("fedavgm", lr=0.3, momentum=momentum))
    torch_rounds(lambda parameters: torch.optim.SGD(parameters, lr=0.3, momentum=momentum), mean_updates(), found)


def test_fedadagrad_is_adagrad_started_at_tau_squared():
    found = follow("fedadagrad", mean_updates(), keys("fedadagrad", lr=0.1, tau=0.02))

    def adagrad(parameters):
        return torch.optim.Adagrad(parameters, lr=0.1, initial_accumulator_value=0.02**2, eps=0.02)

    torch_rounds(adagrad, mean_updates(), found)


def test_fedadam_is_adam_without_bias_correction():
    found = follow("fedadam", mean_updates(), keys("fedadam", lr=0.1, momentum=0.8, second_momentum=0.95, tau=0.02))

    def a_million_steps_in(optimizer, parameters):  # there bias correction has become 1
        for parameter in parameters:
            first, second = torch.zeros_like(parameter), torch.full_like(parameter, 0.02**2)
            optimizer.state[parameter] = {"step": torch.tensor(1e6), "exp_avg": first, "exp_avg_sq": second}

    def adam(parameters):
        return torch.optim.Adam(parameters, lr=0.1, betas=(0.8, 0.95), eps=0.02)

    torch_rounds(adam, mean_updates(), found, a_million_steps_in)


# --- by hand: a single weight from 0, lr = 1, tau = 1 and so v = 1 before round 1 -------------------


def test_hand_case_fedavg():
    assert one_number("fedavg", [1.0, -3.0, 0.25], lr=0.5) == [0.5, -1.0, -0.875]


def test_hand_case_fedavgm():
    # m: 1, 0.5 - 2 = -1.5, -0.75 + 0.25 = -0.5
    assert one_number("fedavgm", [1.0, -2.0, 0.25], momentum=0.5) == [1.0, -0.5, -1.0]


def test_hand_case_fedadagrad():
    # v: 1 + 0.75^2 = 1.25^2, 1.25^2 + 3^2 = 3.25^2; no momentum, whatever the key says
    expected = [0.75 / 2.25, 0.75 / 2.25 - 3.0 / 4.25]
    assert one_number("fedadagrad", [0.75, -3.0], lr=1.0, tau=1.0, momentum=0.9) == pytest.approx(expected, rel=1e-7)


def test_hand_case_fedadam():
    # m: 0.5, 0.25 + 3.5 = 3.75; v: 0.5 + 0.5 = 1, 0.5 + 24.5 = 5^2
    found = one_number("fedadam", [1.0, 7.0], lr=1.0, tau=1.0, momentum=0.5, second_momentum=0.5)
    assert found == [0.5 / 2, 0.25 + 3.75 / 6]


def test_hand_case_fedyogi():
    # m: 0.5, 0.25 + 2 = 2.25, 1.125 + 1 = 2.125; v: 1 (sign of 0 is 0), 1 + 8 = 3^2, 9 - 2 = 7 (falls by (1 - b2) d^2)
    found = one_number("fedyogi", [1.0, 4.0, 2.0], lr=1.0, tau=1.0, momentum=0.5, second_momentum=0.5)
    path = [0.25, 0.25 + 2.25 / 4, 0.8125 + 2.125 / (math.sqrt(7) + 1)]
    assert found == pytest.approx(path, rel=1e-7)


def test_after_one_huge_update_yogi_forgets_slower_than_adam():
    quiet = [100.0] + 20 * [0.01]
    second = {}
    for strategy in ("fedadam", "fedyogi"):
        state = {}
        follow(strategy, [{"w": np.array([update])} for update in quiet], keys(strategy), state, {"w": np.float32([0])})
        second[strategy] = float(state["second/w"][0])
    assert second["fedadam"] == pytest.approx(100.0 * 0.99**20, rel=1e-3)
    assert second["fedyogi"] == pytest.approx(100.0, rel=1e-3)


def test_adaptive_rules_do_not_divide_by_zero():
    for strategy in ("fedadam", "fedyogi", "fedadagrad"):
        still = follow(strategy, 3 * [{name: np.zeros(shape) for name, shape in SHAPES.items()}], keys(strategy))
        for name, array in arrays(99, dtype=np.float32).items():
            assert (still[-1][name] == array).all()


# --- against Flower -----------------------------------------------------------------------------


def record(weights):
    return ArrayRecord({name: Array(array) for name, array in weights.items()})


def replies(weights, update):
    """Stand-ins for two clients' messages, with 1 and 3 examples, whose weighted mean update is `update`."""
    found = []
    for examples, share in ((1, 2.5), (3, 0.5)):
        model = {name: array.astype(np.float64) + share * update[name] for name, array in weights.items()}
        content = {"arrays": record(model), "metrics": MetricRecord({"num-examples": examples})}
        found.append(SimpleNamespace(content=RecordDict(content), has_error=lambda: False))
    return found


def assert_flower_agrees(strategy, given, theirs, before_round):
    weights = {name: np.atleast_1d(array) for name, array in arrays(99, dtype=np.float32).items()}
    state = {}
    for number, found in enumerate(mean_updates(seed=7), start=1):
        update = {name: np.atleast_1d(array) for name, array in found.items()}
        before_round(theirs, number, {name: array.astype(np.float64) for name, array in weights.items()})
        expected, _ = theirs.aggregate_train(number, replies(weights, update))
        weights = SERVER_RULES[strategy](weights, update, state, given)
        for name, array in weights.items():
            np.testing.assert_allclose(array, expected[name].numpy().astype(np.float32), rtol=2e-7, atol=1e-9)


def start_at_tau_squared(theirs, number, weights):
    theirs.current_arrays = weights
    if number == 1:  # Flower starts the second moment at 0, the paper at tau^2 or more
        theirs.v_t = {name: np.full_like(array, theirs.tau**2) for name, array in weights.items()}


def test_flower_fedavgm_agrees():
    def before(theirs, number, weights):
        theirs.current_arrays = record(weights)

    theirs = FedAvgM(server_learning_rate=0.3, server_momentum=0.9)
    assert_flower_agrees("fedavgm", keys("fedavgm", lr=0.3, momentum=0.9), theirs, before)


def test_flower_fedadagrad_agrees_once_started_at_tau_squared():
    theirs = FedAdagrad(eta=0.1, tau=0.02)
    assert_flower_agrees("fedadagrad", keys("fedadagrad", lr=0.1, tau=0.02), theirs, start_at_tau_squared)


def test_flower_fedyogi_agrees_once_started_at_tau_squared():
    theirs = FedYogi(eta=0.1, beta_1=0.8, beta_2=0.95, tau=0.02)
    given = keys("fedyogi", lr=0.1, momentum=0.8, second_momentum=0.95, tau=0.02)
    assert_flower_agrees("fedyogi", given, theirs, start_at_tau_squared)


def test_flower_fedadam_agrees_once_its_bias_correction_is_undone():
    def before(theirs, number, weights):  # the paper's Algorithm 2 has none
        start_at_tau_squared(theirs, number, weights)
        theirs.eta = 0.1 * (1 - 0.8 ** (number + 1)) / math.sqrt(1 - 0.95 ** (number + 1))

    theirs = FedAdam(beta_1=0.8, beta_2=0.95, tau=0.02)
    given = keys("fedadam", lr=0.1, momentum=0.8, second_momentum=0.95, tau=0.02)
    assert_flower_agrees("fedadam", given, theirs, before)


# --- state --------------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", SERVER_RULES)
def test_a_run_cut_in_two_by_a_file_has_the_bits_of_one_run(strategy, tmp_path):
    given, updates = keys(strategy), mean_updates()
    whole = follow(strategy, updates, given)[-1]
    state = {}
    half = follow(strategy, updates[:3], given, state)[-1]
    save_file(state, tmp_path / "state.safetensors")
    again = load_file(tmp_path / "state.safetensors")
    rest = follow(strategy, updates[3:], given, again, half)[-1]
    assert all(rest[name].tobytes() == whole[name].tobytes() for name in SHAPES)


@pytest.mark.parametrize(
    ("strategy", "kinds"),
    [
        ("fedavg", ()),
        ("fedprox", ()),
        ("fedavgm", ("first",)),
        ("fedadagrad", ("second",)),
        ("fedadam", ("first", "second")),
        ("fedyogi", ("first", "second")),
    ],
)
def test_state_is_flat_float64_and_weights_are_float32(strategy, kinds):
    state = {}
    found = follow(strategy, mean_updates(), keys(strategy), state)[-1]
    assert set(state) == {f"{kind}/{name}" for kind in kinds for name in SHAPES}
    for name, shape in SHAPES.items():
        assert (found[name].dtype, found[name].shape) == (np.float32, shape)
        assert all(state[f"{kind}/{name}"].dtype == np.float64 for kind in kinds)
        assert all(state[f"{kind}/{name}"].shape == shape for kind in kinds)


@pytest.mark.parametrize("strategy", SERVER_RULES)
def test_inputs_are_left_alone(strategy):
    state, weights, updates = {}, arrays(99, dtype=np.float32), mean_updates()
    follow(strategy, updates[:1], keys(strategy), state)
    for array in [*weights.values(), *updates[0].values(), *state.values()]:
        array.flags.writeable = False  # as arrays from a file may be
    SERVER_RULES[strategy](weights, updates[0], state, keys(strategy))


def test_weights_are_rounded_once():
    # 1 + 2^-24 is half way between two float32: a step rounded on its own would be lost
    start, step = {"w": np.float32([1.0])}, {"w": np.array([2.0**-24 + 2.0**-40])}
    assert SERVER_RULES["fedavg"](start, step, {}, keys("fedavg"))["w"][0] == np.float32(1.0) + np.float32(2.0**-23)


# --- the rate ---------------------------------------------------------------------------------------


def rates(rounds, **given):
    return [learning_rate(keys("fedadam", lr=0.8, **given), number, rounds) for number in range(1, rounds + 1)]


def test_a_rate_rises_in_even_steps_and_falls_to_a_tenth():
    assert rates(4) == [0.8] * 4
    assert rates(6, warmup_rounds=3) == pytest.approx([0.2, 0.4, 0.6, 0.8, 0.8, 0.8])
    assert rates(5, lr_decay="linear") == pytest.approx([0.8, 0.62, 0.44, 0.26, 0.08])
    assert rates(6, warmup_rounds=3, lr_decay="linear") == pytest.approx([0.2, 0.4, 0.6, 0.8, 0.44, 0.08])
    assert rates(4, warmup_rounds=3, lr_decay="linear") == pytest.approx([0.2, 0.4, 0.6, 0.8])


def test_a_warm_up_ends_before_the_run_does():
    with pytest.raises(InputError, match=r"server\.warmup-rounds = 4: rounds = 4; give fewer than that"):
        load_config(None, ["rounds=4", "server.warmup-rounds=4"])


def test_a_round_takes_its_step_at_its_rate():
    settings = ["server.strategy=fedavg", "server.lr=1", "server.warmup-rounds=1", "server.lr-decay=linear"]
    federation: Any = SimpleNamespace(config=load_config(None, ["rounds=3", *settings]))
    method = Averaging(federation, Silent(), lambda: None, lambda line: None)
    intake: Any = None  # a plain rule looks at the update alone
    moved = [method.step(number, {"w": np.zeros(1, np.float32)}, {"w": np.ones(1)}, intake, {}) for number in (1, 2, 3)]
    assert [float(weights["w"][0]) for weights in moved] == pytest.approx([0.5, 1.0, 0.1])
