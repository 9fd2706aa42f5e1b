"""The configuration, what is not the default first, and the versions that made the run."""

import json

from common.config import default_keys
from common.section import Scalar
from server.report.page import Section, Table
from server.report.read import Run


def configuration(run: Run) -> Section:
    """Keys that are not the default; behind them, folded, all."""
    usual = default_keys()
    changed = [(key, value) for key, value in run.keys.items() if key not in usual or value != usual[key]]
    rows = [(key, _toml(value), _toml(usual[key]) if key in usual else "no such key now") for key, value in changed]
    first = Table("Keys that are not the default", ("key", "value", "default"), rows, words=True)
    every = Table("Every key", ("key", "value"), [(key, _toml(value)) for key, value in run.keys.items()], words=True)
    parts = [first] if rows else ["Every key has its default."]
    return Section("Configuration", parts, wide=True, folded=[(f"All {len(run.keys)} keys", every)])


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
