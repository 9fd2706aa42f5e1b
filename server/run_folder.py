"""What a run leaves behind: config.toml, metrics.jsonl, summary.json, checkpoints/, student/."""

import json
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
from numpy.typing import NDArray

from common.config import Config
from common.errors import InputError
from common.store import write_atomically


class RunFolder:
    """A run's own folder; raises `InputError` when there is something in it already."""

    def __init__(self, path: Path, config: Config) -> None:
        if path.exists() and (not path.is_dir() or any(path.iterdir())):
            raise InputError(f"{path}: not an empty folder; give another --out, or remove it")
        self.made, self.began = not path.exists(), time.monotonic()
        try:
            path.mkdir(parents=True, exist_ok=True)
            write_atomically(path / "config.toml", config.toml().encode())
        except OSError as error:
            raise InputError(f"{path}: cannot be made or written: {error.strerror}") from None
        self.path = path.resolve()

    def release(self) -> None:
        """Undo the claim of a run that never started, because its input was wrong."""
        for name in ("config.toml", "log.txt"):
            (self.path / name).unlink(missing_ok=True)
        if self.made and not any(self.path.iterdir()):
            self.path.rmdir()

    def add_line(self, line: Mapping[str, Any]) -> None:
        """Append one line to metrics.jsonl."""
        with (self.path / "metrics.jsonl").open("a") as stream:
            stream.write(json.dumps(finite(line)) + "\n")

    def save_checkpoint(self, round_number: int, weights: Mapping[str, NDArray[np.float32]], keep: int) -> None:
        """Write the student's trained arrays after a round and forget all but the last ``keep``."""
        folder = self.path / "checkpoints"
        data = safetensors.numpy.save(dict(weights), metadata={"round": str(round_number)})
        write_atomically(folder / f"round-{round_number:05d}.safetensors", data)
        # by number: round-100000 would stand before round-99999
        for old in sorted(folder.glob("round-*.safetensors"), key=lambda path: int(path.stem[6:]))[:-keep]:
            old.unlink()

    def save_summary(self, summary: Mapping[str, Any]) -> None:
        write_atomically(self.path / "summary.json", (json.dumps(finite(summary), indent=2) + "\n").encode())


def finite(value: Any) -> Any:
    """The value with NaN and Inf as null, which JSON has no word for."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {key: finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [finite(inner) for inner in value]
    return value
