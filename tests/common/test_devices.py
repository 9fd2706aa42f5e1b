"""Device tables: presets, what overrides them, and what is said to a wrong one."""

import pytest

from common.devices import PRESETS, DeviceProfile, load_profiles
from common.errors import InputError


def never() -> dict[str, float]:
    raise AssertionError("nothing asked for a measurement")


def load(tmp_path, text: str, measure=never, **keys):
    path = tmp_path / "devices.toml"
    path.write_text(text)
    return load_profiles(path, measure, **keys)


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_is_a_device(name):
    profile = DeviceProfile.model_validate(PRESETS[name])
    assert profile.single_tokens_per_s == 3 * profile.tokens_per_s


def test_a_table_overrides_its_preset(tmp_path):
    found = load(tmp_path, '[a]\npreset = "phone-low"\nlatency-ms = 7\n[b]\npreset = "pi"')
    assert list(found) == ["a", "b"]
    assert found["a"].latency_ms == 7.0
    assert found["a"].memory_mb == PRESETS["phone-low"]["memory-mb"]
    assert found["b"] == DeviceProfile.model_validate(PRESETS["pi"])


def test_this_machine_is_measured_once_and_its_own_speed_wins(tmp_path):
    calls = []

    def measure() -> dict[str, float]:
        calls.append(1)
        return {"tokens-per-s": 100.0, "single-tokens-per-s": 50.0}

    text = '[a]\npreset = "this"\n[b]\npreset = "this"\ntokens-per-s = 10\n'
    found = load(tmp_path, text, measure, probed=True)
    assert len(calls) == 1
    assert [profile.single_tokens_per_s for profile in found.values()] == [50.0, 30.0, 50.0]
    assert list(found) == ["a", "b", "this"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "no device in it"),
        ("x = 3", "x stands outside a table"),
        ("[a]\nmemory-mb = 3", "[a]: tokens-per-s is missing; give it, or a preset"),
        ('[a]\npreset = "toaster"', "[a]: preset = 'toaster': give one of phone-low, phone-high, pi, laptop, this"),
        ('[a]\npreset = "pi"\nwats = 3', "[a]: wats: no such key; give preset, memory-mb"),
        ('[a]\npreset = "pi"\nwatts = 0', "[a]: watts = 0: input should be greater than 0"),
        ('[a]\npreset = "pi"\nwatts = "much"', "[a]: watts = 'much': input should be a valid number"),
        ('[a]\npreset = "pi"\nwatts = inf', "[a]: watts = inf"),
        ("[a", "not a TOML file"),
    ],
)
def test_a_wrong_file_is_named_in_one_line(tmp_path, text, expected):
    with pytest.raises(InputError) as error:
        load(tmp_path, text)
    assert expected in str(error.value)
    assert "devices.toml" in str(error.value)
    assert "\n" not in str(error.value)


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(InputError, match="no such file"):
        load_profiles(tmp_path / "nowhere.toml", never)


def test_the_name_of_this_machine_is_taken(tmp_path):
    with pytest.raises(InputError, match=r"\[this\]: --probe gives"):
        load(tmp_path, '[this]\npreset = "pi"', probed=True)
