"""What a secure sum costs each client and the server, by the size of the cohort: ``python -m simulations.secure_cost``.

The real server and the real members, in one process and without a network; the opened sum is compared with the plain
one, bit for bit.
"""

import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from clients.secure_sum import Member, masked_sum, members_of, say
from common.config import Config, from_flat
from common.wire import ClientLine, Instruction, Shapes, content_bytes, pack_reply, pack_told
from server.exchange import no_question
from server.phase import Phase
from server.secure_sum import MaskedWords, SecureSum, layout_of

STAGES = {"query.keys": Member.keys, "query.shares": Member.letters, "query.unmask": Member.reveal}
STUDENT = 5_472_002  # trained parameters of the default student: three layers of MiniLM and a head


class Loopback:
    """An exchange with members in this process, each asked by itself; times and bytes of each stage.

    Args:
        lost: clients that do not send their masked words.
    """

    def __init__(self, folder: Path, config: Config, shapes: Shapes, lost: set[int]) -> None:
        self.folder, self.config, self.shapes, self.lost = folder, config, shapes, lost
        self.secure, self.seats, self.run = no_question, {}, "0" * 16  # type: ignore[var-annotated]
        self.seconds: dict[str, float] = {}
        self.up: dict[str, int] = {}
        self.down: dict[str, int] = {}
        self.worker = SimpleNamespace(cache=folder, config=config, shapes=shapes)

    def open(self, kind: str, number: int, clients: Sequence[int], **given: Any) -> list[Instruction]:
        self.phase = Phase(kind, number, tuple(clients), len(clients), tried={client: [1] for client in clients})
        empty = Instruction(self.run, number, "", (), (), "", "", "", "", "")
        return [replace(empty, clients=(one,), feedback=(0,), secure=self.secure((one,))) for one in clients]

    def send_and_receive(self, messages: Sequence[Instruction], **given: Any) -> Iterator[tuple[int, Any]]:
        for instruction in messages:
            with self._timed():
                content = self._answer(instruction)
            self._note(self.up, content_bytes(content))
            self._note(self.down, len(instruction.secure))
            yield instruction.clients[0], content

    def collect(self, grid: Any, replies: Iterator[tuple[int, Any]], take: Any) -> Phase:
        for client, content in replies:
            lines, refused = take(content, frozenset((client,)))
            self.phase.accept(1, lines, refused)
        return self.phase

    def _answer(self, instruction: Instruction) -> Any:
        if self.phase.kind == "train":
            return pack_reply(*masked_sum(self.worker, "train", instruction, self._train))  # type: ignore[arg-type]
        share = self.config.privacy.secure_threshold
        return pack_told(*say(members_of(self.folder / "secure-sums", instruction, share), STAGES[self.phase.kind]))

    def _train(self, instruction: Instruction) -> tuple[Any, list[ClientLine]]:
        (client,) = instruction.clients
        if client in self.lost:
            return {}, [ClientLine(client, 0, 0.0, problem="lost")]
        began = time.process_time()
        update = update_of(client, self.shapes)
        self._note(self.seconds, began - time.process_time())  # not part of the protocol
        return {"update": update}, [ClientLine(client, 100, 0.0)]

    @contextmanager
    def _timed(self) -> Iterator[None]:
        began = time.process_time()
        yield
        self._note(self.seconds, time.process_time() - began)

    def _note(self, sums: dict[str, Any], amount: float) -> None:
        sums[self.phase.kind] = sums.get(self.phase.kind, 0) + amount


def update_of(client: int, shapes: Shapes) -> dict[str, NDArray[np.int64]]:
    rng = np.random.default_rng(client)
    return {name: rng.integers(-(2**40), 2**40, shape) for name, shape in shapes.items()}


def measure(members: int, words: int, lost: int) -> dict[str, float]:
    """One secure sum; means over the clients and totals of the server, in seconds of one core and bytes.

    Args:
        lost: how many members are lost after their shares are with the others.

    Raises:
        AssertionError: the opened sum is not the plain one.
    """
    config = from_flat({"data.clients": members, "privacy.secure-aggregation": True})
    shapes: Shapes = {"w": (words,)}
    with tempfile.TemporaryDirectory() as name:
        loop = Loopback(Path(name), config, shapes, set(range(lost)))
        exchange: Any = loop
        secure = SecureSum(exchange, config, lambda phase: None)
        ready = secure.begin("train", 1, range(members), loop)
        masked = MaskedWords(layout_of({"update": shapes}))
        loop.collect(loop, loop.send_and_receive(loop.open("train", 1, ready)), masked.take)
        before, began = sum(loop.seconds.values()), time.process_time()
        opened = secure.open(masked, loop.phase.accepted, loop)
        server = time.process_time() - began - (sum(loop.seconds.values()) - before)
    plain = np.zeros(words, dtype=np.int64)
    for client in range(lost, members):
        plain += update_of(client, shapes)["w"]
    assert (opened.group("update")["w"] == plain).all()
    told = {kind: size / (members - lost * (kind in ("train", "query.unmask"))) for kind, size in loop.up.items()}
    return {
        "members": members,
        "lost": lost,
        "plain_mb": words * 8 / 1e6,
        "up_mb": sum(told.values()) / 1e6,
        "up_more_kb": (sum(told.values()) - words * 8) / 1e3,
        "down_more_kb": sum(loop.down.values()) / members / 1e3,
        "setup_s": (loop.seconds["query.keys"] + loop.seconds["query.shares"]) / members,
        "mask_s": loop.seconds["train"] / max(members - lost, 1),
        "unmask_s": loop.seconds["query.unmask"] / max(members - lost, 1),
        "server_s": server,
    }


def main(*sizes: str) -> None:
    """A line for each size of the cohort, without losses and with a quarter of it lost."""
    for size in [int(size) for size in sizes] or [4, 8, 16, 32, 64]:
        for lost in (0, size // 4):
            print({name: round(value, 4) for name, value in measure(size, STUDENT, lost).items()}, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
