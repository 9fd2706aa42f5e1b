"""What a client on a device of its own is sent besides arrays: a model's files, once, known by the model's hash."""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from common.wire import MODEL_FILE


def files_of(folder: Path) -> dict[str, NDArray[np.uint8]]:
    """The bytes of a model folder's files by name, without whatever else lies there."""
    paths = sorted(path for path in folder.iterdir() if path.is_file() and MODEL_FILE.fullmatch(path.name))
    return {path.name: np.frombuffer(path.read_bytes(), dtype=np.uint8) for path in paths}
