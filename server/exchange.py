"""One exchange with the nodes: messages out, replies checked and folded in one by one, losses noted.

A reply that fails a check is refused, counted and named; the others go on.
"""

import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flwr.app import Message
from flwr.serverapp import Grid
from numpy.typing import NDArray

from common.errors import Interrupted, RunFailed
from common.progress import Progress, Step
from common.wire import NOT_FINITE, ClientLine, Instruction, Shapes, message_bytes, pack, unpack_reply
from server.assignment import assign
from server.preparation import Federation

POLL_SECONDS = 0.1
Fold = Callable[[dict[str, dict[str, Any]], list[ClientLine]], None]


class StreamingGrid:
    """A Flower grid whose replies can be folded in as they come, instead of all at once at the end."""

    def __init__(self, grid: Grid, tick: Callable[[], None]) -> None:
        self.grid, self.tick = grid, tick

    def get_node_ids(self) -> list[int]:
        return sorted(self.grid.get_node_ids())

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterator[Message]:
        """Push messages and yield each reply when it arrives, until all are in or time is up."""
        waiting = set(self.grid.push_messages(list(messages)))
        end = time.monotonic() + (timeout if timeout is not None else float("inf"))
        while waiting and time.monotonic() < end:
            self.tick()
            for reply in self.grid.pull_messages(waiting):
                # matched by the message it answers: an error for a dead node comes from nobody's node id
                if reply.metadata.reply_to_message_id in waiting:
                    waiting.discard(reply.metadata.reply_to_message_id)
                    yield reply
            if waiting:
                time.sleep(POLL_SECONDS)


@dataclass
class Phase:
    """What was asked of whom, what came back, what was lost.

    Attributes:
        sent: each message and the clients it names.
        answered: clients whose node replied, in whatever way.
        failed, rejected: client id and reason.
    """

    name: str
    round: int
    clients: tuple[int, ...]
    sent: list[tuple[Message, tuple[int, ...]]]
    display: AbstractContextManager[Step]
    step: Step
    began: float = field(default_factory=time.monotonic)
    shown: int = 0
    answered: set[int] = field(default_factory=set)
    failed: dict[int, str] = field(default_factory=dict)
    rejected: dict[int, str] = field(default_factory=dict)
    bytes_up: int = 0
    bytes_down: int = 0

    @property
    def late(self) -> list[int]:
        return sorted(set(self.clients) - self.answered)

    @property
    def lost(self) -> int:
        return len(self.failed) + len(self.rejected) + len(self.late)

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.began

    def losses(self) -> list[tuple[int, str]]:
        """Client id and what happened, for each client that is not in the sum."""
        named = [(client, f"failed: {reason}") for client, reason in self.failed.items()]
        named += [(client, f"rejected: {reason}") for client, reason in self.rejected.items()]
        return sorted(named + [(client, "late: no reply in time") for client in self.late])

    def accounting(self) -> dict[str, Any]:
        """The part of a metrics line that every phase has."""
        return {
            "seconds": self.seconds,
            "bytes_up": self.bytes_up,
            "bytes_down": self.bytes_down,
            "failed": sorted(self.failed),
            "rejected": sorted(self.rejected),
            "late": self.late,
        }


class Exchange:
    """Sends phases to the nodes of a run and collects them; at most one is open at a time.

    Args:
        scoreboard: a file to which workers on this machine add a byte per finished client.
        stopped: asked ten times a second; True raises `Interrupted`.
    """

    def __init__(
        self, federation: Federation, scoreboard: Path, progress: Progress, stopped: Callable[[], bool]
    ) -> None:
        self.federation, self.config, self.data = federation, federation.config, federation.data
        self.scoreboard, self.progress, self.stopped = scoreboard, progress, stopped
        self.sizes = {int(client): int(self.data.train_sizes[client]) for client in self.data.eligible}
        self.phase: Phase | None = None

    def wait_for_nodes(self, grid: StreamingGrid, count: int) -> None:
        """Return when that many nodes are there; Flower itself would start with the first."""
        end = time.monotonic() + self.config.server.round_timeout
        while len(grid.get_node_ids()) < count:
            self.tick()
            if time.monotonic() > end:
                raise RunFailed(f"{len(grid.get_node_ids())} nodes came; the run waits for {count}")
            time.sleep(POLL_SECONDS)

    def open(
        self,
        name: str,
        kind: str,
        round_number: int,
        clients: Sequence[int],
        *,
        nodes: Iterable[int],
        arrays: Mapping[str, NDArray[Any]],
        info: str,
    ) -> list[Message]:
        """The messages of a phase, one per node, with its progress step on show."""
        self.scoreboard.write_bytes(b"")
        sent = []
        for node, chosen in assign(clients, self.sizes, list(nodes)).items():
            content = pack(self._instruction(round_number, chosen), arrays)
            sent.append((Message(content, dst_node_id=node, message_type=kind), chosen))
        display = self.progress.step(f"round {round_number}/{self.config.rounds} {name}", len(clients))
        self.phase = Phase(name, round_number, tuple(clients), sent, display, display.__enter__())
        self.phase.step.info(info)
        self.phase.bytes_down = sum(message_bytes(message) for message, _ in sent)
        return [message for message, _ in sent]

    def collect(self, replies: Iterable[Message], expected: Mapping[str, Shapes], fold: Fold) -> Phase:
        """Check each reply of the open phase as it comes, fold it in, close the phase."""
        phase = self.phase
        assert phase is not None
        for reply in replies:
            asked = {message.metadata.message_id: clients for message, clients in phase.sent}
            clients = asked[reply.metadata.reply_to_message_id]
            phase.answered.update(clients)
            if reply.has_error():
                phase.failed.update(dict.fromkeys(clients, _reason(reply)))
                continue
            phase.bytes_up += message_bytes(reply)
            try:
                sums, lines = unpack_reply(reply.content, expected, frozenset(clients))
                fold(sums, lines)
            except ValueError as error:
                phase.rejected.update(dict.fromkeys(clients, str(error)))
                continue
            for line in lines:
                if line.problem:
                    (phase.rejected if line.problem == NOT_FINITE else phase.failed)[line.client] = line.problem
        self.close()
        for client, what in phase.losses():
            self.progress.line(f"round {phase.round}: client {client} {what}")
        return phase

    def close(self) -> None:
        """Take the open phase off the screen."""
        if self.phase is not None:
            self.phase.display.__exit__(None, None, None)
            self.phase = None
        self.scoreboard.unlink(missing_ok=True)

    def tick(self) -> None:
        """Called while waiting: notice a stop, move the bar."""
        if self.stopped():
            raise Interrupted
        if self.phase is not None and self.scoreboard.exists():
            done = self.scoreboard.stat().st_size
            if done > self.phase.shown:
                self.phase.step.advance(done - self.phase.shown)
                self.phase.shown = done

    def _instruction(self, round_number: int, clients: tuple[int, ...]) -> Instruction:
        teacher = self.federation.teacher
        return Instruction(
            round=round_number,
            config=json.dumps(self.config.flat(), sort_keys=True),
            clients=clients,
            teacher=str(teacher.folder.resolve()),
            teacher_hash=teacher.hash,
            dataset=self.data.key,
            scoreboard=str(self.scoreboard),
        )


def _reason(reply: Message) -> str:
    """A node's error in a few words: Flower wraps what the ClientApp raised in two texts of its own."""
    words = " ".join((reply.error.reason or "").split())
    return words.rsplit(":<'", 1)[-1].rsplit("Message: ", 1)[-1].removesuffix("'>").strip()[:120] or "no reason given"
