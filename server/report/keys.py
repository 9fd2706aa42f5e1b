"""The configuration, what is not the default first, and the versions that made the run."""

import json

from common.config import default_keys, from_flat
from common.errors import InputError
from common.section import Scalar
from server.report.page import Section, Table
from server.report.read import Run

# what a run puts in the place of `auto`, or of nothing, as its other keys say
RESOLVED = ("data.partition", "data.partition-by", "server.lr", "server.packing", "server.wire")


def configuration(run: Run) -> Section:
    """Keys that are not the default; behind them, folded, all."""
    usual = _usual(run)
    changed = [(key, value) for key, value in run.keys.items() if key not in usual or value != usual[key]]
    rows = [(key, _toml(value), _toml(usual[key]) if key in usual else "no such key now") for key, value in changed]
    first = Table("Keys that are not the default", ("key", "value", "default"), rows, words=True)
    every = Table("Every key", ("key", "value"), [(key, _toml(value)) for key, value in run.keys.items()], words=True)
    parts = [first] if rows else ["Every key has its default."]
    return Section("Configuration", parts, wide=True, folded=[(f"All {len(run.keys)} keys", every)])


def _usual(run: Run) -> dict[str, Scalar]:
    """The defaults, and what this run would have resolved them to."""
    usual = default_keys()
    given = {key: value for key, value in run.keys.items() if key in usual and key not in RESOLVED}
    try:
        resolved = from_flat(given).flat()
    except InputError:  # keys of another version
        return usual
    return usual | {key: resolved[key] for key in RESOLVED}


def _toml(value: Scalar) -> str:
    return json.dumps(value, ensure_ascii=False)


def versions(run: Run) -> Section:
    """Of the program and its libraries, and the hash of the student's weights."""
    found = dict(run.summary.get("versions", {}))
    if not found:
        return Section("Versions", ["Not there: they are told when a run ends."])
    rows = [(name, str(version)) for name, version in found.items()]
    table = Table("Versions", ("package", "version"), rows, words=True)
    said = run.summary.get("student_sha256")
    return Section("Versions", [table, *([f"SHA-256 of the student's weights: {said}"] if said else [])])
