"""``fedistill audit``: attacks on federations, each in the arms that are compared, and what the defences cost.

An audit's folder holds ARM/TASK/seed-N with config.toml, a file of rows for each attack that is done and what attacks
keep to go on from; above them rows.parquet and audit.md, after every attack anew, and at the end the plots and
report.html.
"""

import sys
from collections.abc import Mapping, Sequence
from contextlib import closing
from io import BytesIO
from pathlib import Path
from typing import Any

from common.config import load_config
from common.errors import InputError, Interrupted, place_of
from common.progress import Progress
from common.section import Scalar
from common.store import write_atomically
from simulations.audits.attack import Row
from simulations.audits.audit_file import Audit
from simulations.audits.figures import attack_sheets, wide_sheet
from simulations.audits.plots import plot
from simulations.audits.report import write_audit_report
from simulations.audits.runs import attack_all, known
from simulations.child import stoppable
from simulations.compare import differing
from simulations.display import console_on, progress_for
from simulations.table import markdown, show


def audit(plan: Audit, out: Path) -> list[Row]:
    """Run the attacks that are not in the folder yet; leave rows, table and plots, and show the table.

    Raises:
        InputError: the folder holds an audit of other keys or options, or an attack does not fit the run.
        RunFailed: a process that trained models ended.
        Interrupted: stopped by the user; the same command goes on.
    """
    _check(plan, out)
    console = console_on(sys.stdout)
    progress = progress_for(console)
    try:
        with stoppable():
            rows = _run(plan, out, progress)
    except KeyboardInterrupt:
        raise Interrupted from None
    for sheet in attack_sheets(rows, tuple(plan.plan.arms)):
        show(console, sheet)
    for path in (*write(plan, rows, out), *_drawn(plan, rows, out, progress)):
        console.print(str(path), markup=False, highlight=False, soft_wrap=True)
    return rows


def _drawn(plan: Audit, rows: Sequence[Row], out: Path, progress: Progress) -> list[Path]:
    """Plots and page. What goes wrong there is told: the rows are worth more."""
    try:
        return [*plot(plan, rows, out), write_audit_report(plan, rows, out)]
    except Exception as error:
        progress.line(f"no plots: {type(error).__name__}{place_of(error)}; the same command tries them again")
        return []


def _check(plan: Audit, out: Path) -> None:
    """Raise `InputError` unless all that lies in the folder is of this audit."""
    if out.exists() and not out.is_dir():
        raise InputError(f"--out {out}: a file; give a folder")
    for run in plan.plan.runs:
        folder = out / run.folder
        if (kept := folder / "config.toml").is_file() and (before := load_config(kept)) != run.config:
            old, new = before.flat(), run.config.flat()
            told = ", ".join(f"{key} = {new[key]!r} (was {old[key]!r})" for key in old if old[key] != new[key])
            raise InputError(f"{folder}: an audit of other keys: {told}; give another --out")


def _run(plan: Audit, out: Path, progress: Progress) -> list[Row]:
    runs, attacks = plan.plan.runs, plan.attacks
    with progress.step("attacks", len(runs) * len(attacks)) as step:
        there = sum(known(out / run.folder, attack) is not None for run in runs for attack in attacks.values())
        step.advance(there)
        with closing(attack_all(runs, attacks, out, progress, step.info)) as done:
            for run, name, found in done:
                progress.line(f"{run.name}: {_said(name, found.rows)}, {found.seconds:.0f} s")
                write(plan, _gathered(plan, out), out)
                step.advance()
    return _gathered(plan, out)


def _gathered(plan: Audit, out: Path) -> list[Row]:
    """The rows so far, in the plan's order, with where they come from and the keys in which the arms differ."""
    varied = [key for key in differing([run.config for run in plan.plan.runs]) if key != "seed"]
    rows: list[Row] = []
    for run in plan.plan.runs:
        flat = run.config.flat()
        keys: Row = {key: flat[key] for key in varied}
        for name, attack in plan.attacks.items():
            if (found := known(out / run.folder, attack)) is not None:
                place: Row = {"arm": run.arm, "task": run.task, "seed": run.seed, "attack": name}
                rows += [{**place, **row, **keys} for row in found.rows]
    return rows


def _said(name: str, rows: Sequence[Row]) -> str:
    """An attack's outcome in a few words."""
    parts = [
        f"{row.get('variant') or ''} {row['success']:.4f}".strip() for row in rows if row.get("success") is not None
    ]
    return f"{name}: {', '.join(parts) or 'nothing to attack'}"


# --- files ---------------------------------------------------------------------------------------


def write(plan: Audit, rows: Sequence[Row], out: Path) -> list[Path]:
    """rows.parquet and audit.md, of the rows so far."""
    arms = tuple(plan.plan.arms)
    write_atomically(out / "rows.parquet", parquet(rows))
    write_atomically(out / "audit.md", markdown(wide_sheet(rows, arms)).encode())
    return [out / "rows.parquet", out / "audit.md"]


def parquet(rows: Sequence[Mapping[str, Scalar | None]]) -> bytes:
    """Rows as a Parquet file: every name that occurs is a column, numbers of both kinds are floats."""
    import pyarrow as pa  # type: ignore[import-untyped]
    import pyarrow.parquet as pq  # type: ignore[import-untyped]

    names = dict.fromkeys(name for row in rows for name in row)
    table = pa.table({name: _column([row.get(name) for row in rows]) for name in names})
    content = BytesIO()
    pq.write_table(table, content)
    return content.getvalue()


def _column(values: Sequence[Scalar | None]) -> Any:
    import pyarrow as pa

    kinds = {type(value) for value in values if value is not None}
    if kinds <= {int, float} and len(kinds) == 2:
        return pa.array([None if value is None else float(value) for value in values])
    if len(kinds) > 1:
        return pa.array([None if value is None else str(value) for value in values])
    return pa.array(values)
