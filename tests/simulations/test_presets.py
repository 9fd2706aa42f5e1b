"""The presets are read as what they are."""

from pathlib import Path

import pytest

from common.config import load_config
from common.models import choose_layers
from simulations.audits.audit_file import read_audit
from simulations.sweep_file import read_sweep

ROOT = Path(__file__).resolve().parents[2]


PRESETS = sorted((ROOT / "simulations" / "presets").glob("*.toml"))
SWEEPS = ("ablation", "glue", "methods", "teachers", "tiers")
AUDITS = [("inversion", 1, 1), ("membership", 3, 7), ("poisoning", 1, 1), ("privacy", 3, 3)]


@pytest.mark.parametrize(
    "path",
    [one for one in PRESETS if one.stem not in (*SWEEPS, *(name for name, _, _ in AUDITS))],
    ids=lambda path: path.stem,
)
def test_every_preset_loads(path):
    """A preset is named after its task; one for a file of the user's own, which has none, after what is in the file."""
    config = load_config(path)
    assert config.task == path.stem or (config.task == "text" and Path(config.data.source).stem == path.stem)


@pytest.mark.parametrize("path", [path for path in PRESETS if path.stem in SWEEPS], ids=lambda path: path.stem)
def test_every_preset_of_a_sweep_loads(path):
    assert len({run.seed for run in read_sweep(path).runs}) == 3


@pytest.mark.parametrize("have", [6, 12])
def test_the_small_student_of_all_is_the_smallest_of_the_tiers(have):
    students = {run.arm: run.config.student for run in read_sweep(ROOT / "simulations" / "presets" / "tiers.toml").runs}
    layers = {arm: choose_layers(keys.layer_selection, keys.layers, have) for arm, keys in students.items()}
    small = students["all-small"]
    for arm in ("mixed", "exclusive", "sliced"):
        least = students[arm].sizes[0]
        assert (small.layers, small.heads, small.neurons) == (least.layers, least.heads, least.neurons)
        assert layers["all-small"] == layers[arm][: least.layers]


@pytest.mark.parametrize("name, seeds, attacks", AUDITS)
def test_every_preset_of_an_audit_loads(name, seeds, attacks):
    audit = read_audit(ROOT / "simulations" / "presets" / f"{name}.toml")
    assert (len({run.seed for run in audit.plan.runs}), len(audit.attacks)) == (seeds, attacks)
