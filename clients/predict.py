"""``fedistill predict``: what an exported model says of texts, on a device that has neither torch nor transformers."""

import json
import resource
import statistics
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from clients.exported import Exported, Spec, probabilities
from common.errors import InputError
from common.files import column, read_columns
from common.progress import Progress
from common.toy import toy_corpus

CHUNK = 1024  # texts whose predictions are printed together
BENCH_TEXTS, BENCH_BUDGETS = 200, (256, 1024, 4096)
Row = tuple[str, ...]  # the one or two texts of an example


def read_rows(
    spec: Spec,
    texts: Sequence[str],
    table: Path | None,
    text_columns: str,
    *,
    pair: bool,
    lines: Iterable[bytes] | None,
) -> Iterable[Row]:
    """The examples that a user gives, in one way.

    Args:
        texts: arguments of the command.
        table: a file with columns.
        lines: of standard input, read when there is nothing else; None: it is not to be read.

    Raises:
        InputError: they are given twice, or do not fit the model.
    """
    if texts and table:
        raise InputError(f"--csv {table}: texts are given as arguments too; give one of them")
    if text_columns and not table:
        raise InputError(f"--text-columns {text_columns!r}: there is no --csv FILE to find them in")
    if table:
        return rows_of_file(spec, table, text_columns)
    if texts:
        return rows_of_arguments(spec, texts, pair=pair)
    return [] if lines is None else rows_of_lines(spec, lines, pair=pair)


def rows_of_arguments(spec: Spec, texts: Sequence[str], *, pair: bool) -> list[Row]:
    """Texts of the command line, for a model of pairs two by two."""
    _check_pair(spec, pair=pair)
    if len(texts) % len(spec.columns):
        raise InputError(f"TEXT: {len(texts)} texts cannot be read two by two; quote each, and give an even number")
    return [tuple(texts[place : place + len(spec.columns)]) for place in range(0, len(texts), len(spec.columns))]


def rows_of_lines(spec: Spec, lines: Iterable[bytes], *, pair: bool) -> Iterator[Row]:
    """A text in each line, or two with a tab between; empty lines are left out."""
    _check_pair(spec, pair=pair)
    for number, raw in enumerate(lines, start=1):
        try:
            line = raw.decode().rstrip("\r\n")
        except UnicodeDecodeError:
            raise InputError(f"standard input: line {number} is not UTF-8; give it as UTF-8") from None
        if not line.strip():
            continue
        parts = tuple(line.split("\t")) if pair else (line,)
        if len(parts) != len(spec.columns):
            raise InputError(f"standard input: line {number} has {len(parts) - 1} tabs; give two texts, a tab between")
        yield parts


def rows_of_file(spec: Spec, path: Path, text_columns: str) -> list[Row]:
    """The texts in some columns of a CSV, JSON lines or Parquet file; none named: those that the task has."""
    names = tuple(name.strip() for name in text_columns.split(",")) if text_columns else spec.columns
    if len(names) != len(spec.columns):
        raise InputError(f"--text-columns {text_columns!r}: the task {spec.task} has {len(spec.columns)}; give as many")
    if not path.is_file():
        raise InputError(f"--csv {path}: no such file")
    found = read_columns(path)
    advice = "is the first line a header? name others with --text-columns"
    columns = [column(found, name, str(path), advice) for name in names]
    for name, values in zip(names, columns, strict=True):
        for number, text in enumerate(values, start=1):
            if not isinstance(text, str):
                raise InputError(f"{path}: row {number} has no text in column {name!r}")
    return list(zip(*columns, strict=True))


def _check_pair(spec: Spec, *, pair: bool) -> None:
    if pair != (len(spec.columns) == 2):
        ways = "leave --pair out" if pair else "give --pair"
        what = "one text at a time" if pair else f"two texts at a time ({', '.join(spec.columns)})"
        raise InputError(f"--pair: the task {spec.task} reads {what}; {ways}")


def predictions(
    exported: Exported, rows: Iterable[Row], progress: Progress, total: int | None = None
) -> Iterator[dict[str, Any]]:
    """What the model says of each example, in their order: see `described`."""
    several = iter(rows)
    with progress.step("predict", total) as step:
        while chunk := list(islice(several, CHUNK)):
            logits = exported.logits(list(zip(*chunk, strict=True)))
            yield from described(exported.spec, logits)
            step.advance(len(chunk))


def described(spec: Spec, logits: NDArray[np.float32]) -> Iterator[dict[str, Any]]:
    """For each example ``score``; or ``label`` and its ``probability``; or ``labels``, those of a probability above
    a half; and of labels the ``probabilities`` of all."""
    if spec.kind == "score":
        yield from ({"score": float(value)} for value in logits[:, 0])
        return
    for row in probabilities(spec, logits):
        every = {name: float(value) for name, value in zip(spec.labels, row, strict=True)}
        if spec.kind == "multi-label":
            yield {"labels": [name for name, value in every.items() if value > 0.5], "probabilities": every}
        else:
            best = int(row.argmax())
            yield {"label": spec.labels[best], "probability": float(row[best]), "probabilities": every}


def line_of(found: dict[str, Any], *, as_json: bool) -> str:
    """One prediction as a line, its parts with tabs between."""
    if as_json:
        return json.dumps(found, ensure_ascii=False)
    if "score" in found:
        return f"{found['score']:.4f}"
    if "label" in found:
        return f"{found['label']}\t{found['probability']:.4f}"
    every = "\t".join(f"{name} {value:.4f}" for name, value in found["probabilities"].items())
    return f"{','.join(found['labels']) or '-'}\t{every}"


def bench(exported: Exported, rows: Sequence[Row]) -> dict[str, float]:
    """Milliseconds for one text, texts a second in batches, megabytes of memory; cutting text into pieces is in it.

    Args:
        rows: at most `BENCH_TEXTS` of these are used; none: the program makes some.
    """
    texts = list(rows)[:BENCH_TEXTS] or _made(len(exported.spec.columns))
    columns = list(zip(*texts, strict=True))
    seconds = []
    for number, row in enumerate([*texts[:10], *texts]):  # the first ten warm up
        began = time.perf_counter()
        exported.logits([(text,) for text in row])
        if number >= min(10, len(texts)):
            seconds.append(time.perf_counter() - began)
    rates = {}
    for budget in BENCH_BUDGETS:
        began = time.perf_counter()
        exported.logits(columns, budget)
        rates[budget] = len(texts) / (time.perf_counter() - began)
    best = max(rates, key=lambda budget: rates[budget])
    return {
        "texts": len(texts),
        "pieces": statistics.mean(len(ids) for windows in exported.windows(columns) for ids, _ in windows),
        "p50_ms": 1e3 * float(np.quantile(seconds, 0.5)),
        "p95_ms": 1e3 * float(np.quantile(seconds, 0.95)),
        "texts_per_s": rates[best],
        "token_budget": best,
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1024 if sys.platform != "darwin" else 1024**2),
    }


def bench_lines(found: dict[str, float]) -> str:
    return (
        f"one text at a time  p50 {found['p50_ms']:.2f} ms, p95 {found['p95_ms']:.2f} ms\n"
        f"in batches          {found['texts_per_s']:,.0f} texts a second, "
        f"{found['token_budget']:.0f} word pieces a batch\n"
        f"peak memory         {found['peak_mb']:.0f} MB\n"
        f"texts               {found['texts']:.0f}, of {found['pieces']:.0f} word pieces in the mean"
    )


def _made(columns: int) -> list[Row]:
    sentences = toy_corpus(0)["validation"]["sentence"][:BENCH_TEXTS]
    return [(text,) * columns for text in sentences]
