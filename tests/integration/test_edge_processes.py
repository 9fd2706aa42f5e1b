"""Real SuperLink and SuperNodes over TLS: who gets in, who does not, what survives a kill. Nothing is mocked."""

import shutil
import signal
import socket
import ssl
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import httpx
import pytest

from clients.edge_folder import ClientFolder
from common.edge import ClientFile
from common.errors import InputError
from common.processes import free_port
from server.edge_folder import EdgeFolder, add_client, revoke
from server.roster import Roster
from tests.integration.edges import Command, home, lives, make, two_machines, until


@pytest.fixture
def data(tmp_path) -> Path:
    path = tmp_path / "my own 'data'.csv"
    path.write_text("text,label\ngood,1\nbad,0\n")
    return path


def test_who_gets_in_and_who_does_not(edge, data, tmp_path):
    folder, control = make(tmp_path / "fed", 4), free_port()
    server = edge("server", folder.path, "--control-port", control)
    server.wait_for("ready: ")
    clients = [edge("client", home(folder, number), "--data", data) for number in (0, 1)]
    for number, client in enumerate(clients):
        client.wait_for("joined ")
        server.wait_for(f"client {number} joined")
    with Roster("127.0.0.1", control, folder.ca_file) as roster:
        before = roster.nodes()
    assert sorted(node.status for node in before.values()) == ["online", "online", "registered", "registered"]

    # a second client from one folder
    second = edge("client", home(folder, 0), "--data", data)
    assert second.exit_code() == 2
    assert "a client runs from this folder already" in second.text()

    # a client of another federation, whose authority is another: its certificate is not ours
    stranger = make(tmp_path / "other", 1)
    call_here(stranger, 0, folder)
    other = edge("client", home(stranger, 0), "--data", data)
    assert other.exit_code() == 2
    assert "is not signed by this client's ca.crt" in other.text()

    # a client with the right authority and a key that nobody has registered
    shutil.copy(folder.ca_file, home(stranger, 0) / "ca.crt")
    unknown = edge("client", home(stranger, 0), "--data", data)
    assert unknown.exit_code() == 2
    assert "refuses the key of client 0: it is unknown there" in unknown.text()

    # the right server under a name that its certificate does not hold
    alias = ClientFile(host="127.0.0.2", port=folder.endpoint.port, client=2)
    (home(folder, 2) / "client.toml").write_bytes(alias.toml())
    with pytest.raises(InputError, match=r"the server's certificate is not for 127\.0\.0\.2"):
        introduce_by_another_address(folder)

    # no TLS, and interfaces that are not the clients'
    with pytest.raises(httpx.TransportError):
        httpx.get(f"http://127.0.0.1:{folder.endpoint.port}/v1/fleet/pull-messages")
    trusted = ssl.create_default_context(cafile=str(folder.ca_file))
    outside = f"https://127.0.0.1:{folder.endpoint.port}"
    for path in ("/v1/control/list-nodes", "/v1/runtime/acquire-task", "/health", "/v1/fleet/../control/list-nodes"):
        assert httpx.post(outside + path, verify=trusted).status_code == 404
    assert httpx.get(f"https://127.0.0.1:{control}/health", verify=trusted).status_code == 200
    trusted.maximum_version = ssl.TLSVersion.TLSv1_2
    with pytest.raises(httpx.TransportError):
        httpx.get(outside, verify=trusted)
    trusted.maximum_version = ssl.TLSVersion.TLSv1_3
    nobody = httpx.post(
        outside + "/v1/fleet/pull-messages", verify=trusted, headers={"content-type": "application/x-protobuf"}
    )
    assert nobody.status_code in (400, 401, 415)

    # revoked while it runs
    revoke(folder, "1")
    server.wait_for("client 1 revoked")
    assert clients[1].exit_code() == 2
    assert "refuses the key of client 1" in clients[1].text()
    again = edge("client", home(folder, 1), "--data", data)
    assert again.exit_code() == 2

    # the first has noticed nothing, and one more may come
    add_client(folder)
    server.wait_for("client 4 registered")
    assert clients[0].text().count("joined") == 1
    assert clients[0].stop() == 0
    server.wait_for("client 0 left")
    assert server.stop(signal.SIGINT) == 0
    assert server.text().strip().endswith("stopped")


def call_here(stranger: EdgeFolder, number: int, folder: EdgeFolder) -> None:
    """Point a client of one federation to the server of another."""
    settings = ClientFile(**folder.endpoint.model_dump(), client=number)
    (home(stranger, number) / "client.toml").write_bytes(settings.toml())


def introduce_by_another_address(folder: EdgeFolder) -> None:
    """The server listens on 127.0.0.1 alone; a socket that passes all on stands for a second address of its machine."""
    from clients.fleet import introduce

    with subprocess.Popen([sys.executable, "-c", RELAY, str(folder.endpoint.port)], stderr=subprocess.DEVNULL) as relay:
        try:
            until(lambda: listens("127.0.0.2", folder.endpoint.port), lambda: "the relay does not listen")
            client = ClientFolder.open(home(folder, 2))
            client.make_state()
            introduce(client)
        finally:
            relay.kill()


RELAY = """
import socket, sys, threading
def copy(a, b):
    while data := a.recv(65536):
        b.sendall(data)
    b.close()
with socket.create_server(("127.0.0.2", int(sys.argv[1]))) as door:
    while True:
        a = door.accept()[0]
        b = socket.create_connection(("127.0.0.1", int(sys.argv[1])))
        for pair in ((a, b), (b, a)):
            threading.Thread(target=copy, args=pair, daemon=True).start()
"""


def listens(host: str, port: int) -> bool:
    try:
        socket.create_connection((host, port), timeout=2).close()
    except OSError:
        return False
    return True


def test_what_survives(edge, data, tmp_path):
    """A killed SuperNode, a server that stops and comes back, one that is killed: the client rejoins under its id."""
    folder, control = make(tmp_path / "fed", 1), free_port()
    client = edge("client", home(folder, 0), "--data", data)  # before there is a server
    client.wait_for("does not answer")
    server = edge("server", folder.path, "--control-port", control)
    client.wait_for("joined ")
    with Roster("127.0.0.1", control, folder.ca_file) as roster:
        before = roster.nodes()

    second = edge("server", folder.path, "--control-port", free_port())
    assert second.exit_code() == 2  # its port is taken
    nodes = [process for process in client.family() if "clients.fleet" in process.cmdline()]
    nodes[0].kill()
    client.wait_for("ended by itself (exit code -9")
    client.wait_for("joined ", times=2)

    # a copy of a folder on another machine: the one that is there stays
    copy = tmp_path / "elsewhere"
    shutil.copytree(home(folder, 0), copy, ignore=shutil.ignore_patterns("state"))
    twin = edge("client", copy, "--data", data)
    twin.wait_for("the server holds this client for present")
    assert twin.stop() == 0

    assert server.stop() == 0
    server = edge("server", folder.path, "--control-port", control)
    server.wait_for("ready: ")
    server.wait_for("client 0 joined")
    assert "registered" not in server.text()
    with Roster("127.0.0.1", control, folder.ca_file) as roster:
        assert roster.nodes().keys() == before.keys()
        assert [node.id for node in roster.nodes().values()] == [node.id for node in before.values()]

    # a SuperLink that hangs for a while is waited for
    link = next(process for process in server.family() if "server.fleet_gate" in process.cmdline())
    link.suspend()
    server.wait_for("it is waited for")
    link.resume()
    add_client(folder)
    server.wait_for("client 1 registered")

    # a SuperLink that is killed: said so, and nothing of it stays
    family = server.family()
    next(process for process in family if "server.fleet_gate" in process.cmdline()).kill()
    assert server.exit_code() == 1
    assert "the SuperLink ended by itself (exit code -9)" in server.text()
    assert not any(map(lives, family))
    server = edge("server", folder.path, "--control-port", control)
    server.wait_for("client 0 joined")

    # nothing outlives a server or a client that is killed
    for command in (server, client):
        family = command.family()
        assert family
        command.process.kill()
        command.process.wait()
        until(lambda: not any(map(lives, family)), lambda: f"alive: {family}")  # noqa: B023


def sockets_of(command: Command) -> set[tuple[str, int]]:
    """Where a command and all it has started listen, in whatever network namespace they are."""
    found: set[tuple[str, int]] = set()
    for pid in [command.process.pid, *(process.pid for process in command.family())]:
        ours = set()
        for entry in Path(f"/proc/{pid}/fd").iterdir():
            with suppress(FileNotFoundError):  # closed meanwhile
                ours.add(str(entry.readlink()))
        for table in ("tcp", "tcp6"):
            for line in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]:
                fields = line.split()
                if fields[3] == LISTENING and f"socket:[{fields[9]}]" in ours:
                    address, port = fields[1].split(":")
                    found.add((HEX_ADDRESSES.get(address, address), int(port, 16)))
    return found


LISTENING = "0A"  # in /proc/net/tcp
HEX_ADDRESSES = {"0100007F": "127.0.0.1", "00000000": "0.0.0.0"}


def test_the_control_api_cannot_be_reached_from_another_machine(edge, data, tmp_path):
    """Two network namespaces stand for two machines; where these are not allowed, another address of this one."""
    control = free_port()
    with two_machines() as (server_side, client_side, address):
        folder = make(tmp_path / "fed", 1, host=address)
        server = edge("server", folder.path, "--control-port", control, prefix=server_side)
        server.wait_for("ready: ")
        fleet = folder.endpoint.port
        assert sockets_of(server) == {("127.0.0.1", control), ("0.0.0.0", fleet)}
        assert answers(client_side, address, fleet)
        assert not answers(client_side, address, control)
        client = edge("client", home(folder, 0), "--data", data, prefix=client_side)
        client.wait_for("joined ")
        server.wait_for("client 0 joined")
        assert {host for host, _ in sockets_of(client)} == {"127.0.0.1"}
        assert client.stop() == 0
        assert server.stop() == 0


def answers(side: tuple[str, ...], host: str, port: int) -> bool:
    code = "import socket, sys; socket.create_connection((sys.argv[1], int(sys.argv[2])), 3)"
    command = [*side, sys.executable, "-c", code, host, str(port)]
    return subprocess.run(command, check=False, capture_output=True).returncode == 0
