"""One exchange with the nodes: messages out, replies checked and folded in one by one, losses retried and noted.

A reply that fails a check is refused, counted and named; the others go on. Clients that are lost get another chance
on another node, in smaller company each time, until those to blame are alone; they travel alone from then on. A node
that answers nothing in two phases in a row gets no more work.
"""

import json
import socket
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NamedTuple

from flwr.app import ArrayRecord, Message, RecordDict
from flwr.serverapp import Grid
from numpy.typing import NDArray

from common.errors import Interrupted, RunFailed
from common.progress import Progress, Step
from common.store import cache_folder
from common.wire import ClientLine, Instruction, message_bytes, pack, pack_arrays
from server.assignment import FIXED_EXAMPLES, assign
from server.phase import Phase
from server.preparation import Federation
from server.reply import reason_of

NAMES = {
    "query.supply": "send models",
    "query.teach": "teacher outputs",
    "query.weigh": "weigh heads and neurons",
    "train": "train",
    "evaluate": "score",
}  # of the kinds of message, on screen
POLL_SECONDS = 0.1
MISSES = 2  # phases in a row without any answer that make a node dead
RETRY_MESSAGES = 16  # lost clients travel in ever smaller lists, until one that kills its worker is alone in its own
CHANCES = 2  # of a client that is alone to blame
IDLE_WAVES = 2  # without any answer, and nobody is tried again
TOLD = 10  # lost clients that are named one by one
# checks a reply's content and folds it in: its lines, and clients whose own update is refused; ValueError: all of it
Take = Callable[[RecordDict, frozenset[int]], tuple[list[ClientLine], dict[int, str]]]


class Sent(NamedTuple):
    """A message that has no answer yet, and whom it asks."""

    message: Message
    node: int
    clients: tuple[int, ...]


class StreamingGrid:
    """A Flower grid whose replies can be folded in as they come, instead of all at once at the end."""

    def __init__(
        self,
        grid: Grid,
        tick: Callable[[], None],
        again: Callable[[], list[Message]] = list,
        moot: Callable[[], set[str]] = set,
    ) -> None:
        self.grid, self.tick = grid, tick
        self.again, self.moot = again, moot  # messages to push besides; ids that need no answer any more
        self.abandoned: set[str] = set()  # not waited for any more; Flower would keep their replies for ever

    def get_node_ids(self) -> list[int]:
        return sorted(self.grid.get_node_ids())

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterator[Message]:
        """Push messages and yield each reply when it arrives, until all are in or time is up."""
        waiting = set(self.grid.push_messages(list(messages)))
        began = time.monotonic()
        end = began + (timeout if timeout is not None else float("inf"))
        try:
            while waiting and time.monotonic() < end:
                self.tick()
                if more := self.again():
                    waiting |= set(self.grid.push_messages(more))
                for reply in self.grid.pull_messages(waiting | self.abandoned):
                    # matched by the message it answers: an error for a dead node comes from nobody's node id
                    answered = reply.metadata.reply_to_message_id
                    self.abandoned.discard(answered)
                    if answered in waiting:
                        waiting.discard(answered)
                        yield reply
                moot = self.moot() & waiting
                waiting, self.abandoned = waiting - moot, self.abandoned | moot
                if waiting:  # a short phase is asked often, a long one rarely
                    time.sleep(min(POLL_SECONDS, max(0.005, 0.02 * (time.monotonic() - began))))
        finally:
            self.abandoned |= waiting


class Exchange:
    """Sends phases to the nodes of a run and collects them; at most one is open at a time.

    Args:
        run: the run's id.
        folder: where the files lie to which workers on this machine add a byte per finished client.
        stopped: asked ten times a second; True raises `Interrupted`.
        on_hang: called when nodes have not answered in time; the runtime may end and replace them.
    """

    def __init__(
        self,
        federation: Federation,
        run: str,
        folder: Path,
        progress: Progress,
        *,
        stopped: Callable[[], bool],
        on_hang: Callable[[], None],
    ) -> None:
        self.federation, self.config, self.data = federation, federation.config, federation.data
        self.run, self.folder, self.progress, self.stopped, self.on_hang = run, folder, progress, stopped, on_hang
        self.sizes = {int(client): int(self.data.train_sizes[client]) for client in self.data.eligible}
        self.feedback: dict[int, int] = {}  # client -> round of its last accepted lossy update
        self.token_budget = 0  # of training; 0: as the keys say
        self.clip_norm = 0.0  # of updates; 0: none
        self.speeds: dict[int, float] = {}
        self.misses: dict[int, int] = {}
        self.suspects: set[tuple[str, int]] = set()  # kind of message and client: lost when it was last tried
        self.phase: Phase | None = None
        self._arrays: Mapping[str, NDArray[Any]] = {}
        self._packed: dict[int, ArrayRecord] = {}  # what of them a message brings, by the largest tier in it
        self._sent: list[Sent] = []
        self._again: dict[int, bool] = {}  # clients to be tried again, and whether they may be to blame
        self._idle = 0  # waves in a row that nobody has answered
        self._failing: set[int] = set()  # nodes that have lost a message of the open phase
        self._display: AbstractContextManager[Step] | None = None
        self._step: Step | None = None
        self._shown = 0

    def wait_for_nodes(self, grid: StreamingGrid, count: int) -> None:
        """Return when that many nodes are there; Flower itself would start with the first."""
        end = time.monotonic() + self.config.server.round_timeout
        with self.progress.step("wait for the workers", count) as step:
            found = 0
            while found < count:
                self.tick()
                step.advance(len(grid.get_node_ids()) - found)
                found = len(grid.get_node_ids())
                if found < count and time.monotonic() > end:
                    raise RunFailed(f"{found} nodes came; the run waits for {count}")
                time.sleep(POLL_SECONDS if found < count else 0)

    def open(
        self,
        kind: str,
        round_number: int,
        clients: Sequence[int],
        *,
        grid: Any,
        arrays: Mapping[str, NDArray[Any]],
        info: str,
        goal: int | None = None,
    ) -> list[Message]:
        """The messages of a phase, with its progress step on show.

        One message per node; one per client when only the first ``goal`` clients are waited for.
        """
        self.phase = Phase(kind, round_number, tuple(clients), len(clients) if goal is None else goal)
        self._arrays, self._packed = arrays, {}
        self._shown = 0
        self._failing = set()
        self._scoreboard.write_bytes(b"")
        self._display = self.progress.step(f"round {round_number}/{self.config.rounds} {NAMES[kind]}", self.phase.goal)
        self._step = self._display.__enter__()
        self._step.info(info)
        lists = self._lists(clients, grid)
        single = self.phase.goal < len(clients)
        return self._messages(
            [(node, part) for node, chosen in lists.items() for part in self._parts(kind, chosen, single=single)]
        )

    def collect(self, grid: Any, replies: Iterable[Message], take: Take) -> Phase:
        """Check each reply of the open phase as it comes and fold it in, retry what was lost, close the phase."""
        phase = self.phase
        assert phase is not None
        self._again, self._idle = {}, 0
        size = len(phase.clients)
        self._take_all(replies, take)
        while self._again and not phase.reached and self._idle < IDLE_WAVES and self._can_try_again(grid):
            before = len(phase.accepted)
            self._tell(phase)
            size = max(min(size // 2, -(-len(self._again) // RETRY_MESSAGES)), 1)
            again = self._second_chance(phase, grid, size)
            self._take_all(grid.send_and_receive(again, timeout=self.config.server.round_timeout), take)
            self._idle = 0 if len(phase.accepted) > before else self._idle + 1
        for node in self._failing:  # one that answers other messages is well: a client is to blame
            self.misses[node] = self.misses.get(node, 0) + 1
        self.misses.update(dict.fromkeys(phase.busy, 0))
        phase.ended = time.monotonic()
        self.close()
        for client, what in phase.losses():
            self.progress.line(f"round {phase.round}: client {client} {what}")
        return phase

    def close(self) -> None:
        """Take the open phase off the screen; a worker that is still at it sees that nobody waits any more."""
        if self._display is not None:
            self._display.__exit__(None, None, None)
            self._display = self._step = None
        if self.phase is not None:
            self._scoreboard.unlink(missing_ok=True)
            self.phase = None

    def ask_again(self) -> list[Message]:
        """Messages to push besides while answers are waited for."""
        return []

    def moot(self) -> set[str]:
        """Ids of messages that need no answer any more."""
        return set()

    def tick(self) -> None:
        """Called while waiting: notice a stop, move the bar."""
        if self.stopped():
            raise Interrupted
        if self._step is not None and self.phase is not None and self._scoreboard.exists():
            done = min(self._scoreboard.stat().st_size, self.phase.goal)  # who is tried again is done twice
            if done > self._shown:
                self._step.advance(done - self._shown)
                self._shown = done

    # --- one wave of messages -------------------------------------------------------------------

    def _take_all(self, replies: Iterable[Message], take: Take) -> None:
        phase = self.phase
        assert phase is not None
        for reply in replies:
            answered = reply.metadata.reply_to_message_id  # known to a message only once it has been pushed
            asked = next((one for one in self._sent if one.message.metadata.message_id == answered), None)
            if asked is not None:  # else a second answer to the same question
                self._sent.remove(asked)
                self._take(reply, asked.node, asked.clients, take)
            if phase.reached:
                return
        hanging = set()
        for unanswered in self._sent:  # the first of a node hangs; the others wait behind it
            self._lose(unanswered.clients, blamed=unanswered.node not in hanging)
            hanging.add(unanswered.node)
            phase.give_up(unanswered.clients)
        self._failing |= hanging
        if self._sent:
            self.on_hang()

    def _take(self, reply: Message, node: int, clients: tuple[int, ...], take: Take) -> None:
        phase = self.phase
        assert phase is not None
        if reply.has_error():
            self._failing.add(node)
            self._lose(clients, blamed=True)
            phase.fail(clients, reason_of(reply))
            return
        if reply.metadata.src_node_id != node:
            phase.reject(clients, "its answer came from another node")
            return
        phase.bytes_up += message_bytes(reply)
        try:
            lines, refused = take(self._read(reply), frozenset(clients))
        except ValueError as error:
            self._lose(clients, blamed=True)
            phase.reject(clients, str(error))
            return
        self.suspects.difference_update((phase.kind, client) for client in clients)
        phase.accept(node, lines, refused)
        for client in set(clients) - phase.accepted:  # it was not its company
            if len(phase.tried[client]) < CHANCES:
                self._again[client] = True
        if phase.kind == "train":
            self._note_speed(node, lines)

    def _lose(self, clients: Sequence[int], *, blamed: bool) -> None:
        """A message is lost: who is alone in it, and to blame, has had this chance; the others get another."""
        phase = self.phase
        assert phase is not None
        if blamed:
            self.suspects.update((phase.kind, client) for client in clients)
        for client in clients:
            if not blamed or len(clients) > 1 or len(phase.tried[client]) < CHANCES:
                self._again[client] = blamed

    def _lists(self, clients: Sequence[int], grid: Any) -> dict[int, tuple[int, ...]]:
        """The clients that each node works for."""
        return assign(clients, self.sizes, self._alive(grid), self.speeds)

    def _second_chance(self, phase: Phase, grid: Any, size: int) -> list[Message]:
        """Messages for lost clients in lists of this size, to other nodes where there are any.

        Whoever only waited behind another goes first, and never beside one that may be to blame again.
        """
        again, self._again = self._again, {}
        alive = self._alive(grid)
        load = dict.fromkeys(alive, 0)
        lists: dict[tuple[bool, int], list[int]] = {}
        for client in sorted(again):
            others = [node for node in alive if node not in phase.tried[client]] or alive
            node = min(others, key=lambda one: load[one])
            load[node] += self.sizes[client] + FIXED_EXAMPLES
            lists.setdefault((again[client], node), []).append(client)
        ordered = sorted(lists.items(), key=lambda one: one[0])
        return self._messages([(node, part) for (_, node), chosen in ordered for part in _split(chosen, size)])

    def _can_try_again(self, grid: Any) -> bool:
        """Whether there is a node for somebody who is to be tried again."""
        return True

    def _tell(self, phase: Phase) -> None:
        """Say who is tried again; of many, some."""
        lost = [(client, what) for client, what in phase.losses() if client in self._again]
        for client, what in lost[:TOLD]:
            self.progress.line(f"round {phase.round}: client {client} {what}; tried again")
        if len(lost) > TOLD:
            self.progress.line(f"round {phase.round}: {len(lost) - TOLD} more clients are tried again")

    def _messages(self, lists: Sequence[tuple[int, Sequence[int]]]) -> list[Message]:
        self._sent = []
        return [self._message(node, tuple(clients)) for node, clients in lists]

    def _message(self, node: int, clients: tuple[int, ...]) -> Message:
        phase = self.phase
        assert phase is not None
        message = Message(self._content(clients), dst_node_id=node, message_type=phase.kind)
        self._sent.append(Sent(message, node, clients))
        phase.bytes_down += message_bytes(message)
        for client in clients:
            phase.tried.setdefault(client, []).append(node)
        return message

    def _content(self, clients: tuple[int, ...]) -> RecordDict:
        assert self.phase is not None
        return pack(self._instruction(self.phase.round, clients), self._student(clients))

    def _read(self, reply: Message) -> RecordDict:
        """A reply's records as they were before they were sent. Raises ValueError when they cannot be read."""
        return reply.content

    def _student(self, clients: Sequence[int]) -> ArrayRecord | None:
        """What these clients' tiers hold of the arrays; messages share the record."""
        if not self._arrays:
            return None
        tiers, tier = self.federation.tiers, max(int(self.federation.tier_of[client]) for client in clients)
        if tier not in self._packed:
            outputs = self._arrays.keys() != tiers.shapes.keys()  # and no weights: all tiers get them
            part = self._arrays if outputs else tiers.cut(self._arrays, tiers[tier].sent)
            self._packed[tier] = pack_arrays(part)
        return self._packed[tier]

    def _alive(self, grid: Any) -> list[int]:
        nodes = [node for node in grid.get_node_ids() if self.misses.get(node, 0) < MISSES]
        if not nodes:
            raise RunFailed("no node is left that answers")
        return nodes

    def _note_speed(self, node: int, lines: Sequence[ClientLine]) -> None:
        seconds = sum(line.seconds for line in lines)
        if seconds > 0:
            speed = sum(line.examples + FIXED_EXAMPLES for line in lines) / seconds
            self.speeds[node] = 0.5 * (self.speeds.get(node, speed) + speed)

    def _parts(self, kind: str, clients: Sequence[int], *, single: bool) -> list[Sequence[int]]:
        """A node's clients as its messages list them: all together, but by itself who was lost the last time."""
        alone = [client for client in clients if single or (kind, client) in self.suspects]
        together = [client for client in clients if not single and (kind, client) not in self.suspects]
        return [*([together] if together else []), *_split(alone, 1)]

    @property
    def _scoreboard(self) -> Path:
        assert self.phase is not None
        return self.folder / f".finished-{self.phase.round}-{self.phase.kind}"

    def _instruction(self, round_number: int, clients: tuple[int, ...]) -> Instruction:
        teacher, masked, keys = self.federation.teacher, self.federation.masked, self.config.flat()
        if keys["runtime.cache"]:  # a worker need not have been started where we were
            keys["runtime.cache"] = str(cache_folder(self.config.runtime.cache))
        return Instruction(
            run=self.run,
            round=round_number,
            config=json.dumps(keys, sort_keys=True),
            clients=clients,
            feedback=tuple(self.feedback.get(client, 0) for client in clients),
            teacher=str(teacher.folder.resolve()),
            teacher_hash=teacher.hash,
            dataset=self.data.key,
            student=self.federation.pupil.key,
            student_hash=self.federation.pupil.hash,
            token_budget=self.token_budget,
            clip_norm=self.clip_norm,
            masked="" if masked is None else str(masked.folder.resolve()),
            masked_hash="" if masked is None else masked.hash,
            scoreboard=str(self._scoreboard),
            host=socket.gethostname(),
        )


def _split(clients: Sequence[int], size: int) -> list[Sequence[int]]:
    return [clients[start : start + size] for start in range(0, len(clients), size)]
