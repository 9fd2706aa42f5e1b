"""Rows of the inversion attack, and which defence stops which of its ways."""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from scipy import stats

from simulations.audits.attack import Row
from simulations.audits.victim import Setting

MEASURES = {
    "rows": ("recall of pieces", "set_recall"),
    "longest": ("longest length right", "right"),
    "labels": ("labels counted right", "right"),
    "span": ("recall of pieces", "set_recall"),
    "tag": ("ROUGE-L", "rougeL"),
    "lamp": ("ROUGE-L", "rougeL"),
}
SHOWN = ("private", "recovered")  # texts, with the option ``show`` alone
NO_CLASSES = "no bias of the head that tells classes, or examples without a class"
Found = dict[str, Any]  # figures of one victim by name, None: not to be had here; the guess's as ``guess_...``


def summed_up(method: str, setting: Setting, found: Sequence[Found]) -> Row:
    """A row of the means over victims."""
    measure, wanted = MEASURES[method]
    row: Row = {
        "variant": f"{method}: {setting}",
        **summed(found, wanted, measure),
        "method": method,
        "setting": str(setting),
        "examples": setting.examples,
        "local_steps": setting.steps,
        "optimizer": setting.optimizer,
        "embeddings": setting.embeddings,
        "precision": setting.precision,
        "clip": setting.clip,
        "noise": setting.noise,
        "cohort": setting.cohort,
    }
    for name in SHOWN:
        if any(name in one for one in found):
            row[name] = "\n".join(str(one.get(name, "")) for one in found)
    return row


def summed(found: Sequence[Found], wanted: str, measure: str) -> Row:
    """Means over victims of all figures; the ``wanted`` one as success, with its chance and interval."""
    names = dict.fromkeys(name for one in found for name in one if name not in SHOWN)
    values = {name: [one[name] for one in found if one.get(name) is not None] for name in names}
    if "nothing" in names:  # of whom something was found, that is not told
        values["nothing"] = [one.get("nothing", 0.0) for one in found]
    means: Row = {name: float(np.mean(each)) if each else None for name, each in values.items()}
    low, high = interval(values.get(wanted, []))
    told: Row = {} if values.get(wanted) else {"note": NO_CLASSES}
    told |= {"measure": measure, "success": means.pop(wanted, None), "low": low, "high": high}
    return {**told, "chance": means.pop(f"guess_{wanted}", None), "victims": len(found), **means}


def interval(numbers: Sequence[float]) -> tuple[float | None, float | None]:
    """The 95 % interval of a mean of shares by Student's t, within 0 and 1; of one value there is none."""
    if len(numbers) < 2:
        return None, None
    half = stats.t.ppf(0.975, len(numbers) - 1) * np.std(numbers, ddof=1) / len(numbers) ** 0.5
    mean = float(np.mean(numbers))
    return max(mean - float(half), 0.0), min(mean + float(half), 1.0)


def verdicts(rows: Iterable[Row]) -> list[str]:
    """Which defence stops which attack: a line a setting, of each method the success in per cent.

    In brackets where no more than chance was reached, and the attack so stopped; a dash where it was not tried.
    """
    table: dict[str, dict[str, str]] = {}
    methods: dict[str, None] = {}
    for row in rows:
        success, chance = row["success"], row["chance"]
        text = "-"
        if isinstance(success, float) and isinstance(chance, float):
            text = f"{100 * success:.0f}" if success > chance + 1e-9 else f"({100 * success:.0f})"
        table.setdefault(str(row["setting"]), {})[str(row["method"])] = text
        methods[str(row["method"])] = None
    lines = [f"{'':36}" + "".join(f"{method:>7}" for method in methods)]
    for setting, cells in table.items():
        lines.append(f"{setting:36.36}" + "".join(f"{cells.get(method, '-'):>7}" for method in methods))
    return lines
