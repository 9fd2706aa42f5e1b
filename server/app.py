"""The ServerApp that ``flwr run .`` starts: the same federation, keys and run folder as ``fedistill simulate``."""

import time
from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from common.config import Config, from_flat
from common.progress import Lines
from server.preparation import prepare
from server.run import run_federation, told_in
from server.run_folder import RunFolder

app = ServerApp()


def default_folder(config: Config) -> Path:
    """Where a run goes when nobody says: runs/TASK-TIME under the current folder."""
    return Path(config.runtime.out or Path("runs") / f"{config.task}-{time.strftime('%Y%m%d-%H%M%S')}")


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Prepare and run the federation that the run config describes."""
    config = from_flat(context.run_config)
    progress = Lines(every=10.0)
    folder = RunFolder(default_folder(config), config)
    with told_in(folder, config):
        federation = prepare(config, progress)
        summary = run_federation(federation, folder, grid, progress, nodes=1)
    share = summary["retention"]["federated"]
    progress.line(f"{summary['status']}: retention {share:.4f}, see {folder.path}")
