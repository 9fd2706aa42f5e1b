"""Canary clients: a lower bound on epsilon of a client's presence from one run.

Andrew et al. 2024, https://arxiv.org/abs/2302.03098: clients whose update is a random direction c, of the clip norm,
in every round. In so many dimensions directions are nearly orthogonal to each other and to all that is learnt.

    score = <final weights - first weights, c> / |c|

Theirs are all in; here each is in by a fair coin, so that `simulations.audits.one_run` gives a bound and not an
estimate alone. Who guesses sees only the final student. The real clients learn as ever, beside them.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from common.clipping import norm_of
from common.compression import compress, wire_for
from common.config import changed
from common.errors import InputError
from common.progress import Progress, Step
from common.seeding import generator
from common.wire import ClientLine, own_update, pack_reply
from server.assignment import pick_cohort
from server.averaging import mean_of_last
from server.intake import Intake, Kept
from simulations.audits.attack import EPSILON, MASKED, Row
from simulations.audits.canaries import Shapes
from simulations.audits.one_run import check_canaries, judge, rows_of
from simulations.laboratory import Laboratory, Weights, keeping


@dataclass(frozen=True)
class ClientCanaries:
    """See the module.

    Attributes:
        canaries: clients that could be there besides the real ones.
        examples: that each claims to have.
        norm: of their updates in clip norms; without a clip, in median norms of the real ones in round 1.
    """

    name: ClassVar[str] = "client-canaries"
    paper: ClassVar[str] = "https://arxiv.org/abs/2302.03098"

    canaries: int = 100
    examples: int = 100
    norm: float = 1.0

    def run(self, lab: Laboratory, progress: Progress) -> Iterator[Row]:
        check_canaries(self.name, self.canaries)
        if lab.config.server.strategy not in ("fedavg", "fedprox") or len(lab.federation.tiers) > 1:
            raise InputError(
                f"server.strategy = {lab.config.server.strategy!r}: client canaries are for the mean of one whole "
                "student; give fedavg, and no student.tiers"
            )
        if lab.config.privacy.secure_aggregation:
            yield {"variant": "unit client, any scores", "measure": EPSILON, "success": None, "note": MASKED}
            return
        if lab.config.server.packing != "off":
            lab = Laboratory(changed(lab.config, {"server.packing": "off"}), progress)
        inside = generator(lab.config.seed, self.name).random(self.canaries) < 0.5
        with progress.step("train with canary clients", lab.config.rounds) as step:
            end = self._train(lab, inside, step)
        moved = {name: end[name].astype(np.float64) - lab.start[name] for name in end}
        scores = np.array([_along(moved, direction(lab, which)) for which in range(self.canaries)])
        found, privacy = judge(scores, inside, delta=lab.config.privacy.delta), lab.method.privacy
        claimed = 0.0 if privacy is None else privacy.epsilon
        told: Row = {"unit": lab.config.privacy.unit}
        yield from rows_of("unit client", found, claimed, normal=claimed > 0.0, told=told)

    def _train(self, lab: Laboratory, inside: NDArray[np.bool_], step: Step) -> Weights:
        """The final weights, with the canaries that are in."""
        weights, memory, norm = lab.start, {}, 0.0  # type: ignore[var-annotated]
        privacy, first, lab.worker.rows = lab.method.privacy, lab.data.clients, {}
        if privacy is not None:
            privacy.begin()
        there = [int(first + which) for which in np.flatnonzero(inside)]
        for number in range(1, lab.config.rounds + 1):
            if privacy is not None:
                cohort, norm = privacy.cohort([*lab.data.eligible, *there]), self.norm * privacy.clip_norm
            else:
                cohort = *pick_cohort(lab.data.eligible, lab.config.server.cohort, lab.config.seed, number), *there
            real = tuple(client for client in cohort if client < first)
            sizes = {client: lab.config.client.part_of(len(lab.worker._rows_of(client))) for client in real}
            intake = keeping(lab.method.intake(number, weights, sizes | dict.fromkeys(there, self.examples)))
            if real:
                lab.take(intake, *lab.answer(number, weights, real))
            if not norm:
                assert isinstance(intake, Kept)
                norm = self.norm * float(np.median([norm_of(update) for update in intake.kept.values()]))
            for client in cohort[len(real) :]:
                self._send(lab, intake, number, client, norm)
            moved = lab.method.step(number, weights, intake.update(), intake, memory)
            weights = mean_of_last(lab.config, number, moved, memory)
            step.advance()
        return weights

    def _send(self, lab: Laboratory, intake: Intake, number: int, client: int, norm: float) -> None:
        """A canary's reply."""
        update = direction(lab, client - lab.data.clients, norm)
        parts = compress(update, wire_for(lab.config.server, number, lab.config.rounds), np.random.default_rng())
        reply = pack_reply({own_update(client): parts}, [ClientLine(client, self.examples, 0.0)])
        _, refused = intake.take(reply, frozenset([client]))
        if refused:
            raise ValueError(f"a canary was refused: {refused[client]}")


def direction(lab: Laboratory, which: int, norm: float = 1.0) -> dict[str, NDArray[np.float32]]:
    """A canary's update."""
    rng, shapes = generator(lab.config.seed, "direction", which), _shapes(lab)
    drawn = {name: rng.standard_normal(shape, dtype=np.float32) for name, shape in shapes.items()}
    length = np.float32(norm / norm_of(drawn))
    return {name: array * length for name, array in drawn.items()}


def _shapes(lab: Laboratory) -> Shapes:
    return {name: array.shape for name, array in lab.start.items()}


def _along(moved: Mapping[str, NDArray[np.float64]], canary: Weights) -> float:
    return float(sum(np.vdot(moved[name], array.astype(np.float64)) for name, array in canary.items()))
