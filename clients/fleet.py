"""A client's side of Flower's Fleet API: showing its key to the server, and running a SuperNode.

Run as a module: ``python -m clients.fleet PARENT_PID, and flower-supernode's own arguments``.
"""

import os
import ssl
import sys
import time
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime

import httpx
from flwr.proto.fleet_pb2 import ActivateNodeRequest, DeactivateNodeRequest
from flwr.supercore.error import ApiErrorCode, FlowerError
from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor
from flwr.supercore.primitives.asymmetric import public_key_to_bytes
from flwr.supernode.fleet_http_client import FleetHttpClient
from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor

from clients.edge_folder import ClientFolder
from common.errors import InputError
from common.pki import load_client_key
from common.processes import end_with

POLL_SECONDS = 0.2  # between two questions to the server whether there is a message
LOOK_SECONDS = 0.05  # between two looks, on this machine, whether an answer is there
CLOCK_TOLERANCE = timedelta(minutes=5)  # Flower's, of a signature's time
LOOK_TIMEOUT = 5.0  # seconds
WRONG_NAME = (62, 64)  # X509_V_ERR_HOSTNAME_MISMATCH and IP_ADDRESS_MISMATCH, openssl/x509_vfy.h
GAVE_UP = 1  # exit code
EXPIRED = 10  # X509_V_ERR_CERT_HAS_EXPIRED


class Unreachable(Exception):
    """The server does not answer; it may do so later."""


class KeyRefused(InputError):
    """The server does not know our key, or has struck it off."""


def introduce(folder: ClientFolder) -> None:
    """Show our key to the server, so that what is wrong is known before a SuperNode starts.

    Flower holds a node whose process was killed for present for another minute and lets it in under its id only
    then; the node that was ours is signed off first.

    Raises:
        InputError: the server is not ours, or refuses the key.
        Unreachable: there is no answer.
    """
    key = load_client_key(folder.key_file)
    with FleetHttpClient.from_server_address(
        folder.settings.address,
        insecure=False,
        root_certificates=folder.ca_file.read_bytes(),
        interceptors=[
            RuntimeVersionHttpInterceptor(component_name="SuperNode"),
            NodeAuthHttpInterceptor(key, key.public_key()),
        ],
    ) as server:
        try:
            # a key that is known gets as far as the interval, which is none: nothing changes at the server
            server.ActivateNode(
                ActivateNodeRequest(public_key=public_key_to_bytes(key.public_key()), heartbeat_interval=0)
            )
        except httpx.HTTPStatusError as error:
            found = FlowerError.from_json(error.response.text)
            if found is None or found.code != ApiErrorCode.FLEET_INVALID_HEARTBEAT_INTERVAL:
                raise _refusal(folder, error.response) from None
        except httpx.TransportError as error:
            raise _no_connection(folder, error) from None
        with suppress(OSError, ValueError, httpx.HTTPError):  # it was never there, or is not present
            server.DeactivateNode(DeactivateNodeRequest(node_id=int(folder.node_file.read_text())))


def answers(folder: ClientFolder) -> bool:
    """Whether our server is there, whatever it says."""
    trusted = ssl.create_default_context(cafile=str(folder.ca_file))
    try:
        httpx.get(f"https://{folder.settings.address}/", verify=trusted, timeout=LOOK_TIMEOUT)
    except httpx.TransportError:
        return False
    return True


def _refusal(folder: ClientFolder, response: httpx.Response) -> Exception:
    """The error for an answer that is not what was asked for."""
    address = folder.settings.address
    if response.status_code >= 500 or response.status_code in (408, 413, 429):  # its own trouble, or a proxy's
        return Unreachable(f"{address} answers with {response.status_code}")
    if response.status_code in (404, 405):
        return InputError(f"{address}: no fedistill server; correct host and port in {folder.path / 'client.toml'}")
    if "date" in response.headers:
        apart = timedelta()
        with suppress(ValueError, TypeError):  # no date, or one without a zone
            apart = abs(datetime.now(UTC) - parsedate_to_datetime(response.headers["date"]))
        if apart > CLOCK_TOLERANCE:
            return InputError(f"the clocks of this machine and of {address} are {apart} apart; set this one right")
    return KeyRefused(
        f"{address} refuses the key of client {folder.settings.client}: it is unknown there or was revoked; "
        "ask for a new folder (`fedistill edge add-client`)"
    )


def _no_connection(folder: ClientFolder, error: BaseException) -> Exception:
    """The error for a connection that was not made, by what lies beneath it."""
    address = folder.settings.address
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, ssl.SSLError):
        cause = cause.__cause__ or cause.__context__
    if isinstance(cause, ssl.SSLCertVerificationError):
        if cause.verify_code in WRONG_NAME:
            return InputError(
                f"the server's certificate is not for {folder.settings.host}; correct host in "
                f"{folder.path / 'client.toml'}, or make the server's with that --host"
            )
        if cause.verify_code == EXPIRED:
            return InputError(f"the certificate of {address} has expired; run there: fedistill edge renew")
        return InputError(
            f"the certificate of {address} is not signed by this client's {folder.ca_file.name} "
            f"({cause.verify_message}): another federation's server, or someone in between; nothing was sent"
        )
    if isinstance(cause, ssl.SSLError):
        return InputError(f"{address} does not speak TLS; correct host and port in {folder.path / 'client.toml'}")
    return Unreachable(f"{address} does not answer ({type(error).__name__})")


class _Clock:
    """The `time` that Flower's SuperNode waits by: its waits, 3 s for a message and 0.5 s for an answer, cannot be set.

    With those a round that does nothing takes 8 to 11 s.
    """

    @staticmethod
    def sleep(seconds: float) -> None:
        time.sleep(POLL_SECONDS if seconds > 1.0 else LOOK_SECONDS)


def main(parent: str, *arguments: str) -> None:
    """Run Flower's SuperNode in this process."""
    end_with(int(parent))
    from flwr.supernode import start_client_internal
    from flwr.supernode.cli import flower_supernode

    vars(start_client_internal)["time"] = _Clock

    sys.argv = ["flower-supernode", *arguments]
    flower_supernode()
    # it has given up on the server, as it does when a TLS handshake takes too long, but its own server runs on in a
    # thread: end, so that whoever started us can start anew
    os._exit(GAVE_UP)


if __name__ == "__main__":
    main(*sys.argv[1:])
