"""The keys of privacy: whose presence is hidden, how well, and what the server may see."""

from typing import Literal

from pydantic import Field

from common.section import Fraction, Section


class PrivacyKeys(Section):
    unit: Literal["none", "example", "client"] = Field(
        "none",
        description="whose presence the noise hides: example: one example of a client, from the server too (DP-SGD at "
        "the client); client: all of a client, from whoever sees the students (noise at the server); none: nobody's; "
        "with client each client is in a round by a chance of its own, `server.cohort` in the mean; chance, lots "
        "and noise are the operating system's, so such a run cannot be reproduced",
    )
    epsilon: float = Field(
        0.0,
        ge=0.0,
        le=1000.0,
        description="what the whole run may spend; the noise is calibrated to it; 0: `privacy.noise-multiplier` counts",
    )
    delta: float = Field(1e-5, gt=0.0, lt=1.0, description="the chance that epsilon does not hold")
    accountant: Literal["pld", "prv", "rdp"] = Field(
        "pld", description="how the rounds add up: pld and rdp of dp-accounting, prv of Opacus"
    )
    noise_multiplier: float = Field(
        0.0, ge=0.0, le=1e6, description="deviation of the noise, in clip norms; with `privacy.epsilon` it is found"
    )
    clip_norm: float = Field(
        1.0,
        gt=0.0,
        le=1e6,
        description="norm that what a unit adds is scaled down to: a gradient (in place of `client.clip-norm`), or an "
        "update",
    )
    lot: int = Field(64, ge=1, description="of unit example: how many examples a step draws in the mean (Poisson)")
    lifetime_epsilon: float = Field(
        0.0,
        ge=0.0,
        le=1000.0,
        description="of unit example: a client declines a round after which one of its examples would have spent more "
        "than this in all runs together, by the ledger on its disk; 0: as `privacy.epsilon`",
    )
    adaptive_clip: Fraction = Field(
        0.0,
        description="of unit client: the clip norm follows this quantile of the updates' norms, itself measured under "
        "noise that is accounted for; 0: it stays",
    )
    noise_cohort: int = Field(
        0,
        ge=0,
        description="of unit client: noise, and epsilon, of a cohort of this size, to learn in a small simulation what "
        "a large federation's student would be like; such an epsilon holds for that cohort alone; 0: the real one",
    )
    scores_share: Fraction = Field(
        0.0,
        description="share of epsilon that the clients' scores are noised with; 0: they are exact, and the summary "
        "says that they are not protected",
    )
    scores_examples: int = Field(
        16, ge=1, description="with `scores-share`: at most so many held-out examples of a client count, the first ones"
    )
    secure_aggregation: bool = Field(
        False, description="the server sees the sum of the updates and no client's own; the student is the same"
    )
    secure_threshold: float = Field(
        0.66, gt=0.5, le=1.0, description="share of a cohort that must stay to the end of a round for its sum to open"
    )
    distributed_noise: bool = Field(
        False,
        description="of unit client with secure aggregation: each client adds its part of the noise (discrete "
        "Gaussian), so that nobody ever holds a sum without",
    )
