"""What a run has cost and lost: time by phase and worker, bytes, faults."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from server.report.page import Figure, Section, Table
from server.report.plots import COLOURS, CROWDED, canvas, legend_above, mark, rounds_axis, svg
from server.report.read import Line, Run
from server.report.verdict import any_fault, fault_words
from server.report.words import listed, many, number, share, size, span

SUMMED = ("seconds", "bytes_up", "bytes_down")
KINDS = {"failed": "failed", "rejected": "refused", "late": "late", "recovered": "asked again"}


def time_by_phase(run: Run) -> Section:
    """How long each phase of a round took, and how busy the workers were."""
    title = "Time by phase and worker"
    if not run.costs:
        return Section(title, ["No phase has ended yet."])
    seconds = _per_round(run.costs, "seconds")
    totals = {phase: sum(found.values()) for phase, found in seconds.items()}
    figure, axes = canvas(2.8)
    _stacked(axes, seconds)
    axes.set_ylabel("seconds")
    legend_above(figure, axes, 4)
    known = sum(totals.values())
    parts = [f"{phase} {span(value)}" for phase, value in totals.items()]
    words = f"Of {span(known)} that were spent with the clients, {listed(parts)}."
    note = ""
    if wall := run.summary.get("cost", {}).get("wall_s"):
        note = f"The run took {span(wall)}; the rest is preparing, scoring at the server and saving."
    rows = [(phase, span(value), share(value / known if known else 0.0)) for phase, value in totals.items()]
    tables = [Table("Time by phase", ("phase", "time", "share"), rows), _round_table(seconds, "Seconds", _seconds)]
    return Section(title, [Figure(svg(figure, "time"), words, note, tables), *_workers(run)])


def _workers(run: Run) -> list[Figure]:
    """How much of a phase each worker was at work."""
    lines = [line for line in run.costs if line.get("phase") == "train" and line.get("busy")]
    if not lines:
        return []
    figure, axes = canvas(2.3)
    rounds, most = [line["round"] for line in lines], max(len(line["busy"]) for line in lines)
    for worker in range(min(most, len(COLOURS))):
        found = [100 * line["busy"][worker] if worker < len(line["busy"]) else np.nan for line in _spread(lines, most)]
        axes.plot(rounds, found, mark(len(rounds)) + "-", color=COLOURS[worker], label=_rank(worker, most))
    axes.set_ylim(0, 105)
    axes.set_ylabel("% of training")
    rounds_axis(axes)
    legend_above(figure, axes, 3)
    busy = [value for line in lines for value in line["busy"]]
    words = (
        f"Workers computed for {share(float(np.mean(busy)))} of the time that training took; the idlest for "
        f"{share(min(busy))}, the busiest for {share(max(busy))}."
    )
    note = f"{many(most, 'worker')}, of each round from the idlest to the busiest."
    rows = [
        (str(line["round"]), str(len(line["busy"])), *(share(pick(line["busy"])) for pick in (min, np.median, max)))
        for line in lines
    ]
    head = ("round", "workers", "idlest", "median", "busiest")
    return [Figure(svg(figure, "workers"), words, note, [Table("Work, as a share of training's time", head, rows)])]


def _spread(lines: Sequence[Line], most: int) -> list[Line]:
    """Of more workers than there are colours: some, evenly spaced from the idlest to the busiest."""
    shown = min(most, len(COLOURS))
    picked = []
    for line in lines:
        busy = sorted(line["busy"])
        places = np.linspace(0, len(busy) - 1, min(shown, len(busy))).round().astype(int)
        picked.append({"busy": [busy[place] for place in places]})
    return picked


def _rank(worker: int, most: int) -> str:
    last = min(most, len(COLOURS)) - 1
    if not last:
        return "worker"
    return "idlest" if not worker else "busiest" if worker == last else f"{worker + 1}."


def bytes_per_round(run: Run) -> Section:
    """To the clients and from them."""
    title = "Bytes per round"
    down, up = (_by_round(run.costs, name) for name in ("bytes_down", "bytes_up"))
    if not down:
        return Section(title, ["Nothing was sent yet."])
    most = max(*down.values(), *up.values())
    name, unit = next(((name, unit) for name, unit in (("GB", 1e9), ("MB", 1e6)) if most >= unit), ("kB", 1e3))
    figure, axes = canvas(2.6)
    for shift, (label, found) in enumerate((("to the clients", down), ("from the clients", up))):
        rounds, values = np.array(list(found)), np.array(list(found.values())) / unit
        if len(rounds) > CROWDED:
            axes.step(rounds, values, ("-", "--")[shift], where="mid", color=COLOURS[shift], label=label)
        else:
            axes.bar(rounds + (shift - 0.5) * 0.4, values, 0.4, color=COLOURS[shift], label=label)
    axes.set_ylim(bottom=0)
    axes.set_ylabel(name)
    rounds_axis(axes)
    legend_above(figure, axes)
    both, count = sum(down.values()) + sum(up.values()), max(run.summary.get("rounds", 0), 1)
    words = (
        f"{size(both)} in all: {size(sum(down.values()))} to the clients and {size(sum(up.values()))} from them, about "
        f"{size(both / count)} a round."
    )
    rows = [(str(each), f"{down[each]:,}", f"{up[each]:,}") for each in sorted(down)]
    table = Table("Bytes per round", ("round", "to the clients", "from the clients"), rows)
    note = "Round 0 is what comes before the first."
    return Section(title, [Figure(svg(figure, "bytes"), words, note if 0 in down else "", [table])])


def faults(run: Run) -> Section:
    """Who was lost, per round."""
    if "faults" in run.summary:
        words = fault_words(run.summary)
    else:
        words = "who was lost is told when a run ends" if run.lines else "no client was asked yet"
    words = f"{words[0].upper()}{words[1:]}."
    by_kind = {kind: _lost(run, kind) for kind in KINDS}
    shown = {kind: found for kind, found in by_kind.items() if found}
    if not shown:
        hidden = "Which of them, and in which round, is not told." if any_fault(run.summary) else ""
        return Section("Faults", [words, *([hidden] if hidden else [])])
    figure, axes = canvas(2.4)
    _stacked(
        axes, {KINDS[kind]: {each: float(len(who)) for each, who in found.items()} for kind, found in shown.items()}
    )
    axes.yaxis.get_major_locator().set_params(integer=True)
    axes.set_ylabel("clients")
    legend_above(figure, axes, 4)
    rounds = sorted(set().union(*shown.values()))
    rows = [
        (str(each), *(", ".join(map(str, found.get(each, ()))) or "none" for found in shown.values()))
        for each in rounds
    ]
    table = Table("Clients by their ids, in all phases of a round", ("round", *(KINDS[kind] for kind in shown)), rows,
                  words=True)  # fmt: skip
    return Section("Faults", [Figure(svg(figure, "faults"), words, "", [table])])


def _lost(run: Run, kind: str) -> dict[int, list[int]]:
    found: dict[int, list[int]] = {}
    for line in run.costs if kind == "recovered" else run.lines:
        if line.get(kind):
            found.setdefault(line["round"], []).extend(line[kind])
    return found


def _by_round(costs: Sequence[Line], name: str) -> dict[int, float]:
    found: dict[int, float] = {}
    for line in costs:
        found[line["round"]] = found.get(line["round"], 0) + line.get(name, 0)
    return dict(sorted(found.items()))


def _per_round(costs: Sequence[Line], name: str) -> dict[str, dict[int, float]]:
    """By phase and round."""
    phases = dict.fromkeys(str(line["phase"]) for line in costs)
    return {phase: _by_round([line for line in costs if line["phase"] == phase], name) for phase in phases}


def _stacked(axes: Any, parts: Mapping[str, Mapping[int, float]]) -> None:
    """Parts on each other: a bar for each round, or a band over many."""
    rounds = sorted(set().union(*parts.values()))
    names, colours = list(parts), [COLOURS[place % len(COLOURS)] for place in range(len(parts))]
    values = np.array([[parts[name].get(each, 0.0) for each in rounds] for name in names])
    if len(rounds) > CROWDED:
        axes.stackplot(rounds, values, colors=colours, labels=names, step="mid", lw=0)
    else:
        tops = values.cumsum(axis=0)
        for name, colour, height, top in zip(names, colours, values, tops, strict=True):
            axes.bar(rounds, height, 0.8, top - height, color=colour, label=name)
    rounds_axis(axes)


def _seconds(value: float) -> str:
    return f"{value:.2f}"


def _round_table(parts: Mapping[str, Mapping[int, float]], what: str, words: Callable[[float], str]) -> Table:
    rounds = sorted(set().union(*parts.values()))
    rows = [(str(each), *(words(found[each]) if each in found else number(None) for found in parts.values()))
            for each in rounds]  # fmt: skip
    return Table(f"{what} per round", ("round", *parts), rows)
