"""The trackers that a run's keys ask for, kept from doing the run any harm."""

from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from common.config import Config
from common.errors import InputError
from server.lines import numbers_of
from server.trackers.mlflow import MLflow
from server.trackers.tensorboard import TensorBoard
from server.trackers.wandb import WeightsAndBiases


class Tracker(Protocol):
    """Opened for a run folder when its first line is written."""

    def add(self, number: int, numbers: Mapping[str, float]) -> None:
        """Numbers of a round."""

    def end(self, status: str) -> None:
        """The run has ended; ``status`` as in summary.json."""


KINDS: dict[str, Callable[[Config, Path], Tracker]] = {
    "tensorboard": TensorBoard,
    "mlflow": MLflow,
    "wandb": WeightsAndBiases,
}


class Trackers:
    """Passes lines on; a tracker that fails is told of once and left alone from then on.

    Args:
        tell: hears of that; a run's progress takes its place.

    Raises:
        InputError: the package of one that the keys ask for is not installed.
    """

    def __init__(self, config: Config, run: Path, tell: Callable[[str], Any] = print) -> None:
        self.config, self.run, self.tell = config, run, tell
        self.chosen = {name for name in KINDS if getattr(config.tracking, name)}
        self.open: dict[str, Tracker] = {}
        for name in sorted(self.chosen):
            if find_spec(name) is None:
                value = getattr(config.tracking, name)
                raise InputError(
                    f"tracking.{name} = {str(value).lower() if value is True else value!r}: the package {name} is not "
                    f"installed; pip install 'fedistill[{name}]', or leave the key out"
                )

    def add(self, line: Mapping[str, Any]) -> None:
        """Pass on a line that metrics.jsonl has got."""
        number, numbers = numbers_of(line)
        for name in sorted(self.chosen):
            self._guarded(name, lambda name=name: self._opened(name).add(number, numbers))  # type: ignore[misc]

    def end(self, status: str) -> None:
        """Close them; the next line would open them again."""
        for name, tracker in list(self.open.items()):
            self._guarded(name, lambda tracker=tracker: tracker.end(status))  # type: ignore[misc]
        self.open.clear()

    def _opened(self, name: str) -> Tracker:
        if name not in self.open:
            self.open[name] = KINDS[name](self.config, self.run)
        return self.open[name]

    def _guarded(self, name: str, act: Callable[[], None]) -> None:
        try:
            act()
        except Exception as error:  # whatever a client of a service may raise: the run is worth more
            self.chosen.discard(name)
            self.open.pop(name, None)
            self.tell(f"tracking.{name}: {type(error).__name__}; the run goes on without it")
