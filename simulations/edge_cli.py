"""``fedistill edge``: keys and certificates, the server, a client."""

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    no_args_is_help=True,
    help="Real clients over TLS: `init` makes keys and certificates, `server` and `client` run until they are stopped.",
)
Folder = Annotated[Path, typer.Argument(metavar="DIR", help="a federation's folder, at the server")]


@app.command()
def init(
    path: Annotated[Path, typer.Argument(metavar="DIR", help="folder to make; must not be there yet")],
    host: Annotated[str, typer.Option(help="DNS name or IP address by which clients reach the server")],
    clients: Annotated[int, typer.Option(min=1, help="number of clients")],
    port: Annotated[int, typer.Option(min=1, max=65535, help="the server's port for clients")] = 9092,
) -> None:
    """Make a private CA, the server's certificate and a folder with a key for each client.

    Copy DIR/clients/client-N to its machine, by a way that nobody reads along, and remove it here. DIR/ca/ca.key signs
    server certificates: keep it off the network where you can.
    """
    from server.edge_folder import describe
    from server.edge_folder import init as make

    folder = make(path, host, clients, port)
    _print(describe(folder))
    typer.echo(f"copy each folder in {folder.path / 'clients'} to its client; then: fedistill edge server {path}")


@app.command("add-client")
def add_client(path: Folder) -> None:
    """Make a folder with a key for one more client; a server that runs lets it in within seconds."""
    from server.edge_folder import EdgeFolder
    from server.edge_folder import add_client as add

    typer.echo(f"{add(EdgeFolder.open(path))}: copy it to its client")


@app.command()
def revoke(
    path: Folder, client: Annotated[str, typer.Argument(metavar="CLIENT", help="its number, or client-NUMBER")]
) -> None:
    """Shut a client out for good; a server that runs does so within seconds."""
    from server.edge_folder import EdgeFolder
    from server.edge_folder import revoke as strike

    typer.echo(f"client {strike(EdgeFolder.open(path), client)} is revoked; add-client makes a new one")


@app.command()
def renew(path: Folder) -> None:
    """Renew the server's certificate for another year; restart the server after it. Clients need nothing."""
    from server.edge_folder import EdgeFolder, describe
    from server.edge_folder import renew as sign

    folder = EdgeFolder.open(path)
    sign(folder)
    _print(describe(folder))
    typer.echo("a server that runs takes it when it is started again")


@app.command()
def show(path: Folder) -> None:
    """Certificates, until when they hold and their serial numbers; the clients' keys."""
    from server.edge_folder import EdgeFolder, describe

    _print(describe(EdgeFolder.open(path)))


@app.command()
def server(
    path: Folder,
    bind: Annotated[str, typer.Option(help="IP address to listen on for clients; empty: all")] = "",
    control_host: Annotated[str, typer.Option(help="loopback address of the Control API")] = "127.0.0.1",
    control_port: Annotated[int, typer.Option(min=1, max=65535, help="port of the Control API")] = 9093,
    exposed: Annotated[
        bool,
        typer.Option("--expose-control-api", help="allow a --control-host that other machines can reach"),
    ] = False,
) -> None:
    """Serve clients over TLS until stopped (Ctrl-C, SIGTERM): a line when ready and when a client joins or leaves.

    Clients reach the Fleet API alone. The Control API, which starts any code and has no login, listens on loopback:
    all who have an account on this machine can reach it.
    """
    from server.edge_folder import EdgeFolder
    from server.edge_server import run_server

    run_server(EdgeFolder.open(path), bind, (control_host, control_port), _print_line, exposed=exposed)


@app.command()
def client(  # noqa: PLR0917 (options of a command)
    path: Annotated[Path, typer.Argument(metavar="CLIENT_DIR", help="this client's folder, copied from the server")],
    data: Annotated[Path, typer.Option(help="this client's private examples: CSV, JSONL or Parquet")],
    teacher: Annotated[Path | None, typer.Option(help="a folder with the shared teacher; without, it is sent")] = None,
    columns: Annotated[
        str, typer.Option(help="that a run may use: those of texts, then that of labels")
    ] = "text,label",
    threads: Annotated[int, typer.Option(min=0, help="for training; 0: as many as the run says")] = 0,
    max_seconds: Annotated[float, typer.Option(min=0, help="for a round's training; 0: no limit")] = 0.0,
    energy_budget: Annotated[float, typer.Option(min=0, help="joules for a round's training; 0: no limit")] = 0.0,
    memory_limit: Annotated[int, typer.Option(min=0, help="megabytes for the worker's batches; 0: what is free")] = 0,
    lifetime_epsilon: Annotated[
        float, typer.Option(min=0, help="that training may ever spend of an example's privacy; 0: as the run says")
    ] = 0.0,
    delta: Annotated[float, typer.Option(min=0, max=1, help="that --lifetime-epsilon is of, at most")] = 1e-5,
) -> None:
    """Take part with a file of private data until stopped (Ctrl-C, SIGTERM).

    This machine runs the code that is installed here, never code that the server sends. What comes and goes is noted in
    CLIENT_DIR/state/audit.jsonl.
    """
    from clients.edge_client import run_client
    from clients.edge_folder import ClientFolder

    run_client(
        ClientFolder.open(path), data, _print_line, teacher=teacher,
        columns=tuple(name.strip() for name in columns.split(",")), threads=threads, max_seconds=max_seconds,
        energy_budget=energy_budget, memory_limit=memory_limit, lifetime_epsilon=lifetime_epsilon, delta=delta,
    )  # fmt: skip


@app.command()
def run(  # noqa: PLR0917 (options of a command)
    path: Folder,
    config: Annotated[
        Path | None, typer.Argument(metavar="[CONFIG.toml]", help="keys that differ from the defaults")
    ] = None,
    settings: Annotated[
        list[str] | None, typer.Option("-s", metavar="KEY=VALUE", help="one key; may be repeated")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="folder for the run (default: runs/TASK-TIME)")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="continue the run in --out")] = False,
    least: Annotated[int, typer.Option("--min-clients", min=0, help="begin with so many after --wait; 0: all")] = 0,
    wait: Annotated[float, typer.Option(min=1, help="seconds to wait for clients before round 1")] = 300.0,
) -> None:
    """Run a federation of the clients that take part, and write the folder that `simulate` writes.

    data.source is public text, at this server; the private texts stay where they are. `edge server` must be running.
    """
    from server.edge_folder import EdgeFolder
    from server.run_folder import keys_of_run
    from simulations.edge_run import keys_of_clients, run_on_edge

    edge = EdgeFolder.open(path)
    keys = keys_of_run(config, settings or [], out, resume=resume, fixed=keys_of_clients(edge))
    run_on_edge(edge, keys, out, resume=resume, least=least, wait=wait)


def _print_line(line: str) -> None:
    """A status line, seen at once also where the output is a file."""
    print(line, flush=True)


def _print(lines: list[str]) -> None:
    for line in lines:
        typer.echo(line)
