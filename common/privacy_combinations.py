"""What the keys of privacy mean to each other: combinations that would protect nobody."""

from common.keys import FUSED, KEEPING, ROBUST, Keys
from common.secure_sum import LEAST


def check_privacy(config: Keys) -> None:
    """Raise ValueError for the first of some keys that do not fit each other."""
    for check in (
        _noise_is_found_or_given, _keys_of_unit_client, _what_unit_client_allows, _scores_that_can_be_noised,
        _what_unit_example_allows, _secure_aggregation,
    ):  # fmt: skip
        check(config)


def _noise_is_found_or_given(config: Keys) -> None:
    keys = config.privacy
    if keys.epsilon and keys.noise_multiplier:
        raise ValueError(
            f"privacy.epsilon = {keys.epsilon}: it finds the noise, and privacy.noise-multiplier = "
            f"{keys.noise_multiplier} gives it; give one of them"
        )
    if keys.unit == "none" and (keys.epsilon or keys.noise_multiplier):
        told = f"epsilon = {keys.epsilon}" if keys.epsilon else f"noise-multiplier = {keys.noise_multiplier}"
        raise ValueError(f"privacy.{told}: with privacy.unit = 'none' nothing is noised; give example or client, or 0")


def _keys_of_unit_client(config: Keys) -> None:
    keys = config.privacy
    for name, value in (
        ("adaptive-clip", keys.adaptive_clip),
        ("noise-cohort", keys.noise_cohort),
        ("scores-share", keys.scores_share),
    ):
        if value and keys.unit != "client":
            raise ValueError(f"privacy.{name} = {value}: it is of privacy.unit = 'client'; give that, or 0")


def _what_unit_client_allows(config: Keys) -> None:
    """Only what is clipped per client and added up with the same weight has a known sensitivity."""
    if config.privacy.unit != "client":
        return
    server, student = config.server, config.student
    against = {
        f"server.strategy = {server.strategy!r}": server.strategy in (*ROBUST, *FUSED, *KEEPING),
        f"server.wire = {server.wire!r}": server.wire != "fp32",
        f"server.norm-bound = {server.norm_bound}": server.norm_bound > 0,
        f"server.over-select = {server.over_select}": server.over_select > 1.0,
        f"student.tiers = {student.tiers!r}": bool(student.tiers),
        "client.grow-batch = true": config.client.grow_batch,
        f"student.width-selection = {student.width_selection!r}": student.is_weighed,
    }
    for other, found in against.items():
        if found:
            raise ValueError(
                f"privacy.unit = 'client': {other} lets a client move more than its clipped update; give one of them"
            )


def _scores_that_can_be_noised(config: Keys) -> None:
    keys = config.privacy
    if not keys.scores_share:
        return
    if keys.scores_share == 1.0:
        raise ValueError("privacy.scores-share = 1.0: nothing is left for the student; give less than 1")
    if config.task == "stsb" or config.data.multi_label:
        what = "data.multi-label = true" if config.data.multi_label else f"task = {config.task!r}"
        raise ValueError(
            f"privacy.scores-share = {keys.scores_share}: statistics of {what} are no confusion matrix; give 0, and "
            "the scores are not protected"
        )


def _what_unit_example_allows(config: Keys) -> None:
    """Only what each example gives by itself, clipped, has a known sensitivity."""
    keys, student, distill = config.privacy, config.student, config.distill
    if keys.unit != "example":
        if keys.lifetime_epsilon:
            raise ValueError(
                f"privacy.lifetime-epsilon = {keys.lifetime_epsilon}: clients keep a ledger only with "
                "privacy.unit = 'example'; give that, or 0"
            )
        return
    own, everybody = config.server.strategy in KEEPING, "is a mean over more than one example"
    against = {
        f"server.strategy = {config.server.strategy!r}: clients train models of their own, without noise": own,
        "student.train-embeddings = true: which rows move tells which words are there": student.train_embeddings,
        f"student.tiers = {student.tiers!r}: a weight is in a step more than once": bool(student.tiers),
        "student.width-selection = 'importance': clients measure it without noise; `random` does fit":
            student.is_weighed,
        f"data.windows = {config.data.windows}: an example must be one row": config.data.windows > 1,
        f"distill.hidden-weight = {distill.hidden_weight}: that loss {everybody}": distill.hidden_weight > 0,
        f"distill.cls-weight = {distill.cls_weight}: that loss {everybody}": distill.cls_weight > 0,
        f"distill.relation-weight = {distill.relation_weight}: that loss {everybody}": distill.relation_weight > 0,
        f"distill.general-rounds = {distill.general_rounds}: their loss {everybody}": distill.general_rounds > 0,
        "distill.prior-correction = true: the labels of all are in each example's loss": distill.prior_correction,
        "client.grow-batch = true: a lot stays as large as privacy.lot": config.client.grow_batch,
        f"client.share = {config.client.share}: lots are drawn from the whole shard": config.client.share < 1.0,
        "privacy.distributed-noise = true: that is of privacy.unit = 'client'": keys.distributed_noise,
        f"student.dropout = {student.dropout}: its masks depend on the examples beside one": student.dropout > 0,
        f"client.max-seconds = {config.client.max_seconds}: when it stops tells of the lots":
            config.client.max_seconds > 0,
        f"client.energy-budget = {config.client.energy_budget}: when it stops tells of the lots":
            config.client.energy_budget > 0,
    }  # fmt: skip
    for other, found in against.items():
        if found:
            raise ValueError(f"privacy.unit = 'example' does not fit {other}; give one of them")


def _secure_aggregation(config: Keys) -> None:
    privacy, server, student = config.privacy, config.server, config.student
    if privacy.distributed_noise and not (privacy.secure_aggregation and privacy.unit == "client"):
        raise ValueError(
            "privacy.distributed-noise = true: each client adds a part of the noise to its words of a secure sum; give "
            "privacy.secure-aggregation = true and privacy.unit = 'client'"
        )
    if privacy.distributed_noise and not (privacy.epsilon or privacy.noise_multiplier):
        raise ValueError(
            "privacy.distributed-noise = true: there is no noise to share; give privacy.epsilon or noise-multiplier"
        )
    if privacy.distributed_noise and privacy.scores_share:
        raise ValueError(
            f"privacy.scores-share = {privacy.scores_share}: the server noises scores, and with "
            "privacy.distributed-noise = true it is to see nothing without noise; give one of them"
        )
    if privacy.distributed_noise and privacy.adaptive_clip:
        raise ValueError(
            f"privacy.adaptive-clip = {privacy.adaptive_clip}: what it counts is noised by the server, and with "
            "privacy.distributed-noise = true nothing is; give one of them"
        )
    if not privacy.secure_aggregation:
        return
    reasons = {
        f"server.strategy = {server.strategy!r} needs each client's own update": server.strategy in (*ROBUST, *FUSED),
        f"server.strategy = {server.strategy!r} has a sum of its own": server.strategy in KEEPING,
        f"server.norm-bound = {server.norm_bound} needs each client's own update": server.norm_bound > 0,
        f"server.wire = {server.wire!r} needs each client's own update": server.wire != "fp32",
        "server.packing = 'off' sends each client's own update": server.packing == "off",
        f"server.over-select = {server.over_select} loses clients on purpose": server.over_select > 1.0,
        f"student.tiers = {student.tiers!r} adds clients of each tier up by themselves": bool(student.tiers),
        "client.grow-batch = true adds the updates' norms up": config.client.grow_batch,
        f"server.cohort = {server.cohort} hides nobody, {LEAST} do": 0 < server.cohort < LEAST,
        f"data.clients = {config.data.clients} hides nobody, {LEAST} do": 0 < config.data.clients < LEAST,
    }
    for reason, found in reasons.items():
        if found:
            raise ValueError(f"privacy.secure-aggregation = true: {reason}; it does not fit that")
