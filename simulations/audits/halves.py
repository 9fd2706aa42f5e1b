"""Who is a member: for each of K models, fair coins decide which of the clients' examples it is trained on.

Members and others are of one distribution, and no text is on both sides: examples that share a text share a coin.
Each model has coins of its own. A fixed K / 2 of them would tell: whoever knows how many of the other models hold an
example would know whether the last one does.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from common.corpus import Table, labelled
from common.dataset import FederatedDataset
from common.errors import InputError
from common.partition import text_groups
from common.seeding import generator

Index = NDArray[np.int64]


@dataclass(frozen=True)
class Halves:
    """The examples under attack, and what each model is trained on.

    Attributes:
        rows: (n,) of the train table; all are some client's training rows that have a label.
        owner: (n,) the client of each.
        inside: (K, n) whether a model is trained on it.
        always: by client, the rows that every model is trained on, because they are not under attack.
        population: rows of the same distribution that no model is trained on: what the clients hold out, with labels.
    """

    rows: Index
    owner: Index
    inside: NDArray[np.bool_]
    always: dict[int, Index]
    population: Index

    @property
    def models(self) -> int:
        return len(self.inside)

    def trained(self, model: int) -> dict[int, Index]:
        """What each client trains on for a model, in the order of its shard's rows."""
        chosen = self.inside[model]
        return {
            client: np.concatenate([self.rows[chosen & (self.owner == client)], rest])
            for client, rest in self.always.items()
        }


def draw_halves(data: FederatedDataset, models: int, examples: int, seed: int) -> Halves:
    """Toss the coins.

    Args:
        examples: about how many are under attack, drawn text by text; 0: all that the clients train on. One without
            a label is not: its own class is what every attack asks about.

    Raises:
        InputError: the task's examples have no class each.
    """
    if data.task.regression or data.task.multi_label:
        raise InputError(f"task = {data.task.name!r}: membership attacks need one class for each example")
    known = labelled(np.asarray(data.train.labels))
    shards = {int(client): data.shard(int(client)) for client in data.eligible}
    rows = np.concatenate([shard.train for shard in shards.values()])
    owner = np.repeat(np.array(list(shards)), [len(shard.train) for shard in shards.values()])
    group = groups_of(data)[rows]
    names, place = np.unique(group, return_inverse=True)
    share = min(examples / max(int(known[rows].sum()), 1), 1.0) if examples else 1.0
    attacked = (generator(seed, "audit", "examples").random(len(names)) < share)[place] & known[rows]
    coins = np.stack([generator(seed, "audit", "half", model).random(len(names)) < 0.5 for model in range(models)])
    always = {client: rows[~attacked & (owner == client)] for client in shards}
    population = np.concatenate([shard.heldout for shard in shards.values()])
    population = np.sort(population[known[population]])
    return Halves(rows[attacked], owner[attacked], coins[:, place[attacked]], always, population)


def groups_of(data: FederatedDataset) -> Index:
    """(train rows,) a number for each group of examples that share a text."""
    texts = tuple(column.all() for column in data.train.texts)
    return text_groups(Table(texts, np.asarray(data.train.labels)))
