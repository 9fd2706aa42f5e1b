"""Exchanges with clients on devices of their own: each has one node, which may be away for a while and comes back.

A message that was on its way when a connection broke is lost: Flower takes it for delivered. So a client that is silent
for long is asked again. One that has answered already gives the same answer, without working again.
"""

import time
from typing import Any

from flwr.app import ArrayRecord, Message, RecordDict

from common.bundle import bundle, unbundled
from common.wire import Instruction
from server.exchange import POLL_SECONDS, Exchange, Take
from server.joining import is_away, keys_for_clients, task_text
from server.phase import Phase

AWAY = "its device is away"
STRUCK_OFF = "it may not take part any more"
PATIENCE_SECONDS = 60.0  # at least, before a client is asked again; each time twice the last
SLOWEST = 3.0  # and so many times what the slowest of the others has taken


class EdgeExchange(Exchange):
    """As `Exchange`, for clients that only their own node can work for."""

    def ask_again(self) -> list[Message]:
        """Messages for clients that have been silent for long."""
        if self.phase is None:
            return []
        now, phase = time.monotonic(), self.phase
        answered = phase.last_answer - phase.began if phase.accepted else 0.0
        found = []
        for client in {client for one in self._sent for client in one.clients}:
            times = sum(one.clients == (client,) for one in self._sent)
            if now - self._asked[client] > max(PATIENCE_SECONDS, SLOWEST * answered) * 2 ** (times - 1):
                found.append(self._message(self.federation.homes[client], (client,)))
                phase.tried[client].pop()  # the same chance, not another
        return found

    def moot(self) -> set[str]:
        """Ids of messages to clients that have answered another one of the same phase."""
        return self._moot

    def _message(self, node: int, clients: tuple[int, ...]) -> Message:
        self._asked.update(dict.fromkeys(clients, time.monotonic()))
        return super()._message(node, clients)

    def _lists(self, clients: Any, grid: Any) -> dict[int, tuple[int, ...]]:
        self._asked: dict[int, float] = {}
        self._moot: set[str] = set()
        self._bundles: dict[int, ArrayRecord] = {}  # of the records of the phase
        return {self.federation.homes[client]: (client,) for client in clients}

    def _take(self, reply: Message, node: int, clients: tuple[int, ...], take: Take) -> None:
        others = [one for one in self._sent if one.clients == clients]
        if reply.has_error() and others:
            return  # the same question is on its way
        if is_away(reply):
            assert self.phase is not None
            self._again.update(dict.fromkeys(clients, False))
            self.phase.fail(clients, AWAY)
            self._idle = -1  # to be away is not to fail
        else:
            super()._take(reply, node, clients, take)
        self._moot |= {one.message.metadata.message_id for one in others}
        self._sent = [one for one in self._sent if one not in others]

    def _second_chance(self, phase: Phase, grid: Any, size: int) -> list[Message]:
        homes, again, here = self.federation.homes, self._again, set(grid.get_node_ids())
        self._again = {client: blamed for client, blamed in again.items() if homes[client] not in here}
        return self._messages([(homes[client], (client,)) for client in sorted(set(again) - set(self._again))])

    def _can_try_again(self, grid: Any) -> bool:
        """Wait for a client that is to be tried again; False: it was not there until time was up."""
        phase, homes, told = self.phase, self.federation.homes, False
        assert phase is not None
        over = phase.began + self.config.server.round_timeout
        if time.monotonic() > over and not any(self._again.values()):  # there, and away again whenever they are asked
            return False
        while not {homes[client] for client in self._again} & set(grid.get_node_ids()):
            for client in self.federation.struck_off() & set(self._again):
                del self._again[client]
                phase.fail([client], STRUCK_OFF)
            if not self._again:
                return False
            if time.monotonic() > over:
                return False
            if not told:
                away = ", ".join(str(client) for client in sorted(self._again))
                self.progress.line(f"round {phase.round}: waits for client {away}: {AWAY}")
                told = True
            self.tick()
            time.sleep(POLL_SECONDS)
        return True

    def _content(self, clients: tuple[int, ...]) -> RecordDict:
        content = super()._content(clients)
        record = content.get("student")
        if isinstance(record, ArrayRecord):  # clients of a tier share it, bundled too
            content["student"] = self._bundles.get(id(record)) or self._bundles.setdefault(id(record), bundle(record))
        return content

    def _read(self, reply: Message) -> RecordDict:
        return unbundled(reply.content)

    def _instruction(self, round_number: int, clients: tuple[int, ...]) -> Instruction:
        """No folder of ours, no key of what lies here."""
        return Instruction(
            run=self.run,
            round=round_number,
            config=keys_for_clients(self.config),
            clients=clients,
            feedback=tuple(self.feedback.get(client, 0) for client in clients),
            teacher="",
            teacher_hash=self.federation.teacher.hash,
            dataset="",
            student="",
            student_hash=self.federation.pupil.hash,
            token_budget=self.token_budget,
            clip_norm=self.clip_norm,
            noise=self.noise,
            task=task_text(self.data.task),
            secure=self.secure(clients),
        )
