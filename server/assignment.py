"""Who takes part in a round, and which node works for whom."""

from collections.abc import Mapping, Sequence

from common.partition import Index
from common.seeding import generator


def pick_cohort(eligible: Index, size: int, seed: int, round_number: int) -> tuple[int, ...]:
    """Client ids of a round, ascending: drawn without replacement from (seed, round); 0 means everyone.

    Stable ids, not Flower's node ids, which are random per run and name only workers.
    """
    if size == 0 or size >= len(eligible):
        return tuple(int(client) for client in eligible)
    chosen = generator(seed, "cohort", round_number).choice(eligible, size=size, replace=False)
    return tuple(sorted(int(client) for client in chosen))


def assign(clients: Sequence[int], sizes: Mapping[int, int], nodes: Sequence[int]) -> dict[int, tuple[int, ...]]:
    """Clients of each node that gets any: largest client first, always to the least loaded node.

    Graham 1969's longest-processing-time rule, at most 4/3 of the best makespan. How clients are assigned
    never changes a result, only how long a round takes.
    """
    load = dict.fromkeys(nodes, 0)
    lists: dict[int, list[int]] = {node: [] for node in nodes}
    for client in sorted(clients, key=lambda one: (-sizes[one], one)):
        node = min(nodes, key=lambda one: load[one])
        lists[node].append(client)
        load[node] += max(sizes[client], 1)
    return {node: tuple(chosen) for node, chosen in lists.items() if chosen}
