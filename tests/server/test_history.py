"""Figures of the summary against hand-computed ones."""

import json
import math
from dataclasses import asdict, replace
from types import SimpleNamespace

import pytest
import torch
from transformers import BertConfig

from common.config import from_flat
from common.hashing import hash_tensors
from common.privacy_keys import PrivacyKeys
from common.slim import Shape
from common.wire import ClientLine
from server.history import History, client_spread, retention, summarise, unprepared_summary
from server.privacy_report import spending_of_examples


def test_retention_is_the_students_share_of_the_teachers_score():
    assert retention({"f1": 0.6}, {"f1": 0.8}, "f1") == pytest.approx(0.75)
    assert retention({"matthews": -0.1}, {"matthews": 0.5}, "matthews") == pytest.approx(-0.2)


@pytest.mark.parametrize("teacher", [{"f1": 0.0}, {"f1": -0.3}, {"f1": math.nan}, {}])
def test_retention_of_a_teacher_without_merit_means_nothing(teacher):
    assert math.isnan(retention({"f1": 0.6}, teacher, "f1"))
    assert math.isnan(retention({}, {"f1": 0.8}, "f1"))


def test_client_spread_hand_case():
    """Eleven scores 0.0, 0.1 ... 1.0: the worst tenth ends at 0.1; variance (121 - 1) / 12 hundredths."""
    found = client_spread([None, *[i / 10 for i in range(11)], None])
    assert found == pytest.approx({"worst_decile": 0.1, "mean": 0.5, "std": 0.1 * math.sqrt(10), "clients": 11})


def test_clients_without_a_score_of_their_own_do_not_count():
    assert client_spread([]) == client_spread([None, None]) == {"clients": 0}
    assert client_spread([0.7, None]) == {"worst_decile": 0.7, "std": 0.0, "mean": 0.7, "clients": 1}


HISTORY = History(
    rounds=3, examples=600, train_seconds=4.0, bytes_up=10, bytes_down=20, failed=1, rejected=2, late=3, retried=5,
    seconds=100.0, losses={"loss": 0.5}, student={"f1": 0.6, "n": 40}, teacher={"f1": 0.8, "n": 40},
    validation={"f1": 0.45, "n": 9}, spread={"clients": 2},
)  # fmt: skip


def federation(**keys):
    """A student of three weights and a bias, a teacher of twenty; seven clients, of whom six take part."""
    model = torch.nn.Linear(4, 4)
    model.config = BertConfig(  # type: ignore[assignment]
        num_hidden_layers=4, num_attention_heads=3, intermediate_size=9, hidden_size=6, vocab_size=60
    )
    return SimpleNamespace(
        config=from_flat({"seed": 11} | {name.replace("__", "."): value for name, value in keys.items()}),
        data=SimpleNamespace(task=SimpleNamespace(name="mrpc", headline="f1"), clients=7, eligible=range(6)),
        drawn_from=range(6),
        student=torch.nn.Linear(3, 1, bias=True).requires_grad_(False),
        tiers=[None],
        teacher=SimpleNamespace(fine_tuned_on=77),
        lesson=SimpleNamespace(model=model, validation={"f1": 0.9, "n": 9}),
        pupil=SimpleNamespace(shape=Shape((0, 3), ((1, 0), (2, 1)), ((4, 2, 0), (1, 3, 5)), 50, 7)),
    )


def test_a_summary_holds_what_a_run_has_measured():
    run = federation()
    summary = summarise(run, HISTORY, "completed", 30.0)
    assert (summary["status"], summary["task"], summary["metric"], summary["seed"]) == ("completed", "mrpc", "f1", 11)
    assert (summary["rounds"], summary["clients"], summary["clients_left_out"], summary["cohort"]) == (3, 7, 1, 6)
    assert summary["student"]["params"] == 4
    assert summary["student"]["params_ratio"] == 0.2
    assert summary["student"]["federated"] == {"f1": 0.6, "n": 40}
    assert summary["student"]["shape"] == {"layers": [0, 3], "heads": 2, "neurons": 3, "pieces": 50, "rank": 7}
    assert summary["teacher"]["params"] == 20
    whole = {"layers": [0, 1, 2, 3], "heads": 3, "neurons": 9, "pieces": 60, "rank": 0, "hidden": 6}
    assert summary["teacher"]["shape"] == whole
    assert summary["teacher"]["validation"] == {"f1": 0.9, "n": 9}
    assert summary["retention"] == pytest.approx({"federated": 0.75, "validation": 0.5})
    assert summary["spread"] == {"clients": 2}
    assert summary["faults"] == {"failed": 1, "rejected": 2, "late": 3, "retried": 5}
    assert summary["student_sha256"] == hash_tensors(run.student.state_dict())
    assert summary["privacy"]["unit"] == "none"


def test_a_runs_cost_is_that_of_all_its_processes():
    cost = summarise(federation(), HISTORY, "completed", 30.0)["cost"]
    assert cost["wall_s"] == 130.0
    assert (cost["train_s"], cost["examples"], cost["examples_per_s"]) == (4.0, 600, 150.0)
    assert (cost["bytes_up"], cost["bytes_down"]) == (10, 20)
    assert cost["peak_rss_mb"] > 10
    assert summarise(federation(), History(), "failed", 1.0)["cost"]["examples_per_s"] == 0.0


def test_the_cohort_of_a_summary_is_the_one_that_was_asked_for():
    assert summarise(federation(data__clients=7, server__cohort=4), HISTORY, "failed", 1.0)["cohort"] == 4


def test_a_cohort_is_no_larger_than_those_that_it_is_drawn_from():
    whole = federation(data__clients=7, server__cohort=4)
    whole.drawn_from = range(2)  # only who holds the whole student trains
    assert summarise(whole, HISTORY, "failed", 1.0)["cohort"] == 2


def test_a_history_goes_on_from_json_as_if_it_had_never_stopped():
    again = History(**json.loads(json.dumps(asdict(HISTORY))))
    assert again == HISTORY
    assert History(**asdict(History())) == History()


def test_a_run_that_never_began_says_what_it_was(tmp_path):
    from common.config import Config

    summary = unprepared_summary(Config(), "failed")
    assert (summary["status"], summary["task"], summary["rounds"]) == ("failed", "toy", 0)
    assert "torch" in summary["versions"]


def test_the_epsilon_of_a_run_is_the_largest_that_a_client_says():
    keys = PrivacyKeys(unit="example", epsilon=4.0, delta=1e-6, accountant="prv")
    lines = [
        ClientLine(0, 5, 0.1, epsilon=1.5, lifetime_epsilon=3.0),
        ClientLine(1, 5, 0.1, epsilon=2.0, lifetime_epsilon=2.0),
    ]
    first = spending_of_examples(keys, {}, lines)
    assert (first["epsilon"], first["lifetime_epsilon"], first["delta"], first["accountant"]) == (2.0, 3.0, 1e-6, "prv")
    # a client that is in no later round keeps what it has spent
    later = spending_of_examples(keys, first, [ClientLine(0, 5, 0.1, epsilon=1.9, lifetime_epsilon=3.4)])
    assert (later["epsilon"], later["lifetime_epsilon"]) == (2.0, 3.4)
    assert later["protects"] == {"student": True, "updates": True, "scores": False, "counts": False, "times": False}
    unbounded = spending_of_examples(keys, later, [ClientLine(0, 5, 0.1)])
    assert unbounded["epsilon"] is None and not any(unbounded["protects"].values())
    assert spending_of_examples(keys, unbounded, lines)["epsilon"] is None
    run = federation(privacy__unit="example", privacy__epsilon=4.0)
    block = summarise(run, replace(HISTORY, privacy=later), "completed", 1.0)["privacy"]
    assert block == {**spending_of_examples(run.config.privacy, later, []), "secure_aggregation": False}
