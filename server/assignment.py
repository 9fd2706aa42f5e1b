"""Who takes part in a round, and which node works for whom."""

import math
from collections.abc import Mapping, Sequence

from common.partition import Index
from common.seeding import generator

FIXED_EXAMPLES = 8  # what a client costs besides its examples: reset, update, sum


def pick_cohort(eligible: Index, size: int, seed: int, round_number: int, over_select: float = 1.0) -> tuple[int, ...]:
    """Client ids of a round, ascending: drawn without replacement from (seed, round); size 0 means everyone.

    Stable ids, not Flower's node ids, which are random per run and name only workers. ``over_select`` times the
    size are drawn, as far as there are so many.
    """
    asked = math.ceil(round(size * over_select, 6))  # 100 * 1.1 is a little more than 110
    if size == 0 or asked >= len(eligible):
        return tuple(int(client) for client in eligible)
    chosen = generator(seed, "cohort", round_number).choice(eligible, size=asked, replace=False)
    return tuple(sorted(int(client) for client in chosen))


def assign(
    clients: Sequence[int], sizes: Mapping[int, int], nodes: Sequence[int], speeds: Mapping[int, float] | None = None
) -> dict[int, tuple[int, ...]]:
    """Clients of each node that gets any: largest client first, always to the node that would be done first.

    Graham 1969's longest-processing-time rule, at most 4/3 of the best makespan. How clients are assigned
    never changes a result, only how long a round takes.

    Args:
        speeds: examples per second of nodes that have been seen at work; the others count as average.
    """
    known = [speed for node, speed in (speeds or {}).items() if node in set(nodes)]
    usual = sum(known) / len(known) if known else 1.0
    pace = {node: (speeds or {}).get(node, usual) for node in nodes}
    busy = dict.fromkeys(nodes, 0.0)
    lists: dict[int, list[int]] = {node: [] for node in nodes}
    for client in sorted(clients, key=lambda one: (-sizes[one], one)):
        work = sizes[client] + FIXED_EXAMPLES
        node = min(nodes, key=lambda one: busy[one] + work / pace[one])
        lists[node].append(client)
        busy[node] += work / pace[node]
    return {node: tuple(chosen) for node, chosen in lists.items() if chosen}
