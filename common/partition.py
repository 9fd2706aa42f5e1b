"""Cutting a table: public and private, the private rest into clients, each shard into train and held-out.

A text that occurs twice stands on one side of every cut: examples that share a text (in any column, up to
letter case and white space) form a group, and groups are what is cut. Dirichlet and shard cuts are those of
`flwr-datasets`' partitioners; iid and natural cuts equal theirs, in a thousandth of their time for ten thousand
clients. Everything follows from the seed and the order of the table.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from common.config import DataKeys
from common.corpus import Table
from common.errors import InputError
from common.seeding import generator, seed_for

Index = NDArray[np.int64]


@dataclass(frozen=True)
class Shard:
    """One client's private examples, as row numbers of the train table."""

    train: Index
    heldout: Index

    def __len__(self) -> int:
        return len(self.train) + len(self.heldout)


def text_groups(table: Table) -> NDArray[np.int64]:
    """(n,) group number of each example: connected components of "shares a text with"."""
    from scipy.sparse import coo_matrix
    from scipy.sparse.csgraph import connected_components

    number: dict[str, int] = {}
    nodes = [
        [number.setdefault(" ".join(text.casefold().split()), len(number)) for text in column] for column in table.texts
    ]
    if len(nodes) == 1:
        return np.asarray(nodes[0], dtype=np.int64)
    first, second = (np.asarray(column, dtype=np.int64) for column in nodes)
    links = coo_matrix((np.ones(len(first), dtype=np.int8), (first, second)), shape=(len(number),) * 2)
    _, component = connected_components(links, directed=False)
    return np.asarray(component[first], dtype=np.int64)


def cut_groups(groups: NDArray[np.int64], share: float, rng: np.random.Generator) -> tuple[Index, Index]:
    """Rows of about ``share`` of the examples, and the rest; both sorted, no group on both sides."""
    names, inverse, sizes = np.unique(groups, return_inverse=True, return_counts=True)
    target = round(share * len(groups))
    chosen = np.zeros(len(names), dtype=bool)
    taken = 0
    for group in rng.permutation(len(names)):
        if taken + sizes[group] <= target:
            chosen[group] = True
            taken += int(sizes[group])
    side = chosen[inverse]
    return np.flatnonzero(side), np.flatnonzero(~side)


def cut_clients(table: Table, rows: Index, keys: DataKeys, seed: int) -> list[Index]:
    """The private rows of each client, in the order of client ids.

    Raises:
        InputError: more clients than examples, or a natural cut that does not fit ``data.clients``.
    """
    if keys.partition != "natural" and keys.clients > len(rows):
        raise InputError(
            f"data.clients = {keys.clients}: only {len(rows)} private examples are left; give fewer clients or "
            "a smaller data.public-fraction"
        )
    if keys.partition == "natural":
        return _natural(table, rows, keys)
    rows = generator(seed, "order").permutation(rows)
    if keys.partition == "iid":
        return [np.sort(part) for part in np.array_split(rows, keys.clients)]
    from datasets import Dataset

    partitioner = _partitioner(keys, seed_for(seed, "clients") % 2**32)
    classes = _partition_classes(table.labels)[rows]
    partitioner.dataset = Dataset.from_dict({"row": rows, "class": classes})
    try:
        return [
            np.sort(np.asarray(partitioner.load_partition(client)["row"][:], dtype=np.int64))
            for client in range(keys.clients)
        ]
    except ValueError as error:
        raise InputError(f"data.partition = {keys.partition}: {error}") from None


def cut_holdout(shards: list[Index], groups: NDArray[np.int64], share: float, minimum: int, seed: int) -> list[Shard]:
    """Cut each shard into train and held-out; a group that several clients hold stays on one side.

    A client with fewer than ``minimum`` examples keeps none: it is left out of the federation.
    """
    side: dict[int, bool] = {}  # group -> held out, decided by the first client that holds it
    result = []
    for client, rows in enumerate(shards):
        if len(rows) < minimum:
            result.append(Shard(rows[:0], rows[:0]))
            continue
        own = groups[rows]
        names, sizes = np.unique(own, return_counts=True)
        target = min(max(round(share * len(rows)), 1 if share > 0 else 0), len(rows) - 1)
        held = sum(int(size) for name, size in zip(names, sizes, strict=True) if side.get(int(name), False))
        for position in generator(seed, "holdout", client).permutation(len(names)):
            name, size = int(names[position]), int(sizes[position])
            if name not in side:
                side[name] = held + size <= target
                held += size if side[name] else 0
        heldout = np.asarray([side[int(group)] for group in own], dtype=bool)
        result.append(Shard(rows[~heldout], rows[heldout]))
    return result


def _partitioner(keys: DataKeys, seed: int) -> Any:
    from flwr_datasets import partitioner as flower

    if keys.partition == "shards":
        return flower.ShardPartitioner(
            num_partitions=keys.clients,
            partition_by="class",
            num_shards_per_partition=keys.shards_per_client,
            seed=seed,
        )
    return flower.DirichletPartitioner(
        num_partitions=keys.clients,
        partition_by="class",
        alpha=keys.alpha,
        min_partition_size=0,  # small clients are left out by name, not drawn again until luck helps
        self_balancing=False,
        seed=seed,
    )


def _natural(table: Table, rows: Index, keys: DataKeys) -> list[Index]:
    """One client for each owner, in the order of their names."""
    everyone = table.owners or []
    parts: dict[str, list[int]] = {}
    for row in rows.tolist():
        parts.setdefault(everyone[row], []).append(row)
    if keys.clients not in (0, len(parts)):
        raise InputError(
            f"data.clients = {keys.clients}: the column {keys.partition_by!r} has {len(parts)} values among the "
            f"private examples; give 0 or {len(parts)}"
        )
    return [np.asarray(parts[owner], dtype=np.int64) for owner in sorted(parts)]


def _partition_classes(labels: NDArray[Any]) -> NDArray[np.int64]:
    """What Dirichlet and shard cuts skew: the class, the whole part of a score, -1 for unlabelled."""
    if labels.dtype.kind != "f":
        return labels.astype(np.int64)
    return np.where(np.isnan(labels), -1, np.minimum(np.floor(np.nan_to_num(labels)), 4)).astype(np.int64)
