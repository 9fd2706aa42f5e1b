"""The books of one exchange: what was asked of whom, what came back, what was lost."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from common.wire import NOT_FINITE, ClientLine


@dataclass
class Phase:
    """One question to some clients, and how it went.

    Attributes:
        kind: Flower's message type: query.teach, train or evaluate.
        clients: everyone who is asked.
        goal: accepted clients that end the phase early; all of them unless more are asked than are needed.
        tried: the nodes that each client was sent to.
        accepted: clients whose answer stands.
        failed, rejected, late: the others, and the reason.
        recovered: clients that were lost at first and answered from another node.
        busy: seconds of work by node.
        last_answer: when the last readable answer came, by the monotonic clock; 0: none has.
    """

    kind: str
    round: int
    clients: tuple[int, ...]
    goal: int
    tried: dict[int, list[int]] = field(default_factory=dict)
    accepted: set[int] = field(default_factory=set)
    failed: dict[int, str] = field(default_factory=dict)
    rejected: dict[int, str] = field(default_factory=dict)
    late: set[int] = field(default_factory=set)
    recovered: set[int] = field(default_factory=set)
    busy: dict[int, float] = field(default_factory=dict)
    bytes_up: int = 0
    bytes_down: int = 0
    began: float = field(default_factory=time.monotonic)
    ended: float = 0.0
    last_answer: float = 0.0

    @property
    def reached(self) -> bool:
        """Whether enough clients have answered."""
        return len(self.accepted) >= self.goal

    @property
    def lost(self) -> list[int]:
        """Clients that have no part in the sum, ascending."""
        return sorted({*self.failed, *self.rejected, *self.late})

    @property
    def missing(self) -> int:
        """How many of the clients that are needed are lost."""
        return max(self.goal - len(self.accepted), 0)

    @property
    def surplus(self) -> list[int]:
        """Clients that were asked and not waited for."""
        return sorted(set(self.clients) - self.accepted - set(self.lost))

    @property
    def seconds(self) -> float:
        return (self.ended or time.monotonic()) - self.began

    def accept(self, node: int, lines: Sequence[ClientLine], refused: dict[int, str]) -> None:
        """Note a readable answer; ``refused`` are clients whose own update the server does not take."""
        self.last_answer = time.monotonic()
        for line in lines:
            self.busy[node] = self.busy.get(node, 0.0) + line.seconds
            if line.client in refused:
                self._lose(line.client, self.rejected, refused[line.client])
            elif line.problem:
                self._lose(line.client, self.rejected if line.problem == NOT_FINITE else self.failed, line.problem)
            else:
                if self._forget(line.client):
                    self.recovered.add(line.client)
                self.accepted.add(line.client)

    def fail(self, clients: Sequence[int], reason: str) -> None:
        for client in clients:
            self._lose(client, self.failed, reason)

    def reject(self, clients: Sequence[int], reason: str) -> None:
        for client in clients:
            self._lose(client, self.rejected, reason)

    def give_up(self, clients: Sequence[int]) -> None:
        """These clients have not answered in time."""
        for client in clients:
            self._forget(client)
            self.late.add(client)

    def losses(self) -> list[tuple[int, str]]:
        """Client id and what happened, for each client that is lost."""
        named = [(client, f"failed: {reason}") for client, reason in self.failed.items()]
        named += [(client, f"rejected: {reason}") for client, reason in self.rejected.items()]
        return sorted(named + [(client, "late: no reply in time") for client in self.late])

    def faults(self) -> dict[str, Any]:
        """The part of a metrics line that every phase has."""
        return {"failed": sorted(self.failed), "rejected": sorted(self.rejected), "late": sorted(self.late)}

    def costs(self) -> dict[str, Any]:
        """Time and bytes: what differs between two runs of the same bits."""
        return {
            "round": self.round,
            "phase": self.kind.removeprefix("query."),
            "seconds": self.seconds,
            "bytes_up": self.bytes_up,
            "bytes_down": self.bytes_down,
            "busy": sorted(seconds / self.seconds for seconds in self.busy.values()),
            "recovered": sorted(self.recovered),
            "surplus": self.surplus,
        }

    def _lose(self, client: int, kind: dict[int, str], reason: str) -> None:
        self._forget(client)
        kind[client] = reason

    def _forget(self, client: int) -> bool:
        found = client in self.late or client in self.failed or client in self.rejected
        self.late.discard(client)
        self.failed.pop(client, None)
        self.rejected.pop(client, None)
        return found
