"""What a round exchanges and what the server makes of it; the rounds themselves are the strategy's.

`Averaging` is FedAvg and all that differs from it only in the rule of the step: weights go down, updates come up.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from common.compression import wire_for
from common.progress import Progress
from server.client_privacy import ClientPrivacy
from server.clipped import clipped_intake
from server.intake import Intake, intake_for
from server.preparation import Federation
from server.rules import SERVER_RULES, MeanUpdate, fedavg, learning_rate, of_the_held
from server.tiered import TieredSum

Weights = dict[str, NDArray[np.float32]]
Memory = dict[str, NDArray[np.float64]]  # of the server between rounds, kept in checkpoints; changed in place
Line = Mapping[str, Any]


class Averaging:
    """The student's weights travel; their mean update moves them on.

    Args:
        tick: called often while the server itself is at work; may raise to stop.
        tell: writes a line into the run's metrics.

    Attributes:
        privacy: what hides a client's presence, where something does; its ``begin`` is the caller's.
    """

    def __init__(
        self, federation: Federation, progress: Progress, tick: Callable[[], None], tell: Callable[[Line], None]
    ) -> None:
        self.federation, self.config = federation, federation.config
        self.progress, self.tick, self.tell = progress, tick, tell
        self.privacy: ClientPrivacy | None = None
        if self.config.privacy.unit == "client":
            self.privacy = ClientPrivacy(self.config, federation.data.clients, federation.final_shapes())

    def sends(self, kind: str, number: int, weights: Weights, memory: Memory) -> Mapping[str, NDArray[Any]]:
        """The arrays that clients get with a question of this kind."""
        return {} if kind.startswith("query") else weights

    def intake(self, number: int, weights: Weights, sizes: Mapping[int, int]) -> Intake:
        """Takes the replies of a round; ``sizes`` are the examples each client is known to have."""
        federation, keys = self.federation, self.config.server
        if len(federation.tiers) > 1:
            return TieredSum(federation.tiers, federation.tier_of, sizes)
        shapes, wire = federation.tiers.shapes, wire_for(keys, number, self.config.rounds)
        if self.privacy is not None:
            return clipped_intake(self.privacy, shapes, sizes, number)
        return intake_for(keys, wire, shapes, sizes, squares=self.config.client.grow_batch)

    def step(self, number: int, weights: Weights, update: MeanUpdate, intake: Intake, memory: Memory) -> Weights:
        """The next weights; ``update`` is what the intake has made of the replies."""
        # a robust rule has chosen the update; its step is plain
        keys = self.config.server
        rule = SERVER_RULES.get(keys.strategy, fedavg)
        now = keys.model_copy(update={"lr": learning_rate(keys, number, self.config.rounds)})
        held = intake.held if isinstance(intake, TieredSum) else {}
        return of_the_held(rule, weights, update, memory, now, held=held)
