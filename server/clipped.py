"""Replies under `privacy.unit = "client"`: clipped updates that count the same, and a mean that is noised.

Where nodes add up (`ClippedSum`), clipping is done by the clients' software. The server sees a node's sum: of k clients
its norm is at most k C, and with one client per node, as with devices of their own, that checks the client itself.
Where each update travels by itself (`ClippedEach`) the server clips it once more and trusts no client.
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from common.clipping import BELOW, HALF, below, clip, norm_of, slack
from common.compression import wire_for
from common.fixed_point import SCALE, ExactSum, Rows
from common.wire import ClientLine, Shapes, unpack_lines, unpack_update
from server.aggregation import Rejected
from server.client_privacy import ClientPrivacy, Update
from server.intake import Intake, Refused, Streamed, Summed

CLOSE = 2.0**-20  # relative: what rounding does to a norm, and more


def clipped_intake(privacy: ClientPrivacy, shapes: Shapes, sizes: Mapping[int, int], number: int) -> Intake:
    """The way that the keys ask for.

    Args:
        shapes: of a client's update.
        sizes: the examples each client is known to have.
    """
    kind = ClippedSum if privacy.config.server.packing == "on" else ClippedEach
    return kind(privacy, shapes, sizes, number)


class _Released:
    """The update is drawn once: each draw is a release."""

    privacy: ClientPrivacy
    number: int
    _released: Update | None = None

    def release(self, totals: Mapping[str, NDArray[np.int64]]) -> Update:
        if self._released is None:
            self._released = self.privacy.release(self.number, totals)
        return self._released


class ClippedSum(_Released, Summed):
    """Nodes add up what their clients have clipped."""

    def __init__(self, privacy: ClientPrivacy, shapes: Shapes, sizes: Mapping[int, int], number: int) -> None:
        super().__init__(privacy.shapes(shapes), sizes)
        self.privacy, self.number, self.bound = privacy, number, privacy.clip_norm

    def take(self, content: Any, clients: frozenset[int]) -> tuple[list[ClientLine], Refused]:
        lines = unpack_lines(content, clients)
        part = unpack_update(content, self.shapes)
        self._check_reach(part, sum(not line.problem for line in lines))
        self.total.fold(part, lines, self.sizes)
        return lines, {}

    def _check_reach(self, part: Mapping[str, NDArray[np.int64] | Rows], clients: int) -> None:
        """Raise `Rejected` where so many clients cannot have added that much."""
        values = {name: array.values if isinstance(array, Rows) else array for name, array in part.items()}
        said = values.pop(BELOW, np.zeros(1, np.int64))
        if norm_of(values) > clients * self.bound * SCALE * (1.0 + CLOSE):
            raise Rejected(f"an update of {clients} clients beyond {clients} times the clip norm")
        if not -clients * HALF * SCALE <= said[0] <= clients * HALF * SCALE:
            raise Rejected(f"{BELOW}: more than {clients} clients can say")

    def update(self) -> Update:
        return self.release(self.total.totals)


class ClippedEach(_Released, Streamed):
    """Own updates, each clipped here, added to the exact sum and forgotten.

    Attributes:
        kept: the clipped updates by client, where they are asked for.
    """

    def __init__(self, privacy: ClientPrivacy, shapes: Shapes, sizes: Mapping[int, int], number: int) -> None:
        keys = privacy.config.server
        super().__init__(keys, wire_for(keys, number, privacy.config.rounds), shapes, sizes)
        self.privacy, self.number, self.bound = privacy, number, privacy.clip_norm
        self.sum = ExactSum(privacy.shapes(shapes))
        self.kept: dict[int, Mapping[str, NDArray[Any]]] | None = None
        values = sum(math.prod(shape) for shape in shapes.values())
        # whoever had to clip at home comes with a norm of the bound less its slack
        self._full = (self.bound - slack(self.bound, values)) * (1.0 - CLOSE)

    def add(self, line: ClientLine, update: Mapping[str, NDArray[np.float32]]) -> None:
        clipped, norm = clip(update, self.bound)
        said = below(norm, self._full) if self.privacy.keys.adaptive_clip else {}
        self.sum.add({**clipped, **said}, 1)
        self.added.append(line)
        if self.kept is not None:
            self.kept[line.client] = clipped

    def update(self) -> Update:
        return self.release(self.sum.totals)
