"""FedMIA, "all for one" (Zhu et al. 2025, https://arxiv.org/abs/2402.06289, section 4, with the loss as measurement).

The server sees the update of every client and asks whose model knows an example too well. In round t let phi_i be the
scaled confidence of client i's model w + d_i in an example of client k. The others were not trained on it, so their
phi_i are what a model says that has not seen it: with mean m and deviation s over i != k

    p_t = Pr[N(m, s^2) <= phi_k]

The paper adds up log p_t over rounds that all clients are in. Here a client is in n of them, and a sum of fewer terms
is higher by itself; so it is held against what n rounds of a client that tells nothing would give (Fisher 1925):

    -sum_t log p_t ~ Gamma(n, 1),   q = Pr[Gamma(n, 1) >= -sum_t log p_t],   score = log q / (1 - q)

which of one round puts examples in the order of p_t. Of a client that is in no round's cohort nothing is said.

No reference models are trained. Where the server sees no client's own update, the attack cannot be made. Clients of
different domains differ for every example alike, member or not, which costs the attack but does not flatter it.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from scipy.special import log_ndtr
from scipy.stats import gamma

from common.progress import Progress
from simulations.audits.attack import Row
from simulations.audits.halves import Halves, draw_halves
from simulations.audits.membership import MEASURE, Floats, membership_row, scaled_confidence
from simulations.laboratory import Laboratory, updates_of

LEAST = 3  # clients: of fewer the others have no deviation


@dataclass(frozen=True)
class FedMia:
    """See above.

    Attributes:
        models: how many federations are attacked, each trained on a half of its own.
        examples: about how many examples; each is asked of each client's model in each round.
    """

    name: ClassVar[str] = "fedmia"
    paper: ClassVar[str] = "https://arxiv.org/abs/2402.06289"
    models: int = 2
    examples: int = 1000

    def run(self, lab: Laboratory, progress: Progress) -> Iterator[Row]:
        halves = draw_halves(lab.data, self.models, self.examples, lab.config.seed)
        with progress.step("federations watched by the server", self.models) as step:
            found = []
            for model in range(self.models):
                found.append(watched(lab, halves, model))
                step.advance()
        seen = [scores for scores in found if scores is not None]
        if len(seen) < self.models:
            yield {"measure": MEASURE, "success": None, "note": "the server sees no client's own update"}
            return
        yield membership_row(lab, self.name, "", np.stack(seen), halves.inside, models=self.models)


def watched(lab: Laboratory, halves: Halves, model: int) -> Floats | None:
    """(n,) scores of the examples in one federation, NaN of clients that were in no round.

    None: its updates are not seen one by one.
    """
    labels = np.asarray(lab.data.train.labels)[halves.rows]
    rounds: list[Floats] = []

    def watch(number: int, weights: Mapping[str, NDArray[np.float32]], intake: Any) -> None:
        updates = updates_of(intake)
        if len(updates) >= LEAST:
            said = {
                client: scaled_confidence(lab.logits(moved(weights, update), halves.rows)[None], labels)[0]
                for client, update in updates.items()
            }
            rounds.append(all_for_one(np.stack(list(said.values())), np.array(list(said)), halves.owner))

    lab.train(halves.trained(model), watch=watch)
    return combined(np.stack(rounds)) if rounds else None


def combined(rounds: Floats) -> Floats:
    """(n,) scores from (rounds, n) log p_t, NaN where there is none."""
    count = np.isfinite(rounds).sum(axis=0)
    total, times = -np.nansum(rounds, axis=0), np.maximum(count, 1)
    least = np.finfo(np.float64).tiny  # a logarithm of 0 would be no score
    score = np.log(np.maximum(gamma.sf(total, times), least)) - np.log(np.maximum(gamma.cdf(total, times), least))
    return np.where(count > 0, score, np.nan)


def moved(weights: Mapping[str, NDArray[Any]], update: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[np.float32]]:
    """A client's model after its training."""
    return {name: (weights[name] + update[name]).astype(np.float32) for name in weights}


def all_for_one(phi: Floats, clients: NDArray[np.int64], owner: NDArray[np.int64]) -> Floats:
    """(n,) log p_t of one round; NaN where the owner is not in it.

    Args:
        phi: (clients, n) what each client's model says of each example.
        clients: (clients,) their ids.
        owner: (n,) the client of each example.
    """
    own = clients[:, None] == owner
    there = own.any(axis=0)
    others = np.where(own, np.nan, phi)[:, there]
    mean, std = np.nanmean(others, axis=0), np.nanstd(others, axis=0, ddof=1)
    found = np.full(len(owner), np.nan)
    asked = np.where(own, phi, 0.0).sum(axis=0)[there]
    found[there] = log_ndtr((asked - mean) / np.maximum(std, 1e-6))
    return found
