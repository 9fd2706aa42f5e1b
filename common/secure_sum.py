"""Sums that open only as a whole: the arithmetic and the keys of secure aggregation.

Bonawitz et al. 2017, "Practical Secure Aggregation for Privacy-Preserving Machine Learning"
(https://eprint.iacr.org/2017/281), with double masking. Member i's vector x_i of 64-bit words travels as

    y_i = x_i + PRG(b_i) + sum over j > i of PRG(s_ij) - sum over j < i of PRG(s_ij)    (mod 2^64)

s_ij is agreed on by i and j alone (X25519), b_i is i's own. In the sum over all members the s_ij cancel; b_i, and the
key behind the s_ij of a member that was lost, are put together from Shamir shares that any `threshold` members hold.
Addition modulo 2^64 is exact, so the opened sum has the bits of the plain one.

X25519 (RFC 7748), HKDF-SHA-256 (RFC 5869), ChaCha20 and ChaCha20-Poly1305 (RFC 8439) are those of `cryptography`;
secret sharing over GF(2^128) is that of `pycryptodome`.
"""

import hashlib
import hmac
import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from Crypto.Protocol.SecretSharing import Shamir
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from cryptography.hazmat.primitives.ciphers.algorithms import ChaCha20
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from numpy.typing import NDArray

Words = NDArray[np.uint64]

SECRET = 16  # bytes of a secret that is shared: an element of GF(2^128)
NONCE = 12
LETTER = NONCE + 2 * SECRET + 16  # bytes: a nonce, two shares, a tag
BLOCK = 1 << 18  # bytes of a mask at a time: it stays in the cache
LEAST = 3  # members: of a sum of two each knows what the other has added
LIMIT = 2**62  # no sum of words may reach it
MAX_TEXT = 2**26  # characters of a question or an answer
_ZEROS = bytes(BLOCK)
_HEX = re.compile("(?:[0-9a-f]{2})*")


class SecureSumError(ValueError):
    """What arrived does not fit the protocol; the message tells no secret."""


def threshold_of(share: float, members: int) -> int:
    """How many of the members must stay: that share of them, and always more than half.

    With more than half, no server can learn both of a member's secrets by telling some that it is lost and others that
    it is not, as long as each gives one of the two at most.
    """
    return max(math.ceil(round(share * members, 6)), members // 2 + 1)


def session_of(run: str, round_number: int, what: str, nonce: str) -> str:
    """What every key and letter is bound to: one sum of one round of one run, tried once."""
    return f"fedistill/{run}/{round_number}/{what}/{nonce}"


# --- keys ---------------------------------------------------------------------------------------


def masking_key(seed: bytes, session: str) -> X25519PrivateKey:
    """The private key that a member agrees on masks with; who has its 16-byte seed has it."""
    return X25519PrivateKey.from_private_bytes(_derive(seed, session, "masking key"))


def public_bytes(key: X25519PrivateKey) -> bytes:
    return key.public_key().public_bytes_raw()


def pair_key(private: X25519PrivateKey, public: bytes, session: str, purpose: str, pair: tuple[int, int]) -> bytes:
    """The 32-byte key of a pair of members, the same for both.

    Raises:
        SecureSumError: the public key is none, or one with which anybody would know the secret.
    """
    try:
        agreed = private.exchange(X25519PublicKey.from_public_bytes(public))
    except ValueError:
        raise SecureSumError("a member's public key is not one") from None
    return _derive(agreed, session, purpose, *sorted(pair))


def own_key(secret: bytes, session: str, member: int) -> bytes:
    """The key of a member's own mask, from its secret b."""
    return _derive(secret, session, "own mask", member)


def commitment(secret: bytes, session: str, member: int) -> bytes:
    """By which a wrong share of a member's secret b is noticed; tells nothing of the secret."""
    return _derive(secret, session, "commitment", member)


def _derive(secret: bytes, session: str, *purpose: object) -> bytes:
    told = json.dumps([session, *purpose]).encode()
    return HKDF(SHA256(), 32, salt=None, info=told).derive(secret)


# --- masks --------------------------------------------------------------------------------------


def add_stream(total: Words, key: bytes, *, minus: bool = False) -> None:
    """total +- PRG(key), modulo 2^64 and in place; the stream is ChaCha20's, as little-endian words.

    A key serves one stream: the nonce is zero.
    """
    stream = Cipher(ChaCha20(key, bytes(16)), None).encryptor()
    out = bytearray(BLOCK)
    step = np.subtract if minus else np.add
    for start in range(0, len(total), BLOCK // 8):
        part = total[start : start + BLOCK // 8]
        stream.update_into(_ZEROS[: 8 * len(part)], out)
        step(part, np.frombuffer(out, dtype="<u8", count=len(part)), out=part)


def add_pair_mask(total: Words, key: bytes, member: int, peer: int, *, away: bool = False) -> None:
    """Put the mask that a member has with a peer on its words, or take it away again."""
    add_stream(total, key, minus=(member > peer) != away)


# --- shares -------------------------------------------------------------------------------------


def split(secret: bytes, threshold: int, members: Sequence[int]) -> dict[int, bytes]:
    """A 16-byte share of a 16-byte secret for each member; any ``threshold`` of them give it back, fewer nothing."""
    shares = Shamir.split(threshold, len(members), secret, ssss=False)
    return {member: share for member, (_, share) in zip(sorted(members), shares, strict=True)}


def combine(shares: Mapping[int, bytes], members: Sequence[int]) -> bytes:
    """The secret behind some members' shares, as many as the threshold; from wrong shares another one comes."""
    place = {member: number for number, member in enumerate(sorted(members), start=1)}
    return bytes(Shamir.combine([(place[member], share) for member, share in shares.items()], ssss=False))


def seal(key: bytes, shares: tuple[bytes, bytes], session: str, sender: int, receiver: int) -> bytes:
    """The letter with a member's two shares, of its secret b and of its masking key's seed, for one peer."""
    nonce = os.urandom(NONCE)
    return nonce + ChaCha20Poly1305(key).encrypt(nonce, b"".join(shares), _address(session, sender, receiver))


def unseal(key: bytes, letter: bytes, session: str, sender: int, receiver: int) -> tuple[bytes, bytes]:
    """Raises `SecureSumError` when the letter is not this sender's to this receiver."""
    try:
        told = ChaCha20Poly1305(key).decrypt(letter[:NONCE], letter[NONCE:], _address(session, sender, receiver))
    except (InvalidTag, ValueError):
        raise SecureSumError("a letter does not open") from None
    return told[:SECRET], told[SECRET:]


def _address(session: str, sender: int, receiver: int) -> bytes:
    return json.dumps([session, sender, receiver]).encode()


def same(one: bytes, other: bytes) -> bool:
    return hmac.compare_digest(one, other)


# --- what is summed -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Layout:
    """Where each array lies in the vector of words.

    Attributes:
        shapes: of the arrays, by ``GROUP/NAME``.
    """

    shapes: Mapping[str, tuple[int, ...]]

    @property
    def length(self) -> int:
        return sum(math.prod(shape) for shape in self.shapes.values())

    def join(self, arrays: Mapping[str, NDArray[np.int64]]) -> Words:
        """The arrays as one new vector."""
        if set(arrays) != set(self.shapes) or any(arrays[name].shape != self.shapes[name] for name in arrays):
            raise SecureSumError("other arrays than those that are to be summed")
        flat = [np.ascontiguousarray(arrays[name], dtype=np.int64).reshape(-1) for name in sorted(self.shapes)]
        return np.concatenate(flat).view(np.uint64)

    def cut(self, words: Words) -> dict[str, NDArray[np.int64]]:
        """The arrays of a vector, in its memory."""
        found, start = {}, 0
        for name in sorted(self.shapes):
            size = math.prod(self.shapes[name])
            found[name] = words[start : start + size].view(np.int64).reshape(self.shapes[name])
            start += size
        return found


# --- what is said -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Question:
    """The part of a message that is about a secure sum.

    Attributes:
        what: the kind of sum: train, evaluate, weigh.
        nonce: of this try, 16 hexadecimal digits.
        threshold: how many must stay.
        keys: public keys of the members, for letters and for masks.
        letters: to each client that is asked, by sender.
        survivors: members whose masked words are in the sum.
    """

    what: str
    nonce: str
    threshold: int
    keys: Mapping[int, tuple[bytes, bytes]] = field(default_factory=dict)
    letters: Mapping[int, Mapping[int, bytes]] = field(default_factory=dict)
    survivors: tuple[int, ...] = ()

    def text(self) -> str:
        told = asdict(self)
        told["keys"] = {str(member): [key.hex() for key in pair] for member, pair in self.keys.items()}
        told["letters"] = {str(to): write_bytes(letters) for to, letters in self.letters.items()}
        return json.dumps(told)

    @classmethod
    def read(cls, text: str) -> "Question":
        """Raises `SecureSumError` for anything that is no question."""
        told = read_json(text)
        try:
            what, nonce, threshold = told["what"], told["nonce"], told["threshold"]
            keys = {_number(member): _pair(pair) for member, pair in told["keys"].items()}
            letters = {_number(to): read_bytes(letters, LETTER) for to, letters in told["letters"].items()}
            survivors = tuple(_number(member) for member in told["survivors"])
        except (KeyError, TypeError, AttributeError):
            raise SecureSumError("secure sum: not a question") from None
        named = isinstance(what, str) and re.fullmatch("[a-z]{1,20}", what)
        if not (named and isinstance(nonce, str) and re.fullmatch("[0-9a-f]{16}", nonce)):
            raise SecureSumError("secure sum: a name that is none")
        if type(threshold) is not int or threshold < 1 or list(survivors) != sorted(set(survivors)):
            raise SecureSumError("secure sum: numbers that are none")
        return cls(what, nonce, threshold, keys, letters, survivors)


def read_json(text: str) -> dict[str, Any]:
    """Raises `SecureSumError` for anything that is no object, or too long."""
    if len(text) > MAX_TEXT:
        raise SecureSumError("secure sum: too long")
    try:
        told = json.loads(text)
    except (ValueError, RecursionError):
        raise SecureSumError("secure sum: not readable") from None
    if not isinstance(told, dict):
        raise SecureSumError("secure sum: not an object")
    return told


def write_bytes(given: Mapping[int, bytes]) -> dict[str, str]:
    """Bytes by member, as JSON takes them."""
    return {str(member): data.hex() for member, data in given.items()}


def read_bytes(told: Any, size: int) -> dict[int, bytes]:
    """The same back. Raises `SecureSumError` unless all have this size."""
    if not isinstance(told, dict):
        raise SecureSumError("secure sum: no bytes by member")
    return {_number(member): unhex(data, size) for member, data in told.items()}


def unhex(text: Any, size: int) -> bytes:
    """Raises `SecureSumError` unless it is so many bytes in hexadecimal digits."""
    if not isinstance(text, str) or len(text) != 2 * size or not _HEX.fullmatch(text):
        raise SecureSumError(f"secure sum: not {size} bytes")
    return bytes.fromhex(text)


def _number(told: Any) -> int:
    if isinstance(told, str) and re.fullmatch(r"0|[1-9]\d{0,8}", told):
        return int(told)
    if type(told) is int and 0 <= told < 10**9:
        return told
    raise SecureSumError("secure sum: not a client's number")


def _pair(told: Any) -> tuple[bytes, bytes]:
    if not isinstance(told, list) or len(told) != 2:
        raise SecureSumError("secure sum: not two keys")
    return unhex(told[0], 32), unhex(told[1], 32)


def digest(words: Words, members: Sequence[int]) -> str:
    """Of what a member has masked, and with whom."""
    found = hashlib.sha256(json.dumps(sorted(members)).encode())
    found.update(np.ascontiguousarray(words).data)
    return found.hexdigest()
