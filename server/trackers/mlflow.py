"""MLflow: a run in the experiment ``fedistill`` of a tracking server, or of a local folder.

    pip install 'fedistill[mlflow]'; tracking.mlflow = "http://127.0.0.1:5000" or a folder

Only what is named here is sent: the numbers of metrics.jsonl and, unless clients or examples are protected, the keys.
"""

import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from common.config import Config
from server.trackers.given import known_run, told_keys

EXPERIMENT = "fedistill"
ENDS = {"completed": "FINISHED", "failed": "FAILED", "interrupted": "KILLED"}
# no usage reports, and a server that is away must not hold up the rounds: it would be asked for minutes
SETTINGS = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_ALLOW_FILE_STORE": "true",  # newer versions ask whether a plain folder is meant
}


class MLflow:
    """A run's own MLflow run; a run that is continued goes on in the same."""

    def __init__(self, config: Config, run: Path) -> None:
        for name, value in SETTINGS.items():
            os.environ.setdefault(name, value)
        from mlflow import MlflowClient
        from mlflow.entities import Metric

        place = config.tracking.mlflow
        self.client: Any = MlflowClient(place if "://" in place else Path(place).expanduser().resolve().as_uri())
        self.metric = Metric
        self.id = known_run(run, "mlflow", lambda: self._begin(config, run))
        self.client.update_run(self.id, status="RUNNING")

    def add(self, number: int, numbers: Mapping[str, float]) -> None:
        now = int(time.time() * 1000)
        metrics = [self.metric(name, value, now, number) for name, value in numbers.items()]
        self.client.log_batch(self.id, metrics=metrics)

    def end(self, status: str) -> None:
        self.client.set_terminated(self.id, ENDS.get(status, "KILLED"))

    def _begin(self, config: Config, run: Path) -> str:
        found = self.client.get_experiment_by_name(EXPERIMENT)
        experiment = found.experiment_id if found else self.client.create_experiment(EXPERIMENT)
        identity = str(self.client.create_run(experiment, run_name=run.name).info.run_id)
        for key, value in told_keys(config).items():
            self.client.log_param(identity, key, value)
        return identity
