"""TensorBoard: event files in RUN/tensorboard, written by the ``tensorboard`` package itself, without TensorFlow.

    pip install 'fedistill[tensorboard]'; tensorboard --logdir RUN

The folder says what metrics.jsonl says: a run that is continued writes it anew from there.
"""

import shutil
import time
from collections.abc import Mapping
from pathlib import Path

from common.config import Config
from server.lines import numbers_of, read_lines

FOLDER = "tensorboard"


class TensorBoard:
    """An event file of a run; what the run has written so far comes first."""

    def __init__(self, config: Config, run: Path) -> None:
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        shutil.rmtree(run / FOLDER, ignore_errors=True)
        self.writer = EventFileWriter(str(run / FOLDER))
        earlier = [numbers_of(line) for line in read_lines(run / "metrics.jsonl")]
        for number, numbers in earlier[:-1]:  # the last is the line that this was opened for
            self.add(number, numbers)

    def add(self, number: int, numbers: Mapping[str, float]) -> None:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary

        values = [Summary.Value(tag=name, simple_value=value) for name, value in numbers.items()]
        self.writer.add_event(Event(wall_time=time.time(), step=number, summary=Summary(value=values)))
        self.writer.flush()

    def end(self, status: str) -> None:
        self.writer.close()
