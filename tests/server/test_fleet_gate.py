"""The gate in front of Flower: what comes to the clients' door gets the Fleet API and nothing else."""

import asyncio

import pytest

from server.fleet_gate import MAX_REQUEST_BYTES, FleetGate

INNER = ("127.0.0.1", 9093)


def status_of(door, path, length="0", kind="http"):
    """What the gate answers; 200 where the request reached Flower."""

    async def flower(scope, receive, send):
        await send({"type": "http.response.start", "status": 200})

    sent = []

    async def send(message):
        sent.append(message)

    headers = [] if length is None else [(b"content-length", length.encode())]
    scope = {"type": kind, "server": door, "path": path, "headers": headers}
    asyncio.run(FleetGate(flower, INNER)(scope, None, send))
    return sent[0].get("status", sent[0]["type"])


@pytest.mark.parametrize(
    "path", ["/v1/control/start-run", "/v1/runtime/acquire-task", "/health", "/docs", "/openapi.json", "/", "/v1/fleet"]
)
def test_only_this_machines_door_opens_to_all(path):
    assert status_of(INNER, path) == 200
    for door in (("192.0.2.1", 9092), ("127.0.0.1", 9092), ("192.0.2.1", 9093), None):
        assert status_of(door, path) == 404


def test_clients_reach_the_fleet_api():
    assert status_of(("192.0.2.1", 9092), "/v1/fleet/pull-messages") == 200
    assert status_of(("192.0.2.1", 9092), "/V1/fleet/pull-messages") == 404
    assert status_of(("192.0.2.1", 9092), "//v1/fleet/pull-messages") == 404


def test_no_stranger_fills_the_memory():
    assert status_of(("192.0.2.1", 9092), "/v1/fleet/x", str(MAX_REQUEST_BYTES)) == 200
    assert status_of(("192.0.2.1", 9092), "/v1/fleet/x", str(MAX_REQUEST_BYTES + 1)) == 413
    assert status_of(("192.0.2.1", 9092), "/v1/fleet/x", None) == 411
    assert status_of(("192.0.2.1", 9092), "/v1/fleet/x", "-1") == 411


def test_no_other_protocol():
    assert status_of(("192.0.2.1", 9092), "/v1/fleet/x", kind="websocket") == "websocket.close"
