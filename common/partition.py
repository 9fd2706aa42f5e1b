"""Cutting a table: public and private, the private rest into clients, each shard into train and held-out.

A text that occurs twice stands on one side of every cut: examples that share a text (in any column, up to
letter case and white space) form a group, and groups are what is cut. The iid, Dirichlet, shard and natural cuts
equal those of `flwr-datasets`' partitioners row for row, without their dataset object per client: ten thousand
clients are cut in the time of two hundred. Everything follows from the seed and the order of the table.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from common.corpus import Table
from common.errors import InputError
from common.keys import DataKeys
from common.seeding import generator, seed_for

Index = NDArray[np.int64]


@dataclass(frozen=True)
class Shard:
    """One client's private examples, as row numbers of the train table."""

    train: Index
    heldout: Index

    def __len__(self) -> int:
        return len(self.train) + len(self.heldout)


@dataclass(frozen=True)
class Shards:
    """Every client's shard as ranges of one array: ten thousand clients cost what one does.

    Attributes:
        order: row numbers of the train table, client after client.
        starts: (clients + 1,) client c's rows are ``order[starts[c]:starts[c + 1]]``.
        cuts: (clients,) its held-out rows begin at ``order[cuts[c]]``.
    """

    order: Index
    starts: Index
    cuts: Index

    def __len__(self) -> int:
        return len(self.cuts)

    def __getitem__(self, client: int) -> Shard:
        start, cut, end = self.starts[client], self.cuts[client], self.starts[client + 1]
        return Shard(np.asarray(self.order[start:cut]), np.asarray(self.order[cut:end]))

    def __iter__(self) -> Iterator[Shard]:
        return (self[client] for client in range(len(self)))

    @property
    def train_sizes(self) -> Index:
        """(clients,) examples each client trains on; 0 marks a client that is left out."""
        return np.asarray(self.cuts - self.starts[:-1])

    @property
    def heldout_sizes(self) -> Index:
        """(clients,) examples each client only scores."""
        return np.asarray(self.starts[1:] - self.cuts)


def cut_private(groups: Mapping[int, NDArray[np.int64]], clients: int, share: float, minimum: int, seed: int) -> Shards:
    """Shards of clients that hold tables of their own: each is cut as if there were no other.

    So a client that knows its own table alone finds the same cut, and whether two of them share a text tells nobody.

    Args:
        groups: by client id `text_groups` of its table; the others have no rows. Tables lie one behind the other.
    """
    sizes = np.zeros((clients, 2), dtype=np.int64)
    order, start = [np.empty(0, np.int64)], 0
    for client, own in sorted(groups.items()):
        if len(own) >= minimum:
            heldout = _heldout(own, client, share, seed)
            sizes[client] = len(own) - heldout.sum(), heldout.sum()
            order.append(start + np.argsort(heldout, kind="stable"))
        start += len(own)
    return shards_of_sizes(sizes, np.concatenate(order))


def shards_of_sizes(sizes: Index, order: Index | None = None) -> Shards:
    """Shards of so many (clients, 2) train and held-out examples, whose rows are these, or are not here."""
    starts = np.concatenate([[0], np.cumsum(sizes.sum(axis=1))]).astype(np.int64)
    return Shards(np.empty(0, np.int64) if order is None else order, starts, starts[:-1] + sizes[:, 0])


def _heldout(groups: NDArray[np.int64], client: int, share: float, seed: int) -> NDArray[np.bool_]:
    """(n,) which of a client's rows are held out: groups in an order drawn for it, while they fit into the share."""
    names, inverse, counts = np.unique(groups, return_inverse=True, return_counts=True)
    target = min(max(round(share * len(groups)), 1 if share > 0 else 0), len(groups) - 1)
    chosen, held = np.zeros(len(names), dtype=np.bool_), 0
    for name in generator(seed, "holdout", client).permutation(len(names)).tolist():
        if held + counts[name] <= target:
            chosen[name], held = True, held + int(counts[name])
    return chosen[inverse]


def normal_form(text: str) -> str:
    """What two texts have in common that count as one: case and the spaces between words do not tell them apart."""
    return " ".join(text.casefold().split())


def text_groups(table: Table) -> NDArray[np.int64]:
    """(n,) group number of each example: connected components of "shares a text with"."""
    from scipy.sparse import coo_matrix
    from scipy.sparse.csgraph import connected_components

    number: dict[str, int] = {}
    nodes = [[number.setdefault(normal_form(text), len(number)) for text in column] for column in table.texts]
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
    """The private rows of each client, sorted, in the order of client ids.

    Raises:
        InputError: more clients or label shards than examples, or a natural cut that does not fit ``data.clients``.
    """
    if keys.partition == "natural":
        return _rows_of_each(rows, *_natural(table, rows, keys))
    if keys.clients > len(rows):
        raise InputError(
            f"data.clients = {keys.clients}: only {len(rows)} private examples are left; give fewer clients or "
            "a smaller data.public-fraction"
        )
    rows = generator(seed, "order").permutation(rows)
    classes = _partition_classes(table.labels)[rows]
    rng = np.random.default_rng(seed_for(seed, "clients") % 2**32)
    if keys.partition == "iid":
        owner = np.repeat(np.arange(keys.clients), _even_sizes(len(rows), keys.clients))
    elif keys.partition == "zipf":
        owner = np.repeat(np.arange(keys.clients), _zipf_sizes(len(rows), keys.clients, keys.alpha))
    elif keys.partition == "shards":
        owner = _label_shards(classes, keys.clients, keys.shards_per_client, rng)
    else:
        owner = _dirichlet(classes, keys.clients, keys.alpha, rng)
    return _rows_of_each(rows, owner, keys.clients)


def cut_holdout(parts: list[Index], groups: NDArray[np.int64], share: float, minimum: int, seed: int) -> Shards:
    """Cut each client's rows into train and held-out; a group that several clients hold stays on one side.

    A client with fewer than ``minimum`` examples keeps none: it is left out of the federation.
    """
    sizes = np.asarray([len(part) for part in parts], dtype=np.int64)
    sizes[sizes < minimum] = 0
    rows = np.concatenate([np.empty(0, np.int64), *(part for part in parts if len(part) >= minimum)])
    client = np.repeat(np.arange(len(parts)), sizes)
    group = np.unique(groups[rows], return_inverse=True)[1]
    heldout = _heldout_groups(client, group, sizes, share, seed)[group]
    starts = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
    order = rows[np.argsort(2 * client + heldout, kind="stable")]
    return Shards(order, starts, starts[1:] - np.bincount(client[heldout], minlength=len(parts)))


def _heldout_groups(client: Index, group: Index, sizes: Index, share: float, seed: int) -> NDArray[np.bool_]:
    """(groups,) whether each is held out, from the client and the group of every row and the clients' sizes.

    The first client that holds a group decides: it goes through its groups in an order drawn for it and holds out
    what still fits into its share.
    """
    groups = int(group.max(initial=-1)) + 1
    pairs, found = np.unique(client * groups + group, return_counts=True)  # of a client and a group, both ascending
    bounds = np.searchsorted(pairs, np.arange(len(sizes) + 1) * groups).tolist()
    names, counts = (pairs % max(groups, 1)).tolist(), found.tolist()
    side: list[bool | None] = [None] * groups
    for number in np.flatnonzero(sizes).tolist():
        start, end = bounds[number : number + 2]
        size = int(sizes[number])
        target = min(max(round(share * size), 1 if share > 0 else 0), size - 1)
        held = sum(counts[pair] for pair in range(start, end) if side[names[pair]])
        for position in generator(seed, "holdout", number).permutation(end - start).tolist():
            name, count = names[start + position], counts[start + position]
            if side[name] is None:
                side[name] = held + count <= target
                held += count if side[name] else 0
    return np.asarray(side, dtype=np.bool_)


def _rows_of_each(rows: Index, owner: Index, clients: int) -> list[Index]:
    """The rows of each client, sorted, from the owner of every row; -1 is nobody."""
    order = np.lexsort((rows, owner))
    bounds = np.searchsorted(owner[order], np.arange(clients + 1)).tolist()
    ordered = rows[order]
    return [ordered[start:end] for start, end in pairwise(bounds)]


def _even_sizes(examples: int, clients: int) -> Index:
    """(clients,) as even as can be, the larger first."""
    return np.asarray(examples // clients + (np.arange(clients) < examples % clients), dtype=np.int64)


def _zipf_sizes(examples: int, clients: int, exponent: float) -> Index:
    """(clients,) one example each, the rest in proportion to 1 / rank^exponent; client 0 has rank 1.

    What rounding down leaves goes to the first ranks, one each.
    """
    weights = np.arange(1.0, clients + 1) ** -exponent
    rest = examples - clients
    sizes: Index = 1 + np.floor(rest * weights / weights.sum()).astype(np.int64)
    sizes[: examples - sizes.sum()] += 1
    return sizes


def _label_shards(classes: NDArray[np.int64], clients: int, each: int, rng: np.random.Generator) -> Index:
    """(n,) owner of each example: sorted by class and cut into equal shards, of which every client draws ``each``.

    McMahan et al. 2017, https://arxiv.org/abs/1602.05629; drawn as `flwr_datasets.partitioner.ShardPartitioner` does.
    Shards are as large as they can be; fewer than ``clients * each`` examples are left and have no owner (-1).
    """
    size = len(classes) // (clients * each)
    if size == 0:
        raise InputError(
            f"data.shards-per-client = {each}: {clients} clients need {clients * each} label shards, and only "
            f"{len(classes)} private examples are left; give fewer"
        )
    shards = len(classes) // size
    shard_owner = np.full(shards, -1)
    shard_owner[rng.permutation(shards)[: clients * each]] = np.repeat(np.arange(clients), each)
    owner = np.full(len(classes), -1)
    owner[np.argsort(classes, kind="stable")[: shards * size]] = np.repeat(shard_owner, size)
    return owner


def _dirichlet(classes: NDArray[np.int64], clients: int, alpha: float, rng: np.random.Generator) -> Index:
    """(n,) owner of each example: every class is cut by its own draw from Dirichlet(alpha, ..., alpha).

    Yurochkin et al. 2019, https://arxiv.org/abs/1905.12022; drawn as `flwr_datasets.partitioner.DirichletPartitioner`
    does without its minimum size: small clients are left out by name, not drawn again until luck helps.
    """
    owner = np.empty(len(classes), dtype=np.int64)
    for name in np.unique(classes):
        members = np.flatnonzero(classes == name)
        ends = (np.cumsum(rng.dirichlet(np.full(clients, alpha))) * len(members)).astype(np.int64)
        owner[members] = np.searchsorted(ends[:-1], np.arange(len(members)), side="right")
    return owner


def _natural(table: Table, rows: Index, keys: DataKeys) -> tuple[Index, int]:
    """(n,) owner of each row and how many there are, numbered in the order of their names."""
    everyone = table.owners or []
    own = [everyone[row] for row in rows.tolist()]
    number = {name: client for client, name in enumerate(sorted(set(own)))}
    if keys.clients not in (0, len(number)):
        raise InputError(
            f"data.clients = {keys.clients}: the column {keys.partition_by!r} has {len(number)} values among the "
            f"private examples; give 0 or {len(number)}"
        )
    return np.asarray([number[name] for name in own], dtype=np.int64), len(number)


def _partition_classes(labels: NDArray[Any]) -> NDArray[np.int64]:
    """What Dirichlet and shard cuts skew: the class, the whole part of a score, -1 for unlabelled.

    Of several classes the first in label order; no class is a class of its own.
    """
    if labels.ndim == 2:
        most = labels.max(axis=1)
        return np.where(most > 0, labels.argmax(axis=1), np.where(most < 0, -1, labels.shape[1])).astype(np.int64)
    if labels.dtype.kind != "f":
        return labels.astype(np.int64)
    return np.where(np.isnan(labels), -1, np.minimum(np.floor(np.nan_to_num(labels)), 4)).astype(np.int64)
