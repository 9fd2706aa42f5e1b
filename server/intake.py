"""What becomes of the replies of a training phase: checked, added up or kept, and turned into one update.

By configuration: nodes send sums of their clients' updates (`Summed`); each client's own update travels, perhaps with
loss, and is added up here (`Streamed`), and beside that kept for an ensemble (`Kept`); or all of them are kept until
the end, for a rule that compares them (`Collected`). The first two need memory for one model, the others for one per
client.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from common.compression import Wire, decompress
from common.fixed_point import SCALE, ExactSum, mean
from common.keys import ROBUST, ServerKeys
from common.noise import SQUARES_SHAPE, squares_of
from common.wire import (
    ClientLine,
    Shapes,
    only_updates_of,
    unpack_lines,
    unpack_own_update,
    unpack_sums,
    unpack_update,
)
from server.aggregation import Rejected, RunningSum, check_count
from server.robust import ROBUST_RULES, bound_norm

Refused = dict[int, str]


class Intake(Protocol):
    """Takes replies; then gives the round's update.

    Attributes:
        lines: accounting of the clients whose update is in.
        examples: the weight behind the update.
    """

    @property
    def lines(self) -> list[ClientLine]: ...

    @property
    def examples(self) -> int: ...

    def take(self, content: Any, clients: frozenset[int]) -> tuple[list[ClientLine], Refused]:
        """Check a reply and fold it in; see `server.exchange.Take`."""

    def update(self) -> dict[str, NDArray[np.float64]]:
        """The update that stands for the round. Raises ValueError when too few clients are in."""


def intake_for(
    keys: ServerKeys, wire: Wire, shapes: Shapes, sizes: Mapping[int, int], *, squares: bool = False
) -> Intake:
    """The way that the keys ask for.

    Args:
        sizes: the examples each client is known to have.
        squares: the update has the mean squared norm of the clients' updates as one more array, `SQUARES`.
    """
    if keys.strategy in ROBUST:
        return Collected(keys, wire, shapes, sizes)
    if keys.strategy == "feddf":
        return Kept(keys, wire, shapes, sizes, squares=squares)
    if keys.packing == "on":
        return Summed({**shapes, **(SQUARES_SHAPE if squares else {})}, sizes)
    return Streamed(keys, wire, shapes, sizes, squares=squares)


class Summed:
    """Nodes add up: a reply is one sum of integers and a line per client."""

    def __init__(self, shapes: Shapes, sizes: Mapping[int, int]) -> None:
        self.shapes, self.sizes, self.total = shapes, sizes, RunningSum.zeros(shapes)

    @property
    def lines(self) -> list[ClientLine]:
        return self.total.lines

    @property
    def examples(self) -> int:
        return self.total.weight

    def take(self, content: Any, clients: frozenset[int]) -> tuple[list[ClientLine], Refused]:
        lines = unpack_lines(content, clients)
        self.total.fold(unpack_update(content, self.shapes), lines, self.sizes)
        return lines, {}

    def put(self, totals: Mapping[str, NDArray[np.int64]], lines: list[ClientLine], examples: int) -> None:
        """Take a whole sum that was opened, of clients that say nothing of their examples."""
        self.total = RunningSum(dict(totals), examples, list(lines))

    def update(self) -> dict[str, NDArray[np.float64]]:
        return {name: mean(total, self.total.weight) for name, total in self.total.totals.items()}


class Votes(Summed):
    """Sums of finite numbers in which every client counts the same."""

    def update(self) -> dict[str, NDArray[np.float64]]:
        return {name: mean(total, len(self.total.lines)) for name, total in self.total.totals.items()}


class Chances(Votes):
    """Votes that are probabilities, (n, num_labels) for each client.

    Args:
        whole: whether a client's add up to 1 in each row.
    """

    def __init__(self, shapes: Shapes, sizes: Mapping[int, int], *, whole: bool) -> None:
        super().__init__(shapes, sizes)
        self.whole = whole

    def take(self, content: Any, clients: frozenset[int]) -> tuple[list[ClientLine], Refused]:
        lines = unpack_lines(content, clients)
        sums = unpack_sums(content, {"update": self.shapes})["update"]
        said = sum(not line.problem for line in lines)
        for name, part in sums.items():
            # of one client: float32 is off by 2^-25 of a number, and each number is rounded once more
            slack = said * (2.0**-23 * SCALE + part.shape[1])
            if part.min(initial=0) < 0 or part.max(initial=0) > said * SCALE:
                raise Rejected(f"{name}: no probabilities of {said} clients")
            if self.whole and np.abs(part.sum(axis=1) - said * SCALE).max(initial=0) > slack:
                raise Rejected(f"{name}: probabilities of {said} clients that do not add up to {said}")
        return super().take(content, clients)


class _OwnUpdates(ABC):
    """Replies that hold each client's own update: what both ways of using them share."""

    def __init__(self, keys: ServerKeys, wire: Wire, shapes: Shapes, sizes: Mapping[int, int]) -> None:
        self.keys, self.wire, self.shapes, self.sizes = keys, wire, shapes, sizes

    def take(self, content: Any, clients: frozenset[int]) -> tuple[list[ClientLine], Refused]:
        lines = unpack_lines(content, clients)
        sent = [line for line in lines if not line.problem]
        only_updates_of(content, [line.client for line in sent])
        refused: Refused = {}
        for line in sent:  # one bad update does not touch its neighbours
            try:
                check_count(line, self.sizes)
                self.add(line, self.open(content, line.client))
            except ValueError as error:
                refused[line.client] = str(error)
        return lines, refused

    def open(self, content: Any, client: int) -> dict[str, NDArray[np.float32]]:
        update = decompress(unpack_own_update(content, client), self.shapes, self.wire)
        if not all(np.isfinite(array).all() for array in update.values()):
            raise ValueError("its update is not finite")
        return bound_norm(update, self.keys.norm_bound) if self.keys.norm_bound > 0 else update

    @abstractmethod
    def add(self, line: ClientLine, update: Mapping[str, NDArray[np.float32]]) -> None:
        """Take an update that was found right."""


class Streamed(_OwnUpdates):
    """Own updates, each added to the exact sum and forgotten."""

    def __init__(
        self, keys: ServerKeys, wire: Wire, shapes: Shapes, sizes: Mapping[int, int], *, squares: bool = False
    ) -> None:
        super().__init__(keys, wire, shapes, sizes)
        self.squares = squares
        self.sum = ExactSum({**shapes, **(SQUARES_SHAPE if squares else {})})
        self.added: list[ClientLine] = []

    @property
    def lines(self) -> list[ClientLine]:
        return self.added

    @property
    def examples(self) -> int:
        return sum(line.examples for line in self.added)

    def add(self, line: ClientLine, update: Mapping[str, NDArray[np.float32]]) -> None:
        self.sum.add({**update, **(squares_of(update) if self.squares else {})}, line.examples)
        self.added.append(line)

    def update(self) -> dict[str, NDArray[np.float64]]:
        return {name: mean(total, self.examples) for name, total in self.sum.totals.items()}


class Kept(Streamed):
    """Own updates, each added to the exact sum and kept.

    Attributes:
        kept: the updates by client.
    """

    def __init__(
        self, keys: ServerKeys, wire: Wire, shapes: Shapes, sizes: Mapping[int, int], *, squares: bool = False
    ) -> None:
        super().__init__(keys, wire, shapes, sizes, squares=squares)
        self.kept: dict[int, Mapping[str, NDArray[np.float32]]] = {}

    def add(self, line: ClientLine, update: Mapping[str, NDArray[np.float32]]) -> None:
        super().add(line, update)
        self.kept[line.client] = update


class Collected(_OwnUpdates):
    """Own updates, all kept until a robust rule has compared them."""

    def __init__(self, keys: ServerKeys, wire: Wire, shapes: Shapes, sizes: Mapping[int, int]) -> None:
        super().__init__(keys, wire, shapes, sizes)
        self.kept: dict[int, tuple[ClientLine, Mapping[str, NDArray[np.float32]]]] = {}

    @property
    def lines(self) -> list[ClientLine]:
        return [line for line, _ in self.kept.values()]

    @property
    def examples(self) -> int:
        return sum(line.examples for line, _ in self.kept.values())

    def add(self, line: ClientLine, update: Mapping[str, NDArray[np.float32]]) -> None:
        self.kept[line.client] = (line, update)

    def update(self) -> dict[str, NDArray[np.float64]]:
        ordered = [self.kept[client][1] for client in sorted(self.kept)]  # the order of arrival must not matter
        return ROBUST_RULES[self.keys.strategy](ordered, self.keys)
