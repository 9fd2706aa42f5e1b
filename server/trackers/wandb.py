"""Weights & Biases: a run in the project that ``tracking.wandb`` names.

    pip install 'fedistill[wandb]'; wandb login; tracking.wandb = "my-project"

WANDB_MODE=offline keeps everything in RUN/wandb, for ``wandb sync``. Its client would also send what it finds on the
machine (console, code, git, hardware): all of that is turned off.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from secrets import token_hex
from typing import Any

from common.config import Config
from server.trackers.given import known_run, told_keys

ENDS = {"completed": 0}
WAIT_SECONDS = 20.0


class WeightsAndBiases:
    """A run's own W&B run; a run that is continued goes on in the same."""

    def __init__(self, config: Config, run: Path) -> None:
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        import wandb

        quiet = wandb.Settings(
            console="off", disable_git=True, disable_code=True, disable_job_creation=True, save_code=False,
            x_disable_stats=True, x_disable_meta=True, x_disable_machine_info=True, x_save_requirements=False,
            host="", program="", silent=True, init_timeout=WAIT_SECONDS,
        )  # fmt: skip
        self.run: Any = wandb.init(
            project=config.tracking.wandb, name=run.name, id=known_run(run, "wandb", lambda: token_hex(8)),
            dir=str(run), resume="allow", config=told_keys(config), settings=quiet,
        )  # fmt: skip
        self.run.define_metric("*", step_metric="round")

    def add(self, number: int, numbers: Mapping[str, float]) -> None:
        self.run.log({"round": number, **numbers})

    def end(self, status: str) -> None:
        self.run.finish(exit_code=ENDS.get(status, 1))
