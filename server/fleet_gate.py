"""Flower's SuperLink behind two doors: everything on loopback, for the clients only what clients need.

Flower 1.41 serves its Fleet API (clients), its Control API (which starts any code, with no login) and its Runtime API
on one address. Here the same process listens on two: `--host` and `--port`, its own, answer everything; the fleet's
address answers the Fleet API alone. Which of the two a request came to is what its socket says, not what it says.

Run as a module: ``python -m server.fleet_gate PARENT_PID FLEET_HOST FLEET_PORT, and flower-superlink's own arguments``.
"""

import logging
import socket
import ssl
import sys
from collections.abc import Awaitable, Callable, MutableMapping
from functools import partial
from typing import Any

from common.processes import end_with

FLEET = "/v1/fleet/"
MAX_REQUEST_BYTES = (
    32 * 2**20
)  # Flower sends arrays in parts of at most 20 MiB; a body is read before its sender is known
GRACE_SECONDS = 3
ROUTINE = ("/v1/control/list-nodes", "ControlServicer.ListNodes")  # asked by us, every other second

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
Application = Callable[[Scope, Receive, Send], Awaitable[None]]


class FleetGate:
    """An ASGI application that lets through to another what came to the door it may come to.

    Args:
        app: Flower's, which serves all its interfaces.
        inner: (address, port) of the door that opens to all of them.
    """

    def __init__(self, app: Application, inner: tuple[str, int]) -> None:
        self._app, self._inner = app, inner

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan" or tuple(scope.get("server") or ()) == self._inner:
            return await self._app(scope, receive, send)
        if scope["type"] != "http" or not scope["path"].startswith(FLEET):
            return await _refuse(scope, send, 404)
        length = dict(scope["headers"]).get(b"content-length", b"")
        if not length.isdigit():
            return await _refuse(scope, send, 411)
        if int(length) > MAX_REQUEST_BYTES:
            return await _refuse(scope, send, 413)
        return await self._app(scope, receive, send)


async def _refuse(scope: Scope, send: Send, status: int) -> None:
    if scope["type"] == "websocket":
        return await send({"type": "websocket.close", "code": 1008})
    await send({"type": "http.response.start", "status": status, "headers": [(b"connection", b"close")]})
    return await send({"type": "http.response.body", "body": b""})


def serve(fleet: tuple[str, int], app: Application, *, host: str, port: int, **options: Any) -> None:
    """What Flower calls in place of ``uvicorn.run``: one server that listens at both doors."""
    import uvicorn

    inner = _listen(host, port)
    outer = _listen(*fleet)
    address, number = inner.getsockname()[:2]
    config = uvicorn.Config(
        FleetGate(app, (address, number)), host=host, port=port,
        **{**options, "proxy_headers": False, "server_header": False, "timeout_graceful_shutdown": GRACE_SECONDS},
    )  # fmt: skip
    config.load()
    assert config.ssl is not None
    config.ssl.minimum_version = ssl.TLSVersion.TLSv1_3
    for name in ("flwr", "uvicorn.access"):
        logging.getLogger(name).addFilter(lambda record: not any(part in record.getMessage() for part in ROUTINE))
    uvicorn.Server(config).run([inner, outer])


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:
        sys.exit(f"fedistill: cannot listen on {host} port {port}: {error.strerror}")


def main(parent: str, host: str, port: str, *arguments: str) -> None:
    """Start Flower's SuperLink in this process."""
    end_with(int(parent))
    import uvicorn
    from flwr.superlink.cli import flower_superlink

    uvicorn.run = partial(serve, (host, int(port)))
    sys.argv = ["flower-superlink", *arguments]
    flower_superlink()


if __name__ == "__main__":
    main(*sys.argv[1:])
