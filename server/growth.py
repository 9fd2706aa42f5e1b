"""The batch grows with the gradient noise scale, instead of a learning rate that falls.

A client's update d_c from its n_c examples estimates what all clients would move by, G, with a noise whose variance
falls with the examples, Sigma / n_c. McCandlish et al. 2018 (https://arxiv.org/abs/1812.06162, appendix A.1) get
|G|^2 and tr(Sigma) from the squared norms at two batch sizes. Here the small batch is one client and the large one the
cohort: with N = sum_c n_c, C clients, the mean update d = sum_c n_c d_c / N and the mean square
a = sum_c n_c |d_c|^2 / N,

    E |d|^2 = |G|^2 + tr(Sigma) / N        E a = |G|^2 + tr(Sigma) C / N

also for unequal n_c, so that these have no bias:

    |G|^2 = (C |d|^2 - a) / (C - 1)        tr(Sigma) = N (a - |d|^2) / (C - 1)

As in the paper both are smoothed before they are divided: the noise scale tr(Sigma) / |G|^2 is the number of examples
at which noise is as large as what is learnt. It grows while |G| shrinks. A client's update is a whole round of steps
and not a gradient, and what sets clients apart counts as noise too: the scale's size says little, its growth is what
is used. In the first round that has a noise scale it stands for `client.token-budget`; from then on the budget of a
step grows as it does, as a learning rate that falls by the same factor would calm it (Smith et al. 2018,
https://arxiv.org/abs/1711.00489).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

SMOOTHING = 0.7  # weight of earlier rounds
FASTEST = 2  # times the budget of the round before, at most


def estimate(
    update: Mapping[str, NDArray[np.float64]], square: float, clients: int, examples: int
) -> tuple[float, float]:
    """|G|^2 and tr(Sigma) from one round; either may come out below 0.

    Args:
        update: the mean update of at least two clients.
        square: mean squared norm of the clients' updates, weighted by examples as the update is.
        examples: of all these clients.
    """
    large = sum(float(np.square(update[name]).sum()) for name in sorted(update))
    return (clients * large - square) / (clients - 1), examples * (square - large) / (clients - 1)


@dataclass
class Growth:
    """The budget of the next round's steps, and what it follows from.

    Attributes:
        budget: padded word pieces per step.
        most: it grows no further.
        start: `client.token-budget`.
        signal, noise: smoothed |G|^2 and tr(Sigma), from 0 on: both short by the same factor.
        first: the noise scale that `client.token-budget` stands for; 0: none was found yet.
    """

    start: int
    most: int
    budget: int = 0
    signal: float = 0.0
    noise: float = 0.0
    first: float = 0.0

    def __post_init__(self) -> None:
        self.budget = self.budget or self.start

    @property
    def scale(self) -> float | None:
        """The noise scale in examples; None where noise drowns what is learnt, or there is none."""
        return self.noise / self.signal if self.signal > 0 and self.noise > 0 else None

    def note(
        self, update: Mapping[str, NDArray[np.float64]], square: float, clients: int, examples: int
    ) -> dict[str, Any]:
        """Take a round in and set the next one's budget; arguments as of `estimate`.

        Returns:
            What a metrics line says: the budget that this round had, and the noise scale.
        """
        had = self.budget
        if clients > 1:
            signal, noise = estimate(update, square, clients, examples)
            self.signal = SMOOTHING * self.signal + (1.0 - SMOOTHING) * signal
            self.noise = SMOOTHING * self.noise + (1.0 - SMOOTHING) * noise
            if self.scale is not None:
                self.first = self.first or self.scale
                wanted = min(self.start * self.scale / self.first, FASTEST * had, self.most)
                self.budget = max(had, int(wanted))
        return {"token_budget": had, "noise_scale": self.scale}
