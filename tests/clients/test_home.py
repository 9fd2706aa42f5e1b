"""A client at home: what it tells, what it keeps, and what it refuses."""

import json
from contextlib import suppress
from dataclasses import asdict, replace

import numpy as np
import pytest

from clients.home import Home, keep_teacher
from clients.worker import ClientRefused, Worker
from common.hashing import hash_tensors
from common.models import load_teacher
from common.tasks import text_task
from common.version import FEDISTILL
from common.wire import MODEL_FILE, Instruction
from tests.conftest import make_reviews, make_teacher

TASK = text_task(("text",), ("0", "1"), "label", False)
KEYS = {"task": "text", "data.private": "at-clients", "data.clients": 3, "data.max-length": 32, "student.layers": 2}


@pytest.fixture
def home(tmp_path):
    return Home(tmp_path / "state", 1, make_reviews(tmp_path / "secret name.csv", 50))


def files_of_folder(folder):
    """What the server sends of it."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if MODEL_FILE.fullmatch(path.name)}


def instruction(**more):
    given = {
        "run": "0" * 16, "round": 1, "config": json.dumps(KEYS), "clients": (1,), "feedback": (0,), "teacher": "",
        "teacher_hash": "", "dataset": "", "student": "", "student_hash": "", "task": json.dumps(asdict(TASK)),
    }  # fmt: skip
    return Instruction(**{**given, **more})


def test_joining_tells_counts_and_hashes(home, tiny_teacher):
    joined = home.join(instruction())
    assert (joined.client, joined.train, joined.heldout) == (1, 40, 10)
    assert (joined.held, joined.version) == ((), FEDISTILL)
    name = keep_teacher(home, tiny_teacher)
    assert home.join(instruction()).held == (name,)
    assert name == hash_tensors(load_teacher(tiny_teacher).state_dict())


def test_a_question_for_another_client_is_refused(home):
    for ask in (home.join, home.needs, lambda one: home.take(one, {})):
        with pytest.raises(ClientRefused, match="this is client 1, and another was asked"):
            ask(instruction(clients=(2,)))


def test_what_is_wrong_with_the_file_is_the_owners_to_know(home, capsys):
    home.data.write_text("text,label\nwords nobody may see,7\n")
    with pytest.raises(ClientRefused) as error:
        home.join(instruction())
    assert str(error.value) == "its data file does not fit the task; its owner finds why in worker.log"
    assert "row 1: the label is none of the 2 classes" in capsys.readouterr().out


def test_a_server_gets_no_other_column_than_its_owner_gives(home):
    for columns, label in ((("owner",), "label"), (("text",), "text"), (("text", "owner"), "label")):
        task = text_task(columns, ("0", "1"), label, False)
        with pytest.raises(ClientRefused, match="columns that its owner does not give"):
            home.join(instruction(task=json.dumps(asdict(task))))
    pairs = replace(home, columns=("text", "owner", "label"))
    assert pairs.join(instruction(task=json.dumps(asdict(text_task(("text", "owner"), ("0", "1"), "label", False)))))


def test_a_home_is_read_as_it_was_written(home):
    home.state.mkdir()
    whole = replace(home, threads=2, max_seconds=1.5, memory_limit=300, columns=("a", "b", "c"))
    whole.write()
    assert Home.read(home.state) == whole


def test_of_two_limits_the_stricter_holds(home):
    mine = replace(home, max_seconds=5.0, memory_limit=100)
    theirs = json.dumps({**KEYS, "client.max-seconds": 9.0, "client.energy-budget": 70.0, "client.memory-limit": 50})
    keys = mine.config(instruction(config=theirs)).client
    assert (keys.max_seconds, keys.energy_budget, keys.memory_limit) == (5.0, 70.0, 50)
    assert mine.config(instruction()).client.max_seconds == 5.0


def test_a_run_that_cannot_keep_to_an_owners_limit_is_refused_in_words(home):
    private = json.dumps({**KEYS, "privacy.unit": "example", "privacy.epsilon": 8.0})
    with pytest.raises(ClientRefused, match=r"with its owner's limits .*client\.max-seconds = 5\.0"):
        replace(home, max_seconds=5.0).config(instruction(config=private))


def test_an_owner_bounds_what_its_examples_ever_spend(home):
    mine = replace(home, lifetime_epsilon=4.0, delta=1e-5)
    with pytest.raises(ClientRefused, match=r"its owner bounds what its examples spend, and privacy\.unit = 'none'"):
        mine.config(instruction())
    private = {**KEYS, "privacy.unit": "example", "privacy.epsilon": 2.0, "privacy.lot": 4, "privacy.delta": 1e-5}
    assert mine.config(instruction(config=json.dumps(private))).privacy.lifetime_epsilon == 4.0
    for theirs, found in ((3.0, 3.0), (9.0, 4.0)):
        keys = mine.config(instruction(config=json.dumps({**private, "privacy.lifetime-epsilon": theirs})))
        assert keys.privacy.lifetime_epsilon == found
    with pytest.raises(ClientRefused, match=r"privacy\.delta = 0\.01; its owner allows 1e-05"):
        mine.config(instruction(config=json.dumps({**private, "privacy.delta": 0.01})))


def test_on_a_device_the_servers_folders_and_boards_are_nothing(supplied, monkeypatch):
    from flwr.app import Context, Message, RecordDict
    from flwr.supercore.task_identity import TaskIdentity

    from clients import app
    from common.wire import pack

    for name in ("_run_id", "_node_id", "_task_id"):
        monkeypatch.setattr(TaskIdentity, name, 1)
    home, asked = supplied
    home.write()
    board = home.state / "a file of its owner"
    board.write_text("as it was")
    context = Context(
        run_id=1, node_id=1, node_config={"state": str(home.state)}, state=RecordDict(), run_config={}
    )  # fmt: skip
    import socket

    spied = replace(asked, scoreboard=str(board), host=socket.gethostname(), teacher="/etc", dataset="../../etc")
    for told in (spied, replace(spied, task="")):
        message = Message(pack(told, None), dst_node_id=1, message_type="query.teach")
        with suppress(app.ClientFailed):
            app.app(message=message, context=context)
        assert board.read_text() == "as it was"
    message = Message(pack(replace(spied, task=""), None), dst_node_id=1, message_type="query.teach")
    with pytest.raises(Exception, match="JSONDecodeError"):
        app.app(message=message, context=context)


def test_a_teacher_is_kept_when_it_is_the_one_that_was_promised(home, tiny_teacher, tmp_path):
    files = files_of_folder(tiny_teacher)
    name = hash_tensors(load_teacher(tiny_teacher).state_dict())
    with pytest.raises(ClientRefused, match="is not the one that was promised"):
        home.take(instruction(teacher_hash="f" * 64), files)
    assert list(home.teachers.glob("?" * 64)) == []
    home.take(instruction(teacher_hash=name), files)
    assert [path.name for path in home.teachers.glob("?" * 64)] == [name]
    other = files_of_folder(make_teacher(tmp_path / "other", seed=9))
    home.take(instruction(teacher_hash=name), other)  # it is there: nothing is written
    assert hash_tensors(load_teacher(home.teachers / name).state_dict()) == name


def test_a_hash_is_no_path(home, tiny_teacher):
    with pytest.raises(ClientRefused, match="not a hash"):
        home.take(instruction(teacher_hash="../" * 20 + "x" * 4), files_of_folder(tiny_teacher))
    with pytest.raises(ClientRefused, match="not a hash"):
        home.needs(instruction(teacher_hash="/etc", student_hash="f" * 64))


@pytest.fixture
def supplied(home, tiny_teacher, tmp_path):
    """A home that has joined and holds a teacher and a student, and an instruction about them."""
    from common.pupil import save_pupil
    from common.slim import Shape
    from tests.conftest import make_student

    home.join(instruction())
    teacher = keep_teacher(home, tiny_teacher)
    model = load_teacher(tiny_teacher)
    student = make_student(model, (0, 2))
    save_pupil(student, Shape.whole(model.config, (0, 2)), tmp_path / "pupil", own_pieces=False)
    asked = instruction(teacher_hash=teacher, student_hash=hash_tensors(student.state_dict()))
    home.take(asked, files_of_folder(tmp_path / "pupil"))
    return home, asked


def test_a_worker_is_made_of_what_is_here(supplied):
    home, asked = supplied
    worker = Worker(home.config(asked), **home.needs(asked))
    assert worker.data.clients == 3
    assert worker.data.train_sizes.tolist() == [0, 40, 0]
    assert worker.cache == home.cache.resolve()
    lines = worker.teach([1], lambda count: None)
    assert [(line.client, line.examples, line.problem) for line in lines] == [(1, 50, "")]
    arrays = {name: np.zeros(shape, np.float32) for name, shape in worker.expects("train", asked).items()}
    groups, lines = worker.train(arrays, asked, lambda count: None)
    assert lines[0].examples == 40
    assert set(groups) == {"update"}


def test_data_that_have_changed_since_are_refused(supplied):
    home, asked = supplied
    with home.data.open("a") as stream:
        stream.write("one more good film,1,a\n")
    with pytest.raises(ClientRefused, match="not those that it has joined with"):
        home.needs(asked)
    home.data.unlink()
    with pytest.raises(ClientRefused, match="its data file does not fit the task"):
        home.needs(asked)


@pytest.mark.parametrize("key", ["seed", "data.holdout-fraction", "data.min-examples"])
def test_a_run_holds_out_what_it_held_out_when_the_client_joined(supplied, key):
    home, asked = supplied
    other = {"seed": 1, "data.holdout-fraction": 0.3, "data.min-examples": 3}[key]
    with pytest.raises(ClientRefused, match="its data, or their cut, are not those that it has joined with"):
        home.needs(replace(asked, config=json.dumps({**KEYS, key: other})))


def test_what_is_not_here_is_said(supplied):
    home, asked = supplied
    with pytest.raises(ClientRefused, match="the teacher of this run is not here"):
        home.needs(replace(asked, teacher_hash="a" * 64))
    with pytest.raises(ClientRefused, match="the student of this run is not here"):
        home.needs(replace(asked, student_hash="a" * 64))
    (home.state / "joined.json").write_text("damaged")
    with pytest.raises(ClientRefused, match="it has not joined this run"):
        home.needs(asked)


def test_a_student_is_kept_when_it_is_the_one_that_was_promised(supplied, tmp_path):
    home, asked = supplied
    with pytest.raises(ClientRefused, match="the student that was sent is not the one"):
        home.take(replace(asked, student_hash="c" * 64), files_of_folder(tmp_path / "pupil"))
    assert [path.name for path in home.students.glob("?" * 64)] == [asked.student_hash]
    path = home.students / asked.student_hash
    wrong = json.loads((path / "fedistill.json").read_text()) | {"hash": "b" * 64}
    (path / "fedistill.json").write_text(json.dumps(wrong))
    with pytest.raises(ValueError, match="not those"):  # and compared before it is used
        Worker(home.config(asked), **home.needs(asked))


def test_the_devices_own_keys_take_the_place_of_the_servers(home):
    theirs = {**KEYS, "runtime.cache": "/theirs", "runtime.workers": 9, "runtime.threads": 3}
    config = home.config(instruction(config=json.dumps(theirs)))
    assert (config.runtime.cache, config.runtime.workers, config.runtime.threads) == (str(home.cache), 1, 3)
    assert replace(home, threads=2).config(instruction(config=json.dumps(theirs))).runtime.threads == 2
