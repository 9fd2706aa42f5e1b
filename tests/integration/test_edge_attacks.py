"""Real clients that lie, repeat others or themselves, or have no room: they are named, and the others go on."""

import pytest

from tests.integration.conftest import read_lines, read_summary
from tests.integration.edges import Federation, Proxy, home, make, simulated, two_machines, write_texts

HOSTILE = {2: "NaN", 3: "a huge header", 4: "an earlier answer"}
TOLD = {2: "expected <i8 of shape", 3: "expected <i8 of shape", 4: "its answer is to another question"}


@pytest.mark.parametrize("texts", [5], indirect=True)
def test_whoever_sends_no_update_of_this_round_is_named_and_left_out(federation, keys, tmp_path):
    """NaN, an array that says it has 36 TiB, and the update of round 1 in all later rounds."""
    for number in range(5):
        module = {"module": ("tests.integration.hostile", HOSTILE[number])} if number in HOSTILE else {}
        federation.clients.append(federation.start_client(number, **module))
    for client in federation.clients:
        client.wait_for("joined ")
    run = federation.run(tmp_path / "run", *keys, "-s", "server.max-lost-fraction=0.6")
    assert run.exit_code() == 0, run.text()
    trained = [line for line in read_lines(tmp_path / "run") if line["phase"] == "train"]
    assert [line["rejected"] for line in trained] == [[2, 3], [2, 3, 4], [2, 3, 4]]
    assert [line["clients"] for line in trained] == [3, 2, 2]
    for number, words in TOLD.items():
        assert any(f"client {number} rejected: " in line and words in line for line in run.text().splitlines())
    assert read_summary(tmp_path / "run")["status"] == "completed"
    federation.stop()


def test_what_a_client_has_said_counts_once_however_often_it_is_said(federation, fedistill, keys, texts, tmp_path):
    """Somebody in between, who can even read along, says all of client 2's requests again."""
    link = Proxy(federation.folder)
    link.lead_through(2)
    federation.start_clients()
    run = federation.run(tmp_path / "run", *keys)
    run.wait_for("round 2/3")
    assert link.replay() > 0
    assert run.exit_code() == 0, run.text()
    simulated(fedistill, texts, keys)
    ours, theirs = read_summary(tmp_path / "run"), read_summary(tmp_path / "simulated")
    assert ours["student_sha256"] == theirs["student_sha256"]
    assert ours["faults"]["rejected"] == 0
    federation.stop()


def test_a_clock_that_is_an_hour_off_is_told(federation):
    client = federation.start_client(0, module=("tests.integration.hostile", "an hour ahead"))
    assert client.exit_code() == 2
    assert "the clocks of this machine and of" in client.text()
    assert "1:00:0" in client.text() or "0:59:5" in client.text()
    assert federation.server.stop() == 0


def test_a_client_with_a_full_disk_is_lost_alone_and_is_back_when_there_is_room(federation, keys, tmp_path):
    keys = [*keys, "-s", "server.max-lost-fraction=0.6"]
    full = ("prlimit", "--fsize=30000")  # no file may grow beyond so many bytes: less than a model has
    federation.clients = [federation.start_client(number, prefix=full if number == 1 else ()) for number in range(3)]
    for client in federation.clients:
        client.wait_for("joined ")
    run = federation.run(tmp_path / "run", *keys)
    assert run.exit_code() == 0, run.text()
    assert "client 1 failed: its disk is full" in run.text()
    assert read_summary(tmp_path / "run")["status"] == "completed"
    assert federation.clients[1].stop() == 0
    assert not list((home(federation.folder, 1) / "state" / "teachers").glob("?" * 64))  # nothing half

    federation.clients[1] = federation.start_client(1)
    federation.clients[1].wait_for("joined ")
    again = federation.run(tmp_path / "again", *keys)
    assert again.exit_code() == 0, again.text()
    assert [line["clients"] for line in read_lines(tmp_path / "again") if line["phase"] == "train"] == [3, 3, 3]
    federation.stop()


def test_a_slow_link_changes_the_time_alone(edge, fedistill, keys, tmp_path):
    """Two megabits a second, where network namespaces are allowed; else the way through another address."""
    texts = write_texts(tmp_path / "one", 1)
    keys = [part.replace(str(tmp_path / "data"), str(texts)) for part in keys]
    with two_machines(rate="2mbit") as (server_side, client_side, address):
        folder = make(tmp_path / "fed", 1, host=address)
        federation = Federation(lambda *given: edge(*given, prefix=server_side), texts, folder)
        client = edge("client", home(folder, 0), "--data", texts / "private" / "0.csv", prefix=client_side)
        client.wait_for("joined ")
        run = federation.run(tmp_path / "run", *keys)
        assert run.exit_code() == 0, run.text()
        assert client.stop() == 0
        assert federation.server.stop() == 0
    simulated(fedistill, texts, keys)
    shas = [read_summary(tmp_path / name)["student_sha256"] for name in ("run", "simulated")]
    assert shas[0] == shas[1]
