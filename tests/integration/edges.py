"""``fedistill edge`` commands that run beside a test, and links between them that can be watched and cut."""

import asyncio
import csv
import json
import os
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil

from common.edge import ClientFile
from common.processes import free_port
from server.edge_folder import EdgeFolder, init
from tests.conftest import make_sentences
from tests.integration.conftest import ROOT

LIMIT = 300.0  # seconds for anything to happen on a busy machine


EXAMPLES = 40  # of each client
COMMAND = ("simulations.cli", "edge")


class Command:
    """A ``fedistill edge`` command that runs, and the lines it has printed so far.

    Args:
        prefix: what runs it.
        module: a module that stands in for it, and its first arguments.
    """

    def __init__(self, arguments: list[str], out: Path, prefix: list[str], module: tuple[str, ...] = COMMAND) -> None:
        self.out = out
        command = [*prefix, sys.executable, "-m", *module, *arguments]
        with out.open("wb") as stream:
            self.process = subprocess.Popen(
                command, cwd=out.parent, env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=stream, stderr=stream
            )

    def text(self) -> str:
        return self.out.read_text()

    def wait_for(self, words: str, times: int = 1) -> None:
        until(lambda: self.text().count(words) >= times, lambda: f"{words!r} {times} times in: {self.text()}")

    def exit_code(self) -> int:
        return self.process.wait(LIMIT)

    def family(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children(recursive=True)

    def stop(self, number: int = signal.SIGTERM) -> int:
        """Ask it to end; all it has started must end with it."""
        family = self.family()
        self.process.send_signal(number)
        code = self.exit_code()
        assert not [process for process in family if lives(process)], self.text()
        return code


def lives(process: psutil.Process) -> bool:
    """Whether it runs; one that has ended may still wait for this machine's first process to notice."""
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def until(fact: Callable[[], bool], what: Callable[[], str]) -> None:
    end = time.monotonic() + LIMIT
    while not fact():
        assert time.monotonic() < end, what()
        time.sleep(0.2)


def make(path: Path, clients: int, host: str = "127.0.0.1") -> EdgeFolder:
    return init(path, host, clients, free_port())


def home(folder: EdgeFolder, number: int) -> Path:
    return folder.path / "clients" / f"client-{number}"


def write_texts(folder: Path, clients: int) -> Path:
    """Public text, a validation file and a file for each client; no sentence is in two of them."""
    (folder / "private").mkdir(parents=True)
    sentences = iter(sorted(set(make_sentences(800, seed=3, longest=14))))
    for name, count in (("public", 60), ("validation", 40), *((f"private/{n}", EXAMPLES) for n in range(clients))):
        with (folder / f"{name}.csv").open("w", newline="") as stream:
            rows = csv.writer(stream)
            rows.writerow(["text", "label"])
            rows.writerows([next(sentences), ("bad", "good")[place % 2]] for place in range(count))
    return folder


class Federation:
    """A server and its clients, each a process of its own."""

    def __init__(self, edge: Callable[..., Command], texts: Path, folder: EdgeFolder) -> None:
        self.edge, self.texts, self.folder, self.control = edge, texts, folder, free_port()
        self.server = self.start_server()
        self.clients: list[Command] = []

    def __len__(self) -> int:
        return len(list((self.texts / "private").glob("*.csv")))

    def start_server(self) -> Command:
        self.server = self.edge("server", self.folder.path, "--control-port", self.control)
        self.server.wait_for("ready: ")
        return self.server

    def start_clients(self, *options: object) -> None:
        self.clients = [self.start_client(number, *options) for number in range(len(self))]
        for client in self.clients:
            client.wait_for("joined ")

    def start_client(self, number: int, *options: object, **more: Any) -> Command:
        data = self.texts / "private" / f"{number}.csv"
        return self.edge("client", home(self.folder, number), "--data", data, *options, **more)

    def run(self, out: Path, *arguments: object) -> Command:
        return self.edge("run", self.folder.path, *arguments, "--out", out)

    def audit(self, number: int) -> list[dict[str, Any]]:
        lines = (home(self.folder, number) / "state" / "audit.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines]

    def worker(self, number: int) -> psutil.Process:
        return next(one for one in self.clients[number].family() if "clients.resident" in one.cmdline())

    def supernode(self, number: int) -> psutil.Process:
        return next(one for one in self.clients[number].family() if "clients.fleet" in one.cmdline())

    def superlink(self) -> psutil.Process:
        return next(one for one in self.server.family() if "server.fleet_gate" in one.cmdline())

    def stop(self) -> None:
        assert [client.stop() for client in self.clients] == [0] * len(self.clients)
        assert self.server.stop() == 0


def simulated(fedistill: Callable[..., Any], texts: Path, keys: list[str]) -> Any:
    """A simulation with the same files, in the folder ``simulated``."""
    done = fedistill("simulate", *keys, "-s", f"data.private={texts / 'private'}", "--out", "simulated")
    assert done.returncode == 0, done.stderr
    return done


@contextmanager
def two_machines(rate: str = "") -> Iterator[tuple[tuple[str, ...], tuple[str, ...], str]]:
    """How to run a command at the server's and at the client's, and the server's address as the client sees it.

    Args:
        rate: of the link between them, as ``tc`` writes it; empty: as fast as it is.
    """
    names = [f"fedistill-{side}-{os.getpid()}" for side in ("server", "client")]
    try:
        for name in names:
            ip("netns", "add", name)
        ip("link", "add", "fed0", "netns", names[0], "type", "veth", "peer", "name", "fed1", "netns", names[1])
        for name, device, address in ((names[0], "fed0", "192.0.2.1/24"), (names[1], "fed1", "192.0.2.2/24")):
            ip("-n", name, "address", "add", address, "dev", device)
            for each in (device, "lo"):
                ip("-n", name, "link", "set", each, "up")
            if rate:
                limit = f"tc qdisc add dev {device} root tbf rate {rate} burst 64kbit latency 400ms"
                ip("netns", "exec", name, *limit.split())
        server, client = (("ip", "netns", "exec", name) for name in names)
        made = True
    except (OSError, subprocess.CalledProcessError):
        made = False
    try:
        yield (server, client, "192.0.2.1") if made else ((), (), own_address())
    finally:
        for name in names:
            with suppress(OSError, subprocess.CalledProcessError):
                ip("netns", "delete", name)


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)


def own_address() -> str:
    """An address of this machine that is not loopback."""
    found = [each.address for all_ in psutil.net_if_addrs().values() for each in all_ if each.family == socket.AF_INET]
    return next(address for address in found if not address.startswith("127."))


class Proxy:
    """A link between clients and a federation's server that shows what passes, unencrypted, and can be bad.

    It has the server's certificate and key. Clients call it after `lead_through`.

    Attributes:
        sent: every byte that clients have sent.
        calls: the same by connection.
        down: refuse connections; set by `cut`.
        delay: seconds that every piece of data is held.
    """

    def __init__(self, folder: EdgeFolder) -> None:
        self.folder, self.port = folder, free_port()
        self.sent, self.calls = bytearray(), list[bytearray]()
        self.down, self.delay = False, 0.0
        self._open: set[asyncio.StreamWriter] = set()
        self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._context.load_cert_chain(folder.certificate_file, folder.key_file)
        self._trusted = ssl.create_default_context(cafile=str(folder.ca_file))
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, daemon=True).start()
        asyncio.run_coroutine_threadsafe(
            asyncio.start_server(self._join, "127.0.0.1", self.port, ssl=self._context), self._loop
        ).result()

    def lead_through(self, number: int) -> None:
        """Have a client call the proxy in place of the server."""
        settings = ClientFile(host="127.0.0.1", port=self.port, client=number)
        (home(self.folder, number) / "client.toml").write_bytes(settings.toml())

    def cut(self, *, down: bool) -> None:
        """Break all connections, in the middle of whatever is said; take new ones, or not."""
        self.down = down
        self._loop.call_soon_threadsafe(lambda: [one.transport.abort() for one in self._open])

    async def _join(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self.down:
            writer.transport.abort()
            return
        with suppress(OSError):
            port = self.folder.endpoint.port
            far_reader, far_writer = await asyncio.open_connection("127.0.0.1", port, ssl=self._trusted)
            self._open |= {writer, far_writer}
            self.calls.append(bytearray())
            await asyncio.gather(
                self._pass(reader, far_writer, self.sent, self.calls[-1]), self._pass(far_reader, writer, bytearray())
            )
        self._open.discard(writer)
        writer.close()

    def replay(self) -> int:
        """Say once more to the server all that clients have said so far; returns in how many connections."""
        said = [bytes(call) for call in self.calls if call]
        for call in said:
            with (
                suppress(OSError),
                socket.create_connection(("127.0.0.1", self.folder.endpoint.port), 5) as line,
                self._trusted.wrap_socket(line, server_hostname="127.0.0.1") as safe,
            ):
                safe.sendall(call)
                safe.settimeout(1.0)
                while safe.recv(65536):
                    pass
        return len(said)

    async def _pass(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *records: bytearray) -> None:
        with suppress(OSError):
            while data := await reader.read(65536):
                for record in records:
                    record.extend(data)
                await asyncio.sleep(self.delay)
                writer.write(data)
                await writer.drain()
        self._open.discard(writer)
        writer.close()
