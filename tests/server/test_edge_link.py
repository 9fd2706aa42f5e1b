"""What travels with a run: no code, no data."""

import io
import re
import threading
import time
import tomllib
import zipfile
from pathlib import Path
from types import SimpleNamespace

import httpx
import pytest
from flwr.app import Message, RecordDict
from flwr.cli.build import build_fab_from_disk
from flwr.supercore.task_identity import TaskIdentity

from common.errors import InputError
from server.edge_folder import init
from server.edge_link import EdgeGrid, LinkLost, control_of, edge_run, make_bundle, nodes_of_clients

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def _inside_an_app(monkeypatch):
    """Flower makes messages inside apps only."""
    for name in ("_run_id", "_node_id", "_task_id"):
        monkeypatch.setattr(TaskIdentity, name, 1)


def test_with_a_run_of_real_clients_a_name_and_a_version_travel():
    with zipfile.ZipFile(io.BytesIO(make_bundle())) as bundle:
        assert set(bundle.namelist()) == {"pyproject.toml", ".info/CONTENT"}
        project = tomllib.loads(bundle.read("pyproject.toml").decode())
    assert project["project"]["name"] == "fedistill"
    assert project["tool"]["flwr"]["app"]["config"] == {}


def test_with_flwr_run_code_travels_and_nothing_else():
    with zipfile.ZipFile(io.BytesIO(build_fab_from_disk(ROOT))) as bundle:
        names = set(bundle.namelist()) - {"pyproject.toml", ".info/CONTENT", "LICENSE"}
    assert {"clients/app.py", "server/app.py"} < names
    assert {(name.split("/")[0], Path(name).suffix) for name in names} == {
        ("common", ".py"), ("server", ".py"), ("clients", ".py"),
    }  # fmt: skip


def test_an_answer_that_does_not_end_holds_nobody_up():
    """As Flower's grid waits for what a client has announced and does not send."""
    sent, said = threading.Event(), {name: Message(RecordDict(), 1, "train") for name in ("slow", "well")}

    def pull(names):
        (name,) = names
        if name == "slow":
            assert sent.wait(60)
        return [said[name]]

    grid = EdgeGrid(SimpleNamespace(pull_messages=pull))
    began = time.monotonic()
    assert grid.pull_messages(["slow", "well"]) == [said["well"]]
    for _ in range(100):
        assert grid.pull_messages(["slow"]) == []
    assert time.monotonic() - began < 30
    sent.set()
    time.sleep(0.5)
    assert grid.pull_messages(["slow"]) == [said["slow"]]


@pytest.mark.parametrize(
    ("error", "told"),
    [(httpx.ConnectError("x"), None), (ValueError("what a client has sent"), r"cannot be opened \(ValueError\)")],
)
def test_a_lost_link_and_an_answer_that_does_not_open_are_told_apart(error, told):
    def pull(names):
        raise error

    grid = EdgeGrid(SimpleNamespace(pull_messages=pull))
    if told is None:
        with pytest.raises(LinkLost, match="does not answer"):
            grid.pull_messages(["a"])
    else:
        (reply,) = grid.pull_messages(["a"])
        assert reply.metadata.reply_to_message_id == "a"
        assert re.search(told, reply.error.reason)


def test_without_a_server_there_is_no_run(tmp_path):
    folder = init(tmp_path / "fed", "127.0.0.1", 1, 9092)
    with pytest.raises(InputError, match="no server runs from here; start one"):
        control_of(folder)
    with pytest.raises(LinkLost, match="no server runs from here"), edge_run(folder, lambda: False):
        pass
    with pytest.raises(LinkLost, match="no server runs from here"):
        nodes_of_clients(folder)
