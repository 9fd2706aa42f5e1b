"""Scores from the clients' held-out data: sums of statistics, of each tier and of all together."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from common.dataset import FederatedDataset
from common.fixed_point import add_into
from common.metrics import check_statistics, scores, statistics_length
from common.models import count_parameters
from common.tiers import group_name
from common.wire import ClientLine, unpack_lines, unpack_sums
from server.aggregation import Rejected, RunningSum
from server.preparation import Federation
from server.tiered import Refused, clients_of_tiers

WHO = ("student", "teacher")


class TieredScores:
    """Takes replies to a scoring phase: for each tier the statistics of its student and of the teacher.

    Args:
        tier_of: (clients,) the tier of each client.
        tiers: how many there are; a run without has one.
    """

    def __init__(self, data: FederatedDataset, tier_of: NDArray[np.int64], tiers: int) -> None:
        self.spec, self.tier_of = data.task.score_spec, tier_of
        self.held = {int(client): int(data.heldout_sizes[client]) for client in data.eligible}
        self.shapes = {"statistics": (statistics_length(self.spec),)}
        self.names = {who: [group_name(who, tier, tiers) for tier in range(tiers)] for who in WHO}
        self.totals = {name: RunningSum.zeros(self.shapes) for names in self.names.values() for name in names}

    @property
    def lines(self) -> list[ClientLine]:
        """Of the clients whose scores are in, by client."""
        found = [line for name in self.names["student"] for line in self.totals[name].lines]
        return sorted(found, key=lambda line: line.client)

    def take(self, content: Any, clients: frozenset[int]) -> tuple[list[ClientLine], Refused]:
        lines = unpack_lines(content, clients)
        asked = sorted({int(self.tier_of[client]) for client in clients})
        sums = unpack_sums(content, {self.names[who][tier]: self.shapes for tier in asked for who in WHO})
        parts = []
        for tier in asked:
            own = [line for line in lines if not line.problem and self.held[line.client]]
            own = [line for line in own if self.tier_of[line.client] == tier]
            most = sum(self.held[line.client] for line in own)
            for who in WHO:
                name = self.names[who][tier]
                check_statistics(self.spec, sums[name]["statistics"])
                if scores(self.spec, sums[name]["statistics"])["n"] > most:
                    raise Rejected(f"statistics of more than the {most} examples that its clients hold out")
                parts.append((name, own, self.totals[name].check(sums[name], own, self.held)))
        for name, own, bound in parts:
            self.totals[name].add(sums[name], own, bound)
        return lines, {}

    def put(self, sums: Mapping[str, NDArray[np.int64]], lines: list[ClientLine]) -> None:
        """Take the whole sums of a run without tiers, by `WHO`. Raises ValueError for what are no statistics."""
        for who, statistics in sums.items():
            check_statistics(self.spec, statistics)
            self.totals[self.names[who][0]] = RunningSum({"statistics": statistics}, lines=list(lines))

    def by_tier(self, who: str) -> list[NDArray[np.int64]]:
        return [self.totals[name].totals["statistics"] for name in self.names[who]]

    def together(self, who: str) -> NDArray[np.int64]:
        """Of all tiers; raises OverflowError where the sum leaves the 64-bit range."""
        total = np.zeros(self.shapes["statistics"], dtype=np.int64)
        for part in self.by_tier(who):
            add_into(total, part)
        return total


def tier_rows(federation: Federation) -> list[dict[str, Any]]:
    """What each tier is, for metrics and summary; none without tiers."""
    if len(federation.tiers) == 1:
        return []
    clients = clients_of_tiers(federation.config, federation.data)
    return [
        {
            "layers": len(tier.shape.layers),
            "heads": len(tier.shape.heads[0]),
            "neurons": len(tier.shape.neurons[0]),
            "params": count_parameters(tier.model),
            "clients": count,
        }
        for tier, count in zip(federation.tiers.tiers, clients, strict=True)
    ]
