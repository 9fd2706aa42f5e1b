"""``fedistill ceiling``: the score that central training on everybody's text would reach."""

import json
import sys
from pathlib import Path

from common.config import Config
from common.errors import InputError
from common.store import make_folder, write_atomically
from server.ceiling import prepare_ceiling
from server.run_folder import finite
from simulations.display import console_on, progress_for


def save_ceiling(config: Config, out: Path) -> None:
    """Fine-tune (or find in the cache) the encoder on the whole train split; write and print its scores."""
    target = out / "summary.json"
    if target.exists():
        raise InputError(f"--out {out}: holds a summary.json already; give a new folder")
    if out.exists() and not out.is_dir():
        raise InputError(f"--out {out}: a file; give a folder")
    make_folder(out.parent, "--out")
    progress = progress_for(console_on(sys.stdout))
    ceiling = prepare_ceiling(config, progress)
    summary = {
        "task": ceiling.data.task.name,
        "metric": ceiling.data.task.headline,
        "seed": config.seed,
        "examples": ceiling.model.fine_tuned_on,
        "params": ceiling.params,
        "validation": ceiling.validation,
        "sha256": ceiling.model.hash,
        "keys": config.flat(),
    }
    write_atomically(target, (json.dumps(finite(summary), indent=2) + "\n").encode())
    found = ", ".join(f"{name} {value:.4f}" for name, value in ceiling.validation.items() if name != "n")
    progress.line(f"{target}: {found or 'no validation split'} ({ceiling.model.fine_tuned_on:,} examples, central)")
