"""The model and data hub, asked only when a user's key needs it, with a short wait and a useful refusal."""

from pathlib import Path
from typing import Literal

from common.errors import InputError

WAIT_SECONDS = 10.0


def fetch_folder(repo: str, kind: Literal["model", "dataset"], patterns: tuple[str, ...], key: str) -> Path:
    """Download files of a hub repository (or find them in its cache) and return the local folder.

    Raises:
        InputError: the hub cannot be reached or has no such thing; says what was wanted and how to give it.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.utils.tqdm import disable_progress_bars

    disable_progress_bars()
    try:
        folder = snapshot_download(
            repo, repo_type=kind, allow_patterns=list(patterns), etag_timeout=WAIT_SECONDS, max_workers=4
        )
    except Exception as error:  # the client raises a dozen kinds for "not reachable" and "not there"
        wanted = ", ".join(patterns)
        raise InputError(
            f"{key}: the hub's {kind} {repo} ({wanted}) could not be fetched ({type(error).__name__}); "
            f"download it where there is a network and give its folder: {key} = FOLDER"
        ) from None
    return Path(folder)
