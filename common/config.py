"""A run's configuration: keys read, laid over each other and checked.

The same keys come from a TOML file (sections), from ``-s section.key=value`` on the command line and from
``flwr run . --run-config``. A key that does not exist or a value that does not fit raises `InputError` before anything
starts.
"""

import difflib
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tomli_w
from numpy.typing import NDArray
from pydantic import ValidationError, model_validator

from common.combinations import check_combinations, resolve_server
from common.errors import InputError
from common.keys import Keys
from common.section import Scalar, Section
from common.tiers import assign_tiers

OF_MANY_RUNS = ("arms", "attacks", "grid", "seeds", "tasks")  # keys and tables of sweeps and audits


class Config(Keys):
    """A run. `Config()` is the embedded demo; see `load_config` for how keys are given."""

    @model_validator(mode="before")
    @classmethod
    def _defaults_of_the_task(cls, values: Any) -> Any:
        """Resolve ``auto``, so that the run folder's config.toml says what was really done."""
        if not isinstance(values, dict) or not isinstance(values.get("data", {}), dict):
            return values
        data = dict(values.get("data", {}))
        toy = values.get("task", "toy") == "toy"
        if data.get("partition", "auto") == "auto":
            own = data.get("private") or data.get("partition-by") or (toy and not data.get("clients"))
            data["partition"] = "natural" if own else "dirichlet"
        if data["partition"] == "natural" and toy and not data.get("partition-by"):
            data["partition-by"] = "domain"
        if data["partition"] != "natural" and not data.get("clients"):
            data["clients"] = 10
        server = values.get("server", {})
        if isinstance(server, dict):
            server = resolve_server(server)
        return {**values, "data": data, "server": server}

    @model_validator(mode="after")
    def _keys_that_need_each_other(self) -> "Config":
        check_combinations(self)
        return self

    def scores_after(self, number: int) -> bool:
        """Whether the student is scored after this round."""
        return number % self.server.scores_every == 0 or number == self.rounds

    @property
    def scored_share(self) -> float:
        """Of the rounds: after which the student is scored."""
        return sum(map(self.scores_after, range(1, self.rounds + 1))) / self.rounds

    @property
    def teaches_inside(self) -> bool:
        """Whether who trains a student of a mixed federation trains the smaller ones inside it along."""
        keys = self.distill
        return self.student.tier_mode == "nested" and keys.self_weight + keys.inner_weight > 0

    def tier_of(self, clients: int) -> NDArray[np.int64]:
        """(clients,) the tier that each client holds, 0 the smallest."""
        return assign_tiers(self.seed, clients, self.student.sizes, self.student.holders)

    def flat(self) -> dict[str, Scalar]:
        """All keys, dotted: ``{"task": "toy", "data.clients": 0, ...}``."""
        found: dict[str, Scalar] = {}
        for name, value in self.model_dump(by_alias=True).items():
            if isinstance(value, dict):
                found.update({f"{name}.{key}": inner for key, inner in value.items()})
            else:
                found[name] = value
        return found

    def toml(self) -> str:
        """All keys as a TOML document that `load_config` reads back to an equal model."""
        return tomli_w.dumps(self.model_dump(by_alias=True))


def default_keys() -> dict[str, Scalar]:
    """Every key with its default as written, before ``auto`` is resolved for a task."""
    found: dict[str, Scalar] = {}
    for name, entry in Config.model_fields.items():
        if isinstance(entry.default, Section):
            found.update({f"{name}.{key}": value for key, value in entry.default.model_dump(by_alias=True).items()})
        else:
            found[name] = entry.default
    return found


def load_config(
    path: Path | None = None,
    settings: Iterable[str] = (),
    base: Config | None = None,
    fixed: Mapping[str, Scalar] | None = None,
) -> Config:
    """Read a TOML file, lay ``key=value`` settings over it, check everything; what neither gives is the base's.

    Args:
        fixed: dotted keys that are so whatever is given.

    Raises:
        InputError: naming the file or key, what was found and what would be right.
    """
    flat: dict[str, Any] = dict(base.flat()) if base is not None else {}
    if path is not None:
        flat |= read_toml(path)
    return from_flat({**flat, **read_settings(settings), **(fixed or {})})


def read_settings(settings: Iterable[str]) -> dict[str, Scalar]:
    """Dotted keys from ``key=value`` texts; the keys are not checked.

    Raises:
        InputError: one is no ``key=value``.
    """
    flat: dict[str, Scalar] = {}
    for setting in settings:
        key, equals, text = setting.partition("=")
        if not equals or not key.strip():
            raise InputError(f"-s {setting}: give key=value, e.g. -s rounds=3")
        flat[key.strip()] = _parse(text.strip())
    return flat


def from_flat(flat: Mapping[str, Any]) -> Config:
    """Build a `Config` from dotted keys, as Flower's run config gives them."""
    known = default_keys()
    nested: dict[str, Any] = {}
    for key, value in flat.items():
        if key.partition(".")[0] in OF_MANY_RUNS:
            raise InputError(f"{key}: it lists several runs; give the file to `fedistill sweep` or `fedistill audit`")
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
            hint = f"; did you mean {near[0]}?" if near else "; `fedistill keys` lists all"
            raise InputError(f"{key}: no such key{hint}")
        section, dot, name = key.partition(".")
        if dot:
            nested.setdefault(section, {})[name] = value
        else:
            nested[key] = value
    try:
        return Config.model_validate(_numbers_to_text(nested))
    except ValidationError as error:
        raise InputError(_first_problem(error)) from None


def read_document(path: Path, wanted: str) -> dict[str, Any]:
    """A TOML file as it is.

    Args:
        wanted: what to give where there is no such file.

    Raises:
        InputError: it cannot be read, or is not TOML.
    """
    try:
        return tomllib.loads(path.read_bytes().decode("utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; give {wanted}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not a TOML file: {error}") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None


def read_toml(path: Path) -> dict[str, Any]:
    """Dotted keys of a TOML file; neither keys nor values are checked.

    Raises:
        InputError: it cannot be read, or is not TOML.
    """
    document = read_document(path, "a TOML file")
    flat: dict[str, Any] = {}
    for key, value in document.items():
        if isinstance(value, dict) and (value or key in Config.model_fields):
            flat.update({f"{key}.{name}": inner for name, inner in value.items()})
        else:
            flat[key] = value
    return flat


def changed(config: Config, settings: Mapping[str, Any]) -> Config:
    """The configuration with other values of some dotted keys.

    Raises:
        InputError: they do not fit the others.
    """
    return from_flat({**config.flat(), **settings})


def _parse(text: str) -> Scalar:
    """A value typed on the command line, read as TOML where it is TOML and as plain text where not."""
    try:
        value = tomllib.loads(f"v = {text}")["v"]
    except tomllib.TOMLDecodeError:
        return text
    return value if isinstance(value, str | int | float | bool) else text


def _numbers_to_text(nested: dict[str, Any]) -> dict[str, Any]:
    """``student.layer-selection=1`` and ``data.source=2024`` are text that happens to look like a number."""
    texts = {key for key, value in default_keys().items() if isinstance(value, str)}
    result: dict[str, Any] = {}
    for name, value in nested.items():
        if isinstance(value, dict):
            result[name] = {
                key: str(inner) if f"{name}.{key}" in texts and type(inner) in (int, float) else inner
                for key, inner in value.items()
            }
        else:
            result[name] = value
    return result


def _first_problem(error: ValidationError) -> str:
    first = error.errors()[0]
    key = ".".join(str(part) for part in first["loc"])
    message = first["msg"].removeprefix("Value error, ")
    if not key:
        return message
    return f"{key} = {first['input']!r}: {message[0].lower()}{message[1:]}"
