"""Flower's Runtime API from the side that works: tasks are asked for, and answered by the code that is installed here.

Left to itself, Flower starts for each message a new process that unpacks and runs the code that came with the run. Both
ends of a real federation ask for their tasks instead, as Flower's `--isolation process` lets them: what a client runs
is what its owner has installed, and models stay in memory from one message to the next. Asking takes a secret that only
those know who can read its file (`--superexec-auth-secret-file`); a task's own token covers the rest.
"""

import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx
from flwr.common.constant import SubStatus
from flwr.proto.runtime_pb2 import AcquireTaskRequest, PushTaskOutputRequest, SendTaskHeartbeatRequest
from flwr.supercore.heartbeat import HeartbeatSender
from flwr.supercore.interceptors import (
    RuntimeTokenHttpInterceptor,
    RuntimeVersionHttpInterceptor,
    SuperExecAuthHttpInterceptor,
)
from flwr.supercore.runtime import RuntimeHttpClient

from common.edge import check_private, write_private

ACQUIRE = "/flwr.proto.Runtime/AcquireTask"
SECRET_BYTES = 32
WITHDRAWN, UNANSWERED = 75, 74  # exit codes of a client's worker: EX_TEMPFAIL and EX_IOERR, sysexits.h


def make_secret(path: Path) -> Path:
    """A file with a fresh secret, its owner's alone; an older one is replaced."""
    path.unlink(missing_ok=True)
    write_private(path, secrets.token_hex(SECRET_BYTES).encode())
    return path


class TaskDesk:
    """Where tasks are asked for.

    Args:
        address: HOST:PORT of the Runtime API.
        secret: the file that `make_secret` has made for it.
        authority: certificate (PEM) that the other end must show; None: it is on this machine and speaks plain HTTP.
        name: what Flower knows the asking program as, to compare versions.
    """

    def __init__(self, address: str, secret: Path, *, authority: bytes | None, name: str) -> None:
        check_private(secret)
        self._address, self._authority, self._name = address, authority, name
        signed = SuperExecAuthHttpInterceptor(master_secret=secret.read_bytes(), protected_methods={ACQUIRE})
        self._client = RuntimeHttpClient.from_server_address(
            address,
            insecure=authority is None,
            root_certificates=authority,
            interceptors=[RuntimeVersionHttpInterceptor(component_name="SuperExec"), signed],
        )

    def close(self) -> None:
        self._client.close()

    def acquire(self, kind: str) -> str:
        """The token of the oldest task of a kind that waits; empty: none does.

        Raises:
            httpx.HTTPError: the other end does not answer, or refuses.
        """
        return self._client.AcquireTask(AcquireTaskRequest(supported_task_types=[kind])).token

    def connect(self, token: str) -> RuntimeHttpClient:
        """A connection for the one task that a token is for."""
        return RuntimeHttpClient.from_server_address(
            self._address,
            insecure=self._authority is None,
            root_certificates=self._authority,
            interceptors=[RuntimeVersionHttpInterceptor(component_name=self._name), RuntimeTokenHttpInterceptor(token)],
        )


@contextmanager
def working(client: RuntimeHttpClient, gone: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Tell Flower that a task's worker lives, which else gives it up after a minute; at the end, how it went.

    Args:
        gone: called, in another thread, when Flower does not know the task any more.
    """

    def beat() -> bool:
        try:
            known = client.SendTaskHeartbeat(SendTaskHeartbeatRequest()).success
        except httpx.HTTPStatusError as error:
            known = error.response.status_code not in (401, 403, 404)  # then the token is for nothing any more
        except httpx.HTTPError:
            return False
        if not known:
            gone()
        return True

    heart, outcome = HeartbeatSender(beat), SubStatus.FAILED
    heart.start()
    try:
        yield
        outcome = SubStatus.COMPLETED
    finally:
        heart.stop()
        with suppress(httpx.HTTPError):
            client.PushTaskOutput(PushTaskOutputRequest(sub_status=outcome))
