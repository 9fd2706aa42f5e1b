"""The probe: its fit on numbers one can check, its counters, and what it hands on."""

import pytest

from clients.device_profile import fit, probe
from common.config import from_flat
from common.devices import PRESETS, DeviceProfile
from common.progress import Silent


def test_the_fit_finds_rate_and_fixed_time():
    operations, layers = [1e9, 3e9, 2e9, 8e9], [1, 3, 6, 2]
    seconds = [work / 5e9 + depth * 0.02 for work, depth in zip(operations, layers, strict=True)]
    line = fit(operations, layers, seconds)
    assert line.rate == pytest.approx(5e9)
    assert line.layer_s == pytest.approx(0.02)
    assert line.errors == pytest.approx((0.0,) * 4, abs=1e-9)


def test_the_fit_gives_no_negative_time():
    # deeper but quicker: the best fixed time would be negative
    line = fit([1e9, 1e9, 2e9], [1, 4, 1], [1.0, 0.5, 2.0])
    assert line.layer_s == 0.0
    assert line.rate > 0.0
    # time that falls with the work: the best time per operation would be negative
    line = fit([9e9, 1e9], [1, 3], [1.0, 3.0])
    assert 0.0 < line.rate < float("inf")


def test_the_probe_gives_a_device(monkeypatch):
    monkeypatch.setattr("clients.device_profile.SHAPES", ((1, 1, 32), (2, 2, 64)))
    found = probe(from_flat({"client.precision": "fp32"}), Silent())
    profile = DeviceProfile.model_validate({**PRESETS["laptop"], **found.figures()})
    assert profile.tokens_per_s > 0
    assert found.threads == 1
    assert found.cores >= 1
    assert len(found.training.errors) == len(found.reading.errors) == 2


def test_memory_is_what_the_device_has_left_for_this_process(monkeypatch):
    """A container's limit or a graphics card, which a test cannot bring along: their measure is replaced."""
    monkeypatch.setattr("clients.device_profile.SHAPES", ((1, 1, 32), (2, 2, 64)))
    monkeypatch.setattr("clients.device_profile.free_memory", lambda device: {"cpu": 123_000_000}[device.type])
    found = probe(from_flat({"client.precision": "fp32", "runtime.device": "cpu"}), Silent())
    assert found.figures()["memory-mb"] == 123.0
