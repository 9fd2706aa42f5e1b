"""Privacy of a client from whoever sees the students: DP-FedAvg over the exact integer sums.

With q the chance of each client to be in a round, by itself and from the operating system's entropy, N clients, C the
clip norm and z the noise multiplier (McMahan et al. 2018, https://arxiv.org/abs/1710.06963, Algorithm 1 with flat
clipping, weight 1 for each client and the fixed denominator qN):

    d = (sum_c clip(d_c, C) + normal(0, (z C)^2)) / (q N)

What a client does not send is a zero, and the denominator stays: it is public, `server.cohort`. A round whose cohort is
empty is a step of noise. Clipping is `common.clipping`, noise `server.gaussian`; a server rule works on d alone, so
that it costs nothing more.

Adaptive clipping (Andrew et al. 2021, https://arxiv.org/abs/1905.03871) follows the quantile g of the norms:

    b = (sum_c (1 if ||d_c|| <= C else 0, less 1/2) + normal(0, sigma_b^2)) / (q N) + 1/2
    C <- C exp(-0.2 (b - g))

Both sums of a round together cost what one of multiplier z costs when the updates get the larger multiplier
z_d = (z^-2 - (2 sigma_b)^-2)^(-1/2). The paper's sigma_b is qN / 20; here it is at least z, so that z_d <= 1.16 z.

`privacy.noise-cohort` M simulates a federation of N M / (q N) clients, of which M are in a round on average: noise is
qN / M times as large, so that on the mean it is what it would be there, and so is epsilon. It holds for no other.
"""

import math
import secrets
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy.stats import binom

from common.accounting import Steps, noise_for_all, spent
from common.clipping import BELOW, BELOW_SHAPE, slack
from common.config import Config
from common.errors import InputError
from common.fixed_point import LIMIT, SCALE, mean
from common.secure_sum import LEAST
from common.wire import Shapes
from server.gaussian import MOST, gaussian
from server.ledger import LEDGER, Charge, Ledger, Released

LEARNING_RATE = 0.2  # of the clip norm's logarithm; Andrew et al. 2021, section 3
SHARE = 20  # of the cohort that sigma_b is: the same
ALL = 0.99  # of an epsilon: what is left buys no round that is not noise alone
CLIP_NORM = "next clip norm"  # beside a released update
NEGLIGIBLE = 0.01  # of delta
SMALLEST = 16.0  # a clip norm is so many times what rounding can add

Totals = Mapping[str, NDArray[np.int64]]
Update = dict[str, NDArray[np.float64]]


class ClientPrivacy:
    """The mechanism of a run, with what it has spent.

    Args:
        clients: how many there are, whether or not they have anything to learn from.
        shapes: of a client's update.

    Attributes:
        rate: q.
        expected: qN.
        clip_norm: C of the next round.
        noise: z; `begin` finds it.
        noise_scores: the same for scores.

    Raises:
        InputError: the clip norm is too small for the sum's grid, or too large for 64 bits.
    """

    def __init__(self, config: Config, clients: int, shapes: Shapes) -> None:
        self.config, self.keys, self.clients = config, config.privacy, clients
        self.expected = min(config.server.cohort or clients, clients)
        self.rate = self.expected / clients
        self.factor = self.expected / (self.keys.noise_cohort or self.expected)
        values = sum(math.prod(shape) for shape in shapes.values())
        self.least, self.most = SMALLEST * slack(0.0, values), LIMIT / SCALE / (2.0 * clients)
        self.clip_norm, self.noise, self.noise_scores = self.keys.clip_norm, 0.0, 0.0
        self.ledger, self.released = Ledger(), Released()
        if not self.least <= self.clip_norm <= self.most:
            raise InputError(
                f"privacy.clip-norm = {self.clip_norm}: for {clients} clients and a student of {values} trained "
                f"numbers give {self.least:.1e} to {self.most:.1e}"
            )

    def begin(self, done: int = 0, folder: Path | None = None) -> None:
        """Find the noise of the rounds that are left.

        Args:
            done: rounds that need not be done again.
            folder: where a run keeps what it has spent and released last; None: it keeps nothing.

        Raises:
            InputError: what the run may spend is spent; see also `common.accounting`.
        """
        self.ledger, self.released = Ledger(folder and folder / LEDGER), Released(folder)
        self.clip_norm = self.keys.clip_norm
        left, keys, share = self.config.rounds - done, self.keys, self.keys.scores_share
        training = ((self.rate, left - self.released.has("update", done + 1)),)
        self.noise = keys.noise_multiplier
        if keys.epsilon:
            self.noise = self._noise("update", training, keys.epsilon * (1.0 - share), 1.0 - share)
        if share:
            whole = [*self.ledger.steps("update"), (self.noise, *training[0])]
            target = (keys.epsilon or self._spent(whole, 1.0 - share) / (1.0 - share)) * share
            scorings = self._scorings(left - self.released.has("scores", done + 1))
            self.noise_scores = self._noise("scores", scorings, target, share)
        self._check_cohorts()
        deviation = max(self._update_noise() * self.clip_norm, self._below_noise()) * self.factor
        if deviation * SCALE > MOST:
            raise InputError(
                f"privacy.clip-norm = {self.clip_norm}: noise of deviation {deviation:.3g} does not fit into the sums; "
                "give a smaller one, or less noise"
            )

    def cohort(self, eligible: Sequence[int] | NDArray[np.int64]) -> tuple[int, ...]:
        """Client ids of a round, ascending: each with probability q. Nobody can draw them again."""
        entropy = secrets.SystemRandom()
        return tuple(int(client) for client in eligible if entropy.random() < self.rate)

    # --- what is released -----------------------------------------------------------------------

    def shapes(self, shapes: Shapes) -> dict[str, tuple[int, ...]]:
        """Of a round's sum."""
        return {**shapes, **(BELOW_SHAPE if self.keys.adaptive_clip else {})}

    @property
    def deviation(self) -> float:
        """Of the noise of an update's sum."""
        return self._update_noise() * self.clip_norm * self.factor

    def release(self, number: int, totals: Totals, *, noisy: bool = False) -> Update:
        """A round's update from the sum of the clipped ones, charged before it is there; the next round's clip norm.

        Args:
            noisy: the clients have added the noise.
        """
        self.ledger.charge(Charge(number, "update", self.noise, self.rate))
        deviations = dict.fromkeys(totals, 0.0 if noisy else self.deviation)
        if BELOW in totals:
            deviations[BELOW] = self._below_noise() * self.factor
        update = {name: mean(noised(total, deviations[name] * SCALE), self.expected) for name, total in totals.items()}
        if BELOW in update:
            share = float(update.pop(BELOW)[0]) + 0.5
            moved = self.clip_norm * math.exp(-LEARNING_RATE * (share - self.keys.adaptive_clip))
            self.clip_norm = min(max(moved, self.least), self.most)
        self.released.keep("update", number, update | {CLIP_NORM: np.array([self.clip_norm])})
        return update

    def released_before(self, number: int) -> Update | None:
        """A round's update, where it was released and the run ended before a checkpoint held it."""
        found = self.released.find("update", number)
        if found is not None:
            self.clip_norm = float(found.pop(CLIP_NORM)[0])
        return found

    def release_statistics(self, number: int, totals: Totals, rate: float) -> dict[str, NDArray[np.int64]]:
        """Counts of a scoring phase's clients, each `privacy.scores-examples` examples at most, with noise and from 0.

        Args:
            totals: counts in each of which an example counts once.
            rate: the chance of each client to score.
        """
        self.ledger.charge(Charge(number, "scores", self.noise_scores, rate))
        reach = self.keys.scores_examples * math.sqrt(len(totals))  # all of a client's examples in one cell of each
        deviation = self.noise_scores * reach * self.factor
        found = {name: np.maximum(noised(total, deviation), 0) for name, total in totals.items()}
        self.released.keep("scores", number, found)
        return found

    # --- what it costs --------------------------------------------------------------------------

    @property
    def epsilon(self) -> float:
        """Of all that was released; infinite without noise."""
        return self.planned(0)

    def planned(self, left: int) -> float:
        """Epsilon once so many more rounds are done."""
        share = self.keys.scores_share
        found = self._spent([*self.ledger.steps("update"), (self.noise, self.rate, left)], 1.0 - share)
        if share:
            scoring = [(self.noise_scores, rate, steps) for rate, steps in self._scorings(left)]
            found += self._spent([*self.ledger.steps("scores"), *scoring], share)
        return found

    @property
    def population(self) -> int:
        """How many clients the federation has whose noise this is."""
        return round(self.clients / self.factor)

    def _check_cohorts(self) -> None:
        """A secure sum of fewer than `LEAST` is nothing at all, and one more client would then show all of them.

        Raises:
            InputError: the chance of such a cohort is not negligible beside delta.
        """
        if not self.keys.secure_aggregation:
            return
        chance = float(binom.cdf(LEAST - 1, self.clients, self.rate)) * self.config.rounds
        target = self.keys.epsilon or self.planned(self.config.rounds)
        if chance and not chance * (1.0 + math.exp(min(target, 700.0))) <= NEGLIGIBLE * self.keys.delta:
            raise InputError(
                f"server.cohort = {self.config.server.cohort}: fewer than {LEAST} of {self.clients} clients may be "
                "drawn, whose secure sum is none; give more, or 0: all of them"
            )

    def _spent(self, steps: Sequence[Steps], share: float) -> float:
        return spent(steps, delta=self.keys.delta * share, accountant=self.keys.accountant)

    def _scorings(self, left: int) -> tuple[tuple[float, int], ...]:
        """Rates of the scoring phases that are left, and how many there are of each."""
        rounds = self.config.rounds
        scored = sum(map(self.config.scores_after, range(rounds - left + 1, rounds + 1)))
        everyone = {"final": min(scored, 1), "cohort": 0, "all": scored}[self.config.server.scores]
        return (self.rate, scored - everyone), (1.0, everyone)

    def _noise(self, what: str, planned: tuple[tuple[float, int], ...], target: float, share: float) -> float:
        """The multiplier of what is left to do: the one so far, where that is enough."""
        done = tuple(self.ledger.steps(what))
        if math.isinf(target):
            return 0.0
        if done:
            last = done[-1][0]
            if self._spent([*done, *((last, rate, steps) for rate, steps in planned)], share) <= target:
                return last
            if any(steps for _, steps in planned) and self._spent(done, share) > ALL * target:
                raise InputError(
                    f"privacy.epsilon = {self.keys.epsilon}: what was released has spent it; nothing is left for more"
                )
        return _calibrated(target, planned, self.keys.delta * share, self.keys.accountant, done)

    def _below_noise(self) -> float:
        """sigma_b."""
        cohort = self.keys.noise_cohort or self.expected
        return max(cohort / SHARE, self.noise) if self.noise and self.keys.adaptive_clip else 0.0

    def _update_noise(self) -> float:
        """The multiplier of the updates' noise: z, or z_d beside a noised quantile."""
        beside = self._below_noise()
        return (self.noise**-2 - (2.0 * beside) ** -2) ** -0.5 if beside else self.noise


def noised(total: NDArray[np.int64], deviation: float) -> NDArray[np.int64]:
    """Whole numbers with noise of this deviation, in their own steps."""
    return total + gaussian(total.size, deviation).reshape(total.shape)


@lru_cache(maxsize=64)
def _calibrated(
    target: float, planned: tuple[tuple[float, int], ...], delta: float, accountant: str, done: tuple[Steps, ...]
) -> float:
    return noise_for_all(target, planned, delta=delta, accountant=accountant, done=done)
