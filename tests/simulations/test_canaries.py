"""Canaries in mechanisms of known noise: a right one stays below its epsilon, broken ones are caught."""

import numpy as np
import pytest

from common.accounting import epsilon
from simulations.audits.canaries import audit_release

CLIP, DELTA, CANARIES = 0.5, 1e-5, 1000
SHAPES = {**{f"layer {number}": (30, 40) for number in range(16)}, "small": (3,)}


def mechanism(noise, *, clip="global", weigh=False, seed=0):
    """The sum of contributions clipped to CLIP, with normal noise of deviation noise x CLIP; or a broken one."""
    rng = np.random.default_rng(seed)

    def release(contributions, examples):
        total = {name: np.zeros(shape) for name, shape in SHAPES.items()}
        for part, count in zip(contributions, examples, strict=True):
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
    found = audit(mechanism(noise), steps=steps, rate=rate)
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
