"""A client's own folder on its machine, as `fedistill edge init` made it, and what must be right before it starts."""

import shutil
from dataclasses import dataclass
from pathlib import Path

from common.edge import ClientFile, check_private
from common.errors import InputError
from common.files import read_columns
from common.pki import load_certificate, load_client_key, load_public_key

MIN_FREE_BYTES = 10**9  # a model, the teacher's cached outputs, Flower's own copies


@dataclass(frozen=True)
class ClientFolder:
    """A client's folder: who it is, where the server is, and its key."""

    path: Path
    settings: ClientFile

    @classmethod
    def open(cls, path: Path) -> "ClientFolder":
        """Find a client's folder and check what it holds.

        Raises:
            InputError: it is none, or its certificate or key is not as it must be.
        """
        if not (path / "client.toml").is_file():
            raise InputError(f"{path}: not a client's folder; `fedistill edge init` makes them, in DIR/clients")
        found = cls(path.resolve(), ClientFile.read(path / "client.toml"))
        load_certificate(found.ca_file, authority=True)
        check_private(found.key_file)
        if load_client_key(found.key_file).public_key() != load_public_key(found.path / "client.key.pub"):
            raise InputError(f"{found.key_file}: does not belong to client.key.pub; copy the whole folder again")
        return found

    @property
    def ca_file(self) -> Path:
        return self.path / "ca.crt"

    @property
    def key_file(self) -> Path:
        return self.path / "client.key"

    @property
    def state(self) -> Path:
        return self.path / "state"

    @property
    def secret_file(self) -> Path:
        """Who can read it can ask this client's SuperNode for messages."""
        return self.state / "superexec.secret"

    @property
    def worker_log(self) -> Path:
        return self.state / "worker.log"

    @property
    def node_file(self) -> Path:
        """The id that the server knows this client by."""
        return self.state / "node-id"

    def make_state(self) -> None:
        """Make the folder for what a running client keeps.

        Raises:
            InputError: it cannot be made, or there is too little room.
        """
        try:
            self.state.mkdir(mode=0o700, exist_ok=True)
            (self.state / "flower").mkdir(mode=0o700, exist_ok=True)
            free = shutil.disk_usage(self.state).free
        except OSError as error:
            raise InputError(f"{self.state}: cannot be made: {error.strerror}") from None
        if free < MIN_FREE_BYTES:
            raise InputError(f"{self.state}: {free / 1e9:.1f} GB free; make room for {MIN_FREE_BYTES / 1e9:.0f} GB")


def check_data(path: Path) -> Path:
    """See that a file of examples can be read; returns its absolute path.

    Raises:
        InputError: it is not there, of no known kind, or holds no example.
    """
    if not path.is_file():
        raise InputError(f"--data {path}: no such file")
    columns = read_columns(path)
    if not columns or not next(iter(columns.values()))():
        raise InputError(f"--data {path}: holds no example")
    return path.resolve()
