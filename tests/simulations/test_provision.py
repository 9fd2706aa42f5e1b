"""``fedistill provision``: what it prints at 80 columns, what it writes, and its exit codes."""

import io
import json

import pytest
from rich.console import Console

from common.config import from_flat
from common.cost import Work
from common.devices import load_profiles
from server.provisioning import choose_student, make_lattice, tiers_together
from server.teacher import find_teacher
from simulations import cli
from simulations.provision import choice_table, refusal_table, tier_lines

DEVICES = """
[a-phone-with-a-very-long-name]
preset = "phone-low"
latency-ms = 1.2
layer-ms = 0.5
[desk]
preset = "laptop"
[toaster]
preset = "pi"
memory-mb = 0.001
"""


def call(*arguments: str) -> int:
    with pytest.raises(SystemExit) as left:
        cli.main(["provision", *arguments])
    return int(left.value.code or 0)


def test_the_tables_fit_80_columns_and_say_all(tmp_path, tiny_teacher):
    (tmp_path / "devices.toml").write_text(DEVICES)
    config = from_flat({"teacher.model": str(tiny_teacher), "student.layers": 3})
    lattice = make_lattice(config, find_teacher(str(tiny_teacher)))
    devices = load_profiles(tmp_path / "devices.toml", dict)
    choices = {name: choose_student(lattice, device, Work.of(config)) for name, device in devices.items()}
    stream = io.StringIO()
    console = Console(file=stream, width=80)
    console.print(choice_table(choices, lattice))
    table = stream.getvalue()
    for name, choice in choices.items():
        console.print(refusal_table(name, choice))
    text = stream.getvalue()
    assert max(map(len, text.splitlines())) <= 80
    assert "…" not in text
    assert "desk" in table
    assert "3/2/32" in table
    assert "none fits" in table
    assert "a-phone-with-a-very-long-name: refused" in text
    assert "desk: the run's own student fits" in text
    for choice in choices.values():
        assert all(refusal.reason in text for refusal in choice.refused)


def test_the_file_holds_all_figures(tmp_path, tiny_teacher, capfd):
    (tmp_path / "devices.toml").write_text(DEVICES)
    out = tmp_path / "out.json"
    keys = ("-s", f"teacher.model={tiny_teacher}", "-s", "data.max-length=32")
    assert call(str(tmp_path / "devices.toml"), *keys, "--out", str(out)) == 0
    found = json.loads(out.read_text())
    assert list(found["devices"]) == ["a-phone-with-a-very-long-name", "desk", "toaster"]
    desk, toaster = found["devices"]["desk"], found["devices"]["toaster"]
    assert desk["student"]["layers"] == [0, 2, 3]
    assert desk["refused"] == []
    assert toaster["student"] is None
    assert len(toaster["refused"]) == found["students"]
    assert toaster["refused"][0]["reason"].startswith("memory ")
    assert found["probe"] is None
    assert found["tiers"]["students"]["desk"] == "3/2/32"
    assert len(found["tiers"]["students"]) == 2  # no student fits the toaster
    lines = capfd.readouterr().out.splitlines()
    assert lines[-3:] == [
        "[student]",
        *(f'{key} = "{found["tiers"][f"student.{key}"]}"' for key in ("tiers", "tier-of")),
    ]
    assert lines[-5] == "to learn together, 2 clients in this order: a-phone-with-a-very-long-name, desk"


def test_without_a_device_for_the_whole_student_there_are_no_tiers(tiny_teacher):
    config = from_flat({"teacher.model": str(tiny_teacher), "student.layers": 3})
    lattice = make_lattice(config, find_teacher(str(tiny_teacher)))
    largest, smallest = lattice.students[0], lattice.students[-1]
    (line,) = tier_lines({"a": smallest}, together := tiers_together(config, lattice, [smallest]))
    assert together.keys == {}
    assert "no device holds the run's own student 3/2/32" in line
    assert line.endswith("layers, heads and neurons of 1/1/8")
    assert tier_lines({"a": largest}, tiers_together(config, lattice, [largest])) == []


def test_wrong_input_is_one_line_and_exit_code_2(tmp_path, tiny_teacher, capfd):
    (tmp_path / "devices.toml").write_text('[a]\npreset = "toaster"')
    keys = ("-s", f"teacher.model={tiny_teacher}", "-s", "data.max-length=32")
    capfd.readouterr()
    assert call(str(tmp_path / "devices.toml"), *keys) == 2
    assert "preset = 'toaster'" in (error := capfd.readouterr().err.strip())
    assert len(error.splitlines()) == 1
    assert call(str(tmp_path / "nowhere.toml"), *keys) == 2
    (tmp_path / "devices.toml").write_text('[a]\npreset = "pi"')
    assert call(str(tmp_path / "devices.toml"), *keys, "--out", str(tmp_path / "no" / "x.json")) == 2
    capfd.readouterr()
    assert call(str(tmp_path / "devices.toml"), *keys, "-s", "data.windows=2", "-s", "data.stride=30") == 2
    assert "a window of data.max-length = 32 has room for 30 pieces" in capfd.readouterr().err
