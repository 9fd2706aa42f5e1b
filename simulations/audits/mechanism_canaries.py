"""Canaries in the noised sum itself: a lower bound on epsilon of the mechanism that a run would use.

Steinke, Nasr, Jagielski 2023, https://arxiv.org/abs/2305.08846: see `simulations.audits.canaries` for what a canary
is, `simulations.audits.one_run` for what guesses prove. The code is that which protects real clients
(`simulations.audits.mechanisms`), at the run's noise, rate and number of steps; what it is given is made up. Nothing is
trained, so it takes seconds. A bound above the claimed epsilon is a broken mechanism.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from clients.example_privacy import calibrated_noise
from clients.private_steps import Lots, PrivateSteps
from common.accounting import epsilon
from common.config import changed
from common.progress import Progress
from simulations.audits.attack import EPSILON, Row
from simulations.audits.canaries import Release, Shapes, audit_release
from simulations.audits.mechanisms import ClientMechanism, ExampleMechanism, lots_of
from simulations.audits.one_run import check_canaries, rows_of
from simulations.laboratory import Laboratory


@dataclass(frozen=True)
class Plan:
    """A mechanism, how often it is used, and what that is said to cost."""

    release: Release
    steps: int
    rate: float
    claimed: float


@dataclass(frozen=True)
class MechanismCanaries:
    """See the module.

    Attributes:
        canaries: how many could be there.
        arrays: that a canary is made of, each with room for all of them.
        steps: 0: as many as a client makes in the run, or as the run has rounds.
    """

    name: ClassVar[str] = "mechanism-canaries"
    paper: ClassVar[str] = "https://arxiv.org/abs/2305.08846"

    canaries: int = 1000
    arrays: int = 16
    steps: int = 0

    def run(self, lab: Laboratory, progress: Progress) -> Iterator[Row]:
        check_canaries(self.name, self.canaries)
        keys = lab.config.privacy
        if keys.unit == "none" or keys.noise_cohort:
            why = "its noise is of another cohort" if keys.noise_cohort else "nothing is noised"
            yield {"variant": "mechanism", "measure": EPSILON, "success": None, "note": why}
            return
        shapes = {f"array {number}": (self.canaries,) for number in range(self.arrays)}
        plan = self._client(lab, shapes) if keys.unit == "client" else self._example(lab, shapes)
        with progress.step("canaries in the mechanism", plan.steps) as step:
            found = audit_release(
                plan.release, shapes, canaries=self.canaries, delta=keys.delta, steps=plan.steps,
                norm=100.0 * keys.clip_norm, seed=lab.config.seed, advance=step.advance,
            )  # fmt: skip
        told: Row = {"unit": keys.unit, "steps": plan.steps, "rate": plan.rate}
        yield from rows_of(f"unit {keys.unit}", found, plan.claimed, normal=plan.rate == 1.0, told=told)

    def _client(self, lab: Laboratory, shapes: Shapes) -> Plan:
        privacy = lab.method.privacy
        assert privacy is not None
        privacy.begin()  # finds the run's noise
        steps, cohort = self.steps or lab.config.rounds, round(privacy.rate * self.canaries)
        own = {
            "privacy.epsilon": 0.0, "privacy.noise-multiplier": privacy.noise, "privacy.scores-share": 0.0,
            "rounds": steps, "server.cohort": 0 if privacy.rate == 1.0 else max(cohort, 1), "server.packing": "off",
            "privacy.secure-aggregation": False, "privacy.distributed-noise": False,  # the noised sum is the same
        }  # fmt: skip
        release = ClientMechanism(changed(lab.config, own), shapes, self.canaries)
        return Plan(release, steps, release.privacy.rate, release.privacy.planned(steps))

    def _example(self, lab: Laboratory, shapes: Shapes) -> Plan:
        """Of the client with the fewest examples, each of which is in a step the most often."""
        keys = lab.config.privacy
        lots = Lots(keys.lot, int(lab.data.train_sizes[lab.data.eligible].min()))
        whole = lots.steps * lab.config.client.epochs * lab.config.rounds
        noise, steps = calibrated_noise(keys, lots, whole, lab.worker.cache), self.steps or whole
        own = lots_of(lots.rate, self.canaries)
        claimed = epsilon(
            noise_multiplier=noise, rate=own.rate, steps=steps, delta=keys.delta, accountant=keys.accountant
        )
        release = ExampleMechanism(PrivateSteps(own, noise=noise, clip_norm=keys.clip_norm), shapes)
        return Plan(release, steps, own.rate, claimed)
