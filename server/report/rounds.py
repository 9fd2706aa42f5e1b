"""Curves over the rounds: scores with the spread between clients, losses, tiers."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from server.report.page import Figure, Section, Table
from server.report.plots import COLOURS, SOFT, canvas, legend_above, mark, rounds_axis, short, svg
from server.report.read import Line, Run
from server.report.words import number, share

POSITIVE = ("accuracy", "f1", "f1_macro", "f1_micro", "exact")  # scores that are never below 0
STYLES = ("-", "--", "-.", ":")


def _points(lines: Sequence[Line], *path: str) -> tuple[list[int], list[float]]:
    """Rounds and values of those lines that have one."""
    rounds, values = [], []
    for line in lines:
        value: Any = line
        for name in path:
            value = value.get(name) if isinstance(value, dict) else None
        if value is not None:
            rounds.append(line["round"])
            values.append(float(value))
    return rounds, values


def score_per_round(run: Run) -> Section:
    """Student and teacher, and how far clients differ."""
    metric, scored, valid = run.metric, run.of("evaluate"), run.of("validation")
    student, public = _points(scored, "student", metric), _points(valid, "student", metric)
    if not student[0] and not public[0]:
        return Section("Score per round", ["No round was scored yet."])
    figure, axes = canvas(3.1)
    spread = [line for line in scored if (line.get("spread") or {}).get("std") is not None]
    axes.plot(*student, mark(len(student[0])) + "-", color=COLOURS[0], label="student, clients")
    axes.plot(*_points(scored, "teacher", metric), "--", color=COLOURS[1], label="teacher, clients")
    if public[0]:
        axes.plot(*public, mark(len(public[0]), "s") + ":", color=COLOURS[2], label="student, validation")
    if spread:
        _band(axes, spread, metric)
    axes.set_ylabel(short(metric))
    rounds_axis(axes)
    legend_above(figure, axes)
    drawn = svg(figure, "score")
    return Section(
        "Score per round",
        [Figure(drawn, _score_words(metric, student, public, spread), _band_words(scored, spread), [_rounds(run)])],
    )


def _band(axes: Any, spread: Sequence[Line], metric: str) -> None:
    rounds = [line["round"] for line in spread]
    mean, std = (np.array([line["spread"][name] for line in spread]) for name in ("mean", "std"))
    least = 0.0 if metric in POSITIVE else -1.0
    band = np.clip(mean - std, least, 1.0), np.clip(mean + std, least, 1.0)
    if len(rounds) > 1:
        axes.fill_between(rounds, *band, color=COLOURS[0], alpha=0.16, lw=0, label="clients: mean ± std")
    else:
        axes.vlines(rounds, *band, color=COLOURS[0], alpha=0.3, lw=8, label="clients: mean ± std")
    worst = [line["spread"].get("worst_decile") for line in spread]
    if None not in worst:  # masked sums tell a mean and a deviation alone
        axes.plot(
            rounds, worst, mark(len(rounds), "v") + "-", color=SOFT, lw=1, markersize=4, label="worst tenth of clients"
        )


def _score_words(
    metric: str, student: tuple[list[int], list[float]], public: tuple[list[int], list[float]], spread: Sequence[Line]
) -> str:
    rounds, values = student if student[0] else public
    where = "the clients' held-out text" if student[0] else "public validation"
    words = f"The student's {metric} on {where} is {number(values[-1])} after round {rounds[-1]}"
    if len(values) > 1:
        best = int(np.argmax(values))
        words += f"; it was {number(values[0])} after round {rounds[0]}, and best after round {rounds[best]}"
        words += f" ({number(values[best])})"
    if spread:
        last = spread[-1]["spread"]
        words += f". Clients differ by a standard deviation of {number(last['std'])}"
        if "worst_decile" in last:
            words += f"; the worst tenth of them scores at most {number(last['worst_decile'])}"
    return words + "."


def _band_words(scored: Sequence[Line], spread: Sequence[Line]) -> str:
    words = []
    if spread:
        words.append(
            "The band is the mean of the clients' own scores, give or take one standard deviation; the curve is the "
            "score of all their examples together."
        )
    elif scored:
        words.append("How far clients differ is not told in this run.")
    asked = {line.get("clients") for line in scored}
    if len(asked) > 1:
        words.append("Rounds were scored by different numbers of clients: see the numbers.")
    return " ".join(words)


def _rounds(run: Run) -> Table:
    metric = run.metric
    by_phase = {name: {line["round"]: line for line in run.of(name)} for name in ("train", "evaluate", "validation")}
    rows = []
    for each in sorted(set().union(*by_phase.values())):
        train, scored, valid = (by_phase[name].get(each, {}) for name in ("train", "evaluate", "validation"))
        spread = scored.get("spread") or {}
        rows.append(
            (
                str(each),
                number(train.get("clients")),
                number(scored.get("clients")),
                number(scored.get("student", {}).get(metric)),
                number(scored.get("teacher", {}).get(metric)),
                share(scored.get("retention")),
                number(spread.get("mean")),
                number(spread.get("std")),
                number(spread.get("worst_decile")),
                number(valid.get("student", {}).get(metric)),
            )
        )
    head = ("round", "trained", "scored", "student", "teacher", "kept", "mean of clients", "std", "worst tenth ends",
            "validation")  # fmt: skip
    return Table(f"{metric} per round; trained and scored: numbers of clients", head, rows)


# --- losses --------------------------------------------------------------------------------------


def losses(run: Run) -> Section:
    """The mean loss of a round's training and its parts."""
    title, train = "Loss and its parts", run.of("train")
    names = [name for name in dict.fromkeys(name for line in train for name in line) if _is_loss(name)]
    names = [name for name in names if any(line.get(name) for line in train)]
    if not names:
        return Section(title, ["No losses are told: of a private run they are private, and a run may have no round."])
    figure, axes = canvas(2.7)
    for number_, name in enumerate(names):
        style = STYLES[number_ // len(COLOURS) % len(STYLES)]
        points = _points(train, name)
        axes.plot(*points, mark(len(points[0])) + style, color=COLOURS[number_ % len(COLOURS)], label=_loss_name(name))
    axes.set_ylabel("loss")
    axes.set_ylim(bottom=0)
    rounds_axis(axes)
    legend_above(figure, axes, 3)
    first, last = train[0], train[-1]
    said = [f"{_loss_name(name)} {number(last.get(name))} (at first {number(first.get(name))})" for name in names]
    table = Table(
        "Mean over the round's examples",
        ("round", *map(_loss_name, names)),
        [(str(line["round"]), *(number(line.get(name)) for name in names)) for line in train],
    )
    note = "Parts are before their weights; the loss is what is minimised."
    words = f"After round {last['round']}: {', '.join(said)}."
    return Section(title, [Figure(svg(figure, "loss"), words, note, [table])])


def _is_loss(name: str) -> bool:
    return name == "loss" or name.endswith("_loss")


def _loss_name(name: str) -> str:
    return {"loss": "loss", "hard_loss": "labels", "soft_loss": "soft targets"}.get(name, name.removesuffix("_loss"))


# --- tiers ---------------------------------------------------------------------------------------


def tiers(run: Run) -> Section | None:
    """A curve for each tier of a mixed federation; None: it is not mixed."""
    metric = run.metric
    where = {name: [line for line in run.of(name) if line.get("tiers")] for name in ("evaluate", "validation")}
    lines = where["evaluate"] or where["validation"]
    if not lines:
        return None
    places = (("evaluate", "federated", "its clients"), ("validation", "validation", "validation"))
    names = [_tier_name(tier) for tier in lines[-1]["tiers"]]
    figure, both = canvas(4.6, 2, 1, sharex=True)
    for axes, (phase, key, label) in zip(both, places, strict=True):
        for tier, name in enumerate(names):
            points = _points([{"round": line["round"], **line["tiers"][tier]} for line in where[phase]], key, metric)
            axes.plot(*points, mark(len(points[0])) + STYLES[tier % 4], color=COLOURS[tier % 6], label=name)
        axes.set_ylabel(short(metric))
        axes.set_title(f"on {label}", loc="left")
        rounds_axis(axes)
    both[0].set_xlabel("")
    legend_above(figure, both[0], 3)
    rows = _tier_rows(run, lines)
    last = ", ".join(f"{row[0]} {row[-3]}" for row in rows)
    words = f"After round {lines[-1]['round']}, each tier's {metric} on its own clients' text: {last}."
    note = "Names are layers/heads/neurons. A tier's clients have other text than another's."
    head = ("layers/heads/neurons", "clients", "parameters", "teacher", "student", "kept", "validation")
    table = Table(f"{metric}, in the end", head, rows)
    return Section("Tiers", [Figure(svg(figure, "tiers"), words, note, [_tier_rounds(where, names, metric)]), table])


def _tier_rows(run: Run, lines: Sequence[Line]) -> list[tuple[str, ...]]:
    metric, found = run.metric, run.summary.get("tiers") or lines[-1]["tiers"]
    rows: list[tuple[str, ...]] = []
    for tier in found:
        own, below, public = ((tier.get(place) or {}).get(metric) for place in ("federated", "teacher", "validation"))
        kept = own / below if own is not None and below is not None and below > 0 else None
        sizes = (str(tier["clients"]), number(tier["params"]))
        rows.append((_tier_name(tier), *sizes, number(below), number(own), share(kept), number(public)))
    return rows


def _tier_rounds(where: dict[str, list[Line]], names: Sequence[str], metric: str) -> Table:
    by_round = {
        phase: {line["round"]: [tier.get(key, {}).get(metric) for tier in line["tiers"]] for line in where[phase]}
        for phase, key in (("evaluate", "federated"), ("validation", "validation"))
    }
    rows = [
        (str(each), *(number(value) for phase in by_round for value in by_round[phase].get(each, [None] * len(names))))
        for each in sorted(set().union(*by_round.values()))
    ]
    head = ("round", *(f"{name}, {place}" for place in ("clients", "validation") for name in names))
    return Table(f"{metric} of each tier per round", head, rows)


def _tier_name(tier: Line) -> str:
    return f"{tier['layers']}/{tier['heads']}/{tier['neurons']}"
