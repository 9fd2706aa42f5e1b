"""Canaries put into a mechanism itself: what a noised sum of clipped contributions shows of each of them.

The strongest case that the guarantee speaks of (Nasr et al. 2021, https://arxiv.org/abs/2101.04535; white-box
experiments of Steinke, Nasr, Jagielski 2023, https://arxiv.org/abs/2305.08846, section 6): who looks on knows every
contribution but for whether it is there. No model and no data are needed, so thousands of canaries take seconds.

A canary has one entry of its own in every array that has room, all of one size, and the same norm in each array:

    score of a canary = sum over steps of <released, canary> / |canary|

Canaries are orthogonal, so that one is no noise to another. A mechanism that clips arrays one by one lets more of
such a canary through than one that clips their common norm; one that weighs by examples, the more the more examples.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from common.seeding import generator
from simulations.audits.one_run import Finding, judge

Contribution = Mapping[str, NDArray[np.float32]]
Shapes = Mapping[str, tuple[int, ...]]


class Release(Protocol):
    """One step of a mechanism, which draws by itself which of the contributions it takes."""

    def __call__(
        self, contributions: Sequence[Contribution], examples: Sequence[int]
    ) -> Mapping[str, NDArray[np.floating]]:
        """What is released of the contributions, which claim to be made of so many examples each: up to a factor,
        their clipped sum with noise."""


def audit_release(
    release: Release,
    shapes: Shapes,
    *,
    canaries: int,
    delta: float,
    steps: int = 1,
    norm: float = 100.0,
    examples: int = 100,
    seed: int = 0,
    confidence: float = 0.95,
    advance: Callable[[float], None] = lambda amount: None,
) -> Finding:
    """What a mechanism shows of canaries of which each is in by a fair coin.

    Args:
        shapes: of the arrays; those with fewer entries than canaries stay zero.
        steps: the coin holds for all of them.
        norm: of a canary before the mechanism clips it.
        examples: what each claims to be made of.

    Raises:
        ValueError: no array has as many entries as there are canaries.
    """
    rng = generator(seed, "canaries")
    inside = rng.random(canaries) < 0.5
    places = places_of(shapes, canaries, rng)
    entry = np.float32(norm / np.sqrt(len(places)))
    scores = np.zeros(canaries)
    sent = [canary(shapes, places, int(which), entry) for which in np.flatnonzero(inside)]
    for _ in range(steps):
        scores += seen(release(sent, [examples] * len(sent)), places)
        advance(1)
    return judge(scores, inside, delta=delta, confidence=confidence)


def places_of(shapes: Shapes, canaries: int, rng: np.random.Generator) -> dict[str, NDArray[np.int64]]:
    """(canaries,) the entry of each in the flat arrays that have room for all."""
    sizes = {name: int(np.prod(shape)) for name, shape in shapes.items()}
    places = {
        name: rng.choice(size, canaries, replace=False).astype(np.int64)
        for name, size in sizes.items()
        if size >= canaries
    }
    if not places:
        raise ValueError(f"no array has an entry for each of {canaries} canaries; give at most {max(sizes.values())}")
    return places


def canary(shapes: Shapes, places: Mapping[str, NDArray[np.int64]], which: int, entry: np.float32) -> Contribution:
    """The contribution of one canary."""
    found = {name: np.zeros(shape, dtype=np.float32) for name, shape in shapes.items()}
    for name, place in places.items():
        found[name].reshape(-1)[place[which]] = entry
    return found


def seen(released: Mapping[str, NDArray[np.floating]], places: Mapping[str, NDArray[np.int64]]) -> NDArray[np.float64]:
    """(canaries,) the inner product of what was released with each canary's direction."""
    parts = [released[name].reshape(-1)[place].astype(np.float64) for name, place in places.items()]
    return np.asarray(np.sum(parts, axis=0) / np.sqrt(len(parts)))
