"""What the embedding's rows tell of a laboratory's own federation, with all its keys and defences, after round 1.

Two look: the server, at each client's update or, where it gets no more than that, at the cohort's sum; and anybody, at
the student that is released.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from simulations.audits.embedding_rows import found_pieces
from simulations.audits.reconstruction import Judge
from simulations.laboratory import Laboratory, updates_of

Update = dict[str, NDArray[np.float32]]


def first_round(lab: Laboratory) -> tuple[dict[int, Update], Update]:
    """What the server sees of each client of round 1, and by how much the released student has moved."""
    if lab.method.privacy is not None:
        lab.method.privacy.begin()
    intake = lab.round(1, lab.start)
    mean = intake.update()
    moved = lab.method.step(1, lab.start, mean, intake, {})
    released = {name: moved[name] - lab.start[name] for name in lab.start}
    kept, seen = updates_of(intake), {}
    for line in intake.lines:
        own: Any = kept.get(line.client, mean)
        seen[line.client] = {name: np.asarray(own[name], dtype=np.float32) for name in lab.start}
    return seen, released


def pieces_of_clients(
    lab: Laboratory, model: Any, judge: Judge, special: NDArray[np.int64], victims: int
) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Figures of some clients, by who looks.

    Args:
        model: has the weights that round 1 began from.
    """
    seen, released = first_round(lab)
    clients = [*seen][:victims]
    for who, updates in (("server", [seen[client] for client in clients]), ("anybody", [released] * len(clients))):
        found = []
        for client, update in zip(clients, updates, strict=True):
            rows = lab.data.shard(client).train[lab.worker.drawn(1, client)]
            truth, pieces = judge.texts(rows), found_pieces(model, update, special)
            if pieces is None or not len(pieces):
                found.append(judge.of_tokens(judge.usual(len(rows)), truth) | {"nothing": 1.0})
            else:
                found.append(judge.of_tokens(pieces.tolist(), truth) | {"nothing": 0.0})
        if found:
            yield who, found
