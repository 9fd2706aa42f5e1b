"""Masks cancel, shares open with the threshold and not below, nothing hostile is read."""

import json

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from hypothesis import given
from hypothesis import strategies as st

from common.config import from_flat
from common.errors import InputError
from common.secure_sum import (
    BLOCK,
    Layout,
    Question,
    SecureSumError,
    add_pair_mask,
    add_stream,
    combine,
    masking_key,
    pair_key,
    public_bytes,
    seal,
    split,
    threshold_of,
    unseal,
)
from common.secure_tail import NAMES, read_tail, tail_of
from common.wire import ClientLine

SESSION = "fedistill/0123456789abcdef/1/train/0123456789abcdef"


def test_the_stream_is_chacha20():
    """RFC 8439, appendix A.1, test vector 1: key, nonce and counter zero."""
    words = np.zeros(8, dtype=np.uint64)
    add_stream(words, bytes(32))
    assert words.astype("<u8").tobytes().hex() == (
        "76b8e0ada0f13d90405d6ae55386bd28bdd219b8a08ded1aa836efcc8b770dc7"
        "da41597c5157488d7724e03fb8d84a376a43b8f41518a11cc387b669b2ee6586"
    )


def test_a_stream_does_not_depend_on_blocks_and_can_be_taken_away():
    words = np.arange(BLOCK // 4 + 3, dtype=np.uint64)
    before = words.copy()
    add_stream(words, b"k" * 32)
    start = np.zeros(5, dtype=np.uint64)
    add_stream(start, b"k" * 32)
    assert (words[:5] - before[:5] == start).all()
    assert not (words == before).any()
    add_stream(words, b"k" * 32, minus=True)
    assert (words == before).all()


@pytest.mark.parametrize("size", [4, 7, 64])
def test_pair_masks_cancel_in_the_sum_of_all_and_of_nobody_less(size):
    keys = {member: masking_key(bytes([member]) * 16, SESSION) for member in range(size)}
    public = {member: public_bytes(key) for member, key in keys.items()}
    total, part = np.zeros(9, dtype=np.uint64), np.zeros(9, dtype=np.uint64)
    for member, key in keys.items():
        for peer in set(keys) - {member}:
            agreed = pair_key(key, public[peer], SESSION, "mask", (member, peer))
            for words in (total, part) if member else (total,):
                add_pair_mask(words, agreed, member, peer)
    assert not total.any()
    assert part.all()


def test_a_pair_has_a_key_of_its_own_for_each_session_and_purpose():
    one, other, third = (X25519PrivateKey.generate() for _ in range(3))
    mine = pair_key(one, public_bytes(other), SESSION, "mask", (3, 8))
    assert mine == pair_key(other, public_bytes(one), SESSION, "mask", (8, 3))
    others = [
        pair_key(one, public_bytes(other), SESSION + "x", "mask", (3, 8)),
        pair_key(one, public_bytes(other), SESSION, "letters", (3, 8)),
        pair_key(one, public_bytes(other), SESSION, "mask", (3, 9)),
        pair_key(third, public_bytes(other), SESSION, "mask", (3, 8)),
    ]
    assert len({mine, *others}) == 5
    with pytest.raises(SecureSumError, match="public key"):
        pair_key(one, bytes(32), SESSION, "mask", (3, 8))


@given(data=st.data())
def test_as_many_shares_as_the_threshold_open_a_secret_whichever_they_are(data):
    members = data.draw(st.lists(st.integers(0, 10**6), min_size=3, max_size=9, unique=True))
    need = threshold_of(0.66, len(members))
    secret = data.draw(st.binary(min_size=16, max_size=16))
    shares = split(secret, need, members)
    some = data.draw(st.permutations(members))
    assert combine({member: shares[member] for member in some[:need]}, members) == secret
    assert combine({member: shares[member] for member in some[: need - 1]}, members) != secret


@pytest.mark.parametrize(
    ("share", "members", "need"), [(0.66, 4, 3), (0.66, 3, 2), (0.51, 4, 3), (1.0, 5, 5), (0.6, 5, 3)]
)
def test_the_threshold_is_the_share_and_always_more_than_half(share, members, need):
    assert threshold_of(share, members) == need
    assert 2 * need > members


def test_a_letter_opens_for_its_receiver_in_its_session_only():
    key, shares = b"k" * 32, (b"a" * 16, b"b" * 16)
    letter = seal(key, shares, SESSION, 1, 2)
    assert unseal(key, letter, SESSION, 1, 2) == shares
    assert seal(key, shares, SESSION, 1, 2) != letter
    for wrong in ((b"l" * 32, letter, SESSION, 1, 2), (key, letter, SESSION, 2, 1), (key, letter, SESSION + "x", 1, 2)):
        with pytest.raises(SecureSumError, match="does not open"):
            unseal(*wrong)
    with pytest.raises(SecureSumError, match="does not open"):
        unseal(key, letter[:-1] + bytes([letter[-1] ^ 1]), SESSION, 1, 2)


def test_a_vector_is_cut_as_it_was_joined():
    arrays = {"u/b": np.array([[1, -2], [3, -(2**62)]]), "u/a": np.array([7]), "t/n": np.zeros(0, dtype=np.int64)}
    layout = Layout({name: array.shape for name, array in arrays.items()})
    words = layout.join(arrays)
    assert (words.dtype, len(words), layout.length) == (np.uint64, 5, 5)
    assert all(
        (part == arrays[name]).all() and part.shape == arrays[name].shape for name, part in layout.cut(words).items()
    )
    with pytest.raises(SecureSumError, match="other arrays"):
        layout.join({"u/a": np.array([7])})


def test_what_clients_tell_of_themselves_adds_up_to_means():
    lines = [
        ClientLine(0, 3, 1.0, loss=2.0, score=0.5),
        ClientLine(1, 1, 1.0, loss=4.0, score=1.0),
        ClientLine(2, 0, 1.0),
    ]
    found = read_tail(sum(map(tail_of, lines), np.zeros(len(NAMES), dtype=np.int64)))
    assert (found["clients"], found["examples"]) == (3, 4)
    assert found["losses"]["loss"] == 2.5
    assert found["losses"]["soft_loss"] == 0.0
    assert found["spread"] == {"mean": 0.75, "std": 0.25, "clients": 2}


def test_a_question_is_read_as_it_was_written():
    question = Question("train", "0123456789abcdef", 3, {4: (b"a" * 32, b"b" * 32)}, {4: {9: b"c" * 60}}, (1, 4))
    assert Question.read(question.text()) == question


@pytest.mark.parametrize(
    "changed",
    [
        {"what": "../train"}, {"nonce": "0"}, {"threshold": True}, {"survivors": [2, 1]}, {"survivors": [1, 1]},
        {"survivors": ["x"]}, {"keys": {"-1": ["00" * 32] * 2}}, {"keys": {"1": ["00" * 32]}},
        {"keys": {"1": ["0g" * 32] * 2}},
        {"letters": {"1": {"2": "00"}}}, {"letters": []}, {"keys": None},
    ],
)  # fmt: skip
def test_what_is_no_question_is_refused(changed):
    told = json.loads(Question("train", "0123456789abcdef", 3).text())
    with pytest.raises(SecureSumError):
        Question.read(json.dumps({**told, **changed}))
    for text in ("", "[]", "{", "[" * 10_000):
        with pytest.raises(SecureSumError):
            Question.read(text)


@pytest.mark.parametrize(
    ("key", "value", "named"),
    [
        ("server.strategy", "median", "server.strategy = 'median'"), ("server.strategy", "feddf", "'feddf'"),
        ("server.strategy", "fedmd", "'fedmd'"), ("server.strategy", "fedkd", "'fedkd'"),
        ("server.wire", "int8", "server.wire = 'int8'"), ("server.norm-bound", 1.0, "server.norm-bound = 1.0"),
        ("server.packing", "off", "server.packing = 'off'"), ("student.tiers", "1/1/8@0.5", "student.tiers"),
        ("server.cohort", 2, "server.cohort = 2"), ("data.clients", 2, "data.clients = 2"),
        ("client.grow-batch", True, "client.grow-batch"),
    ],
)  # fmt: skip
def test_what_needs_a_clients_own_update_is_refused_by_name(key, value, named):
    given = {"privacy.secure-aggregation": True, "client.lr-decay": "constant", "server.packing": "auto", key: value}
    with pytest.raises(InputError, match=r"privacy\.secure-aggregation = true: ") as refused:
        from_flat(given)
    assert named in str(refused.value)


def test_noise_of_the_clients_needs_a_sum_that_hides_it():
    with pytest.raises(InputError, match=r"privacy\.distributed-noise = true"):
        from_flat({"privacy.distributed-noise": True, "privacy.unit": "client"})
