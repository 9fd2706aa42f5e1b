"""What keys mean to each other: values that follow from others, and combinations that make no sense."""

from typing import Any

from common.keys import ADAPTIVE, AT_CLIENTS, AUTO_BUDGET, FUSED, KEEPING, PUBLIC, ROBUST, VOTING, Keys
from common.privacy_combinations import check_privacy


def check_combinations(config: Keys) -> None:
    """Raise ValueError for the first of some keys that do not fit each other."""
    for check in (
        _check_distillation, _check_batches, _check_data, _check_server, _votes_are_no_updates, _mentors_need_labels,
        _what_tiers_allow, _general_rounds_come_first, _student_of_its_own,
    ):  # fmt: skip
        check(config)
    check_privacy(config)


def _check_distillation(config: Keys) -> None:
    keys, student = config.distill, config.student
    if keys.soft_weight + keys.hard_weight + keys.hidden_weight + keys.cls_weight + keys.relation_weight == 0:
        raise ValueError(
            "distill.soft-weight, hard-weight, hidden-weight, cls-weight and relation-weight are all 0: nothing to "
            "learn from"
        )
    if student.target_ratio and student.vocabulary:
        raise ValueError(
            f"student.target-ratio = {student.target_ratio}: it chooses the vocabulary; "
            f"student.vocabulary = {student.vocabulary} does too; give one of them"
        )
    if student.is_weighed and keys.soft_weight + keys.hard_weight == 0:
        raise ValueError(
            "student.width-selection = 'importance': it is measured on the loss on outputs, but "
            "distill.soft-weight and hard-weight are 0; give one of them a weight, or "
            "student.width-selection = 'random'"
        )
    if keys.prior_correction and keys.hard_weight == 0 and keys.weighting == "constant":
        raise ValueError(
            "distill.prior-correction = true: it is about the label's loss, and distill.hard-weight = 0.0; give that a "
            "weight, or false"
        )
    if keys.prior_correction and (config.task == "stsb" or config.data.multi_label):
        what = "data.multi-label = true" if config.data.multi_label else f"task = {config.task}"
        raise ValueError(f"distill.prior-correction = true: {what} has no one class per example; give false")


def _check_data(config: Keys) -> None:
    data = config.data
    if data.multi_label and config.task != "text":
        raise ValueError(f"data.multi-label = true: examples of task = {config.task} have one label each; give false")
    if config.task != "text":
        of_files = {"validation": data.validation, "text-columns": data.text_columns}
        of_files["label-column"] = "" if data.label_column == "label" else data.label_column
        for key, value in of_files.items():
            if value:
                raise ValueError(f"data.{key} = {value!r}: it is for task = 'text', not {config.task!r}; leave it out")
    if data.stride and data.windows == 1:
        raise ValueError(
            f"data.stride = {data.stride}: with data.windows = 1 there is nothing to share; give more windows"
        )
    if data.holdout_fraction == 1.0:
        raise ValueError("data.holdout-fraction = 1.0: nothing would be left to train on; give less than 1")
    if data.clients and config.server.cohort > data.clients:
        raise ValueError(
            f"server.cohort = {config.server.cohort}: there are data.clients = {data.clients}; give at most that"
        )
    if config.server.strategy in PUBLIC and not data.public_fraction:
        raise ValueError(
            f"data.public-fraction = 0.0: server.strategy = {config.server.strategy!r} learns on public text; "
            "give more than 0"
        )
    if data.partition == "natural" and not (data.partition_by or data.private):
        raise ValueError("data.partition-by is empty: data.partition = natural needs the column's name")
    if data.private == AT_CLIENTS and config.task == "toy":
        raise ValueError("task = 'toy': real clients have texts of their own; give text, or a GLUE task")
    if data.private:
        against = {
            f"data.partition = {data.partition!r}": data.partition != "natural",
            f"data.limit = {data.limit}": data.limit > 0,
            "task = 'toy'": config.task == "toy",
        }
        _refuse(f"data.private = {data.private!r}", against)
    if config.task == "text" and not data.source and data.private != AT_CLIENTS:
        raise ValueError("data.source is empty: task = text needs a CSV, JSONL or Parquet file")


def _check_server(config: Keys) -> None:
    keys = config.server
    if keys.over_select > 1.0 and not keys.cohort:
        raise ValueError(f"server.over-select = {keys.over_select}: server.cohort = 0 asks everyone; give a cohort")
    if keys.packing == "on" and (reasons := _needs_own_updates(keys.model_dump(by_alias=True))):
        raise ValueError(f"server.packing = 'on': {reasons[0]} needs each client's own update; give auto or off")
    if keys.average_rounds > config.rounds:
        raise ValueError(
            f"server.average-rounds = {keys.average_rounds}: there are rounds = {config.rounds}; give at most that"
        )
    if keys.warmup_rounds >= config.rounds:
        raise ValueError(f"server.warmup-rounds = {keys.warmup_rounds}: rounds = {config.rounds}; give fewer than that")


def _what_tiers_allow(config: Keys) -> None:
    if not config.student.sizes:
        if config.student.tier_mode != "nested":
            raise ValueError(
                f"student.tier-mode = {config.student.tier_mode!r}: student.tiers is empty; give them, or `nested`"
            )
        if config.student.tier_of.strip():
            raise ValueError(f"student.tier-of = {config.student.tier_of!r}: student.tiers is empty; give them too")
        return
    holders, clients = len(config.student.holders), config.data.clients
    if holders and clients not in (0, holders):
        raise ValueError(
            f"student.tier-of = {config.student.tier_of!r}: {holders} tiers for data.clients = {clients}; give one for "
            "each client"
        )
    against = _needs_own_updates(config.server.model_dump(by_alias=True))
    against += ["server.packing = 'off'"] if config.server.packing == "off" else []
    lone = config.server.strategy in (*FUSED, "fedkd")
    against += [f"server.strategy = {config.server.strategy!r}"] if lone else []
    against += ["client.grow-batch = true"] if config.client.grow_batch else []
    against += ["student.train-embeddings = true"] if config.student.train_embeddings else []
    if against:
        raise ValueError(
            f"student.tiers = {config.student.tiers!r}: clients of each tier are added up by themselves, "
            f"{against[0]} does not fit that; give one of them"
        )


def _general_rounds_come_first(config: Keys) -> None:
    keys, student = config.distill, config.student
    if not keys.general_rounds:
        return
    told = f"distill.general-rounds = {keys.general_rounds}"
    if keys.general_rounds >= config.rounds:
        raise ValueError(f"{told}: the task's rounds come after these, and rounds = {config.rounds}; give fewer")
    if keys.general_soft_weight + keys.general_mlm_weight + keys.general_cosine_weight == 0:
        raise ValueError(
            "distill.general-soft-weight, general-mlm-weight and general-cosine-weight are all 0: nothing to learn "
            f"from in {told}"
        )
    against = {
        f"server.strategy = {config.server.strategy!r}": config.server.strategy in (*FUSED, *KEEPING),
        f"student.tiers = {student.tiers!r}": bool(student.tiers),
        f"student.warm-epochs = {student.warm_epochs}": student.warm_epochs > 0,
        f"student.general-epochs = {student.general_epochs}": student.general_epochs > 0,
        "student.train-embeddings = true": student.train_embeddings,
        f"client.micro-budget = {AUTO_BUDGET}": config.client.micro_budget == AUTO_BUDGET,
        f"client.memory-limit = {config.client.memory_limit}": config.client.memory_limit > 0,
        "client.grow-batch = true": config.client.grow_batch,
        f"server.average-rounds = {config.server.average_rounds} of rounds = {config.rounds}": (
            config.server.average_rounds > config.rounds - keys.general_rounds
        ),
    }
    _refuse(told, against)


def _student_of_its_own(config: Keys) -> None:
    keys = config.student
    if keys.model:
        against = {
            f"server.strategy = {config.server.strategy!r}": config.server.strategy in (*FUSED, *KEEPING),
            f"student.tiers = {keys.tiers!r}": bool(keys.tiers),
            f"distill.general-rounds = {config.distill.general_rounds}": config.distill.general_rounds > 0,
            f"student.general-epochs = {keys.general_epochs}": keys.general_epochs > 0,
        }
        _refuse(f"student.model = {keys.model!r}", against)


def _check_batches(config: Keys) -> None:
    keys = config.client
    spending = {
        "max-seconds": keys.max_seconds, "energy-budget": keys.energy_budget, "memory-limit": keys.memory_limit
    }  # fmt: skip
    for name, value in spending.items():
        if value and config.server.strategy in KEEPING:
            raise ValueError(
                f"client.{name} = {value}: with server.strategy = {config.server.strategy!r} a client trains more than "
                "one model; give 0"
            )
    if keys.share < 1.0 and config.server.strategy in KEEPING:
        raise ValueError(
            f"client.share = {keys.share}: with server.strategy = {config.server.strategy!r} a client trains more than "
            "one model; give 1"
        )
    if keys.optimizer == "sgd" and config.server.strategy in KEEPING:
        raise ValueError(
            f"client.optimizer = 'sgd': with server.strategy = {config.server.strategy!r} clients train models that no "
            "server's optimiser follows; give adamw"
        )
    if keys.micro_budget == AUTO_BUDGET and config.server.strategy in KEEPING:
        raise ValueError(
            f"client.micro-budget = {AUTO_BUDGET}: with server.strategy = {config.server.strategy!r} a client trains "
            "more than one model, and the probe measures one; give a number, or 0"
        )
    if keys.share < 1.0 and config.distill.general_rounds:
        raise ValueError(
            f"client.share = {keys.share}: distill.general-rounds = {config.distill.general_rounds} are over whole "
            "shards; give 1, or no general rounds"
        )
    if not keys.grow_batch:
        return
    if keys.lr_decay != "constant":
        raise ValueError(
            f"client.grow-batch = true: the batch grows instead of the learning rate decaying, but "
            f"client.lr-decay = {keys.lr_decay!r}; give constant"
        )
    if keys.max_token_budget < keys.token_budget:
        raise ValueError(
            f"client.max-token-budget = {keys.max_token_budget}: client.grow-batch = true starts from "
            f"client.token-budget = {keys.token_budget}; give at least that"
        )
    if config.server.cohort == 1:
        raise ValueError("client.grow-batch = true: one client has no noise scale; give server.cohort = 2 or more")
    if config.server.strategy in (*ROBUST, *KEEPING):
        raise ValueError(
            f"client.grow-batch = true: no noise scale is measured with server.strategy = "
            f"{config.server.strategy!r}; give false"
        )


def _votes_are_no_updates(config: Keys) -> None:
    keys = config.server
    if keys.strategy not in VOTING:
        return
    wrong = {
        f"server.wire = {keys.wire!r}": (keys.wire != "fp32", "fp32"),
        f"server.norm-bound = {keys.norm_bound}": (keys.norm_bound > 0, "0"),
        f"server.packing = {keys.packing!r}": (keys.packing != "on", "auto"),
        f"server.lr = {keys.lr}": (keys.lr != 1.0, "0"),
        f"server.warmup-rounds = {keys.warmup_rounds}": (keys.warmup_rounds > 0, "0"),
        f"server.lr-decay = {keys.lr_decay!r}": (keys.lr_decay != "constant", "constant"),
    }
    for told, (found, right) in wrong.items():
        if found:
            raise ValueError(f"{told}: with server.strategy = {keys.strategy!r} no update travels; give {right}")
    if config.student.is_weighed:
        raise ValueError(
            f"student.width-selection = 'importance': with server.strategy = {keys.strategy!r} nothing but outputs on "
            "public text travels, and this is measured on private text; give 'random'"
        )
    if keys.strategy == "ds-fl" and config.task == "stsb":
        raise ValueError("server.strategy = 'ds-fl': it averages probabilities, and stsb has none; give 'fedmd'")


def _mentors_need_labels(config: Keys) -> None:
    keys = config.distill
    if config.server.strategy != "fedkd":
        return
    wrong = {
        f"distill.hard-weight = {keys.hard_weight}": (keys.hard_weight == 0, "more than 0: it learns from labels"),
        f"distill.weighting = {keys.weighting!r}": (keys.weighting != "constant", "constant: it weighs by itself"),
        f"distill.cls-weight = {keys.cls_weight}": (keys.cls_weight > 0, "0, or distill.hidden-weight"),
        f"distill.relation-weight = {keys.relation_weight}": (
            keys.relation_weight > 0, "0, or distill.hidden-weight",
        ),
    }  # fmt: skip
    for told, (found, right) in wrong.items():
        if found:
            raise ValueError(f"{told}: server.strategy = 'fedkd' does not use it so; give {right}")


def resolve_server(given: dict[str, Any]) -> dict[str, Any]:
    """The server's keys with ``auto`` values put in."""
    keys = dict(given)
    if keys.get("lr", 0.0) == 0.0 and type(keys.get("lr", 0.0)) in (int, float):
        keys["lr"] = 0.01 if keys.get("strategy") in ADAPTIVE else 1.0
    if keys.get("wire", "auto") == "auto":
        keys["wire"] = "svd" if keys.get("strategy") == "fedkd" else "fp32"
    if keys.get("packing", "auto") == "auto":
        keys["packing"] = "off" if _needs_own_updates(keys) else "on"
    return keys


def _needs_own_updates(keys: dict[str, Any]) -> list[str]:
    """Which of the server's keys need each client's own update."""
    found = [f"strategy = {keys['strategy']!r}"] if keys.get("strategy") in (*ROBUST, *FUSED) else []
    found += [f"norm-bound = {keys['norm-bound']}"] if keys.get("norm-bound") else []
    found += [f"wire = {keys['wire']!r}"] if keys.get("wire", "fp32") != "fp32" else []
    return [f"server.{key}" for key in found]


def _refuse(told: str, against: dict[str, bool]) -> None:
    """Raise ValueError for the first of some keys that is found beside the one that is told of."""
    for other, found in against.items():
        if found:
            raise ValueError(f"{told}: {other} does not fit that; give one of them")
