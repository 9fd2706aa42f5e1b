"""Tiers: the sizes of student in a federation of unequal devices, and which client holds which.

A smaller student is a beginning of the whole one: its first layers, and the first, most important, heads and neurons of
each (HeteroFL, Diao et al. 2021, https://arxiv.org/abs/2010.01264). `common.nested` has the models.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from common.seeding import generator

ONE = r"\s*(\d+)\s*/\s*(\d+)\s*/\s*(\d+)\s*(?:@\s*([0-9.]+)\s*)?"


@dataclass(frozen=True)
class Size:
    """A student inside the whole one, or as large as that.

    Attributes:
        layers, heads, neurons: how many; of heads and neurons 0 means as many as the whole student has.
        share: of the clients that hold it; 0 where a list says who they are.
    """

    layers: int
    heads: int
    neurons: int
    share: float


def read_sizes(text: str, whole: tuple[int, int, int], *, drawn: bool = True) -> tuple[Size, ...]:
    """The sizes in a text such as ``2/4/256@0.5,4/6/512@0.3``, smallest first.

    Args:
        whole: the whole student's layers, heads and neurons; 0 means all.
        drawn: whether clients are drawn by the shares; else there are none to give.

    Raises:
        ValueError: the text is another, a size does not fit into the next, or nobody is left to hold the whole.
    """
    found: list[Size] = []
    for part in text.split(",") if text.strip() else ():
        fit = re.fullmatch(ONE, part)
        share = fit[4] or "" if fit else ""
        if not fit or share.count(".") > 1 or share == "." or int(fit[1]) < 1 or drawn != bool(share):
            right = "@SHARE, e.g. 2/4/256@0.5" if drawn else " alone: student.tier-of says who holds it"
            raise ValueError(f"{part.strip()!r}: give LAYERS/HEADS/NEURONS{right}")
        found.append(Size(int(fit[1]), int(fit[2]), int(fit[3]), float(share or 0)))
    wholes = tuple(count or np.inf for count in whole)
    rows = [(size.layers, size.heads or wholes[1], size.neurons or wholes[2]) for size in found]
    for small, large in pairwise([*rows, wholes]):
        if any(a > b for a, b in zip(small, large, strict=True)):
            raise ValueError(f"{_said(small)} does not fit into {_said(large)}; give the smallest first")
    shares = [size.share for size in found]
    if drawn and not (all(0.0 < share < 1.0 for share in shares) and sum(shares) < 1.0):
        raise ValueError(
            f"the shares {', '.join(map(str, shares))} leave no client for the whole student; give shares above 0 "
            "that add up to less than 1"
        )
    return tuple(found)


def read_holders(text: str, tiers: int) -> tuple[int, ...]:
    """The tiers in a text such as ``1,1,3``, a client after the other, 0 the smallest; none where it is empty.

    Args:
        tiers: how many there are.

    Raises:
        ValueError: an entry is no tier.
    """
    parts = [part.strip() for part in text.split(",")] if text.strip() else []
    for part in parts:
        if not (part.isascii() and part.isdecimal() and 1 <= int(part) <= tiers):
            raise ValueError(f"{part!r}: give a number from 1, the smallest, to {tiers}, the whole student")
    return tuple(int(part) - 1 for part in parts)


def assign_tiers(seed: int, clients: int, sizes: Sequence[Size], holders: Sequence[int] = ()) -> NDArray[np.int64]:
    """(clients,) the tier that each client holds, 0 the smallest; the whole student is ``len(sizes)``.

    A pure function: server and workers agree without a word. Shares are met as far as whole clients allow.

    Args:
        holders: the tier of each client, where that is known; none: they are drawn.
    """
    if holders:
        return np.asarray(holders, dtype=np.int64)
    order = generator(seed, "tiers").permutation(clients)
    ends = np.rint(np.cumsum([size.share for size in sizes]) * clients).astype(np.int64)
    found = np.empty(clients, dtype=np.int64)
    found[order] = np.searchsorted(ends, np.arange(clients), side="right")
    return found


def group_name(name: str, tier: int, tiers: int) -> str:
    """Name of a tier's group of arrays in a message; a run without tiers needs no number."""
    return name if tiers == 1 else f"{name}-tier-{tier}"


def _said(size: tuple[float, ...]) -> str:
    return "/".join("all" if count == np.inf else str(int(count)) for count in size)
