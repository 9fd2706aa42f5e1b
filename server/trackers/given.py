"""What trackers outside the run folder are given besides lines: the keys, and the name they gave the run."""

import json
from collections.abc import Callable
from pathlib import Path

from common.config import Config
from common.section import Scalar
from common.store import write_atomically

NAMES = "tracking.json"  # in the run folder
PLACES = ("data.source", "data.private", "data.validation", "data.public-text", "runtime.cache", "runtime.out")
MODELS = ("teacher.model", "student.model")  # each a folder, or a name on the hub


def told_keys(config: Config) -> dict[str, Scalar]:
    """The keys without folders and files of this machine; none where somebody's presence is protected."""
    if config.privacy.unit != "none" or config.privacy.secure_aggregation:
        return {}
    return {key: value for key, value in config.flat().items() if not _of_this_machine(key, value)}


def _of_this_machine(key: str, value: Scalar) -> bool:
    own = key in PLACES or key.startswith("tracking.")
    return own or (key in MODELS and bool(value) and Path(str(value)).expanduser().is_dir())


def known_run(run: Path, tracker: str, begin: Callable[[], str]) -> str:
    """The name that a tracker has for this run; it is asked for once."""
    kept: dict[str, str] = json.loads((run / NAMES).read_text()) if (run / NAMES).is_file() else {}
    if tracker not in kept:
        kept[tracker] = begin()
        write_atomically(run / NAMES, json.dumps(kept).encode())
    return kept[tracker]
