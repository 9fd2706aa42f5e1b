"""Every key in words: what `fedistill keys` prints, and docs/configuration.md."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args, get_origin

from pydantic.fields import FieldInfo

from common.config import Config, default_keys
from common.section import Section

ENDLESS = 2**62  # a bound that nobody meets is not worth its words
# of each section a line for the page
ABOUT: Mapping[str, str] = {
    "data": "Where the text comes from, and how it is cut into clients. See [simulations](simulation.md#shards).",
    "teacher": "The shared, frozen model. See [simulations](simulation.md#tasks-and-teachers).",
    "student": "What is cut from the teacher, and how it begins. See [algorithms](algorithms.md#the-student).",
    "distill": "The loss and its parts. See [algorithms](algorithms.md#losses).",
    "client": "Training at a client. See [algorithms](algorithms.md#training-at-a-client).",
    "server": "Cohorts, rules, what travels, what may be lost. See [algorithms](algorithms.md#server-rules).",
    "privacy": "Whose presence is hidden, from whom, how well. See [privacy](privacy.md).",
    "runtime": "Processes, devices, folders. See [simulations](simulation.md#reproducing-a-run).",
}

PAGE = """# Configuration

Every key of a run. In a TOML file they stand in sections, on the command line as `-s section.key=value`, in `flwr run`
in `--run-config`. Lists are written with commas. A key that does not exist, or a value that does not fit, is refused by
name before anything starts.

```
rounds = 20                # in a file: fedistill simulate CONFIG.toml

[server]
cohort = 10                # on the command line: fedistill simulate -s rounds=20 -s server.cohort=10
```

A run folder's `config.toml` holds all of them as they were resolved. This page is written by
`fedistill keys --markdown > docs/configuration.md` from `common/keys.py`; a test holds it to the model.
"""


@dataclass(frozen=True)
class Key:
    """One key in words.

    Attributes:
        name: dotted.
        default: as TOML.
        values: what it takes.
    """

    name: str
    default: str
    values: str
    meaning: str

    @property
    def section(self) -> str:
        """Empty for the keys above the sections."""
        return self.name.rpartition(".")[0]


def every_key() -> Iterator[Key]:
    """All keys in the order of the model."""
    defaults = default_keys()
    for name, entry in Config.model_fields.items():
        if isinstance(entry.default, Section):
            for part, field in type(entry.default).model_fields.items():
                yield _key(f"{name}.{part.replace('_', '-')}", field, defaults)
        else:
            yield _key(name, entry, defaults)


def configuration_page() -> str:
    """The page, a table for each section."""
    keys = list(every_key())
    parts = [PAGE]
    for section in dict.fromkeys(key.section for key in keys):
        about = [ABOUT[section], ""] if section in ABOUT else []
        heading = f"## `[{section}]`" if section else "## Above the sections"
        rows = [_row(key) for key in keys if key.section == section]
        table = ["| key | default | values | meaning |", "| --- | --- | --- | --- |", *rows]
        parts.append("\n".join([heading, "", *about, *table]) + "\n")
    return "\n".join(parts)


def _row(key: Key) -> str:
    # a bar ends a cell, also within code
    cells = (f"`{key.name}`", f"`{key.default}`", key.values, key.meaning)
    return "| " + " | ".join(cell.replace("|", r"\|") for cell in cells) + " |"


def _key(name: str, field: FieldInfo, defaults: Mapping[str, Any]) -> Key:
    return Key(name, _toml(defaults[name]), _values(field), field.description or "")


def _toml(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else f'"{value}"' if isinstance(value, str) else str(value)


def _values(field: FieldInfo) -> str:
    """What a key takes: its choices, or its kind and bounds."""
    kind = field.annotation
    if get_origin(kind) is Literal:
        return ", ".join(f"`{choice}`" for choice in get_args(kind))
    if kind is bool:
        return "`true`, `false`"
    if kind is str:
        return "text"
    words = {"ge": "from", "gt": "above", "le": "up to", "lt": "below"}
    bounds = [
        f"{word} {_figure(bound)}"
        for name, word in words.items()
        for rule in field.metadata
        if (bound := getattr(rule, name, None)) is not None and bound < ENDLESS
    ]
    return " ".join(["number" if kind is float else "whole number", *bounds])


def _figure(bound: float) -> str:
    return f"{bound:,.0f}" if float(bound).is_integer() else f"{bound:g}"
