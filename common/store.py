"""Files that are whole or absent: the cache folder, atomic writes, one builder at a time."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock

from common.errors import InputError


def cache_folder(configured: str = "") -> Path:
    """Where tokenised data, fine-tuned teachers and their outputs are kept between runs, readable by the owner alone.

    In this order: the key ``runtime.cache``, the variable ``FEDISTILL_CACHE``, ``~/.cache/fedistill``.
    """
    chosen = configured or os.environ.get("FEDISTILL_CACHE", "")
    folder = Path(chosen).expanduser() if chosen else Path.home() / ".cache" / "fedistill"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"runtime.cache = {str(folder)!r}: {error.strerror}; give a folder that can be made") from None
    return folder.resolve()


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file so that a reader, a kill or a full disk finds the old content or the new, never half."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        Path(name).chmod(0o644)
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def sync_folder(folder: Path) -> None:
    """Have the names in a folder on disk: only then does a rename, or a new file, outlast a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def build_folder(target: Path) -> Iterator[Path | None]:
    """Build a folder once: yields an empty folder to fill, or None when ``target`` is there already.

    Other processes that want the same folder wait. The filled folder takes its final name in one step, so
    a builder that is killed leaves nothing that looks finished.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    if target.is_dir():
        yield None
        return
    with FileLock(str(target) + ".lock"):
        if target.is_dir():
            yield None
            return
        for abandoned in target.parent.glob(f".{target.name}.*"):  # by a builder that was killed: we hold the lock
            shutil.rmtree(abandoned, ignore_errors=True)
        with draft_of(target) as draft:
            yield draft


def make_folder(path: Path, key: str) -> None:
    """Make a folder, with those above it, that will be written into.

    Raises:
        InputError: it cannot be, named by its key.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise InputError(f"{key} {path}: {error.strerror}; give a folder that can be written") from None


@contextmanager
def draft_of(target: Path) -> Iterator[Path]:
    """An empty folder to fill, that takes the name of ``target``, where nothing is, when it is finished.

    On an error it is removed. A process that is killed leaves it under a hidden name beside ``target``.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}."))
    try:
        yield draft
        draft.rename(target)
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        raise
