"""A run that hides its clients, with cohorts of one client in the mean, some of them empty; then it goes on."""

import json
import shutil

from tests.integration.conftest import read_lines, read_summary

TOLD = {"round", "phase", "student", "teacher", "retention", "clip_norm", "noise_multiplier"}


def test_a_run_that_hides_its_clients_spends_what_it_may_and_tells_nothing_else(fedistill, tiny, tmp_path):
    keys = {
        "privacy.unit": "client",
        "privacy.epsilon": 8.0,
        "privacy.accountant": "rdp",
        "privacy.adaptive-clip": 0.5,
        "privacy.scores-share": 0.25,
        "server.cohort": 1,
        "rounds": 3,
    }
    settings = [*tiny, *(part for key, value in keys.items() for part in ("-s", f"{key}={value}"))]
    done = fedistill("simulate", *settings, "--out", "run")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "allows one to be given away whole" not in done.stdout
    first = read_summary(tmp_path / "run")["privacy"]
    assert (first["unit"], first["neighbours"], first["reproducible"]) == ("client", "add or remove one client", False)
    assert first["protects"] == {"student": True, "scores": True, "cost": False, "faults": False}
    assert 7.9 < first["epsilon"] <= 8.0
    assert first["rounds_charged"] == 3

    more = fedistill("simulate", "--out", "run", "--resume", "-s", "rounds=4")
    assert more.returncode == 2
    assert "nothing is left" in more.stderr + more.stdout

    shutil.rmtree(tmp_path / "run" / "checkpoints" / "round-00003")  # as if killed before it was there
    student = read_summary(tmp_path / "run")["student_sha256"]
    again = fedistill("simulate", "--out", "run", "--resume")
    assert again.returncode == 0, again.stdout + again.stderr
    assert read_summary(tmp_path / "run")["student_sha256"] == student
    assert read_summary(tmp_path / "run")["privacy"] == first

    assert all(set(line) <= TOLD for line in read_lines(tmp_path / "run"))
    ledger = [json.loads(line) for line in (tmp_path / "run" / "privacy.jsonl").read_text().splitlines()]
    assert [(line["round"], line["what"]) for line in ledger] == [
        (number, what) for number in (1, 2, 3) for what in ("update", "scores")
    ]
    assert [line["rate"] for line in ledger if line["what"] == "scores"][-1] == 1.0
