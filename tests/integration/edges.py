"""``fedistill edge`` commands that run beside a test, and links between them that can be watched and cut."""

import asyncio
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

import psutil

from common.edge import ClientFile
from common.processes import free_port
from server.edge_folder import EdgeFolder, init
from tests.integration.conftest import ROOT

LIMIT = 300.0  # seconds for anything to happen on a busy machine


class Command:
    """A ``fedistill edge`` command that runs, and the lines it has printed so far."""

    def __init__(self, arguments: list[str], out: Path, prefix: list[str]) -> None:
        self.out = out
        command = [*prefix, sys.executable, "-m", "simulations.cli", "edge", *arguments]
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


@contextmanager
def two_machines() -> Iterator[tuple[tuple[str, ...], tuple[str, ...], str]]:
    """How to run a command at the server's and at the client's, and the server's address as the client sees it."""
    names = [f"fedistill-{side}-{os.getpid()}" for side in ("server", "client")]
    try:
        for name in names:
            ip("netns", "add", name)
        ip("link", "add", "fed0", "netns", names[0], "type", "veth", "peer", "name", "fed1", "netns", names[1])
        for name, device, address in ((names[0], "fed0", "192.0.2.1/24"), (names[1], "fed1", "192.0.2.2/24")):
            ip("-n", name, "address", "add", address, "dev", device)
            for each in (device, "lo"):
                ip("-n", name, "link", "set", each, "up")
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
        down: refuse connections; set by `cut`.
        delay: seconds that every piece of data is held.
    """

    def __init__(self, folder: EdgeFolder) -> None:
        self.folder, self.port = folder, free_port()
        self.sent = bytearray()
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
            await asyncio.gather(self._pass(reader, far_writer, self.sent), self._pass(far_reader, writer, bytearray()))
        self._open.discard(writer)
        writer.close()

    async def _pass(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, record: bytearray) -> None:
        with suppress(OSError):
            while data := await reader.read(65536):
                record += data
                await asyncio.sleep(self.delay)
                writer.write(data)
                await writer.drain()
        self._open.discard(writer)
        writer.close()
