"""Devices: what one can do and what it may spend, as tables of a TOML file.

[my-phone]
preset = "phone-low"    # what the table leaves out
latency-ms = 20         # a budget: one sentence, alone
"""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from common.config import read_document
from common.errors import InputError

Positive = Annotated[float, Field(gt=0.0, le=1e12)]
THIS = "this"  # the preset that is measured


class DeviceProfile(BaseModel):
    """A device. Speeds are those of the reference encoder, three layers of MiniLM (`common.size.reference`).

    Attributes:
        memory_mb: budget, 10^6 bytes: what training may take, beside the interpreter and its libraries.
        tokens_per_s: word pieces a second that the reference trains on, in batches, its fixed times taken off.
        single_tokens_per_s: word pieces a second that it reads, one sentence at a time; by default three times as many,
            for a forward pass is a third of the arithmetic.
        layer_ms: fixed time of a layer when one sentence is read.
        training_layer_ms: fixed time of a layer in a training step; by default three times that.
        bandwidth_mbit: 10^6 bits a second, either way.
        watts: drawn while the device computes or transfers.
        latency_ms: budget for one sentence, alone.
        energy_j: budget for a round.
        max_seconds: budget for a round, transfers included.
        examples: trained on in a round and epoch.
        length: their mean number of word pieces, special ones included, and of the sentence that is timed.
    """

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        strict=True,
        allow_inf_nan=False,
        alias_generator=lambda name: name.replace("_", "-"),
    )

    memory_mb: Positive
    tokens_per_s: Positive
    single_tokens_per_s: Positive
    layer_ms: float = Field(0.1, ge=0.0, le=1e6)
    training_layer_ms: float = Field(ge=0.0, le=1e6)
    bandwidth_mbit: Positive
    watts: Positive
    latency_ms: Positive
    energy_j: Positive
    max_seconds: Positive
    examples: int = Field(256, ge=1, le=10**9)
    length: int = Field(32, ge=1, le=512)

    @model_validator(mode="before")
    @classmethod
    def _three_times(cls, values: Any) -> Any:
        """Training is a forward pass and a backward pass of twice its cost."""
        if not isinstance(values, dict):
            return values
        filled = dict(values)
        speed, fixed = filled.get("tokens-per-s", ""), filled.get("layer-ms", 0.1)
        if isinstance(speed, int | float):
            filled.setdefault("single-tokens-per-s", 3.0 * speed)
        if isinstance(fixed, int | float):
            filled.setdefault("training-layer-ms", 3.0 * fixed)
        return filled


# The reference takes 31.4 million operations to train on a word piece. A rate of products is taken as half of what the
# device reaches in Linpack (single precision counted double), for a transformer's are small.
PRESETS: dict[str, dict[str, float]] = {
    "phone-low": {
        "memory-mb": 500,  # assumed: a quarter of 2 GB, as systems let one app in front have
        "tokens-per-s": 160,  # assumed: 5 GFLOP/s, somewhat less than a Raspberry Pi 4
        "layer-ms": 0.5,  # assumed
        "bandwidth-mbit": 11,  # mobile upload, mean of the world, September 2020 (Speedtest Global Index: 11.22)
        "watts": 2,  # assumed: what a phone without a fan gives off for long
        "latency-ms": 100,  # assumed: about what is felt as at once
        "energy-j": 550,  # assumed: 1 % of a battery of 4,000 mAh at 3.85 V, 55 kJ
        "max-seconds": 300,  # assumed
    },
    "phone-high": {
        "memory-mb": 2000,  # assumed: a quarter of 8 GB
        "tokens-per-s": 1300,  # assumed: 40 GFLOP/s, on processor cores alone
        "layer-ms": 0.15,  # assumed
        "bandwidth-mbit": 21,  # upload over 5G, median of the world, autumn 2021 (Ookla: 21.08)
        "watts": 4,  # assumed: less than the 4.9 to 6.3 W of one large core of a Snapdragon 8 Gen 2 or 3 at full speed
        "latency-ms": 30,  # assumed: text that is scored while it is typed
        "energy-j": 690,  # assumed: 1 % of a battery of 5,000 mAh at 3.85 V, 69 kJ
        "max-seconds": 120,  # assumed
    },
    "pi": {
        "memory-mb": 3000,  # assumed: a Raspberry Pi 4 of 4 GB, the system's part taken off
        "tokens-per-s": 250,  # 8 GFLOP/s in double precision Linpack (Feiereisen 2022), so 8 here
        "layer-ms": 0.3,  # assumed
        "bandwidth-mbit": 45,  # fixed line's upload, mean of the world, September 2020 (Speedtest Global Index: 45.74)
        "watts": 7,  # assumed: the whole board with four busy cores
        "latency-ms": 100,  # assumed
        "energy-j": 5000,  # assumed: it hangs on a socket
        "max-seconds": 300,  # assumed
    },
    "laptop": {
        "memory-mb": 8000,  # assumed: half of 16 GB
        "tokens-per-s": 5000,  # assumed: half of what two server cores with bf16 reach, in fp32
        "layer-ms": 0.1,  # assumed
        "bandwidth-mbit": 45,  # as pi
        "watts": 20,  # assumed: a processor made for 15 to 28 W
        "latency-ms": 20,  # assumed
        "energy-j": 2000,  # assumed: 1 % of a battery of 55 Wh, 198 kJ
        "max-seconds": 120,  # assumed
    },
}


def load_profiles(
    path: Path, measure: Callable[[], dict[str, float]], *, probed: bool = False
) -> dict[str, DeviceProfile]:
    """The devices of a TOML file, by name.

    Args:
        probed: add this machine, measured, as ``this``.
        measure: called at most once, for tables with ``preset = "this"``; what it gives replaces a laptop's figures.

    Raises:
        InputError: naming file, table and key.
    """
    document = read_document(path, "a TOML file with a table for each device")
    if probed:
        if THIS in document:
            raise InputError(f"{path}: [{THIS}]: --probe gives this machine that name; give the table another")
        document[THIS] = {"preset": THIS}
    if not document:
        raise InputError(f'{path}: no device in it; give a table such as [phone] with preset = "phone-low"')
    found: dict[str, DeviceProfile] = {}
    known: dict[str, dict[str, float]] = dict(PRESETS)
    for name, table in document.items():
        if not isinstance(table, dict):
            raise InputError(f"{path}: {name} stands outside a table; give it below a device's name, [{name}]")
        if table.get("preset") == THIS and THIS not in known:
            known[THIS] = {**PRESETS["laptop"], **measure()}
        found[name] = read_profile(table, known, f"{path}: [{name}]")
    return found


def read_profile(table: dict[str, Any], known: dict[str, dict[str, float]], where: str) -> DeviceProfile:
    """A device's table laid over the preset that it names. Raises `InputError`."""
    keys = dict(table)
    preset = keys.pop("preset", None)
    if preset is not None:
        if not isinstance(preset, str) or preset not in known:
            raise InputError(f"{where}: preset = {preset!r}: give one of {', '.join([*PRESETS, THIS])}")
        # a table with a speed of its own has no use for what was measured beside the preset's
        derived = {"tokens-per-s": "single-tokens-per-s", "layer-ms": "training-layer-ms"}
        gone = {other for key, other in derived.items() if key in keys}
        keys = {**{key: value for key, value in known[preset].items() if key not in gone}, **keys}
    try:
        return DeviceProfile.model_validate(keys)
    except ValidationError as error:
        raise InputError(f"{where}: {_first_problem(error)}") from None


def _first_problem(error: ValidationError) -> str:
    first = error.errors()[0]
    key = ".".join(str(part) for part in first["loc"])
    if first["type"] == "missing":
        return f"{key} is missing; give it, or a preset"
    if first["type"] == "extra_forbidden":
        known = [str(field.alias) for field in DeviceProfile.model_fields.values()]
        return f"{key}: no such key; give preset, {', '.join(known)}"
    return f"{key} = {first['input']!r}: {first['msg'][0].lower()}{first['msg'][1:]}"
