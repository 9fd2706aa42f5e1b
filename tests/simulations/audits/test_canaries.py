"""Canaries in mechanisms of known noise: a right one stays below its epsilon, broken ones are caught."""

import numpy as np
import pytest

from clients.private_steps import PrivateSteps
from common.accounting import epsilon
from common.clipping import clip
from common.config import from_flat
from common.fixed_point import ExactSum
from server import client_privacy, clipped
from simulations.audits.canaries import audit_release
from simulations.audits.mechanisms import ClientMechanism, ExampleMechanism, lots_of

CLIP, DELTA, CANARIES = 0.5, 1e-5, 1000
SHAPES = {**{f"layer {number}": (30, 40) for number in range(16)}, "small": (3,)}


def mechanism(noise, *, rate=1.0, clip="global", weigh=False, seed=0):
    """The sum of contributions clipped to CLIP, with normal noise of deviation noise x CLIP; or a broken one."""
    rng = np.random.default_rng(seed)

    def release(contributions, examples):
        total = {name: np.zeros(shape) for name, shape in SHAPES.items()}
        for part, count in zip(contributions, examples, strict=True):
            if rng.random() >= rate:
                continue
            whole = np.sqrt(sum(np.square(array, dtype=np.float64).sum() for array in part.values()))
            for name, array in part.items():
                norm = whole if clip == "global" else np.linalg.norm(array)
                total[name] += array * min(1.0, CLIP / max(norm, 1e-12)) * (count if weigh else 1)
        return {name: array + noise * CLIP * rng.standard_normal(array.shape) for name, array in total.items()}

    return release


def audit(release, **given):
    return audit_release(release, SHAPES, canaries=CANARIES, delta=DELTA, **given)


@pytest.mark.parametrize(("noise", "steps", "rate"), [(1.0, 1, 1.0), (2.0, 3, 1.0), (1.0, 4, 0.2)])
def test_a_right_mechanism_stays_below_its_epsilon(noise, steps, rate):
    claimed = epsilon(noise_multiplier=noise, rate=rate, steps=steps, delta=DELTA)
    found = audit(mechanism(noise, rate=rate), steps=steps)
    assert 0.0 < found.epsilon < claimed
    if rate == 1.0:  # then scores are normal, and the measured distance is the true one
        assert found.gaussian == pytest.approx(claimed, rel=0.15)
        assert 0.7 * claimed < found.gaussian_low < 1.05 * claimed


@pytest.mark.parametrize(
    "broken",
    [mechanism(0.4), mechanism(4.0, clip="each array"), mechanism(4.0, weigh=True)],
    ids=["noise a tenth", "clip of each array", "weighted sum"],
)
def test_a_broken_mechanism_is_caught(broken):
    claimed = epsilon(noise_multiplier=4.0, rate=1.0, steps=1, delta=DELTA)  # 0.93
    found = audit(broken)
    assert found.epsilon > claimed  # whatever the scores' distribution
    assert found.gaussian_low > 3.0 * claimed
    assert audit(mechanism(4.0)).gaussian_low < claimed


def test_canaries_need_room():
    with pytest.raises(ValueError, match="at most 1200"):
        audit_release(mechanism(1.0), SHAPES, canaries=2000, delta=DELTA)


def client_mechanism(rounds=1, rate=1.0, noise=4.0):
    cohort = round(rate * CANARIES) if rate < 1.0 else 0
    config = from_flat(
        {"rounds": rounds, "server.cohort": cohort, "server.packing": "off", "privacy.unit": "client",
         "privacy.noise-multiplier": noise, "privacy.clip-norm": CLIP, "privacy.delta": DELTA}
    )  # fmt: skip
    return ClientMechanism(config, SHAPES, CANARIES)


def example_mechanism(rate=1.0, noise=4.0):
    return ExampleMechanism(PrivateSteps(lots_of(rate, CANARIES), noise=noise, clip_norm=CLIP), SHAPES)


@pytest.mark.parametrize("make", [client_mechanism, example_mechanism])
def test_our_own_mechanisms_release_the_clipped_sum(make):
    """Without noise: a canary of norm 100 adds CLIP in its own direction, whatever it claims to be made of."""
    release = make(noise=0.0)
    part = {name: np.zeros(shape, np.float32) for name, shape in SHAPES.items()}
    part["layer 0"][0, 0], part["layer 1"][0, 0] = 60.0, 80.0
    found = release([part], [100])
    total = CANARIES * found["layer 0"][0, 0], CANARIES * found["layer 1"][0, 0]  # both divide by the public number
    assert total == pytest.approx((0.6 * CLIP, 0.8 * CLIP), rel=1e-5)
    assert sum(np.count_nonzero(array) for array in found.values()) == 2


def test_our_own_mechanisms_stay_below_their_epsilon():
    client = client_mechanism(rounds=3, noise=2.0)
    found, claimed = audit(client, steps=3), client.privacy.epsilon
    assert found.epsilon < claimed and 0.7 * claimed < found.gaussian_low < 1.05 * claimed
    example = example_mechanism(rate=0.2, noise=1.0)
    claimed = epsilon(noise_multiplier=1.0, rate=0.2, steps=4, delta=DELTA)
    assert 0.0 < audit(example, steps=4).epsilon < claimed


def each_array(update, bound):
    return {name: clip({name: array}, bound)[0][name] for name, array in update.items()}, 1.0


@pytest.mark.parametrize("broken", ["noise", "clip", "weight", "example noise", "example clip"])
def test_our_own_mechanisms_are_caught_when_they_are_broken(broken, monkeypatch):
    release = client_mechanism() if not broken.startswith("example") else example_mechanism()
    claimed = epsilon(noise_multiplier=4.0, rate=1.0, steps=1, delta=DELTA)
    if broken == "noise":
        right = client_privacy.gaussian
        monkeypatch.setattr(client_privacy, "gaussian", lambda count, deviation: right(count, deviation / 10))
    elif broken == "clip":
        monkeypatch.setattr(clipped, "clip", each_array)
    elif broken == "weight":
        add = ExactSum.add
        monkeypatch.setattr(ExactSum, "add", lambda self, update, weight: add(self, update, 100))
    elif broken == "example noise":
        release.steps.noise /= 10
    else:
        release.steps.clip_norm *= 10
        release.steps.noise /= 10
    found = audit(release)
    assert found.epsilon > claimed
    assert found.gaussian_low > 3.0 * claimed
