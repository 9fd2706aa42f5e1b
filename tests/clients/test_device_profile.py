"""The probe: its fit on numbers one can check, its counters, and what it hands on."""

import pytest

from clients.device_profile import _joules, _watts, fit, probe
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


def test_energy_counters_of_packages_alone_are_added(tmp_path):
    assert _joules(tmp_path) is None
    for zone, energy in (("intel-rapl:0", 2_000_000), ("intel-rapl:1", 500_000), ("intel-rapl:0:0", 7_000_000)):
        (tmp_path / zone).mkdir()
        (tmp_path / zone / "energy_uj").write_text(f"{energy}\n")
    assert _joules(tmp_path) == 2.5
    (tmp_path / "intel-rapl:1" / "energy_uj").unlink()
    assert _joules(tmp_path) is None


def test_power_from_counters_or_the_model():
    assert _watts(10.0, 30.0, 4.0, threads=2) == (5.0, "rapl")
    for before, after in ((None, None), (30.0, 10.0)):  # ran over
        assert _watts(before, after, 4.0, threads=2) == (10.0, "assumed: 5 W a busy core")


def test_the_probe_gives_a_device(monkeypatch):
    monkeypatch.setattr("clients.device_profile.SHAPES", ((1, 1, 32), (2, 2, 64)))
    found = probe(from_flat({"client.precision": "fp32"}), Silent())
    profile = DeviceProfile.model_validate({**PRESETS["laptop"], **found.figures()})
    assert profile.tokens_per_s > 0
    assert found.threads == 1
    assert found.cores >= 1
    assert len(found.training.errors) == len(found.reading.errors) == 2
