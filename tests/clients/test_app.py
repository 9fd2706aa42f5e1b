"""The ClientApp: what it answers the server accepts, and what goes wrong is told without private text."""

import json
import socket
import subprocess
import sys

import numpy as np
import pytest
from flwr.app import Context, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity

from clients import app
from common.errors import InputError
from common.metrics import check_statistics, scores, statistics_length
from common.store import cache_folder
from common.wire import (
    Instruction,
    WireError,
    pack,
    pack_arrays,
    unpack_lines,
    unpack_own_update,
    unpack_sums,
    unpack_update,
)
from tests.conftest import make_dataset, make_needs, make_reviews

WORKER = Context(run_id=1, node_id=1, node_config={"partition-id": 0}, state=RecordDict(), run_config={})
CLIENTS = (0, 1, 2)


@pytest.fixture(autouse=True)
def _inside_an_app(monkeypatch):
    """Flower makes messages inside apps only; nothing stays resident between tests."""
    for name in ("_run_id", "_node_id", "_task_id"):
        monkeypatch.setattr(TaskIdentity, name, 1)
    monkeypatch.setattr(app, "_resident", {})


@pytest.fixture(scope="module")
def prepared(tiny_teacher, tmp_path_factory):
    reviews = make_reviews(tmp_path_factory.mktemp("reviews") / "reviews.csv")
    config, data = make_dataset(reviews, tiny_teacher, cache_folder(), student__layers=2)
    return config, data, make_needs(tiny_teacher, data, (0, 3))


def instruction(prepared, board="", clients=CLIENTS, **keys):
    config, _, needs = prepared
    flat = config.flat() | {name.replace("__", "."): value for name, value in keys.items()}
    nothing = tuple(0 for _ in clients)
    where = {"scoreboard": str(board), "host": socket.gethostname()}
    return Instruction("0" * 16, 1, json.dumps(flat), clients, nothing, **needs, **where)


def shapes(asked):
    return app._worker(asked, None).shapes


def message(asked, kind="train"):
    arrays = {name: np.zeros(shape, dtype=np.float32) for name, shape in shapes(asked).items()}
    return Message(pack(asked, pack_arrays(arrays)), dst_node_id=1, message_type=kind)


def failure(call):
    """What the server is told of an error: Flower sends the text as it is."""
    with pytest.raises(app.ClientFailed) as caught:
        call()
    # neither may Flower print the first error beside it
    assert caught.value.__cause__ is None
    assert caught.value.__context__ is None
    return str(caught.value)


def test_an_answer_to_each_kind_of_message_is_one_that_the_server_takes(prepared):
    asked, (_, data, _) = instruction(prepared, student__heads=1), prepared
    taught = app.teach(message(asked, "query.teach"), WORKER).content
    assert unpack_sums(taught, {}) == {}
    assert [line.examples for line in unpack_lines(taught, frozenset(CLIENTS))] == [
        len(data.shard(client)) for client in CLIENTS
    ]
    weighed = app.weigh(message(asked, "query.weigh"), WORKER).content
    worker = app._worker(asked, None)
    parts = unpack_update(weighed, {"heads": (2, 2), "neurons": (2, 32)})
    assert all(total.min() >= 0 and total.any() for total in parts.values())
    lines = unpack_lines(weighed, frozenset(CLIENTS))
    assert [line.examples for line in lines] == data.train_sizes.tolist()
    assert app._worker(asked, None) is worker
    trained = app.train(message(asked), WORKER).content
    assert set(unpack_update(trained, shapes(asked))) == set(shapes(asked))
    lines = unpack_lines(trained, frozenset(CLIENTS))
    assert [line.examples for line in lines] == data.train_sizes.tolist()
    scored = app.evaluate(message(asked, "evaluate"), WORKER).content
    spec = data.task.score_spec
    whole = {"statistics": (statistics_length(spec),)}
    for sums in unpack_sums(scored, {"student": whole, "teacher": whole}).values():
        check_statistics(spec, sums["statistics"])
        assert scores(spec, sums["statistics"])["n"] == data.heldout_sizes.sum()


def test_own_updates_come_one_record_for_each_client(prepared):
    asked = instruction(prepared, server__packing="off")
    reply = app.train(message(asked), WORKER)
    assert set(reply.content) == {"clients", "update-0", "update-1", "update-2"}
    assert {name.partition("|")[0] for name in unpack_own_update(reply.content, 1)} == set(shapes(asked))


def test_an_error_tells_its_kind_and_place_and_no_text(prepared, monkeypatch):
    def fails(*given):
        raise ValueError("patient Smith has a cough")

    question = message(instruction(prepared))
    monkeypatch.setattr(app.Worker, "train", fails)
    told = failure(lambda: app.train(question, WORKER))
    assert told.startswith("ValueError at test_app.py:")
    assert "Smith" not in told


def test_what_was_not_asked_properly_is_an_error(prepared):
    asked = instruction(prepared)
    wrong = {name: np.zeros(1, dtype=np.float32) for name in shapes(asked)}
    for content, kind in (
        (pack(asked, pack_arrays(wrong)), WireError),
        (pack(asked, None), WireError),
        (pack(instruction(prepared, server__wire="fp8"), None), InputError),
    ):
        told = failure(lambda content=content: app.train(Message(content, dst_node_id=1, message_type="train"), WORKER))
        assert told.startswith(f"{kind.__name__} at ")


def test_a_worker_stays_as_long_as_its_run_lasts(prepared):
    first = app._worker(instruction(prepared), None)
    assert app._worker(instruction(prepared, clients=(2,)), None) is first
    second = app._worker(instruction(prepared, client__lr=0.5), None)
    assert second is not first
    assert second.config.client.lr == 0.5
    assert list(app._resident.values()) == [second]


# --- the board on which a display sees who is done ----------------------------------------------


@pytest.mark.parametrize("kind", ["query.teach", "query.weigh", "train", "evaluate"])
def test_each_finished_client_adds_a_byte_to_the_board(prepared, tmp_path, kind):
    board = tmp_path / "board"
    board.write_bytes(b"....")
    getattr(app, kind.removeprefix("query."))(message(instruction(prepared, board, student__heads=1), kind), WORKER)
    assert board.read_bytes() == b"." * (4 + len(CLIENTS))


def test_without_a_board_here_the_work_is_done_all_the_same(prepared, tmp_path):
    for board in ("", tmp_path / "elsewhere" / "board"):
        assert app.train(message(instruction(prepared, board)), WORKER).has_content()
    assert list(tmp_path.iterdir()) == []


def test_when_the_board_was_taken_away_nobody_waits_and_nothing_is_done(prepared, tmp_path, monkeypatch):
    question = message(instruction(prepared, tmp_path / "board"))
    monkeypatch.setattr(app.Worker, "train", lambda *given: pytest.fail("worked for nobody"))
    assert failure(lambda: app.train(question, WORKER)).startswith("PhaseOver at app.py:")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("side", ["clients", "server"])
def test_an_app_that_is_loaded_leaves_transformers_alone(side):
    """`flwr run` loads both apps in threads of one process, and two that import transformers at once may fail.

    It puts another module in its own place while it is imported; who waits for that is given the first.
    """
    code = f"import sys, {side}.app; sys.exit('transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=120).returncode == 0
