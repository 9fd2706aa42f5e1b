"""Mixed federations at the server: who holds which student, sums by tier, the mean over those who hold an entry."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from common.config import Config
from common.dataset import FederatedDataset
from common.errors import InputError
from common.families import head_count, neuron_count
from common.fixed_point import SCALE
from common.nested import Tiers
from common.recipe import Recipe, make_recipe, relation_heads
from common.slim import Shape, beginning
from common.tiers import group_name
from common.wire import ClientLine, unpack_lines, unpack_updates
from server.aggregation import Rejected, RunningSum

Refused = dict[int, str]


class TieredSum:
    """Nodes add up by tier: a reply is one sum of integers for each tier of its clients, and a line per client.

    Every entry of the shared arrays gets its own mean, over the examples of those clients that hold it (Diao et al.
    2021, HeteroFL, equation 1, with examples as weights). Integers until the one division at the end: the same bits
    for any order and grouping. What nobody held does not move: its update is 0, and `held` tells a rule with momentum.

    Args:
        tier_of: (clients,) the tier of each client.
        sizes: examples each client is known to have.
    """

    def __init__(self, tiers: Tiers, tier_of: NDArray[np.int64], sizes: Mapping[int, int]) -> None:
        self.tiers, self.tier_of, self.sizes = tiers, tier_of, sizes
        self.totals = [RunningSum.zeros(tier.held) for tier in tiers.tiers]

    @property
    def lines(self) -> list[ClientLine]:
        return [line for total in self.totals for line in total.lines]

    @property
    def examples(self) -> int:
        return sum(total.weight for total in self.totals)

    def take(self, content: Any, clients: frozenset[int]) -> tuple[list[ClientLine], Refused]:
        lines = unpack_lines(content, clients)
        asked = sorted({int(self.tier_of[client]) for client in clients})
        groups = {tier: group_name("update", tier, len(self.tiers)) for tier in asked}
        found = unpack_updates(content, {groups[tier]: self.tiers[tier].held for tier in asked})
        parts = {tier: found[group] for tier, group in groups.items()}
        own = {tier: [line for line in lines if self.tier_of[line.client] == tier] for tier in asked}
        bounds = {tier: self.totals[tier].check(parts[tier], own[tier], self.sizes) for tier in asked}
        self._check_together(bounds)
        for tier in asked:  # all are checked before the first is added: a refused reply leaves no trace
            self.totals[tier].add(parts[tier], own[tier], bounds[tier])
        return lines, {}

    def _check_together(self, bounds: Mapping[int, Mapping[str, int]]) -> None:
        """Raise `Rejected` if the tiers' sums of one array together could leave the 64-bit range."""
        every = [bounds.get(tier, total.bound) for tier, total in enumerate(self.totals)]
        for name in self.tiers.shapes:
            if sum(bound.get(name, 0) for bound in every) >= 2**63:
                raise Rejected(f"{name}: a value is too large to add up")

    def update(self) -> dict[str, NDArray[np.float64]]:
        if not self.examples:
            raise ValueError("no client is in the sum")
        return {name: self._mean(name, shape) for name, shape in self.tiers.shapes.items()}

    @property
    def held(self) -> dict[str, NDArray[np.bool_]]:
        """Of each shared array the entries that some client of the sum holds."""
        return {name: self._sums(name, shape)[1] > 0 for name, shape in self.tiers.shapes.items()}

    def _mean(self, name: str, shape: tuple[int, ...]) -> NDArray[np.float64]:
        total, weight = self._sums(name, shape)
        found = np.zeros(shape, dtype=np.float64)
        np.divide(total, weight.astype(np.float64) * SCALE, out=found, where=weight > 0)
        return found

    def _sums(self, name: str, shape: tuple[int, ...]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Of each entry the sum of the updates, and of the examples of those who hold it."""
        total, weight = np.zeros(shape, dtype=np.int64), np.zeros(shape, dtype=np.int64)
        for tier, part in zip(self.tiers.tiers, self.totals, strict=True):
            if name in tier.held:
                held, fused = tier.held[name], self.tiers.fused[name]
                place = beginning(total, held, fused)
                place += part.totals[name].reshape(place.shape)
                beginning(weight, held, fused)[...] += part.weight
        return total, weight


def check_tiers(config: Config, shape: Shape, teacher: Any, data: FederatedDataset) -> None:
    """Raise `InputError` unless the teacher has what each tier asks for, and each has clients and something to learn.

    Args:
        shape: the whole student's.
        teacher: the teacher's configuration.
    """
    check_sizes(config, shape, teacher, data.task.regression)
    keys = config.student
    for tier, count in enumerate(clients_of_tiers(config, data)):
        if not count:
            which = f"tier {tier + 1}" if tier < len(keys.sizes) else "the whole student"
            raise InputError(
                f"student.tiers = {keys.tiers!r}: of {len(data.eligible)} clients none holds {which}; give more "
                "clients, another share or another student.tier-of"
            )


def check_sizes(config: Config, shape: Shape, teacher: Any, regression: bool) -> None:
    """Raise `InputError` unless the teacher has what each tier asks for, and each has something to learn."""
    keys, recipe = config.student, make_recipe(config, 1, shape, teacher, regression)
    for size in keys.sizes:
        if not _learns(recipe, size.layers):
            raise InputError(
                f"student.tiers = {keys.tiers!r}: the losses that have weight compare layers that {size.layers} layers "
                "do not hold; give distill.soft-weight or hard-weight, or other hidden-layers or relation-layers"
            )
        for name, asked, most in (
            ("heads", size.heads, head_count(teacher)),
            ("neurons", size.neurons, neuron_count(teacher)),
        ):
            if asked > most:
                raise InputError(f"student.tiers = {keys.tiers!r}: {asked} {name}; the teacher has {most}")
        small = shape.beginning(size.layers, size.heads, size.neurons)
        relation_heads(config.distill.relation_heads, small, teacher)


def _learns(recipe: Recipe, layers: int) -> bool:
    """Whether a student of the first layers has a loss, see `common.nested.Tiers.recipe`."""
    weights, pairs = recipe.weights, {"relation": recipe.relation_pairs, "hidden": recipe.hidden_pairs}
    pairs["cls"] = pairs["hidden"]
    inner = any(weights[part] > 0 and any(own < layers for own, _ in found) for part, found in pairs.items())
    return inner or weights["soft"] + weights["hard"] > 0


def clients_of_tiers(config: Config, data: FederatedDataset) -> list[int]:
    """How many of the clients that take part hold each tier."""
    found = config.tier_of(data.clients)[data.eligible]
    return [int(count) for count in np.bincount(found, minlength=len(config.student.sizes) + 1)]
