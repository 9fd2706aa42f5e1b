"""Runs of real clients: the same bits as a simulation, what leaves a client, and what a run survives."""

import csv
import json
import shutil
import time

import numpy as np
import psutil

from common.dataset import load_tokenizer
from common.models import load_teacher
from server.edge_folder import revoke
from tests.integration.conftest import read_lines, read_summary
from tests.integration.edges import Proxy, home, make, simulated, until


def learnt(run):
    """What the metrics file says was learnt; who was sent what is another matter."""
    return [line for line in read_lines(run) if line["phase"] not in ("supply", "teach")]


def test_a_run_of_real_clients_is_a_simulation_bit_for_bit_and_no_text_leaves(
    federation, fedistill, keys, texts, tmp_path
):
    links = [Proxy(federation.folder) for _ in range(len(federation))]
    for number, link in enumerate(links):
        link.lead_through(number)
    federation.start_clients()
    run = federation.run(tmp_path / "run", *keys)
    assert run.exit_code() == 0, run.text()
    simulated(fedistill, texts, keys)
    ours, theirs = read_summary(tmp_path / "run"), read_summary(tmp_path / "simulated")
    assert ours["status"] == "completed"
    assert ours["student_sha256"] == theirs["student_sha256"]
    assert learnt(tmp_path / "run") == learnt(tmp_path / "simulated")
    assert (tmp_path / "run" / "student" / "model.safetensors").is_file()
    assert (tmp_path / "run" / "report.html").is_file()

    teacher = load_teacher(home(federation.folder, 0) / "state" / "teachers" / teacher_of(federation, 0))
    tokenizer = load_tokenizer(tmp_path / "run" / "student")
    for number, link in enumerate(links):
        sent = bytes(link.sent)
        assert len(sent) > 10_000
        for text in private_texts(texts, number):
            assert text.encode() not in sent
            pieces = tokenizer(text)
            for kind in (np.int64, np.int32, np.uint16):
                assert np.asarray(pieces["input_ids"], dtype=kind).tobytes() not in sent
            logits = teacher(**tokenizer(text, return_tensors="pt")).logits
            assert logits.numpy().tobytes() not in sent
        assert b".csv" not in sent
        left = [line for line in federation.audit(number) if line["way"] == "sent"]
        assert {name for line in left for name in line["records"]} == {
            "joined",
            "clients",
            "update",
            "student",
            "teacher",
        }
        assert "shapes" not in {key for line in left for key in line["records"].get("clients", {})}
    assert not any(str(tmp_path).encode() in bytes(link.sent) for link in links)

    # the second run finds teacher and student where they are, and is the same
    again = federation.run(tmp_path / "again", *keys)
    assert again.exit_code() == 0, again.text()
    assert read_summary(tmp_path / "again")["student_sha256"] == ours["student_sha256"]
    assert [line["phase"] for line in read_lines(tmp_path / "again")].count("supply") == 0
    federation.stop()


def test_real_clients_add_up_under_masks_to_the_same_bits_and_tell_no_counts(
    federation, fedistill, keys, texts, tmp_path
):
    federation.start_clients()
    keys = [*keys, "-s", "rounds=1"]
    run = federation.run(tmp_path / "run", *keys, "-s", "privacy.secure-aggregation=true")
    assert run.exit_code() == 0, run.text()
    simulated(fedistill, texts, keys)
    ours, theirs = read_summary(tmp_path / "run"), read_summary(tmp_path / "simulated")
    assert ours["privacy"]["secure_aggregation"] is True
    assert ours["student_sha256"] == theirs["student_sha256"]
    assert ours["student"]["federated"] == theirs["student"]["federated"]
    assert json.loads((tmp_path / "run" / "clients.json").read_text()) == {
        str(n): [1, 1] for n in range(len(federation))
    }
    for number in range(len(federation)):
        sent = [line for line in federation.audit(number) if line["way"] == "sent" and line["kind"] == "train"]
        assert [line["records"]["update"]["shapes"].keys() for line in sent] == [{"masked"}]
        kept = [
            path.read_text() for path in (home(federation.folder, number) / "state").glob("**/secure-sums/*/*/*.json")
        ]
        assert kept
        assert not any("seed" in text for text in kept)
    federation.stop()


def teacher_of(federation, number):
    return next((home(federation.folder, number) / "state" / "teachers").glob("?" * 64)).name


def private_texts(texts, number):
    with (texts / "private" / f"{number}.csv").open() as stream:
        return [row["text"] for row in csv.DictReader(stream)]


def test_a_run_outlives_kills_of_everything_and_gives_the_same_student(federation, fedistill, keys, texts, tmp_path):
    """A worker in training, a SuperNode, the SuperLink; links that are cut, slow, and down for a while."""
    keys = [*keys, "-s", "client.epochs=40", "-s", "rounds=6"]  # long enough to be hit
    link = Proxy(federation.folder)
    link.lead_through(2)
    federation.start_clients()
    out = tmp_path / "run"
    run = federation.run(out, *keys)

    in_training(federation, 0)
    federation.worker(0).kill()
    federation.clients[0].wait_for("the worker has ended (exit code -9")

    run.wait_for("round 2/6")
    in_training(federation, 1)
    federation.supernode(1).kill()
    federation.clients[1].wait_for("ended by itself (exit code -9")

    run.wait_for("round 3/6")
    link.cut(down=True)
    time.sleep(30)
    link.delay = 0.02
    link.cut(down=False)

    run.wait_for("round 4/6")
    link.delay = 0.0
    family = federation.server.family()
    federation.superlink().kill()
    assert federation.server.exit_code() == 1
    psutil.wait_procs(family, timeout=30)
    run.wait_for("trying again")
    federation.start_server()

    assert run.exit_code() == 0, run.text()
    simulated(fedistill, texts, keys)
    assert read_summary(out)["student_sha256"] == read_summary(tmp_path / "simulated")["student_sha256"]
    federation.stop()


def in_training(federation, number):
    """Wait until a client has been told to train and has not answered yet."""

    def trains():
        path = home(federation.folder, number) / "state" / "audit.jsonl"
        last = federation.audit(number)[-1] if path.is_file() and path.stat().st_size else {}
        return last.get("kind") == "train" and last["way"] == "received"

    until(trains, lambda: f"client {number} does not train")


def test_data_that_change_or_go_away_are_told_and_the_others_go_on(federation, keys, texts, tmp_path):
    keys = [*keys, "-s", "client.epochs=40"]
    federation.start_clients()
    run = federation.run(tmp_path / "run", *keys)
    run.wait_for("round 1/3")
    with (texts / "private" / "0.csv").open("a") as stream:
        stream.write("another sentence,good\n")
    shutil.move(texts / "private" / "1.csv", texts / "elsewhere.csv")
    until(lambda: run.process.poll() is not None or "client 1 failed" in run.text(), run.text)
    assert run.exit_code() == 1
    assert "client 0 failed: its data, or their cut, are not those that it has joined with" in run.text()
    assert "client 1 failed: its data file does not fit the task" in run.text()
    log = (home(federation.folder, 1) / "state" / "worker.log").read_text()
    assert f"{texts / 'private' / '1.csv'}: no such file" in log
    assert str(texts) not in run.text()
    assert read_summary(tmp_path / "run")["status"] == "failed"

    # two of three are enough where that is said
    shutil.move(texts / "elsewhere.csv", texts / "private" / "1.csv")
    again = federation.run(tmp_path / "again", *keys, "-s", "server.max-lost-fraction=0.6")
    again.wait_for("round 1/3")
    shutil.move(texts / "private" / "1.csv", texts / "elsewhere.csv")
    assert again.exit_code() == 0, again.text()
    summary = read_summary(tmp_path / "again")
    assert summary["status"] == "completed"
    assert summary["faults"]["failed"] >= 1
    federation.stop()


def test_ctrl_c_ends_a_run_and_it_can_be_resumed(federation, fedistill, keys, texts, tmp_path):
    keys = [*keys, "-s", "client.epochs=40"]
    federation.start_clients()
    out = tmp_path / "run"
    run = federation.run(out, *keys)
    run.wait_for("round 1/3")
    assert run.stop() == 130
    assert read_summary(out)["status"] == "interrupted"
    again = federation.run(out, "--resume")
    assert again.exit_code() == 0, again.text()
    simulated(fedistill, texts, keys)
    assert read_summary(out)["student_sha256"] == read_summary(tmp_path / "simulated")["student_sha256"]
    federation.stop()


def test_a_run_without_a_server_or_enough_clients_says_so(edge, federation, keys, texts, tmp_path):
    missing = make(tmp_path / "idle", 1)
    none = edge("run", missing.path, *keys, "--out", tmp_path / "none")
    assert none.exit_code() == 2
    assert "no server runs from here" in none.text()
    federation.clients = []
    few = federation.run(tmp_path / "few", *keys, "--wait", "3")
    assert few.exit_code() == 1
    assert "0 of 3 clients have joined in 3 s; 3 are needed" in few.text()
    assert federation.server.stop() == 0


def test_one_that_is_struck_off_in_a_run_is_lost_alone_and_limits_are_its_owners(federation, keys, texts, tmp_path):
    keys = [*keys, "-s", "client.token-budget=64", "-s", "server.max-lost-fraction=0.6", "-s", "rounds=8"]
    federation.start_clients("--max-seconds", "0.001")
    run = federation.run(tmp_path / "run", *keys)
    run.wait_for("round 1/8")
    revoke(federation.folder, "2")
    federation.server.wait_for("client 2 revoked")
    assert run.exit_code() == 0, run.text()
    lines = [line for line in read_lines(tmp_path / "run") if line["phase"] == "train"]
    assert [line["clients"] for line in lines][-1] == 2
    assert 0 < lines[0]["examples"] < 3 * 32  # of 40 each 32 to train on; out of time after the first step
    federation.clients[2].exit_code()
    assert [client.stop() for client in federation.clients[:2]] == [0, 0]
    assert federation.server.stop() == 0
