"""Every server rule and every wire in real Flower runs on Ray, with tiny random models."""

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import safetensors.numpy
import torch

from common.compression import Kind
from common.config import load_config
from common.errors import InputError
from common.keys import ROBUST
from common.progress import Silent
from server.checkpoint import checkpoint_folder
from server.preparation import prepare
from server.rules import SERVER_RULES
from tests.conftest import make_tokenizer
from tests.integration.conftest import read_lines
from tests.integration.faulty import Outcome, Stage

RULES = (*SERVER_RULES, *ROBUST)
WIRES = get_args(Kind)
# of the bytes that fp32 needs for the same student, headers and accounting included
SHARE = {"fp16": 0.51, "int8": 0.27, "topk": 0.05, "svd": 0.5}
CLIENTS = 12


@pytest.fixture(scope="module")
def keys(tiny_teacher: Path) -> dict[str, Any]:
    return {
        "teacher.model": tiny_teacher,
        "data.limit": 400,
        "data.max-length": 32,
        "student.layers": 1,
        "rounds": 2,
        "client.lr": 0.01,
    }


@pytest.fixture(scope="module")
def by_one_worker(tmp_path_factory: pytest.TempPathFactory, keys: dict[str, Any]) -> dict[str, Outcome]:
    """For each wire the run on a single worker."""
    with Stage(tmp_path_factory.mktemp("one-worker"), {**keys, "runtime.workers": 1}) as stage:
        return {wire: stage.run(*four_rounds(wire), nodes=1) for wire in WIRES}


def four_rounds(wire: str) -> tuple[str, ...]:
    """With a cohort that changes, so that clients rest between updates."""
    return (f"server.wire={wire}", "rounds=4", "server.cohort=8")


@pytest.fixture(scope="module")
def run(
    tmp_path_factory: pytest.TempPathFactory, keys: dict[str, Any], by_one_worker: dict[str, Outcome]
) -> Iterator[Callable[..., Outcome]]:
    """Run with these settings on two workers, once. A process can hold one Ray: the other is down by now."""
    known: dict[tuple[str, ...], Outcome] = {}
    with Stage(tmp_path_factory.mktemp("two-workers"), {**keys, "runtime.workers": 2}) as stage:

        def call(*settings: str) -> Outcome:
            if settings not in known:
                known[settings] = stage.run(*settings)
                check_whole(known[settings])
            return known[settings]

        yield call


def check_whole(run: Outcome) -> None:
    assert run.error is None
    assert run.summary["status"] == "completed"
    assert set(run.faults.values()) == {0}
    cohort = load_config(run.path / "config.toml").server.cohort or CLIENTS
    assert all(run.line("train", number)["clients"] == cohort for number in (1, 2))


@pytest.fixture(scope="module")
def wide_teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random BERT classifier that is large enough for headers not to matter: 128 wide, two layers."""
    import transformers as hf

    folder = tmp_path_factory.mktemp("wide-teacher")
    make_tokenizer(folder)
    size = {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 256}
    vocab = len(hf.AutoTokenizer.from_pretrained(folder))
    torch.manual_seed(0)
    config = hf.BertConfig(vocab_size=vocab, max_position_embeddings=66, num_labels=2, **size)
    hf.AutoModelForSequenceClassification.from_config(config).save_pretrained(folder)
    return folder


# --- rules ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", RULES)
def test_a_rule_completes_and_says_how_updates_travelled(run, strategy):
    found = run(f"server.strategy={strategy}")
    config = load_config(found.path / "config.toml")
    assert config.server.packing == ("off" if strategy in ROBUST else "on")
    others = {name: run(f"server.strategy={name}").student for name in RULES if name != strategy}
    assert found.student not in others.values(), "two rules gave the same student"


@pytest.mark.parametrize("strategy", ["fedavg", "fedadam"])
def test_packing_changes_no_bit(run, strategy):
    rule = f"server.strategy={strategy}"
    assert run(rule, "server.packing=off").student == run(rule).student
    # one sum for each of two workers, or one update for each of twelve clients
    assert run(rule, "server.packing=off").costs("train")["bytes_up"] > run(rule).costs("train")["bytes_up"]


def test_a_norm_bound_holds_the_round_within_it(run):
    free, bound = (moved(run(*settings)) for settings in (("rounds=2",), ("server.norm-bound=0.05",)))
    assert free > 0.05
    assert 0.0 < bound <= 0.05 * (1 + 1e-6)


def test_a_norm_bound_that_nobody_reaches_changes_no_bit(run):
    assert run("server.norm-bound=1e6").student == run("server.packing=off").student


def moved(run: Outcome) -> float:
    """How far the last round moved the student."""
    before, after = (
        safetensors.numpy.load_file(checkpoint_folder(run.path / "checkpoints", number) / "student.safetensors")
        for number in (1, 2)
    )
    return float(np.sqrt(sum(np.square(after[name] - before[name], dtype=np.float64).sum() for name in before)))


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        (("server.strategy=krum", "server.byzantine=5"), "krum needs at least 2 x 5 + 3 = 13 clients a round"),
        (("server.strategy=trimmed-mean", "server.byzantine=6"), "trimmed-mean needs at least 2 x 6 + 1 = 13 clients"),
        (("server.strategy=multi-krum", "server.cohort=4"), "server.byzantine at most 0 or a larger server.cohort"),
    ],
)
def test_a_cohort_too_small_for_the_rule_is_refused_before_round_1(keys, settings, told):
    config = load_config(None, [*(f"{key}={value}" for key, value in keys.items()), *settings])
    with pytest.raises(InputError, match=r"^server\.byzantine = ") as refusal:
        prepare(config, Silent())
    assert told in str(refusal.value)


def test_the_largest_byzantine_that_a_cohort_bears_is_taken(run):
    run("server.strategy=multi-krum", "server.byzantine=4")
    run("server.strategy=trimmed-mean", "server.byzantine=5")


# --- wires ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("wire", [wire for wire in WIRES if wire != "fp32"])
def test_a_lossy_wire_saves_bytes(run, wide_teacher, wire):
    wide = (f"teacher.model={wide_teacher}", "student.layers=2", "client.lr=0.001")
    whole, found = run(*wide, "server.packing=off"), run(*wide, f"server.wire={wire}")
    share = bytes_up(found) / bytes_up(whole)
    assert 0.0 < share <= SHARE[wire]
    assert found.student != whole.student
    gap = abs(found.line("train", 2)["loss"] - whole.line("train", 2)["loss"])
    assert gap < 0.1 * whole.line("train", 2)["loss"]


def bytes_up(run: Outcome) -> int:
    return sum(run.costs("train", number)["bytes_up"] for number in (1, 2))


@pytest.mark.parametrize("wire", WIRES)
def test_one_and_two_workers_give_the_same_bits(run, by_one_worker, wire):
    """Error feedback included: what a round left out reaches the next one, whichever worker has the client then."""
    assert by_one_worker[wire].student == run(*four_rounds(wire)).student
    assert learnt(by_one_worker[wire]) == learnt(run(*four_rounds(wire)))


def learnt(run: Outcome) -> list[dict[str, Any]]:
    return [line for line in read_lines(run.path) if line["phase"] != "teach"]


def test_what_a_wire_leaves_out_is_kept_for_each_client(run):
    found = run(*four_rounds("topk"))
    state = json.loads((checkpoint_folder(found.path / "checkpoints", 4) / "state.json").read_text())
    assert len(state["feedback"]) == CLIENTS
    kept = Path(os.environ["FEDISTILL_CACHE"]) / "error-feedback" / state["run"]
    for client, number in state["feedback"]:
        residual = safetensors.numpy.load_file(kept / str(client) / f"round-{number:05d}.safetensors")
        assert any(array.any() for array in residual.values())
