"""Figures of the summary against hand-computed ones."""

import math

import pytest

from server.history import client_spread, retention, unprepared_summary


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


def test_a_run_that_never_began_says_what_it_was(tmp_path):
    from common.config import Config

    summary = unprepared_summary(Config(), "failed")
    assert (summary["status"], summary["task"], summary["rounds"]) == ("failed", "toy", 0)
    assert "torch" in summary["versions"]
