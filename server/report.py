"""RUN/report.html: one self-contained page about a run, from what the run folder holds."""

import html
import io
import json
import math
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common.errors import InputError
from common.store import write_atomically
from server.privacy_report import privacy_words

STYLE = """
:root { color-scheme: light dark; --ink: #1c2330; --paper: #ffffff; --line: #d5dae3; --soft: #5a6577; }
@media (prefers-color-scheme: dark) { :root { --ink: #e8ebf0; --paper: #14181f; --line: #39414f; --soft: #a3adbd; } }
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper);
       max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; width: 100%; margin: 1rem 0; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: .35rem .6rem; border-bottom: 1px solid var(--line); }
th:first-child, td:first-child { text-align: left; }
.verdict { font-size: 1.25rem; } .soft { color: var(--soft); }
figure { margin: 1.5rem 0; overflow-x: auto; background: #fff; border-radius: .5rem; }
svg { max-width: 100%; height: auto; } div.wide { overflow-x: auto; } pre { overflow-x: auto; }
"""


def write_report(run: Path) -> Path:
    """Write ``report.html`` into a run folder and return its path.

    Raises:
        InputError: the folder holds no run.
    """
    summary = _read_summary(run)
    lines, costs = _read_lines(run / "metrics.jsonl"), _read_lines(run / "costs.jsonl")
    body = [
        f"<h1>{html.escape(summary['task'])}</h1>",
        f"<p class='verdict'>{_verdict(summary)}</p>",
        _scores_table(summary),
        _tiers_table(summary),
        _figure(lines, summary),
        _rounds_table(lines, costs, summary),
        "<h2>Configuration</h2><pre>" + html.escape((run / "config.toml").read_text()) + "</pre>",
        "<h2>Versions</h2><pre>" + html.escape(json.dumps(summary["versions"], indent=1)) + "</pre>",
    ]
    page = (
        "<!doctype html><html lang='en'><head><meta charset='utf-8'>"
        "<meta name='viewport' content='width=device-width, initial-scale=1'>"
        f"<title>fedistill: {html.escape(summary['task'])}</title><style>{STYLE}</style></head><body>"
        + "\n".join(body)
        + "</body></html>\n"
    )
    target = run / "report.html"
    write_atomically(target, page.encode())
    return target


def _read_summary(run: Path) -> dict[str, Any]:
    try:
        summary: dict[str, Any] = json.loads((run / "summary.json").read_text())
        tomllib.loads((run / "config.toml").read_text())
    except (OSError, ValueError):
        raise InputError(f"{run}: no finished run there (summary.json and config.toml are needed)") from None
    return summary


def _read_lines(path: Path) -> list[dict[str, Any]]:
    lines = []
    for text in path.read_text().splitlines() if path.is_file() else []:
        try:
            lines.append(json.loads(text))
        except ValueError:  # the last line of a run that was killed may be half there
            break
    return lines


def _verdict(summary: dict[str, Any]) -> str:
    if "student" not in summary:
        return f"Status: <b>{summary['status']}</b>. The run ended before its first round."
    share, metric = summary["retention"]["federated"], summary["metric"]
    kept = f"{share:.1%} of the teacher's {metric}" if share is not None else "an undefined share of the score"
    return (
        f"Status: <b>{summary['status']}</b>. A student of {summary['student']['params_ratio']:.1%} of the "
        f"teacher's size keeps <b>{kept}</b> on data that stayed with {summary['clients']} clients."
    )


def _scores_table(summary: dict[str, Any]) -> str:
    if "student" not in summary:
        return ""
    rows = []
    for where, label in (("federated", "held by the clients"), ("validation", "public validation")):
        for metric, value in summary["student"][where].items():
            if metric != "n":
                rows.append((f"{metric}, {label}", _number(summary["teacher"][where].get(metric)), _number(value)))
    rows.append(("parameters", f"{summary['teacher']['params']:,}", f"{summary['student']['params']:,}"))
    cost = summary["cost"]
    rows.append(("training, examples per second", "", f"{cost['examples_per_s']:.0f}"))
    if summary.get("privacy", {}).get("unit", "none") != "none":
        name, *words = privacy_words(summary["privacy"])
        rows.append((name, "", ", ".join(words)))
    rows.append(("bytes down, up", "", f"{cost['bytes_down'] / 1e6:.1f} MB, {cost['bytes_up'] / 1e6:.1f} MB"))
    rows.append(("lost: " + ", ".join(summary["faults"]), "", ", ".join(str(n) for n in summary["faults"].values())))
    return _table(("", "teacher", "student"), rows)


def _tiers_table(summary: dict[str, Any]) -> str:
    metric, rows = summary.get("metric", ""), []
    for tier in summary.get("tiers", ()):
        size = [str(tier[name]) for name in ("layers", "heads", "neurons", "clients")]
        found = [_number(tier[where].get(metric)) for where in ("federated", "validation")]
        rows.append((*size, f"{tier['params']:,}", *found))
    head = ("layers", "heads", "neurons", "clients", "parameters", f"{metric}, its clients", "public validation")
    return f"<h2>Tiers</h2><div class='wide'>{_table(head, rows)}</div>" if rows else ""


def _rounds_table(lines: list[dict[str, Any]], costs: list[dict[str, Any]], summary: dict[str, Any]) -> str:
    metric = summary.get("metric", "")
    train = {line["round"]: line for line in lines if line["phase"] == "train"}
    scored = {line["round"]: line for line in lines if line["phase"] == "evaluate"}
    valid = {line["round"]: line for line in lines if line["phase"] == "validation"}
    seconds = {line["round"]: line["seconds"] for line in costs if line["phase"] == "train"}
    rows = []
    for number in sorted(train):
        spread = scored.get(number, {}).get("spread", {})
        rows.append(
            (
                str(number),
                _number(train[number].get("clients")),
                _number(train[number].get("loss")),
                _number(scored.get(number, {}).get("student", {}).get(metric)),
                _number(spread.get("worst_decile")),
                _number(spread.get("std")),
                _number(valid.get(number, {}).get("student", {}).get(metric)),
                f"{seconds.get(number, math.nan):.1f}",
            )
        )
    head = ("round", "clients", "loss", metric, "worst decile", "spread", "validation", "seconds")
    return f"<h2>Rounds</h2><div class='wide'>{_table(head, rows)}</div>" if rows else ""


def _figure(lines: list[dict[str, Any]], summary: dict[str, Any]) -> str:
    """Score per round with the teacher as a line, as inline SVG; empty before the first round."""
    metric = summary.get("metric")
    scored = [line for line in lines if line["phase"] == "evaluate" and line["student"].get(metric) is not None]
    if not scored:
        return ""
    import matplotlib as mpl

    mpl.use("svg")
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(7.5, 3.6), layout="constrained")
    axes = figure.add_subplot()
    rounds = [line["round"] for line in scored]
    axes.plot(rounds, [line["student"][metric] for line in scored], "o-", color="#2158c7", label="student, clients")
    axes.plot(rounds, [line["teacher"][metric] for line in scored], "--", color="#c2571a", label="teacher, clients")
    valid = [line for line in lines if line["phase"] == "validation" and line["student"].get(metric) is not None]
    if valid:
        scores = [line["student"][metric] for line in valid]
        axes.plot([line["round"] for line in valid], scores, "s:", color="#5a7d2a", label="student, validation")
    axes.set(xlabel="round", ylabel=metric)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    drawn = io.StringIO()
    figure.savefig(drawn, format="svg", metadata={"Date": None})
    svg = drawn.getvalue()
    label = html.escape(f"{metric} per round, student and teacher")
    return f"<figure role='img' aria-label='{label}'>{svg[svg.index('<svg') :]}</figure>"


def _table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    def cells(tag: str, row: tuple[str, ...]) -> str:
        return "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in row)

    body = "".join(f"<tr>{cells('td', row)}</tr>" for row in rows)
    return f"<table><thead><tr>{cells('th', head)}</tr></thead><tbody>{body}</tbody></table>"


def _number(value: Any) -> str:
    return "-" if value is None else f"{value:.4f}" if isinstance(value, float) else str(value)
