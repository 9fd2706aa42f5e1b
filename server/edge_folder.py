"""The folder of a real federation at its server: the authority, the server's certificate, who may take part.

    DIR/edge.toml              host and port by which clients reach the server
    DIR/ca/                    the authority; its key signs server certificates and is needed for nothing else
    DIR/server/                the server's certificate and key
    DIR/keys/client-0.pub      a client that may take part; a file moved to revoked/ is one that no longer may
    DIR/clients/client-0/      what is copied to the client's machine, and nothing else
    DIR/state/                 the running server's database, log and lock

Every change takes its final name in one step: a kill leaves the old state, or the new.
"""

import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric import ec

from common.edge import ClientFile, Endpoint, alone_in, check_private, write_private
from common.errors import InputError
from common.pki import (
    Issued,
    check_host,
    create_authority,
    create_client_key,
    fingerprint,
    issue_server,
    load_certificate,
    load_issued,
    load_private_key,
    load_public_key,
    names_of,
)
from common.store import build_folder, write_atomically

MAX_CLIENTS = 10_000
CLIENT = re.compile(r"client-(0|[1-9]\d{0,8})")
PARTS = ("ca", "server", "keys", "revoked", "clients", "state")
DRAFT = ".draft-"


@dataclass(frozen=True)
class EdgeFolder:
    """A folder that ``fedistill edge init`` has made."""

    path: Path
    endpoint: Endpoint

    @classmethod
    def open(cls, path: Path) -> "EdgeFolder":
        """Find a federation's folder.

        Raises:
            InputError: it is none.
        """
        if not (path / "edge.toml").is_file():
            raise InputError(f"{path}: not a federation's folder; make one with `fedistill edge init`")
        return cls(path.resolve(), Endpoint.read(path / "edge.toml"))

    @property
    def ca_file(self) -> Path:
        return self.path / "ca" / "ca.crt"

    @property
    def certificate_file(self) -> Path:
        return self.path / "server" / "server.crt"

    @property
    def key_file(self) -> Path:
        return self.path / "server" / "server.key"

    @property
    def state(self) -> Path:
        return self.path / "state"

    @property
    def secret_file(self) -> Path:
        """Who can read it can take the server's part in a run."""
        return self.state / "superexec.secret"

    @property
    def control_file(self) -> Path:
        """Where the running server's Control API is; absent when none runs."""
        return self.state / "control.toml"

    def authority(self) -> Issued:
        """The authority, with its key.

        Raises:
            InputError: it is damaged, expired, or others can read its key.
        """
        key = self.path / "ca" / "ca.key"
        check_private(key)
        return load_issued(self.ca_file, key, authority=True)

    def server(self) -> Issued:
        """The server's certificate and key.

        Raises:
            InputError: they are damaged, expired, not of this authority, or others can read the key.
        """
        check_private(self.key_file)
        found = load_issued(self.certificate_file, self.key_file, authority=False)
        authority = load_certificate(self.ca_file, authority=True)
        try:
            found.certificate.verify_directly_issued_by(authority)
        except (ValueError, TypeError, InvalidSignature):
            raise InputError(f"{self.certificate_file}: not signed by {self.ca_file}") from None
        return found

    def admitted(self) -> dict[int, ec.EllipticCurvePublicKey]:
        """Public keys of the clients that may take part, by number."""
        return _keys_in(self.path / "keys")

    def revoked(self) -> dict[int, ec.EllipticCurvePublicKey]:
        """Public keys of those that no longer may."""
        return _keys_in(self.path / "revoked")

    def struck_off(self) -> set[int]:
        """Numbers of those that no longer may."""
        return {int(name[1]) for path in (self.path / "revoked").glob("*.pub") if (name := CLIENT.fullmatch(path.stem))}

    @contextmanager
    def changing(self) -> Iterator[None]:
        """One change at a time; clears what a killed one has left."""
        with alone_in(self.path, ".lock", "another command changes it; wait for its end"):
            for draft in (self.path / "clients").glob(f"{DRAFT}*"):
                shutil.rmtree(draft)
            yield


def _keys_in(folder: Path) -> dict[int, ec.EllipticCurvePublicKey]:
    found = {}
    for path in folder.glob("*.pub"):
        name = CLIENT.fullmatch(path.stem)
        if name is None:
            raise InputError(f"{path}: not a client's key; its name is client-NUMBER.pub")
        try:
            found[int(name[1])] = load_public_key(path)
        except InputError:
            if path.exists():  # else it was moved away in this moment
                raise
    return dict(sorted(found.items()))


def init(path: Path, host: str, clients: int, port: int) -> EdgeFolder:
    """Make a federation's folder: authority, server certificate and clients' folders.

    Raises:
        InputError: there is something at ``path``, the host is none, or the folder cannot be made.
    """
    if not 1 <= clients <= MAX_CLIENTS:
        raise InputError(f"clients = {clients}: give 1 to {MAX_CLIENTS}")
    endpoint = Endpoint(host=check_host(host), port=port)
    if path.exists() or path.is_symlink():
        raise InputError(f"{path}: is there already; nothing is overwritten, give another folder")
    try:
        with build_folder(path) as draft:
            if draft is None:
                raise InputError(f"{path}: another command has just made it")
            _fill(draft, endpoint, clients)
    except OSError as error:
        raise InputError(f"{path}: cannot be made: {error.strerror}") from None
    return EdgeFolder.open(path)


def _fill(draft: Path, endpoint: Endpoint, clients: int) -> None:
    for part in PARTS:
        (draft / part).mkdir(mode=0o700)
    authority = create_authority()
    server = issue_server(authority, endpoint.host)
    write_private(draft / "ca" / "ca.key", authority.key_pem())
    write_atomically(draft / "ca" / "ca.crt", authority.certificate_pem())
    write_private(draft / "server" / "server.key", server.key_pem())
    write_atomically(draft / "server" / "server.crt", server.certificate_pem())
    write_atomically(draft / "edge.toml", endpoint.toml())
    folder = EdgeFolder(draft, endpoint)
    for number in range(clients):
        _add_client(folder, number)


def _add_client(folder: EdgeFolder, number: int) -> Path:
    """Make a client's folder, then list its key: a folder without a listed key was never finished."""
    private, public = create_client_key(f"client-{number}")
    home = folder.path / "clients" / f"client-{number}"
    draft = Path(tempfile.mkdtemp(dir=home.parent, prefix=DRAFT))  # 0700
    write_private(draft / "client.key", private)
    write_atomically(draft / "client.key.pub", public)
    write_atomically(draft / "ca.crt", folder.ca_file.read_bytes())
    write_atomically(draft / "client.toml", ClientFile(client=number, **folder.endpoint.model_dump()).toml())
    if home.exists():
        shutil.rmtree(home)
    draft.rename(home)
    write_atomically(folder.path / "keys" / f"client-{number}.pub", public)
    return home


def add_client(folder: EdgeFolder) -> Path:
    """Make one more client, with the next number that was never used; returns its folder."""
    with folder.changing():
        number = max((*folder.admitted(), *folder.revoked(), -1)) + 1
        if number >= MAX_CLIENTS:
            raise InputError(f"{folder.path}: has had {MAX_CLIENTS} clients; make a new federation")
        return _add_client(folder, number)


def revoke(folder: EdgeFolder, client: str) -> int:
    """Strike a client off the list; a server that runs sees it within seconds. Returns its number.

    Raises:
        InputError: there is no such client, or it is struck off already.
    """
    name = CLIENT.fullmatch(client if client.startswith("client-") else f"client-{client}")
    if name is None:
        raise InputError(f"{client!r}: not a client; give its number, or client-NUMBER")
    with folder.changing():
        file = f"{name[0]}.pub"
        if (folder.path / "revoked" / file).exists():
            raise InputError(f"{name[0]}: was revoked before")
        try:
            (folder.path / "keys" / file).rename(folder.path / "revoked" / file)
        except FileNotFoundError:
            known = ", ".join(str(number) for number in folder.admitted()) or "none"
            raise InputError(f"{name[0]}: no such client; there are: {known}") from None
    return int(name[1])


def renew(folder: EdgeFolder) -> Issued:
    """Sign the server's key anew, for another year; clients notice nothing."""
    with folder.changing():
        check_private(folder.key_file)
        key = load_private_key(folder.key_file)
        fresh = issue_server(folder.authority(), folder.endpoint.host, key)
        write_atomically(folder.certificate_file, fresh.certificate_pem())
        return fresh


def describe(folder: EdgeFolder) -> list[str]:
    """Lines for people: until when the certificates hold, their serial numbers, the clients' keys."""
    authority, server = load_certificate(folder.ca_file, authority=True), folder.server().certificate
    lines = [
        f"server     {folder.endpoint.address}",
        f"CA         {_validity(authority)}",
        f"server's   {_validity(server)}, for {', '.join(names_of(server))}",
    ]
    lines += [f"client-{number:<3} {fingerprint(key)}" for number, key in folder.admitted().items()]
    return lines + [f"client-{number:<3} {fingerprint(key)} revoked" for number, key in folder.revoked().items()]


def _validity(certificate: x509.Certificate) -> str:
    return f"certificate {certificate.serial_number:x}, valid until {certificate.not_valid_after_utc:%Y-%m-%d}"


def days_left(issued: Issued) -> int:
    """Whole days that a certificate still holds."""
    return (issued.certificate.not_valid_after_utc - datetime.now(UTC)).days
