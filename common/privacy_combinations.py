"""What the keys of privacy mean to each other and to the others: combinations that make no sense, refused by name."""

from common.keys import KEEPING, Keys


def check_privacy(config: Keys) -> None:
    """Raise ValueError for the first of some keys that do not fit each other."""
    for check in (_noise_has_a_unit, _what_one_example_moves):
        check(config)


def _noise_has_a_unit(config: Keys) -> None:
    keys = config.privacy
    given = {"epsilon": keys.epsilon, "noise-multiplier": keys.noise_multiplier}
    for name, value in given.items():
        if value and keys.unit == "none":
            raise ValueError(f"privacy.{name} = {value}: privacy.unit = 'none' hides nobody; give example or client")
    if keys.epsilon and keys.noise_multiplier:
        raise ValueError(
            f"privacy.noise-multiplier = {keys.noise_multiplier}: the noise is found where privacy.epsilon = "
            f"{keys.epsilon} is given; give one of them"
        )


def _what_one_example_moves(config: Keys) -> None:
    """With unit example, all that a client sends of its training must be a sum of what each example gives by itself."""
    keys, student, distill = config.privacy, config.student, config.distill
    if keys.unit != "example":
        if keys.lifetime_epsilon:
            raise ValueError(
                f"privacy.lifetime-epsilon = {keys.lifetime_epsilon}: clients keep a ledger only with "
                "privacy.unit = 'example'; give 0"
            )
        return
    against = {
        f"server.strategy = {config.server.strategy!r} (clients train more than the noised student)":
            config.server.strategy in KEEPING,
        "student.train-embeddings = true (which rows move tells which words are there)":
            student.train_embeddings,
        f"student.tiers = {student.tiers!r} (a weight is used more than once in a step)": bool(student.tiers),
        "student.width-selection = 'importance' (clients would measure it without noise; give random)":
            student.narrows and student.width_selection == "importance",
        f"data.windows = {config.data.windows} (an example is one row)": config.data.windows > 1,
        f"distill.hidden-weight = {distill.hidden_weight} (a mean over the positions of all examples)":
            distill.hidden_weight > 0,
        f"distill.cls-weight = {distill.cls_weight} (a mean over examples)": distill.cls_weight > 0,
        f"distill.relation-weight = {distill.relation_weight} (a mean over the positions of all examples)":
            distill.relation_weight > 0,
        f"distill.general-rounds = {distill.general_rounds} (a mean over the positions of all examples)":
            distill.general_rounds > 0,
        "distill.prior-correction = true (each example's loss holds the labels of all)": distill.prior_correction,
        "client.grow-batch = true (privacy.lot stays)": config.client.grow_batch,
        f"privacy.adaptive-clip = {keys.adaptive_clip} (of unit client)": keys.adaptive_clip > 0,
        f"privacy.noise-cohort = {keys.noise_cohort} (of unit client)": keys.noise_cohort > 0,
        f"privacy.scores-share = {keys.scores_share} (of unit client)": keys.scores_share > 0,
        "privacy.distributed-noise = true (of unit client)": keys.distributed_noise,
    }  # fmt: skip
    for told, found in against.items():
        if found:
            raise ValueError(f"privacy.unit = 'example': {told} does not fit that; give one of them")
