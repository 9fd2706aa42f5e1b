"""``fedistill teacher``: the shared teacher as a folder of its own."""

import shutil
import sys
from pathlib import Path

from common.config import Config
from common.dataset import prepare_dataset
from common.device import choose_compute
from common.errors import InputError
from common.models import load_teacher
from common.store import cache_folder
from server.teacher import check_head, find_teacher, prepare_teacher
from server.validation import validate
from simulations.display import console_on, progress_for


def save_teacher(config: Config, out: Path) -> None:
    """Fine-tune (or find in the cache) the teacher of a configuration, copy it to ``out``, print its scores."""
    if out.exists():
        raise InputError(f"--out {out}: exists already; give a new folder")
    console = console_on(sys.stdout)
    progress = progress_for(console)
    source = find_teacher(config.teacher.model)
    cache = cache_folder(config.runtime.cache)
    data = prepare_dataset(config, source.folder, cache, progress)
    check_head(source, data.task, len(data.public))
    teacher = prepare_teacher(config, source, data, cache, progress)
    compute = choose_compute(config.runtime.device, config.client.precision)
    scores = validate(load_teacher(teacher.folder).to(compute.device), data, compute)
    shutil.copytree(teacher.folder, out)
    found = ", ".join(f"{name} {value:.4f}" for name, value in scores.items() if name != "n")
    progress.line(f"{out}: {found or 'no validation split'} (sha256 {teacher.hash[:16]})")
