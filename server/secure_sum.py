"""The server's part in secure sums (see `common.secure_sum`): it passes keys and letters on, adds masked words up.

It opens the sum of those who are there at the end. A member may be lost at any stage; with too few the round fails.

The server is taken to be curious and to keep to the protocol. One that makes members up could open a client's own
words: public keys are the clients' word, passed on by the server, and nobody else vouches for them.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from secrets import token_hex
from typing import Any

import numpy as np
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from numpy.typing import NDArray

from common.config import Config
from common.errors import RunFailed
from common.fixed_point import largest_of
from common.secure_sum import (
    LEAST,
    LETTER,
    LIMIT,
    SECRET,
    Layout,
    Question,
    SecureSumError,
    Words,
    add_pair_mask,
    add_stream,
    combine,
    commitment,
    masking_key,
    own_key,
    pair_key,
    public_bytes,
    read_bytes,
    read_json,
    same,
    session_of,
    threshold_of,
    unhex,
)
from common.secure_tail import TAIL, read_tail
from common.wire import LOSSES, ClientLine, unpack_lines, unpack_sums, unpack_told
from server.aggregation import Rejected
from server.exchange import Exchange, no_question
from server.intake import Refused
from server.phase import Phase

Count = Callable[[Phase], None]  # told of each stage that is over


def layout_of(shapes: Mapping[str, Mapping[str, tuple[int, ...]]]) -> Layout:
    """Of sums by group and name, and of what clients tell of themselves behind them."""
    named = {f"{group}/{name}": shape for group, arrays in shapes.items() for name, shape in arrays.items()}
    return Layout({**named, **TAIL})


class MaskedWords:
    """Takes replies that hold masked sums: adds them up modulo 2^64.

    Attributes:
        total: the words so far.
        lines: of the clients whose words they are.
    """

    def __init__(self, layout: Layout) -> None:
        self.layout, self.total = layout, np.zeros(layout.length, dtype=np.uint64)
        self.lines: list[ClientLine] = []

    def take(self, content: Any, clients: frozenset[int]) -> tuple[list[ClientLine], Refused]:
        lines = unpack_lines(content, clients)
        for line in lines:
            if line.examples or any(getattr(line, name) is not None for name in (*LOSSES, "score")):
                raise Rejected(f"client {line.client} tells more of itself than its masked words")
        if all(line.problem for line in lines):
            unpack_sums(content, {})
        else:
            words = unpack_sums(content, {"update": {"masked": (self.layout.length,)}})["update"]["masked"]
            np.add(self.total, words.view(np.uint64), out=self.total)
            self.lines += [line for line in lines if not line.problem]
        return lines, {}


@dataclass(frozen=True)
class Opened:
    """What a secure sum was of.

    Attributes:
        arrays: the sums, by ``GROUP/NAME``.
        lines: of the clients in it; they say nothing of their examples.
        examples, losses, spread: totals; see `common.secure_tail`.
    """

    arrays: Mapping[str, NDArray[np.int64]]
    lines: list[ClientLine]
    examples: int
    losses: dict[str, float]
    spread: dict[str, float]

    def group(self, name: str) -> dict[str, NDArray[np.int64]]:
        """The sums of a group by their own names."""
        return {key.partition("/")[2]: array for key, array in self.arrays.items() if key.startswith(f"{name}/")}


class SecureSum:
    """One sum after the other, each with keys of its own.

    Args:
        count: told of each stage but the one in which masked words travel, which is the caller's.
    """

    def __init__(self, exchange: Exchange, config: Config, count: Count) -> None:
        self.exchange, self.share, self.timeout = exchange, config.privacy.secure_threshold, config.server.round_timeout
        self.count = count
        self.question = Question("", "", 1)
        self.round, self.session, self.cohort = 0, "", 0
        self.keys: dict[int, tuple[bytes, bytes]] = {}  # public: for letters, for masks
        self.sharers: tuple[int, ...] = ()  # who has a share of each secret
        self.members: tuple[int, ...] = ()  # of these, whose shares are with the others
        self.letters: dict[int, dict[int, bytes]] = {}  # by sender, then by receiver
        self.commitments: dict[int, bytes] = {}

    def begin(self, what: str, number: int, clients: Sequence[int], grid: Any) -> tuple[int, ...]:
        """Keys and shares; returns the clients that are ready to mask their words.

        Raises:
            RunFailed: too few are left.
        """
        if len(clients) < LEAST:
            raise RunFailed(
                f"round {number} {what}: a sum of {len(clients)} clients hides nobody; "
                f"privacy.secure-aggregation needs {LEAST}"
            )
        self.round, self.cohort = number, len(clients)
        self.question = Question(what, token_hex(8), threshold_of(self.share, len(clients)))
        self.session = session_of(self.exchange.run, number, what, self.question.nonce)
        self.keys, self.letters, self.commitments, self.exchange.seats = {}, {}, {}, {}

        def take_keys(client: int, said: Any) -> None:
            if not isinstance(said, list) or len(said) != 2:
                raise SecureSumError("not two keys")
            self.keys[client] = unhex(said[0], 32), unhex(said[1], 32)

        self.sharers = with_keys = self._stage("query.keys", clients, grid, take_keys)
        self.question = replace(self.question, keys={client: self.keys[client] for client in with_keys})

        def take_letters(client: int, said: Any) -> None:
            letters = read_bytes(_part(said, "letters"), LETTER)
            if set(letters) != set(with_keys) - {client}:
                raise SecureSumError("not a letter to each of the others")
            self.letters[client], self.commitments[client] = letters, unhex(_part(said, "commitment"), 32)

        self.members = self._stage("query.shares", with_keys, grid, take_letters)
        self.exchange.secure = self._question_with_letters
        return self.members

    def open(self, words: MaskedWords, accepted: set[int], grid: Any) -> Opened:
        """Take the masks off the sum of the accepted clients' words.

        Raises:
            RunFailed: too few are left, or what they say does not open the sum.
        """
        survivors = self._enough("query.mask", accepted)
        lost = sorted(set(self.members) - set(survivors))
        self.question = replace(self.question, keys={}, survivors=survivors)
        found: dict[int, dict[str, dict[int, bytes]]] = {}  # shares by who tells them, kind and whose they are

        def take_shares(client: int, said: Any) -> None:
            own, key = (read_bytes(_part(said, kind), SECRET) for kind in ("own", "key"))
            if not (set(own) <= set(survivors) and set(key) <= set(lost)):
                raise SecureSumError("shares of others than were asked for")
            found[client] = {"own": own, "key": key}

        try:
            tellers = self._stage("query.unmask", survivors, grid, take_shares)
            shares = [(client, found[client]) for client in tellers]
            for client in survivors:
                told = {teller: said["own"][client] for teller, said in shares if client in said["own"]}
                secret = self._secret(client, told, self.commitments[client], commitment)
                add_stream(words.total, own_key(secret, self.session, client), minus=True)
            for client in lost:
                told = {teller: said["key"][client] for teller, said in shares if client in said["key"]}
                seed = self._secret(client, told, self.keys[client][1], _public)
                self._take_away(words.total, client, masking_key(seed, self.session), survivors)
        finally:
            self.exchange.secure, self.exchange.seats = no_question, {}
        return self._read(words, survivors)

    # --- parts ----------------------------------------------------------------------------------

    def _stage(self, kind: str, clients: Sequence[int], grid: Any, note: Callable[[int, Any], None]) -> tuple[int, ...]:
        """Ask the clients; who has answered."""
        text = self.question.text()
        self.exchange.secure = lambda chosen: text

        def take(content: Any, asked: frozenset[int]) -> tuple[list[ClientLine], Refused]:
            lines = unpack_lines(content, asked)
            told = read_json(unpack_told(content))
            answered = {str(line.client) for line in lines if not line.problem}
            if set(told) != answered:
                raise SecureSumError("not one answer for each client")
            for client in answered:
                note(int(client), told[client])
            return lines, {}

        messages = self.exchange.open(kind, self.round, clients, grid=grid, arrays={}, info="")
        phase = self.exchange.collect(grid, grid.send_and_receive(messages, timeout=self.timeout), take)
        self.count(phase)
        for client in phase.accepted:  # what it must remember may be there alone
            self.exchange.seats.setdefault(client, phase.tried[client][-1])
        return self._enough(kind, phase.accepted)

    def _enough(self, kind: str, clients: set[int]) -> tuple[int, ...]:
        if len(clients) < self.question.threshold:
            raise RunFailed(
                f"round {self.round} {self.question.what}: {len(clients)} of {self.cohort} clients are left after "
                f"{kind.removeprefix('query.')!r} of the secure sum; privacy.secure-threshold = {self.share} needs "
                f"{self.question.threshold}"
            )
        return tuple(sorted(clients))

    def _question_with_letters(self, clients: Sequence[int]) -> str:
        """To clients that are to mask their words: what the members have sealed for them."""
        letters = {
            client: {sender: self.letters[sender][client] for sender in self.members if sender != client}
            for client in clients
        }
        return replace(self.question, keys={}, letters=letters).text()

    def _secret(
        self, member: int, shares: Mapping[int, bytes], known: bytes, shown: Callable[[bytes, str, int], bytes]
    ) -> bytes:
        """A member's secret; ``known`` is what ``shown`` makes of the right one. A wrong share does not stop it."""
        tellers, need, of = sorted(shares), self.question.threshold, self.sharers
        for start in range(len(tellers) if len(tellers) >= need else 0):
            some = (tellers[start:] + tellers[:start])[:need]
            secret = combine({teller: shares[teller] for teller in some}, of)
            if same(shown(secret, self.session, member), known):
                return secret
        raise RunFailed(
            f"round {self.round} {self.question.what}: the {len(tellers)} shares of client {member} do not open its "
            f"masks; {need} right ones are needed"
        )

    def _take_away(self, total: Words, lost: int, key: X25519PrivateKey, survivors: Sequence[int]) -> None:
        """The masks that the others have with a member whose words are not in the sum."""
        for client in survivors:
            agreed = pair_key(key, self.keys[client][1], self.session, "mask", (client, lost))
            add_pair_mask(total, agreed, client, lost, away=True)

    def _read(self, words: MaskedWords, survivors: Sequence[int]) -> Opened:
        arrays = words.layout.cut(words.total)
        tail = read_tail(arrays["tail/numbers"])
        largest = max(largest_of(array) for array in arrays.values())
        if tail["clients"] != len(survivors) or tail["examples"] < 0 or largest >= LIMIT:
            raise RunFailed(
                f"round {self.round} {self.question.what}: the sum of {len(survivors)} clients does not open; one of "
                "them has not kept to the protocol"
            )
        lines = sorted(words.lines, key=lambda line: line.client)
        return Opened(arrays, lines, tail["examples"], tail["losses"], tail["spread"])


def _public(seed: bytes, session: str, member: int) -> bytes:
    return public_bytes(masking_key(seed, session))


def _part(said: Any, name: str) -> Any:
    if not isinstance(said, dict) or name not in said:
        raise SecureSumError(f"no {name}")
    return said[name]
