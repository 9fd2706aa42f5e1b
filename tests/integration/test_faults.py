"""Broken clients in a real Flower run: what is wrong is named and left out, the others go on."""

from collections.abc import Callable
from pathlib import Path

import pytest
from flwr.clientapp import ClientApp

from common.config import load_config
from common.errors import RunFailed
from common.progress import Lines
from server.preparation import prepare
from server.run import run_federation
from server.run_folder import RunFolder
from simulations.runtime import run_on_ray
from tests.integration import faulty
from tests.integration.conftest import read_lines, read_summary

BROKEN_REPLIES = {
    "NaN": faulty.first_node_only(faulty.with_nan),
    "shape": faulty.first_node_only(faulty.with_wrong_shape),
    "key": faulty.first_node_only(faulty.with_wrong_key),
    "huge header": faulty.first_node_only(faulty.with_huge_header),
    "negative count": faulty.negative_count,
}


class Heard(Lines):
    """Keeps the lines a user would see."""

    def __init__(self) -> None:
        super().__init__()
        self.heard: list[str] = []

    def line(self, text: str) -> None:
        self.heard.append(text)


@pytest.fixture
def run(tiny: list[str], tmp_path: Path) -> Callable[..., tuple[Path, list[str]]]:
    def call(app: ClientApp, *settings: str) -> tuple[Path, list[str]]:
        config = load_config(None, [*tiny[1::2], "rounds=1", *settings])
        heard = Heard()
        federation = prepare(config, heard)
        folder = RunFolder(tmp_path / "run", config)
        outcome: list[BaseException] = []

        def serve(grid: object) -> None:
            try:
                run_federation(federation, folder, grid, heard, nodes=2)
            except RunFailed as error:
                outcome.append(error)

        run_on_ray(serve, config, app)
        if outcome:
            raise outcome[0]
        return folder.path, heard.heard

    return call


@pytest.mark.parametrize("kind", BROKEN_REPLIES)
def test_a_broken_reply_is_refused_and_named_and_the_round_goes_on(run, kind):
    path, heard = run(faulty.app_with(BROKEN_REPLIES[kind]), "server.max-lost-fraction=0.9")
    summary = read_summary(path)
    assert summary["status"] == "completed"
    line = next(line for line in read_lines(path) if line["phase"] == "train")
    assert 0 in line["rejected"]
    assert line["clients"] == 12 - len(line["rejected"]) > 0
    assert summary["faults"]["rejected"] == len(line["rejected"])
    assert any(text.startswith("round 1: client 0 rejected") for text in heard)


@pytest.mark.parametrize(("app", "what"), [("client_that_diverges", "rejected"), ("client_that_raises", "failed")])
def test_one_bad_client_costs_only_itself(run, app, what):
    path, heard = run(getattr(faulty, app)())
    line = next(line for line in read_lines(path) if line["phase"] == "train")
    assert line[what] == [0]
    assert line["clients"] == 11
    assert read_summary(path)["status"] == "completed"
    assert "Smith" not in "".join(heard) + (path / "metrics.jsonl").read_text()


def test_a_node_that_raises_tells_no_private_text(run, capfd):
    path, heard = run(faulty.node_that_raises(), "server.max-lost-fraction=0.9")
    assert read_summary(path)["faults"]["failed"] > 0
    out, err = capfd.readouterr()
    assert "Smith" not in "".join(heard) + out + err
    assert any("RuntimeError at faulty.py" in text for text in heard)


def test_a_killed_worker_fails_the_run_when_too_many_clients_go_with_it(run, tmp_path):
    with pytest.raises(RunFailed, match=r"clients lost, more than server.max-lost-fraction = 0.1 allows"):
        run(faulty.app_with(faulty.kill_first_node), "server.max-lost-fraction=0.1")
    assert read_summary(tmp_path / "run")["status"] == "failed"


def test_a_killed_worker_is_survived_when_few_enough_go_with_it(run):
    path, _ = run(faulty.app_with(faulty.kill_first_node), "server.max-lost-fraction=0.9", "server.scores=cohort")
    assert read_summary(path)["status"] == "completed"
    assert read_summary(path)["faults"]["failed"] > 0
