"""Server rules: from a round's weights and its mean update to the next round's weights.

With w the weights, d = sum_c n_c (w_c - w) / sum_c n_c the mean update, eta = `learning_rate`, beta 1 =
server.momentum, beta 2 = server.second-momentum and tau = server.tau:

    fedavg, fedprox   w <- w + eta d                             McMahan et al. 2017, https://arxiv.org/abs/1602.05629
    fedavgm           m <- beta1 m + d                           Hsu et al. 2019, https://arxiv.org/abs/1909.06335
                      w <- w + eta m
    fedadagrad        v <- v + d^2                               Reddi et al. 2021, https://arxiv.org/abs/2003.00295,
                      w <- w + eta d / (sqrt(v) + tau)           Algorithm 2
    fedadam, fedyogi  m <- beta1 m + (1 - beta1) d               the same
                      v <- beta2 v + (1 - beta2) d^2             fedadam
                      v <- v - (1 - beta2) d^2 sign(v - d^2)     fedyogi
                      w <- w + eta m / (sqrt(v) + tau)

As in Algorithm 2, m starts at 0 and v at tau^2 (the paper asks for at least that), there is no bias
correction, and tau stands outside the root. FedAdagrad has no momentum, as in the paper's experiments.
FedProx (Li et al. 2020, https://arxiv.org/abs/1812.06127) differs from FedAvg only in the client's loss.

All arithmetic is float64, element by element: the same bits on every machine that follows IEEE 754. The
weights are rounded to float32 once, at the end.

In a mixed federation w, m and v stay as they are in every entry that nobody of the round's cohort holds: it has no
update, which is not one of 0, after which momentum would go on (`of_the_held`).
"""

from collections.abc import Callable, Mapping

import numpy as np
from numpy.typing import NDArray

from common.keys import ServerKeys

Arrays = dict[str, NDArray[np.float64]]
Weights = Mapping[str, NDArray[np.float32]]
MeanUpdate = Mapping[str, NDArray[np.float64]]
Held = Mapping[str, NDArray[np.bool_]]
Rule = Callable[[Weights, MeanUpdate, Arrays, ServerKeys], dict[str, NDArray[np.float32]]]
_SecondMoment = Callable[[NDArray[np.float64], NDArray[np.float64], ServerKeys], NDArray[np.float64]]

# Every rule takes (weights, mean update, state, keys): arrays of any shapes, by the same names in the first two.
# `state` is the server optimiser's memory, float64 arrays named first/NAME and second/NAME: empty before round 1,
# brought up to date in place, to be handed to the next round. Its arrays are replaced, never written into, so
# that they may come read-only from a file.


def learning_rate(keys: ServerKeys, number: int, rounds: int) -> float:
    """eta of a round, counted from 1: it rises in even steps over the warm-up, and may fall from there."""
    first = keys.warmup_rounds + 1
    if number < first:
        return keys.lr * number / first
    passed = (number - first) / (rounds - first) if rounds > first else 0.0
    return keys.lr * (1.0 - 0.9 * passed if keys.lr_decay == "linear" else 1.0)


def fedavg(
    weights: Weights, mean_update: MeanUpdate, state: Arrays, keys: ServerKeys
) -> dict[str, NDArray[np.float32]]:
    """w + lr d; keeps no state. McMahan et al. 2017."""
    return {name: _moved(weight, keys.lr * mean_update[name]) for name, weight in weights.items()}


def fedavgm(
    weights: Weights, mean_update: MeanUpdate, state: Arrays, keys: ServerKeys
) -> dict[str, NDArray[np.float32]]:
    """w + lr m with m <- momentum m + d, kept as first/NAME. Hsu et al. 2019."""
    found = {}
    for name, weight in weights.items():
        first = keys.momentum * state.get(f"first/{name}", np.float64(0.0)) + mean_update[name]
        state[f"first/{name}"] = np.asarray(first)
        found[name] = _moved(weight, keys.lr * first)
    return found


def fedadagrad(
    weights: Weights, mean_update: MeanUpdate, state: Arrays, keys: ServerKeys
) -> dict[str, NDArray[np.float32]]:
    """w + lr d / (sqrt(v) + tau) with v <- v + d^2, kept as second/NAME. Reddi et al. 2021."""
    found = {}
    for name, weight in weights.items():
        update = mean_update[name]
        second = _second(state, name, keys) + np.square(update)
        state[f"second/{name}"] = np.asarray(second)
        found[name] = _moved(weight, keys.lr * update / (np.sqrt(second) + keys.tau))
    return found


def fedadam(
    weights: Weights, mean_update: MeanUpdate, state: Arrays, keys: ServerKeys
) -> dict[str, NDArray[np.float32]]:
    """w + lr m / (sqrt(v) + tau), m and v moving averages of d and d^2, both kept. Reddi et al. 2021."""
    return _with_two_moments(weights, mean_update, state, keys, _adam_second_moment)


def fedyogi(
    weights: Weights, mean_update: MeanUpdate, state: Arrays, keys: ServerKeys
) -> dict[str, NDArray[np.float32]]:
    """As `fedadam`, but v moves towards d^2 by at most (1 - second-momentum) d^2. Reddi et al. 2021."""
    return _with_two_moments(weights, mean_update, state, keys, _yogi_second_moment)


SERVER_RULES: dict[str, Rule] = {
    "fedavg": fedavg,
    "fedprox": fedavg,
    "fedavgm": fedavgm,
    "fedadam": fedadam,
    "fedyogi": fedyogi,
    "fedadagrad": fedadagrad,
}


def of_the_held(
    rule: Rule, weights: Weights, mean_update: MeanUpdate, state: Arrays, keys: ServerKeys, *, held: Held
) -> dict[str, NDArray[np.float32]]:
    """A rule's step and memory in the entries that some client held; the others keep both as they were.

    Args:
        held: of arrays, by name, the entries that were held; of an array that it does not name all were.
    """
    before = dict(state)
    found = rule(weights, mean_update, state, keys)
    for name, there in held.items():
        for kind, start in (("first", 0.0), ("second", keys.tau**2)):
            if (kept := f"{kind}/{name}") in state:  # a rule without a memory moves nothing by an update of 0
                state[kept] = np.where(there, state[kept], before.get(kept, start))
                found[name] = np.where(there, found[name], weights[name])
    return found


def _adam_second_moment(
    second: NDArray[np.float64], square: NDArray[np.float64], keys: ServerKeys
) -> NDArray[np.float64]:
    return keys.second_momentum * second + (1.0 - keys.second_momentum) * square


def _yogi_second_moment(
    second: NDArray[np.float64], square: NDArray[np.float64], keys: ServerKeys
) -> NDArray[np.float64]:
    return second - (1.0 - keys.second_momentum) * square * np.sign(second - square)


def _with_two_moments(
    weights: Weights, mean_update: MeanUpdate, state: Arrays, keys: ServerKeys, next_second: _SecondMoment
) -> dict[str, NDArray[np.float32]]:
    """One round of Algorithm 2; FedAdam and FedYogi differ in the second moment alone."""
    found = {}
    for name, weight in weights.items():
        update = mean_update[name]
        first = keys.momentum * state.get(f"first/{name}", np.float64(0.0)) + (1.0 - keys.momentum) * update
        second = next_second(_second(state, name, keys), np.square(update), keys)
        state[f"first/{name}"], state[f"second/{name}"] = np.asarray(first), np.asarray(second)
        found[name] = _moved(weight, keys.lr * first / (np.sqrt(second) + keys.tau))
    return found


def _second(state: Arrays, name: str, keys: ServerKeys) -> NDArray[np.float64]:
    return state.get(f"second/{name}", np.asarray(keys.tau**2))


def _moved(weight: NDArray[np.float32], step: NDArray[np.float64]) -> NDArray[np.float32]:
    return np.asarray(weight.astype(np.float64) + step, dtype=np.float32)
