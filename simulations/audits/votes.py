"""What a client says of public texts tells of its private ones: membership where outputs travel and no weights do.

In fedmd and ds-fl (`common.consensus`) the server gets a client's outputs v_k on public text. It trains a stand-in for
the client's student from them, as model stealing does (Tramer et al. 2016, https://arxiv.org/abs/1609.02943), and asks
the stand-in: an example that the student learnt by heart has bent its outputs nearby, and so the stand-in's. As in
`simulations.audits.fedmia` the stand-ins of the others say what a model says that has not seen the example.

    score(x of k) = log Pr[N(m, s^2) <= phi_k(x)],  m and s of phi_i(x), i != k,  phi = log(p_y / (1 - p_y))

Variants: the whole outputs of each strategy, and ``labels``, where a client says only which class it chose. It is the
first exchange that is attacked: every client starts from the student that all know. The clients answer with the code
of the strategy.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from common.config import Config, from_flat
from common.errors import InputError
from common.fixed_point import SCALE, Rows
from common.progress import Progress, Silent
from server.ensemble import distil_from, rows_of_round
from simulations.audits.attack import Row
from simulations.audits.fedmia import all_for_one
from simulations.audits.halves import Halves, draw_halves
from simulations.audits.membership import MEASURE, Floats, membership_row, scaled_confidence
from simulations.laboratory import Laboratory

SURE = 4.0  # logit of a class that is all that is known


@dataclass(frozen=True)
class Votes:
    """See above.

    Attributes:
        examples: about how many examples are asked of the stand-ins.
        epochs: passes of a stand-in over the public text.
    """

    name: ClassVar[str] = "votes"
    paper: ClassVar[str] = "https://arxiv.org/abs/1609.02943"
    examples: int = 0
    epochs: int = 5

    def run(self, lab: Laboratory, progress: Progress) -> Iterator[Row]:
        for variant, strategy in (("logits", "fedmd"), ("chances", "ds-fl"), ("labels", "fedmd")):
            try:
                config = voting(lab.config, strategy, self.epochs)
            except InputError as error:
                yield {"variant": variant, "measure": MEASURE, "success": None, "note": str(error)}
                continue
            room = Laboratory(config, Silent())
            halves = draw_halves(room.data, 1, self.examples, config.seed)
            scores = stolen(room, halves, labels_alone=variant == "labels", progress=progress)
            yield membership_row(lab, self.name, variant, scores[None], halves.inside)


def voting(config: Config, strategy: str, epochs: int) -> Config:
    """The same federation where outputs travel; the server's own learning on public text is the stand-ins'.

    Raises:
        InputError: its keys do not allow that.
    """
    keys = {"server.strategy": strategy, "server.packing": "auto", "server.wire": "auto"}
    return from_flat({**config.flat(), **keys, "server.public-epochs": epochs, "server.public-lr": config.client.lr})


def stolen(room: Laboratory, halves: Halves, *, labels_alone: bool, progress: Progress) -> Floats:
    """(n,) scores of the examples, from the first votes of all clients."""
    rows, labels = rows_of_round(room.federation, 1), np.asarray(room.data.train.labels)[halves.rows]
    clients = [int(client) for client in room.data.eligible]
    room.worker.rows = halves.trained(0)
    phi = []
    with progress.step("stand-ins for clients", len(clients)) as step:
        for client in clients:
            soft = as_logits(room.config.server.strategy, vote_of(room, client), labels_alone=labels_alone)
            weights, _ = distil_from(
                room.federation, room.start, rows, soft,
                number=1, temperature=1.0, progress=Silent(), tick=lambda: None,
            )  # fmt: skip
            phi.append(scaled_confidence(room.logits(weights, halves.rows)[None], labels)[0])
            step.advance()
    return all_for_one(np.stack(phi), np.array(clients), halves.owner)


def vote_of(room: Laboratory, client: int) -> NDArray[np.float64]:
    """(public rows, classes) what a client says in round 1."""
    groups, lines = room.answer(1, {}, (client,))
    if lines[0].problem:
        raise InputError(f"client {client}: it has no vote: {lines[0].problem}")
    votes: Any = groups["update"]["votes"]
    assert not isinstance(votes, Rows)
    return np.asarray(votes / SCALE, dtype=np.float64)


def as_logits(strategy: str, said: NDArray[np.float64], *, labels_alone: bool) -> NDArray[np.float32]:
    """What a stand-in learns from a client's word."""
    if labels_alone:
        return np.asarray(SURE * np.eye(said.shape[1])[said.argmax(axis=1)], dtype=np.float32)
    found = np.log(np.maximum(said, 1e-7)) if strategy == "ds-fl" else said
    return np.asarray(found, dtype=np.float32)
