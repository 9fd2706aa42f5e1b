"""``fedistill teacher``: the shared teacher as a folder of its own."""

import shutil
import sys
from pathlib import Path

from common.config import Config
from common.errors import InputError
from common.store import draft_of, make_folder
from server.lesson import prepare_lesson
from server.teacher import find_teacher
from simulations.display import console_on, progress_for


def save_teacher(config: Config, out: Path) -> None:
    """Fine-tune (or find in the cache) the teacher of a configuration, copy it to ``out``, print its scores."""
    if out.exists():
        raise InputError(f"--out {out}: exists already; give a new folder")
    make_folder(out.parent, "--out")
    console = console_on(sys.stdout)
    progress = progress_for(console)
    lesson = prepare_lesson(config, find_teacher(config.teacher.model), progress)
    with draft_of(out) as draft:
        shutil.copytree(lesson.teacher.folder, draft, dirs_exist_ok=True)
    found = ", ".join(f"{name} {value:.4f}" for name, value in lesson.validation.items() if name != "n")
    progress.line(f"{out}: {found or 'no validation split'} (sha256 {lesson.teacher.hash[:16]})")
