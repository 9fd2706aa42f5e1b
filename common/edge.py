"""What both ends of a real federation know: where the server is, and folders that hold keys."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Self

import tomli_w
from filelock import FileLock, Timeout
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from common.config import read_document
from common.errors import InputError
from common.pki import check_host


def _host(value: str) -> str:
    try:
        return check_host(value)
    except InputError as error:
        raise ValueError(str(error)) from None


class Endpoint(BaseModel):
    """Where clients find the server; as a TOML file."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    host: Annotated[str, AfterValidator(_host)]
    port: int = Field(ge=1, le=65535)

    @property
    def address(self) -> str:
        return host_and_port(self.host, self.port)

    def toml(self) -> bytes:
        return tomli_w.dumps(self.model_dump()).encode()

    @classmethod
    def read(cls, path: Path) -> Self:
        """What a file says.

        Raises:
            InputError: there is no such file, or it holds anything else.
        """
        try:
            return cls(**read_document(path, "a folder that `fedistill edge` has made"))
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(str(part) for part in first["loc"])
            raise InputError(f"{path}: {place}: {first['msg'].removeprefix('Value error, ')}") from None


class ClientFile(Endpoint):
    """``client.toml``: the server's address and which client this is."""

    client: int = Field(ge=0, lt=2**31)


def host_and_port(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def write_private(path: Path, data: bytes) -> None:
    """Write a new file that its owner alone can read, from its first byte on."""
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as stream:
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())


def check_private(path: Path) -> None:
    """See that a file is its owner's alone.

    Raises:
        InputError: it is not there, or others can read it.
    """
    try:
        mode = path.stat().st_mode & 0o777
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None
    if mode & 0o077:
        raise InputError(f"{path}: others can read this key (mode {mode:o}); run: chmod 600 {path}")


@contextmanager
def alone_in(folder: Path, name: str, taken: str) -> Iterator[None]:
    """Hold ``folder/name`` as a lock; one that dies, however it dies, lets go of it.

    Raises:
        InputError: another process holds it, with ``taken`` as the words for that.
    """
    lock = FileLock(folder / name)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise InputError(f"{folder}: {taken}") from None
    except OSError as error:
        raise InputError(f"{folder}: cannot be written: {error.strerror}") from None
    try:
        yield
    finally:
        lock.release()
