"""``fedistill provision``: which student each device gets, and why not a larger one."""

import json
import sys
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from clients.device_profile import Measured, probe
from common.config import Config
from common.cost import Cost, Work
from common.dataset import load_tokenizer
from common.devices import load_profiles
from common.errors import InputError
from common.tokens import check_stride
from server.history import shape_figures
from server.provisioning import (
    Candidate,
    Choice,
    Lattice,
    Together,
    choose_student,
    fit_tiers,
    make_lattice,
    tiers_together,
)
from server.teacher import check_length, find_teacher
from simulations.display import console_on, progress_for


def provision(config: Config, profiles: Path, *, probed: bool, out: Path | None) -> None:
    """Choose a student for each device of a file, print it, and write all figures to ``out``.

    Args:
        probed: also choose one for this machine, measured, in the name of ``this``.
    """
    console = console_on(sys.stdout)
    progress = progress_for(console)
    source = find_teacher(config.teacher.model)
    check_length(source, config.data.max_length)
    tokenizer, data = load_tokenizer(source.folder), config.data
    check_stride(tokenizer, data.max_length, data.windows, data.stride)
    lattice = make_lattice(config, source)
    measured: list[Measured] = []

    def measure() -> dict[str, float]:
        measured.append(probe(config, progress))
        return measured[0].figures()

    devices = load_profiles(profiles, measure, probed=probed)
    work = Work.of(config, tokenizer.num_special_tokens_to_add(pair=False))
    choices = {name: choose_student(lattice, profile, work) for name, profile in devices.items()}
    found = measured[0] if measured else None
    if found is not None:
        progress.line(probe_line(found))
    console.print(choice_table(choices, lattice))
    for name, choice in choices.items():
        console.print(refusal_table(name, choice))
    tiers = fit_tiers(lattice, choices, work)
    together = tiers_together(config, lattice, list(tiers.values()))
    for line in tier_lines(tiers, together):
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    if out is not None:
        try:
            out.write_text(json.dumps(to_json(choices, (tiers, together), lattice, work, found), indent=2))
        except OSError as error:
            raise InputError(f"--out {out}: cannot be written: {error.strerror}") from None


def choice_table(choices: dict[str, Choice], lattice: Lattice) -> Table:
    """A line per device; fits 80 columns."""
    table = Table(
        title="the largest student that keeps to a device's budgets",
        title_style="bold",
        box=SIMPLE_HEAD,
        pad_edge=False,
    )
    table.add_column("device", overflow="fold", max_width=12)
    table.add_column("layers/\nheads/\nneurons", no_wrap=True)
    for name in ("params\n10^6", "of\nteacher", "memory\nMB", "latency\nms", "round\ns", "energy\nJ"):
        table.add_column(name, justify="right")
    for name, choice in choices.items():
        if choice.best is None or choice.cost is None:
            table.add_row(escape(name), "none fits", *("-",) * 6)
            continue
        size, cost = choice.best.size, choice.cost
        share = f"{size.parameters / lattice.teacher.parameters:.0%}"
        figures = (cost.training_mb, cost.latency_ms, cost.round_s, cost.energy_j)
        table.add_row(
            escape(name), choice.best.name, f"{size.parameters / 1e6:.3g}", share, *(f"{x:,.3g}" for x in figures)
        )
    return table


def refusal_table(name: str, choice: Choice) -> Table | Text:
    """Each student larger than the device's, and the first budget that it breaks."""
    if not choice.refused:
        return Text(f"{name}: the run's own student fits")
    table = Table(title=f"{escape(name)}: refused", title_style="bold", title_justify="left", box=None, pad_edge=False)
    for refusal in choice.refused:
        table.add_row(refusal.candidate.name, f"{refusal.candidate.size.parameters:,}", refusal.reason)
    table.show_header = False
    return table


def tier_lines(tiers: Mapping[str, Candidate], together: Together) -> list[str]:
    """The keys by which these devices learn together, as TOML, or why they cannot; none where one student fits all."""
    if together.refused:
        return [f"\nno tiers for these devices: {together.refused}"]
    if not together.keys:
        return []
    entries = [f"{key.removeprefix('student.')} = {json.dumps(value)}" for key, value in together.keys.items()]
    told = "(all keep to their budgets with the smaller students inside their own, which the table leaves out)"
    return [f"\nto learn together, {len(tiers)} clients in this order: {', '.join(tiers)}", told, "[student]", *entries]


def probe_line(found: Measured) -> str:
    """What was measured, and how far the fitted model is off on the shapes it was fitted to."""
    figures = found.figures()
    training, reading = (max(map(abs, line.errors)) for line in (found.training, found.reading))
    return (
        f"this machine ({found.compute}, {found.threads} of {found.cores} cores): "
        f"trains {figures['tokens-per-s']:,.0f} and reads {figures['single-tokens-per-s']:,.0f} word pieces/s "
        f"of the reference, {figures['layer-ms']:.2f} ms a layer; {found.memory_mb:,.0f} MB free; {found.watts:.1f} W "
        f"({found.watts_from}); fit off by {training:.0%} at most in training, {reading:.0%} in reading"
    )


def to_json(
    choices: dict[str, Choice],
    tiered: tuple[Mapping[str, Candidate], Together],
    lattice: Lattice,
    work: Work,
    found: Measured | None,
) -> dict[str, Any]:
    """All figures."""
    tiers, together = tiered

    def figures(student: Candidate, cost: Cost) -> dict[str, Any]:
        return {
            **shape_figures(student.shape),
            "parameters": student.size.parameters,
            "trained": student.size.trained,
            **asdict(cost),
            "round_s": cost.round_s,
        }

    devices = {
        name: {
            "profile": choice.profile.model_dump(by_alias=True),
            "student": figures(choice.best, choice.cost) if choice.best and choice.cost else None,
            "refused": [
                {**figures(refusal.candidate, refusal.cost), "reason": refusal.reason} for refusal in choice.refused
            ],
        }
        for name, choice in choices.items()
    }
    return {
        "teacher": {"parameters": lattice.teacher.parameters},
        "students": len(lattice.students),
        "work": asdict(work),
        "tiers": {
            "students": {name: student.name for name, student in tiers.items()},
            **together.keys,
            "refused": together.refused or None,
        },
        "probe": found.to_json() if found is not None else None,
        "devices": devices,
    }
