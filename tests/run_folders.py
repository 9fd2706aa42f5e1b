"""Run folders as a run leaves them, for what reads them: small, with numbers that are known beforehand."""

import json

import numpy as np

from common.config import from_flat

TIERS = [
    {"layers": 1, "heads": 1, "neurons": 8, "params": 500, "clients": 2},
    {"layers": 2, "heads": 2, "neurons": 16, "params": 700, "clients": 2},
]
SHAPES = {
    "teacher": {"layers": [0, 1, 2, 3], "heads": 2, "neurons": 32, "pieces": 60, "rank": 0, "hidden": 16},
    "student": {"layers": [0, 3], "heads": 1, "neurons": 16, "pieces": 50, "rank": 4},
}


def make_run(folder, *, rounds=3, clients=4, tiers=False, faults=False, killed=False, classes=("no", "yes"), **keys):
    """Write a run: round r scores 0.5 + 0.1 r / rounds of the teacher's 0.8.

    Args:
        killed: it has no summary, and the last line of its journal is half there.
        keys: as `data__alpha=1.0`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    flat = {name.replace("__", ".").replace("_", "-"): value for name, value in keys.items()}
    config = from_flat({"rounds": rounds, "data.clients": clients, **flat})
    (folder / "config.toml").write_text(config.toml())
    lines = [line for number in range(rounds + 1) for line in _lines(number, rounds, clients, tiers, faults)]
    costs = [
        {"round": number, "phase": phase, "seconds": seconds, "bytes_up": up, "bytes_down": 1000, "busy": [0.5, 0.9],
         "recovered": [1] if faults and number == 2 and phase == "train" else [], "surplus": []}
        for number in range(1, rounds + 1)
        for phase, seconds, up in (("teach", 1.0, 10), ("train", 2.0, 2000), ("evaluate", 0.5, 90))
    ]  # fmt: skip
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "costs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in costs))
    counts = np.random.default_rng(0).integers(0, 20, (clients, len(classes)))
    counts[0] = 0  # left out
    (folder / "shards.json").write_text(json.dumps({"classes": list(classes), "counts": counts.tolist()}))
    if killed:
        with (folder / "metrics.jsonl").open("a") as stream:
            stream.write('{"round": 9, "pha')
        return folder
    (folder / "summary.json").write_text(json.dumps(_summary(rounds, clients, tiers, faults)))
    return folder


def score(number, rounds):
    return 0.5 + 0.1 * number / rounds


def _lines(number, rounds, clients, tiers, faults):
    found, none = score(number, rounds), {"failed": [], "rejected": [], "late": []}
    valid = {"round": number, "phase": "validation", "student": {"accuracy": found + 0.05, "n": 9}}
    if tiers:
        valid["tiers"] = [{**tier, "validation": {"accuracy": found, "n": 9}} for tier in TIERS]
    if not number:
        return [valid]
    lost = {**none, "failed": [2], "late": [3]} if faults and number == 2 else none
    losses = {"loss": 1 / number, "soft_loss": 0.5 / number, "hard_loss": 1.5 / number, "hidden_loss": 0.0}
    train = {"round": number, "phase": "train", "clients": clients, "examples": 100, **losses, **lost}
    spread = {"worst_decile": found - 0.2, "std": 0.1, "mean": found, "clients": clients}
    scored = {"round": number, "phase": "evaluate", "student": {"accuracy": found, "n": 40},
              "teacher": {"accuracy": 0.8, "n": 40}, "retention": found / 0.8, "clients": clients,
              "spread": spread, **none}  # fmt: skip
    if tiers:
        scored["tiers"] = [{**tier, "federated": {"accuracy": found, "n": 20}} for tier in TIERS]
    return [{"round": number, "phase": "teach", "clients": clients, **none}, train, scored, valid]


def _summary(rounds, clients, tiers, faults):
    own = {"federated": {"accuracy": 0.6, "n": 40}, "teacher": {"accuracy": 0.8, "n": 40}}
    return {
        "status": "completed", "task": "toy", "metric": "accuracy", "seed": 0, "rounds": rounds, "clients": clients,
        "clients_left_out": 1, "cohort": clients,
        "teacher": {"params": 1000, "shape": SHAPES["teacher"], "federated": own["teacher"],
                    "validation": {"accuracy": 0.9, "n": 9}, "fine_tuned_on": 10},
        "student": {"params": 400, "params_ratio": 0.4, "shape": SHAPES["student"], "federated": own["federated"],
                    "validation": {"accuracy": 0.65, "n": 9}},
        "tiers": [{**tier, **own, "validation": {"accuracy": 0.6, "n": 9}} for tier in TIERS] if tiers else [],
        "retention": {"federated": 0.75, "validation": 0.65 / 0.9},
        "spread": {"worst_decile": 0.4, "std": 0.1, "mean": 0.6, "clients": clients},
        "privacy": {"unit": "none", "epsilon": None, "delta": None, "accountant": None},
        "cost": {"wall_s": 60.0, "train_s": 2.0 * rounds, "examples": 100 * rounds, "examples_per_s": 50.0,
                 "bytes_up": 2100 * rounds, "bytes_down": 3000 * rounds, "peak_rss_mb": 1500.0},
        "faults": {"failed": 1, "rejected": 0, "late": 1, "retried": 1} if faults
        else {"failed": 0, "rejected": 0, "late": 0, "retried": 0},
        "student_sha256": "ab" * 32,
        "versions": {"python": "3.11.7", "fedistill": "0.1.0"},
    }  # fmt: skip
