"""A member's part in secure sums (see `common.secure_sum`): keys, shares, masked words, and what opens the sum.

What it must remember between the stages of a sum lies in a file for its owner's eyes alone,
``FOLDER/RUN/CLIENT/ROUND-WHAT-NONCE.json``, because another process may do the next stage. Secrets are gone from it
with the last stage, or with the member's next sum where it was lost before. Each stage may be asked for again, and gets
the same answer again: nothing is drawn twice, no other words are ever masked with the same masks, and of each peer
either the share of its own mask or that of its masking key is told, never both.
"""

import hashlib
import json
import math
import secrets
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from filelock import FileLock
from numpy.typing import NDArray

from clients.ledger import BUDGET
from clients.worker import ClientRefused, Groups, Worker, reason_of
from common.distributed_noise import distributed_noise
from common.edge import write_private
from common.fixed_point import SCALE, Rows, largest_of
from common.secure_sum import (
    LEAST,
    LIMIT,
    SECRET,
    Layout,
    Question,
    SecureSumError,
    Words,
    add_pair_mask,
    add_stream,
    commitment,
    digest,
    masking_key,
    own_key,
    pair_key,
    public_bytes,
    same,
    seal,
    session_of,
    split,
    threshold_of,
    unseal,
    write_bytes,
)
from common.secure_tail import tail_of
from common.wire import ClientLine, Instruction

State = dict[str, Any]
Answer = Callable[[Instruction], tuple[Groups, list[ClientLine]]]  # of a worker, to a message
FOLDER = "secure-sums"  # in the cache
DAY_SECONDS = 86_400.0


class Member:
    """One client in one secure sum.

    Args:
        folder: of all members' files.
        share: `privacy.secure-threshold`.
    """

    def __init__(self, folder: Path, instruction: Instruction, question: Question, client: int, share: float) -> None:
        self.client, self.question, self.share = client, question, share
        self.session = session_of(instruction.run, instruction.round, question.what, question.nonce)
        self.round = instruction.round
        self.folder = folder / instruction.run / str(client)
        self.path = self.folder / f"{instruction.round:05d}-{question.what}-{question.nonce}.json"

    def keys(self) -> list[str]:
        """The public keys, for letters and for masks."""
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with self._locked():
            if not self.path.is_file():
                self._forget_earlier()
                drawn = {"seed": SECRET, "secret": SECRET, "channel": 32}
                self._save({name: secrets.token_hex(size) for name, size in drawn.items()})
            return [key.hex() for key in self._public(self._state())]

    def letters(self) -> dict[str, Any]:
        """Shares of both secrets for each of the others, sealed, and the commitment to the secret b.

        Raises:
            ClientRefused: these are too few members, a threshold too low, or not those that it has sent shares to.
        """
        with self._locked():
            state, keys = self._state(), self.question.keys
            told = {str(member): [key.hex() for key in pair] for member, pair in sorted(keys.items())}
            if "members" not in state:
                self._check_members(state)
                self._save(
                    state := state | {"members": told, "threshold": self.question.threshold} | self._share(state)
                )
            elif state["members"] != told or state["threshold"] != self.question.threshold:
                raise ClientRefused("secure sum: its shares have gone to others")
            return {"commitment": state["commitment"], "letters": state["sent"]}

    def mask(self, words: Words) -> Words:
        """The words under all their masks; they are changed in place.

        Raises:
            ClientRefused: it has masked other words before, or for other members.
        """
        with self._locked():
            state, letters = self._state(), self.question.letters.get(self.client, {})
            keys = self._keys(state)
            members = sorted({self.client, *letters})
            if not set(members) <= set(keys) or len(members) < state["threshold"]:
                raise ClientRefused("secure sum: too few members")
            limit = LIMIT // len(members)
            if largest_of(words.view(np.int64)) >= limit:
                raise ClientRefused("its numbers are too large for a sum of so many")
            found = digest(words, members)
            if state.setdefault("masked", found) != found:  # their difference would be no secret any more
                raise ClientRefused("secure sum: it has masked another update with these keys")
            if "shares" not in state:
                state |= {"shares": self._open(state, letters), "together": members}
                self._save(state)
            key = masking_key(bytes.fromhex(state["seed"]), self.session)
            add_stream(words, own_key(bytes.fromhex(state["secret"]), self.session, self.client))
            for peer in members:
                if peer != self.client:
                    agreed = pair_key(key, keys[peer][1], self.session, "mask", (self.client, peer))
                    add_pair_mask(words, agreed, self.client, peer)
            return words

    @property
    def has_masked(self) -> bool:
        """Whether words were masked in this sum; see `mask`."""
        with self._locked():
            return self.path.is_file() and "masked" in self._state()

    def noised(self, sums: Mapping[str, NDArray[np.int64]], deviation: float) -> dict[str, NDArray[np.int64]]:
        """A clipped update with this client's part of noise of a deviation.

        The key of the noise is kept as long as those of the masks: asked again, it sends the same words.

        Raises:
            ClientRefused: the deviation is none.
        """
        if not deviation:
            raise ClientRefused("secure sum: it is to add noise, and is not told how much")
        with self._locked():
            state = self._state()
            if "noise" not in state:
                self._save(state := state | {"noise": secrets.token_hex(32)})
        # a member knows its own part: the others' must be enough without it
        sigma, others, found = deviation * SCALE, state["threshold"] - 1, {}
        for name, part in sums.items():
            key = hashlib.sha256(bytes.fromhex(state["noise"]) + name.encode()).digest()
            found[name] = part + distributed_noise(part.shape, sigma, others, key)
        return found

    def reveal(self) -> dict[str, Any]:
        """A share of each survivor's own mask, and one of the masking key of each member that was lost.

        Raises:
            ClientRefused: it has answered for other survivors, they are too few, or it is not one of them.
        """
        with self._locked():
            state, survivors = self._state(), list(self.question.survivors)
            if "answer" not in state:
                if "masked" not in state or self.client not in survivors or len(survivors) < state["threshold"]:
                    raise ClientRefused("secure sum: too few members, or it is none of them")
                if not set(survivors) <= set(state["together"]):
                    raise ClientRefused("secure sum: others than those that it has masked its words for")
                own, key = {}, {}
                for peer, (secret, seed) in state["shares"].items():
                    if int(peer) in survivors:
                        own[peer] = secret
                    else:
                        key[peer] = seed
                state = {"survivors": survivors, "answer": {"own": own, "key": key}}
                self._save(state)  # nothing else is left of the sum
            if state["survivors"] != survivors:  # it would tell both shares of a peer
                raise ClientRefused("secure sum: it has answered for other members")
            answer: dict[str, Any] = state["answer"]
            return answer

    # --- parts ----------------------------------------------------------------------------------

    def _check_members(self, state: State) -> None:
        keys, threshold = self.question.keys, self.question.threshold
        if self.client not in keys or not all(map(same, keys[self.client], self._public(state))):
            raise ClientRefused("secure sum: it is not among the members with its keys")
        if len(keys) < LEAST or not threshold_of(self.share, len(keys)) <= threshold <= len(keys):
            raise ClientRefused(f"secure sum: {len(keys)} members and a threshold of {threshold}")
        if len({key for pair in keys.values() for key in pair}) < 2 * len(keys):
            raise ClientRefused("secure sum: two members with one key")

    def _share(self, state: State) -> State:
        """What becomes of the secrets: a letter to each peer, and the shares that stay here."""
        secret, seed, members = bytes.fromhex(state["secret"]), bytes.fromhex(state["seed"]), list(self.question.keys)
        of_secret, of_seed = (split(one, self.question.threshold, members) for one in (secret, seed))
        sent = {
            peer: seal(
                self._channel(state, peer, pair[0]), (of_secret[peer], of_seed[peer]), self.session, self.client, peer
            )
            for peer, pair in self.question.keys.items()
            if peer != self.client
        }
        return {
            "sent": write_bytes(sent),
            "own": [of_secret[self.client].hex(), of_seed[self.client].hex()],
            "commitment": commitment(secret, self.session, self.client).hex(),
        }

    def _open(self, state: State, letters: Mapping[int, bytes]) -> dict[str, list[str]]:
        """The shares by member; a letter that does not open is one share less."""
        keys, found = self._keys(state), {str(self.client): list(state["own"])}
        for sender, letter in letters.items():
            try:
                channel = self._channel(state, sender, keys[sender][0])
                shares = unseal(channel, letter, self.session, sender, self.client)
            except SecureSumError:
                continue
            found[str(sender)] = [share.hex() for share in shares]
        return found

    def _channel(self, state: State, peer: int, public: bytes) -> bytes:
        key = X25519PrivateKey.from_private_bytes(bytes.fromhex(state["channel"]))
        return pair_key(key, public, self.session, "letters", (self.client, peer))

    def _public(self, state: State) -> tuple[bytes, bytes]:
        channel = X25519PrivateKey.from_private_bytes(bytes.fromhex(state["channel"]))
        return public_bytes(channel), public_bytes(masking_key(bytes.fromhex(state["seed"]), self.session))

    def _keys(self, state: State) -> dict[int, tuple[bytes, bytes]]:
        if "members" not in state:
            raise ClientRefused("secure sum: it has sent no shares")
        return {
            int(peer): (bytes.fromhex(one), bytes.fromhex(other)) for peer, (one, other) in state["members"].items()
        }

    # --- the file -------------------------------------------------------------------------------

    @contextmanager
    def _locked(self) -> Iterator[None]:
        if not self.folder.is_dir():
            raise ClientRefused("secure sum: its keys are not here")
        with FileLock(self.folder / ".lock", mode=0o600):
            yield

    def _state(self) -> State:
        try:
            found: State = json.loads(self.path.read_bytes())
        except FileNotFoundError:
            raise ClientRefused("secure sum: its keys are not here") from None
        return found

    def _save(self, state: State) -> None:
        draft = self.path.with_suffix(".draft")
        draft.unlink(missing_ok=True)  # of a process that was killed: we hold the lock
        write_private(draft, json.dumps(state).encode())
        draft.replace(self.path)

    def _forget_earlier(self) -> None:
        """Files of sums that are over, and those that runs of other days have left."""
        for path in self.folder.parent.parent.glob(f"*/{self.client}/*-*-*"):
            if path.stat().st_mtime < time.time() - DAY_SECONDS:
                path.unlink(missing_ok=True)
        for path in self.folder.glob("*-*-*"):
            if int(path.name.partition("-")[0]) <= self.round:
                path.unlink(missing_ok=True)


def members_of(folder: Path, instruction: Instruction, share: float) -> Iterator[Member]:
    """The clients that a message asks; raises `SecureSumError` when it asks nothing that is about a secure sum."""
    question = Question.read(instruction.secure)
    return (Member(folder, instruction, question, client, share) for client in instruction.clients)


def say(members: Iterator[Member], work: Callable[[Member], Any]) -> tuple[dict[int, Any], list[ClientLine]]:
    """What each member says in a stage, and a line for each; whoever cannot answer says why."""
    told, lines = {}, []
    for member in members:
        try:
            told[member.client] = work(member)
            lines.append(ClientLine(member.client, 0, 0.0))
        except Exception as error:  # the others go on
            lines.append(_problem(member.client, error))
    return told, lines


def masked_sum(worker: Worker, what: str, instruction: Instruction, answer: Answer) -> tuple[Groups, list[ClientLine]]:
    """The sum of the clients' masked words, in place of what a worker would send for them.

    Lines tell nothing of a client but that its words are in the sum; the rest is in the words.

    Args:
        what: the kind of sum that the message asks for.
        answer: what the worker sends; it is asked for one client at a time.
    """
    members = list(members_of(worker.cache / FOLDER, instruction, worker.config.privacy.secure_threshold))
    if members[0].question.what != what:
        raise ClientRefused(f"secure sum: of another kind than {what}")
    hidden = what == "train" and worker.config.privacy.distributed_noise  # no number of a client goes without noise
    total: Words | None = None
    lines: list[ClientLine] = []
    seconds = 0.0
    for member, base in zip(members, instruction.feedback, strict=True):
        if what == "train" and worker.config.privacy.unit == "example" and member.has_masked:
            # other lots and other noise would be other words, and would be spent for nothing
            problem = "secure sum: its update of this round was masked, and cannot be made again"
            lines.append(ClientLine(member.client, 0, 0.0, problem=problem))
            continue
        groups, (line,) = answer(replace(instruction, clients=(member.client,), feedback=(base,)))
        seconds += line.seconds
        if line.problem:
            # a budget that is spent is told of in figures, and they depend on how many examples there are
            problem = BUDGET if line.problem.startswith(BUDGET) else line.problem
            lines.append(ClientLine(member.client, 0, 0.0, problem=problem))
            continue
        try:
            arrays = dense(groups, worker.shapes)
            if hidden:
                arrays = member.noised(arrays, instruction.noise)
            arrays["tail/numbers"] = tail_of(ClientLine(member.client, 0, 0.0) if hidden else line)
            words = member.mask(Layout({name: array.shape for name, array in arrays.items()}).join(arrays))
        except Exception as error:
            lines.append(_problem(member.client, error))
            continue
        total = words if total is None else np.add(total, words, out=total)
        spent = _coarse(line.epsilon), _coarse(line.lifetime_epsilon)
        lines.append(ClientLine(member.client, 0, 0.0, epsilon=spent[0], lifetime_epsilon=spent[1]))
    # how long a client takes tells how much it has
    lines = [replace(line, seconds=seconds / len(lines)) for line in lines]
    return {} if total is None else {"update": {"masked": total.view(np.int64)}}, lines


def _coarse(epsilon: float | None) -> float | None:
    """The next tenth: an epsilon to the last digit tells how many examples there are."""
    return None if epsilon is None else math.ceil(10.0 * epsilon) / 10.0


def dense(groups: Groups, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, NDArray[np.int64]]:
    """All arrays by ``GROUP/NAME``, whole: which rows an update has would tell which words a client uses."""
    return {
        f"{group}/{name}": array.dense(shapes[name]) if isinstance(array, Rows) else array
        for group, arrays in groups.items()
        for name, array in arrays.items()
    }


def _problem(client: int, error: Exception) -> ClientLine:
    return ClientLine(client, 0, 0.0, problem=str(error) if isinstance(error, SecureSumError) else reason_of(error))
