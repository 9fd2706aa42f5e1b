"""What a run leaves behind: config.toml, metrics.jsonl, costs.jsonl, summary.json, checkpoints/, student/, report.html;
of a simulation in which nothing is protected shards.json too.

metrics.jsonl holds what was learnt: the same for two runs of the same bits, and for one that was killed and
continued. Times and bytes stand in costs.jsonl.
"""

import json
import math
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from common.config import Config, load_config
from common.errors import InputError
from common.section import Scalar
from common.store import write_atomically
from server.trackers.chosen import Trackers

ENDS = ("summary.json", "report.html")  # what a run leaves when it ends
JOURNALS = ("metrics.jsonl", "costs.jsonl")
SHARDS = "shards.json"
CLAIM = (".lock", ".config.toml.*")  # what a process leaves that is killed while it takes a folder


class RunFolder:
    """A run's own folder.

    Args:
        resume: continue the run whose configuration lies there; an empty folder begins a new one.

    Raises:
        InputError: the folder is taken, cannot be written, or holds a run of another configuration.
    """

    def __init__(self, path: Path, config: Config, *, resume: bool = False) -> None:
        kept = path / "config.toml"
        self.trackers = Trackers(config, path.resolve())
        self.status = "failed"  # until a summary says how the run has ended
        self.resumed = resume and kept.is_file()
        if not self.resumed and path.exists() and not _is_free(path):
            ways = "--resume to continue the run in it, " if kept.is_file() else ""
            what = "not a run's folder" if resume else "not an empty folder"
            raise InputError(f"{path}: {what}; {ways}give another --out, or remove it")
        self.made, self.began = not path.exists(), time.monotonic()
        self._before = {kept.name: kept.read_bytes()} if self.resumed else {}
        self._lock = FileLock(path / ".lock")
        try:
            path.mkdir(parents=True, exist_ok=True)
            self._lock.acquire(timeout=0)
            for name in ("config.toml", "summary.json"):
                for abandoned in path.glob(f".{name}.*"):  # by a process that was killed while it wrote
                    abandoned.unlink()
            write_atomically(kept, config.toml().encode())
        except Timeout:
            raise InputError(f"{path}: another process works in it; wait for its end, or give another --out") from None
        except OSError as error:
            raise InputError(f"{path}: cannot be made or written: {error.strerror}") from None
        self.path = path.resolve()
        if self.resumed:
            self._forget_ends()

    def take_up(self) -> None:
        """Go on with the run in this process, from its last checkpoint."""
        self.resumed = True
        self._forget_ends()

    def _forget_ends(self) -> None:
        """They would speak of a run that goes on."""
        for told in (self.path / name for name in ENDS):
            if told.is_file():
                self._before[told.name] = told.read_bytes()
                told.unlink()

    @property
    def begun(self) -> bool:
        """Whether it holds rounds, or an end, of before this process took it up."""
        return self.resumed and ("summary.json" in self._before or any(self.checkpoints.glob("round-*")))

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def seconds(self) -> float:
        """Since this process took the folder."""
        return time.monotonic() - self.began

    def release(self) -> None:
        """Undo the claim of a run that never started, or never went on: its folder is what it was."""
        if self.resumed:
            for name, data in self._before.items():
                write_atomically(self.path / name, data)
            return
        self._lock.release()
        for name in ("config.toml", "log.txt", ".lock"):
            (self.path / name).unlink(missing_ok=True)
        if self.made and not any(self.path.iterdir()):
            self.path.rmdir()

    def close(self) -> None:
        """Let another process continue the run."""
        self.trackers.end(self.status)
        self._lock.release()

    def add_line(self, line: Mapping[str, Any]) -> None:
        """Append one line to metrics.jsonl, and tell the trackers."""
        self._append("metrics.jsonl", line)
        self.trackers.add(line)

    def add_costs(self, line: Mapping[str, Any]) -> None:
        """Append one line to costs.jsonl."""
        self._append("costs.jsonl", line)

    def lengths(self) -> dict[str, int]:
        """Bytes of each journal, all on disk."""
        found = {}
        for name in JOURNALS:
            with (self.path / name).open("ab") as stream:
                os.fsync(stream.fileno())
                found[name] = stream.tell()
        return found

    def cut_back(self, lengths: Mapping[str, int]) -> None:
        """Make the journals what they were: a run that continues writes the rest again.

        Raises:
            InputError: one is shorter than it was; all are left as they are.
        """
        wanted = {self.path / name: int(lengths.get(name, 0)) for name in JOURNALS}
        for path, length in wanted.items():
            have = path.stat().st_size if path.exists() else 0
            if have < length:
                raise InputError(f"{path}: {have} bytes; at its last checkpoint the run had written {length}")
        for path, length in wanted.items():
            with path.open("ab") as stream:
                stream.truncate(length)
        self.trackers.end("interrupted")  # what they have beyond that is written again

    def save_summary(self, summary: Mapping[str, Any]) -> None:
        self.status = str(summary.get("status", self.status))
        write_atomically(self.path / "summary.json", (json.dumps(finite(summary), indent=2) + "\n").encode())

    def _append(self, name: str, line: Mapping[str, Any]) -> None:
        with (self.path / name).open("a") as stream:
            stream.write(json.dumps(finite(line)) + "\n")


def keys_of_run(
    config: Path | None,
    settings: Sequence[str],
    out: Path | None,
    *,
    resume: bool,
    fixed: Mapping[str, Scalar] | None = None,
) -> Config:
    """The keys that were given; to continue the run in ``out``, its own, and these may only repeat them or add rounds.

    Args:
        fixed: laid over those of a new run; a run that goes on has its own in their place.

    Raises:
        InputError: a key is wrong, or differs from the run's.
    """
    if not resume:
        return load_config(config, settings, fixed=fixed)
    if out is None:
        raise InputError("--resume: give the run's folder with --out")
    kept = out / "config.toml"
    if not kept.is_file():  # killed before it began
        return load_config(config, settings, fixed=fixed)
    before = load_config(kept)
    own = before.flat()
    keys = load_config(config, settings, base=before, fixed={name: own[name] for name in fixed or {}})
    check_resumed(before, keys, out)
    return keys


def check_resumed(before: Config, now: Config, path: Path) -> None:
    """Raise `InputError` naming each key in which a run would be continued with another configuration.

    Only ``rounds`` may grow.
    """
    old, new = before.flat(), now.flat()
    changed = [key for key in old if old[key] != new[key] and not (key == "rounds" and now.rounds > before.rounds)]
    if changed:
        told = ", ".join(f"{key} = {new[key]!r} (was {old[key]!r})" for key in changed)
        raise InputError(f"{path}: --resume with another configuration: {told}; only rounds may grow")


def _is_free(path: Path) -> bool:
    return path.is_dir() and all(any(entry.match(name) for name in CLAIM) for entry in path.iterdir())


def finite(value: Any) -> Any:
    """The value with NaN and Inf as null, which JSON has no word for."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {key: finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [finite(inner) for inner in value]
    return value
