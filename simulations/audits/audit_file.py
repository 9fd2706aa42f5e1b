"""An audit in a TOML file: that of a sweep (`simulations.sweep_file`), its arms being what is compared.

Above the sections stands ``attacks = ["lira", "rmia"]``; ``[attack.NAME]`` holds options of one. A run's folder and a
plain file of keys are audits of one arm.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from common.config import read_settings, read_toml
from common.errors import InputError
from common.section import Scalar
from simulations.audits import ATTACKS
from simulations.audits.attack import Attack
from simulations.sweep_file import Planned, Sweep, sections, sweep_of


@dataclass(frozen=True)
class Audit:
    """What is attacked, and how.

    Attributes:
        plan: the arms and seeds.
        attacks: by name, with their options.
    """

    plan: Sweep
    attacks: Mapping[str, Attack]


def read_audit(
    path: Path,
    settings: Sequence[str] = (),
    attacks: str = "",
    options: Sequence[str] = (),
    seeds: int | None = None,
) -> Audit:
    """Read an audit, lay settings and options over it, check everything.

    Args:
        path: a file, or a run's folder.
        attacks: names with commas between; empty: those of the file, or all.
        options: ``ATTACK.OPTION=VALUE``.
        seeds: how many, from 0; None: those of the file.

    Raises:
        InputError: naming the file, key or option, what was found and what would be right.
    """
    if path.is_dir():
        if not (path / "config.toml").is_file():
            raise InputError(f"{path}: not a run's folder (no config.toml); give one, or a TOML file")
        path = path / "config.toml"
    document = read_toml(path)
    given = sections(path, document, "attack")
    listed = attacks.split(",") if attacks else document.pop("attacks", [*given] or [*ATTACKS])
    document.pop("attacks", None)
    if not isinstance(listed, list) or not listed or any(type(name) is not str for name in listed):
        raise InputError(f"{path}: attacks = {listed!r}: give a list of names, e.g. ['lira']")
    if seeds is not None:
        document.pop("seed", None)
    plan = sweep_of(path, document, settings, None if seeds is None else range(seeds))
    if len(tasks := dict.fromkeys(run.task for run in plan.runs)) > 1:
        raise InputError(f"{path}: tasks = {[*tasks]}: an audit is of one task; give one, and an audit to each")
    over = _by_attack(options)
    if other := sorted({*given, *over} - {name.strip() for name in listed}):
        raise InputError(f"attack.{other[0]}: options of an attack that is not among {', '.join(listed)}")
    found = {name.strip(): attack_of(name.strip(), given.get(name, {}) | over.get(name, {})) for name in listed}
    return Audit(dataclasses.replace(plan, runs=tuple(_as_the_server_sees(run) for run in plan.runs)), found)


def attack_of(name: str, options: Mapping[str, Scalar]) -> Attack:
    """An attack with these of its options.

    Raises:
        InputError: there is no such attack or option, or the value does not fit.
    """
    if name not in ATTACKS:
        raise InputError(f"attack {name!r}: no such attack; give some of {', '.join(ATTACKS)}")
    kind: Any = ATTACKS[name]
    known = {field.name.replace("_", "-"): field for field in dataclasses.fields(kind)}
    values = {}
    for option, value in options.items():
        if option not in known:
            raise InputError(f"{name}.{option}: no such option; {name} has {', '.join(known) or 'none'}")
        usual: Any = known[option].default
        fits = isinstance(value, type(usual)) and isinstance(value, bool) == isinstance(usual, bool)
        if not fits and not (isinstance(usual, float) and type(value) is int):
            raise InputError(f"{name}.{option} = {value!r}: give {type(usual).__name__}, as the default {usual!r}")
        values[known[option].name] = type(usual)(value)
    return cast(Attack, kind(**values))


def _by_attack(options: Sequence[str]) -> dict[str, dict[str, Scalar]]:
    found: dict[str, dict[str, Scalar]] = {}
    for key, value in read_settings(options).items():
        name, dot, option = key.partition(".")
        if not dot:
            raise InputError(f"-o {key}: give ATTACK.OPTION=VALUE, e.g. -o lira.models=8")
        found.setdefault(name, {})[option] = value
    return found


def _as_the_server_sees(run: Planned) -> Planned:
    """The run with each client's own update in the intake, as a server of real devices gets them.

    What a simulation's worker adds up for its clients hides nothing on the edge. Secure aggregation does; and students
    of several sizes are only ever added up.
    """
    config = run.config
    if config.privacy.secure_aggregation or config.student.sizes or config.server.packing == "off":
        return run
    server = config.server.model_copy(update={"packing": "off"})
    return dataclasses.replace(run, config=config.model_copy(update={"server": server}))
