"""``fedistill edge server``: Flower's SuperLink over TLS, for clients whose keys are on the list and nobody else."""

import ipaddress
import math
import os
import socket
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from common.edge import Endpoint, alone_in, host_and_port
from common.errors import InputError, RunFailed
from common.pki import names_of
from common.processes import Child, Stop, flower_environment, until_stopped
from common.runtime_api import make_secret
from common.store import write_atomically
from server.edge_folder import EdgeFolder, days_left
from server.roster import Roster

POLL_SECONDS = 2.0
START_SECONDS = 120.0
WARN_DAYS = 30
Tell = Callable[[str], None]


def run_server(folder: EdgeFolder, bind: str, control: tuple[str, int], tell: Tell, *, exposed: bool = False) -> None:
    """Serve until asked to stop.

    Args:
        bind: address to listen on for clients; empty: all, or loopback where clients are to call that.
        control: host and port of the Control API.
        exposed: the user has asked for a Control API that others than this machine can reach.

    Raises:
        InputError: keys, certificates or addresses are not as they must be, or another server runs from the folder.
        RunFailed: the SuperLink did not start, or ended by itself.
    """
    server = folder.server()
    if (left := days_left(server)) < WARN_DAYS:
        tell(f"the server's certificate expires in {left} days; run: fedistill edge renew {folder.path}")
    check_control(control, folder.endpoint.port, names_of(server.certificate), exposed=exposed)
    fleet = (bind or _everywhere(folder.endpoint.host), folder.endpoint.port)
    for host, port in (control, fleet):
        _check_free(host, port)
    with alone_in(folder.state, "lock", "a server runs from this folder already"), until_stopped() as stop:
        _serve(folder, fleet, control, tell, stop)


def check_control(control: tuple[str, int], fleet_port: int, names: Sequence[str], *, exposed: bool) -> None:
    """See that only this machine can reach the Control API, unless that was asked for.

    Args:
        names: that the server's certificate holds for; Flower's own processes check it there too.

    Raises:
        InputError: others could, the certificate does not hold for it, or the port is the clients' own.
    """
    host, port = control
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        raise InputError(f"--control-host {host}: give an IP address") from None
    if not address.is_loopback and not exposed:
        raise InputError(
            f"--control-host {host}: whoever reaches the Control API can run code here and at every client, and it has "
            "no login; give a loopback address, or also --expose-control-api"
        )
    if str(address) not in names:
        raise InputError(
            f"--control-host {host}: the server's certificate is for {', '.join(names)}; give one of these"
        )
    if port == fleet_port:
        raise InputError(f"--control-port {port}: is the clients' port; give another")


def _everywhere(host: str) -> str:
    """The address to listen on where clients call the server by ``host``."""
    if host == "localhost":
        return "127.0.0.1"
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return "0.0.0.0"  # noqa: S104 - clients come from elsewhere; this door opens to the Fleet API alone
    if address.is_loopback:
        return host
    return "::" if address.version == 6 else "0.0.0.0"  # noqa: S104


def _check_free(host: str, port: int) -> None:
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        socket.create_server((host, port), family=family).close()
    except OSError as error:
        raise InputError(f"cannot listen on {host_and_port(host, port)}: {error.strerror}") from None


def _serve(folder: EdgeFolder, fleet: tuple[str, int], control: tuple[str, int], tell: Tell, stop: Stop) -> None:
    log = folder.state / "superlink.log"
    make_secret(folder.secret_file)
    arguments = superlink_arguments(folder, fleet, control)
    child = Child(arguments, flower_environment(_home(folder)), log, lambda line: None)
    try:
        with Roster(*control, folder.ca_file) as roster:
            waited = 0.0
            while not roster.answers():
                if not child.running or waited >= START_SECONDS:
                    raise RunFailed(f"the SuperLink did not start{_last_words(log)}; see {log}")
                if stop.wait(0.2):
                    return
                waited += 0.2
            for line in roster.update(folder.admitted(), folder.revoked()):
                tell(line)
            write_atomically(folder.control_file, Endpoint(host=control[0], port=control[1]).toml())
            tell(f"ready: clients connect to {folder.endpoint.address}; {len(folder.admitted())} may take part")
            _watch(child, roster, folder, tell, stop)
    finally:
        folder.control_file.unlink(missing_ok=True)
        child.stop()
    tell("stopped")


def _watch(child: Child, roster: Roster, folder: EdgeFolder, tell: Tell, stop: Stop) -> None:
    """Let in who may take part and say what happens, until asked to stop; a SuperLink that is slow is waited for."""
    deadline = math.inf
    while not stop.wait(POLL_SECONDS):
        if not child.running:
            log = folder.state / "superlink.log"
            raise RunFailed(f"the SuperLink ended by itself (exit code {child.exit_code}); see {log}")
        try:
            lines, deadline = roster.update(folder.admitted(), folder.revoked()), math.inf
        except RunFailed as error:
            if time.monotonic() > deadline:
                raise
            lines = [f"{error}; it is waited for"] if deadline == math.inf else []
            deadline = min(deadline, time.monotonic() + START_SECONDS)
        for line in lines:
            tell(line)


def superlink_arguments(folder: EdgeFolder, fleet: tuple[str, int], control: tuple[str, int]) -> list[str]:
    """The module that starts the SuperLink, and its arguments."""
    return [
        "server.fleet_gate", str(os.getpid()), fleet[0], str(fleet[1]),
        "--host", control[0], "--port", str(control[1]),
        "--ssl-ca-certfile", str(folder.ca_file),
        "--ssl-certfile", str(folder.certificate_file),
        "--ssl-keyfile", str(folder.key_file),
        "--enable-supernode-auth",
        "--database", str(folder.state / "superlink.db"),
        "--disable-runtime-dependency-installation",
        "--isolation", "process",  # nobody starts code that came with a run: `edge run` takes the server's part
        "--superexec-auth-secret-file", str(folder.secret_file),
    ]  # fmt: skip


def _home(folder: EdgeFolder) -> Path:
    """Flower's own folder, so that the user's is left alone."""
    home = folder.state / "flower"
    home.mkdir(mode=0o700, exist_ok=True)
    return home


def _last_words(log: Path) -> str:
    """What our own part of the SuperLink's process has said before it ended."""
    lines = log.read_text(encoding="utf-8").splitlines() if log.is_file() else []
    ours = [line.removeprefix("fedistill: ") for line in lines if line.startswith("fedistill: ")]
    return f": {ours[-1]}" if ours else ""
