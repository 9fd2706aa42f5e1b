"""Every random choice is drawn from (seed, purpose, round, client): nothing depends on who asks first."""

import hashlib

import numpy as np


def seed_for(seed: int, *purpose: str | int) -> int:
    """A 64-bit seed for one purpose, e.g. ``seed_for(seed, "batches", round, client)``.

    The parts are hashed with BLAKE2b, so neighbouring rounds or clients share no structure and the
    result is the same on every machine and Python process.
    """
    text = "\x1f".join([str(int(seed)), *(f"{type(part).__name__}:{part}" for part in purpose)])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def generator(seed: int, *purpose: str | int) -> np.random.Generator:
    """A NumPy generator for one purpose; see `seed_for`."""
    return np.random.Generator(np.random.PCG64(seed_for(seed, *purpose)))
