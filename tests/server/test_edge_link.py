"""What travels with a run: no code, no data."""

import io
import tomllib
import zipfile
from pathlib import Path

import pytest
from flwr.cli.build import build_fab_from_disk

from common.errors import InputError
from server.edge_folder import init
from server.edge_link import LinkLost, control_of, edge_run, make_bundle, nodes_of_clients

ROOT = Path(__file__).resolve().parents[2]


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


def test_without_a_server_there_is_no_run(tmp_path):
    folder = init(tmp_path / "fed", "127.0.0.1", 1, 9092)
    with pytest.raises(InputError, match="no server runs from here; start one"):
        control_of(folder)
    with pytest.raises(LinkLost, match="no server runs from here"), edge_run(folder, lambda: False):
        pass
    with pytest.raises(LinkLost, match="no server runs from here"):
        nodes_of_clients(folder)
