"""Files of examples as columns of values: public Parquet tables, and a user's own CSV, JSON lines or Parquet.

Public tables are read by `datasets`. A user's file is not: `datasets` guesses types ("007" becomes a number, a
column of dates no text), keeps a copy of private text in a cache of its own and quotes it in its log. A message
of this module names the file and the line, never what stands there.
"""

import csv
import difflib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from common.errors import InputError

Columns = Mapping[str, Callable[[], list[Any]]]  # by name; called, a column gives its values
CSV_FIELD_LIMIT = 2**24  # characters; the default of 128 Ki is less than a long document


def read_columns(path: Path) -> Columns:
    """Columns of a file, by the ending of its name.

    CSV values are text as they stand; JSON and Parquet values keep their types, a missing one is None.

    Raises:
        InputError: the ending is unknown, the file is empty, not UTF-8 or not of its kind.
    """
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise InputError(f"{path}: unknown kind {path.suffix!r}; give one of {', '.join(READERS)}")
    if path.stat().st_size == 0:
        raise InputError(f"{path}: the file is empty")
    return reader(path)


def column(
    columns: Columns, name: str, where: str, advice: str = "is the first line a header, and the key right?"
) -> list[Any]:
    """The values of a column.

    Raises:
        InputError: there is none of this name.
    """
    if name not in columns:
        # not the names themselves: without a header line they would be a private text and its label
        near = difflib.get_close_matches(name, columns, n=1, cutoff=0.7)
        hint = f"did you mean {near[0]}?" if near else advice
        raise InputError(f"{where}: no column {name!r} among its {len(columns)}; {hint}")
    return columns[name]()


def clean(text: str) -> str:
    """A text as every model of this program reads it, where it learns and where it is used: without outer spaces."""
    # a lone surrogate survives JSON but is no UTF-8: no tokenizer takes it
    return text.encode("utf-8", "ignore").decode().strip()


def read_public(paths: Sequence[Path]) -> Columns:
    """Columns of the Parquet files of one split, one after the other, through `datasets`.

    Raises:
        InputError: a file is not Parquet, or they do not fit each other.
    """
    import datasets

    datasets.disable_progress_bars()
    try:
        table = datasets.Dataset.from_parquet([str(path) for path in paths], keep_in_memory=True)
    except Exception as error:  # datasets raises many kinds
        kind = type(error.__cause__ or error).__name__
        raise InputError(f"{paths[0]}: cannot be read as parquet ({kind})") from None
    return {name: partial(table.__getitem__(name).__getitem__, slice(None)) for name in table.column_names}


def read_parquet(path: Path) -> Columns:
    """Columns of one Parquet file."""
    from pyarrow.parquet import read_table  # type: ignore[import-untyped]

    try:
        table = read_table(str(path), partitioning=None)
        table.validate(full=True)  # finds text that is not UTF-8
    except Exception as error:  # pyarrow raises many kinds
        raise InputError(f"{path}: cannot be read as parquet ({type(error).__name__})") from None
    return {name: table[name].to_pylist for name in table.column_names}


def _read_csv(path: Path) -> Columns:
    csv.field_size_limit(CSV_FIELD_LIMIT)
    rows = csv.reader(read_lines(path), strict=True)
    try:
        header = next((row for row in rows if row), [])
        columns: list[list[str]] = [[] for _ in header]
        if len(set(header)) < len(header):
            raise InputError(f"{path}: two columns have the same name")
        for row in (row for row in rows if row):
            if len(row) != len(header):
                raise InputError(
                    f"{path}: line {rows.line_num}: {len(row)} fields, the header has {len(header)}; put a text "
                    "that holds a comma in double quotes"
                )
            for column, value in zip(columns, row, strict=True):
                column.append(value)
    except csv.Error as error:  # its messages name what is wrong and quote nothing
        raise InputError(f"{path}: line {rows.line_num}: {error}") from None
    return {name: partial(list, column) for name, column in zip(header, columns, strict=True)}


def _read_json(path: Path) -> Columns:
    """An object per line, or one array of objects."""
    text = list(read_lines(path))
    whole = next((line.lstrip() for line in text if line.strip()), "").startswith("[")
    entries: list[Any] = []
    for number, line in enumerate(["".join(text)] if whole else text, start=1):
        if not line.strip():
            continue
        try:
            found = json.loads(line)
        except (ValueError, RecursionError) as error:
            place = error.lineno if whole and isinstance(error, json.JSONDecodeError) else number
            raise InputError(f"{path}: line {place} is not JSON; give an object per line") from None
        entries.extend(found if whole else [found])
    for row, entry in enumerate(entries, start=1):
        if not isinstance(entry, dict):
            raise InputError(f"{path}: row {row} is no object with a value for each column")
    names = dict.fromkeys(name for entry in entries for name in entry)
    return {name: partial(list, [entry.get(name) for entry in entries]) for name in names}


def read_lines(path: Path) -> Iterator[str]:
    with path.open("rb") as stream:
        for number, line in enumerate(stream, start=1):
            try:
                yield line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise InputError(
                    f"{path}: line {number}, byte {error.start + 1} is not UTF-8; save it as UTF-8"
                ) from None


READERS: dict[str, Callable[[Path], Columns]] = {
    ".csv": _read_csv,
    ".jsonl": _read_json,
    ".json": _read_json,
    ".parquet": read_parquet,
}
