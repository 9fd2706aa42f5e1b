"""The command line. Exit codes: 0 done, 1 the run failed, 2 the input was wrong, 130 stopped by the user."""

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from common.config import default_keys, load_config
from common.errors import ExportFailed, InputError, Interrupted, RunFailed, place_of
from simulations import edge_cli
from simulations.child import end_with_parent

# read when the libraries are first imported: waiting threads sleep instead of spinning, which on a busy machine costs
# several times the work itself; Flower does not ask the network for versions, nor reports its use
for _name, _value in (
    ("OMP_WAIT_POLICY", "PASSIVE"),
    ("FLWR_TELEMETRY_ENABLED", "0"),
    ("FLWR_DISABLE_UPDATE_CHECK", "1"),
):
    os.environ.setdefault(_name, _value)

app = typer.Typer(
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    help="Federated knowledge distillation: many clients, one shared teacher, one small student, exact scores.",
)
app.add_typer(edge_cli.app, name="edge")
ConfigFile = Annotated[Path | None, typer.Argument(metavar="[CONFIG.toml]", help="keys in TOML; none: the demo")]


def beginning_with(begun: str) -> list[str]:
    """The keys that the shell may complete to."""
    return [f"{key}=" for key in default_keys() if key.startswith(begun)]


Settings = Annotated[
    list[str] | None,
    typer.Option(
        "-s", "--set", metavar="KEY=VALUE", help="one key; `fedistill keys` lists them", autocompletion=beginning_with
    ),
]


@app.command()
def simulate(
    config: ConfigFile = None,
    settings: Settings = None,
    out: Annotated[Path | None, typer.Option(help="run folder; default: runs/TASK-TIME")] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="continue the run in --out after its last checkpoint")
    ] = False,
) -> None:
    """Run a whole federation on this machine: workers on Ray, one table at the end."""
    from server.run_folder import keys_of_run
    from simulations.simulate import simulate as run

    keys = keys_of_run(config, settings or [], out, resume=resume)

    run(keys, out, resume=resume)


@app.command()
def teacher(
    out: Annotated[Path, typer.Option(help="folder for the fine-tuned teacher")],
    config: ConfigFile = None,
    settings: Settings = None,
) -> None:
    """Fine-tune the shared teacher on the public split and save it as a plain transformers folder."""
    keys = load_config(config, settings or [])
    from simulations.teach import save_teacher

    save_teacher(keys, out)


@app.command()
def ceiling(
    out: Annotated[Path, typer.Option(help="folder for its summary.json")],
    config: ConfigFile = None,
    settings: Settings = None,
) -> None:
    """Fine-tune the teacher's encoder centrally on all train text, as no federation could, and score it."""
    keys = load_config(config, settings or [])
    from simulations.ceiling import save_ceiling

    save_ceiling(keys, out)


@app.command()
def sweep(
    file: Annotated[
        Path, typer.Argument(metavar="SWEEP.toml", help="keys, seeds, tasks, ceiling, [arms.NAME], [grid]")
    ],
    settings: Settings = None,
    *,
    out: Annotated[Path, typer.Option(help="folder for all runs")],
    resume: Annotated[bool, typer.Option("--resume", help="go on with the sweep in --out")] = False,
) -> None:
    """Run what a sweep file lists, each run in a process of its own, and compare the arms."""
    from simulations.sweep import sweep as run
    from simulations.sweep_file import read_sweep

    run(read_sweep(file, settings or []), out, resume=resume)


@app.command()
def audit(
    file: Annotated[
        Path, typer.Argument(metavar="CONFIG.toml|RUN", help="keys, seeds, attacks, [arms.NAME]; or a run")
    ],
    settings: Settings = None,
    *,
    attack: Annotated[str, typer.Option(help="some of the attacks, a,b; none: those of the file, or all")] = "",
    options: Annotated[
        list[str] | None, typer.Option("-o", "--option", metavar="ATTACK.OPTION=VALUE", help="an option of an attack")
    ] = None,
    seeds: Annotated[int | None, typer.Option(min=1, help="number of seeds, from 0; none: those of the file")] = None,
    out: Annotated[Path, typer.Option(help="folder for rows, table and plots; the same again: go on there")],
) -> None:
    """Measure what leaks: attack the federations that a file describes, and show which defence stops which attack.

    Audits train many models; use small ones. What is done stays in --out: the same command goes on after a stop.
    """
    from simulations.audits.audit import audit as run
    from simulations.audits.audit_file import read_audit

    run(read_audit(file, settings or [], attack, options or [], seeds), out)


@app.command()
def compare(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN RUN ...", help="run folders, or folders of sweeps")],
    form: Annotated[
        str, typer.Option("--format", help="table, markdown, csv (raw, a column for each run) or html; none: by --out")
    ] = "",
    out: Annotated[Path | None, typer.Option(help="a file instead of the screen")] = None,
) -> None:
    """Show runs side by side: the keys in which they differ, scores, what is kept, sizes, costs.

    Runs that differ in their seed alone are one column, with mean and standard deviation.
    """
    from simulations.compare import compare as show

    show(runs, form, out)


@app.command()
def glue(
    settings: Settings = None,
    *,
    data: Annotated[str, typer.Option(help="folder laid out like nyu-mll/glue; none: the hub")] = "",
    seeds: Annotated[int, typer.Option(min=1, help="number of seeds, from 0")] = 3,
    out: Annotated[Path, typer.Option(help="folder for all runs")],
    resume: Annotated[bool, typer.Option("--resume", help="go on with the runs in --out")] = False,
) -> None:
    """Run GLUE's tasks and show what teacher, student and ceiling score, beside DistilBERT's published figures."""
    from simulations.glue import glue as run

    run(settings or [], data, seeds, out, resume=resume)


@app.command()
def report(run: Annotated[Path, typer.Argument(help="a run folder")]) -> None:
    """Write RUN/report.html again, from what the run folder holds."""
    from server.report import write_report

    typer.echo(write_report(run))


@app.command()
def export(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="the folder of a completed run")],
    form: Annotated[str, typer.Option("--format", help="onnx")] = "onnx",
    *,
    int8: Annotated[bool, typer.Option("--int8", help="also with 8-bit weights: a quarter of the size")] = False,
    out: Annotated[Path | None, typer.Option(help="a new folder; default: RUN/export")] = None,
    max_drop: Annotated[float, typer.Option(help="hundredths of the headline score that 8-bit weights may cost")] = 0.5,
    tier: Annotated[int, typer.Option(help="of a mixed run, 1 the smallest student; 0: the whole")] = 0,
) -> None:
    """Write a run's student as a folder for devices, after it has answered there as it does in torch.

    The folder holds the model as ONNX with 32-bit weights (and with 8-bit ones), its tokenizer, the names of its
    labels, and a card with scores, sizes, times and hashes. `fedistill predict` reads it.
    """
    from simulations.display import console_on, progress_for
    from simulations.export_run import check_options, export_run

    check_options(form, max_drop)
    progress = progress_for(console_on(sys.stdout))
    typer.echo(export_run(run, out, int8=int8, max_drop=max_drop, progress=progress, tier=tier))


@app.command()
def predict(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="what `fedistill export` wrote")],
    texts: Annotated[
        list[str] | None, typer.Argument(metavar="[TEXT ...]", help="none: lines of standard input")
    ] = None,
    *,
    pair: Annotated[bool, typer.Option("--pair", help="texts two by two; in lines a tab between")] = False,
    csv: Annotated[Path | None, typer.Option(help="texts of a .csv, .jsonl or .parquet file")] = None,
    text_columns: Annotated[str, typer.Option(help="columns of that file, a,b; default: the task's")] = "",
    as_json: Annotated[bool, typer.Option("--json", help="a JSON object for each text")] = False,
    fp32: Annotated[bool, typer.Option("--fp32", help="32-bit weights, where there are 8-bit ones too")] = False,
    threads: Annotated[int, typer.Option(min=0, help="0: as onnxruntime chooses")] = 0,
    bench: Annotated[bool, typer.Option("--bench", help="how fast and how large it is instead")] = False,
) -> None:
    """Say what an exported student says of texts: a line for each, with its label and the probability of that.

    For a task that predicts a score, the score; for one of several labels, those above a half (or -), then all.
    """
    import json

    from clients import predict as prediction
    from clients.exported import open_export
    from common.progress import Silent
    from simulations.display import console_on, progress_for

    exported = open_export(folder, fp32=fp32, threads=threads)
    lines = None if bench else sys.stdin.buffer
    if not (bench or texts or csv) and sys.stdin.isatty():
        raise InputError("TEXT: none given; give texts, --csv FILE, or lines on standard input")
    rows = prediction.read_rows(exported.spec, texts or [], csv, text_columns, pair=pair, lines=lines)
    if bench:
        found = prediction.bench(exported, list(rows))
        typer.echo(json.dumps(found) if as_json else prediction.bench_lines(found))
        return
    # in a terminal the predictions themselves show how far it is
    progress = Silent() if sys.stdout.isatty() else progress_for(console_on(sys.stderr))
    for answer in prediction.predictions(exported, rows, progress, total=len(rows) if isinstance(rows, list) else None):
        typer.echo(prediction.line_of(answer, as_json=as_json))


@app.command()
def provision(
    profiles: Annotated[Path, typer.Argument(metavar="PROFILES.toml", help="a table for each device")],
    config: ConfigFile = None,
    settings: Settings = None,
    *,
    probed: Annotated[bool, typer.Option("--probe", help="also measure this machine, as the device `this`")] = False,
    out: Annotated[Path | None, typer.Option(help="also write all figures to this JSON file")] = None,
) -> None:
    """Which student each device of a file gets, and why not a larger one."""
    keys = load_config(config, settings or [])
    from simulations.provision import provision as run

    run(keys, profiles, probed=probed, out=out)


@app.command()
def doctor(as_json: Annotated[bool, typer.Option("--json", help="a JSON list")] = False) -> None:
    """Look at this machine: what a run needs, what is missing and how to get it. Exit code 1 when something is."""
    from simulations.doctor import doctor as look

    if not look(as_json=as_json):
        raise typer.Exit(1)


@app.command()
def describe(
    config: ConfigFile = None,
    settings: Settings = None,
    *,
    as_json: Annotated[bool, typer.Option("--json", help="all figures as JSON")] = False,
) -> None:
    """What a run would do, without running it: clients, shards, student, bytes, estimated time."""
    keys = load_config(config, settings or [])
    from simulations.describe import describe as tell

    tell(keys, as_json=as_json)


@app.command()
def bench(
    config: ConfigFile = None,
    settings: Settings = None,
    *,
    workload: Annotated[str | None, typer.Option(help="few-large or many-small: keys laid under those of -s")] = None,
    arms: Annotated[str, typer.Option(help="some of loop-1xN,loop-Nx1,fedistill,flower; empty: all")] = "",
    repeats: Annotated[int, typer.Option(min=1, help="how often each arm is timed")] = 5,
    out: Annotated[Path | None, typer.Option(help="also write all figures to this JSON file")] = None,
) -> None:
    """Training speed of a federated round beside plain PyTorch loops and a usual Flower app."""
    from simulations.bench import bench as run
    from simulations.bench import choose_arms, workload_settings

    chosen = load_config(config, [*workload_settings(workload), *(settings or [])])
    run(chosen, repeats, out, workload, choose_arms(arms))


@app.command()
def keys(
    markdown: Annotated[bool, typer.Option("--markdown", help="as the page docs/configuration.md")] = False,
) -> None:
    """List every key, its default and what it means."""
    from simulations.keys_page import configuration_page, every_key

    if markdown:
        typer.echo(configuration_page(), nl=False)
        return
    for key in every_key():
        typer.echo(f"{key.name} = {key.default}\n    {key.meaning}")


def main(arguments: list[str] | None = None) -> None:
    """Entry point of the console script; turns our three errors into their exit codes."""
    end_with_parent()
    sys.exit(_exit_code(lambda: app(args=arguments, standalone_mode=True)))


def _exit_code(command: Callable[[], Any]) -> int:
    try:
        command()
    except InputError as error:
        print(f"fedistill: {error}", file=sys.stderr)
        return 2
    except RunFailed as error:
        what = "" if isinstance(error, ExportFailed) else "the run failed: "
        print(f"fedistill: {what}{error}", file=sys.stderr)
        return 1
    except (Interrupted, KeyboardInterrupt):
        print("fedistill: interrupted", file=sys.stderr)
        return 130
    except SystemExit as left:
        return left.code if isinstance(left.code, int) else 1
    except Exception as error:  # a fault of ours; its text could quote private data
        print(f"fedistill: {type(error).__name__}{place_of(error)}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    main()
