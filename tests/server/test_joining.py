"""Who may join a federation, who is waited for, and what the clients are told."""

import json
import threading

import pytest
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.app.error import Error
from flwr.common.constant import SUPERLINK_NODE_ID, ErrorCode
from flwr.supercore.task_identity import TaskIdentity

from common.config import from_flat
from common.errors import Interrupted, RunFailed
from common.progress import Silent
from common.tasks import text_task
from common.version import FEDISTILL
from common.wire import Joined, pack_joined, unpack_instruction
from server.joining import join, keys_for_clients

TASK = text_task(("text",), ("bad", "good"), "label", False)
CONFIG = from_flat(
    {
        "task": "text",
        "data.source": "/ours/public.csv",
        "data.validation": "/ours/validation.csv",
        "teacher.model": "/ours/teacher",
        "runtime.cache": "/ours/cache",
        "data.private": "at-clients",
        "data.clients": 3,
    }
)
HOMES = {0: 100, 1: 101, 2: 102}


@pytest.fixture(autouse=True)
def _inside_an_app(monkeypatch):
    """Flower makes messages inside apps only."""
    for name in ("_task_id", "_run_id", "_node_id"):
        monkeypatch.setattr(TaskIdentity, name, 1)


class Grid:
    """Nodes that answer joining; each is a function of the question's client."""

    def __init__(self, nodes):
        self.nodes, self.replies, self.asked = nodes, {}, []

    def get_node_ids(self):
        return list(self.nodes)

    def push_messages(self, messages):
        names = []
        for message in messages:
            message.metadata.__dict__["_message_id"] = name = f"m{len(self.asked)}"
            self.asked.append(message)
            reply = self.nodes[message.metadata.dst_node_id](message)
            if reply is not None:
                self.replies[name] = reply
            names.append(name)
        return names

    def pull_messages(self, ids):
        return [self.replies.pop(name) for name in list(ids) if name in self.replies]


def answer(**given):
    def node(message):
        (client,) = unpack_instruction(message.content).clients
        told = {"client": client, "train": 8, "heldout": 2, "held": ("a" * 64,), "version": FEDISTILL} | given
        return Message(pack_joined(Joined(**told)), reply_to=message)

    return node


def said(**texts):
    return RecordDict({name: ConfigRecord({"json": text}) for name, text in texts.items()})


def another_node(message):
    reply = answer()(message)
    reply.metadata.__dict__["_src_node_id"] = 999
    return reply


def ask(nodes, least=3, seconds=0.5, stopped=lambda: False):
    return join(
        Grid(nodes), HOMES, CONFIG, TASK, least=least, seconds=seconds, progress=Silent(), stopped=stopped
    )  # fmt: skip


def test_all_who_are_there_join():
    found = ask(dict.fromkeys(HOMES.values(), answer()))
    assert found == {client: Joined(client, 8, 2, ("a" * 64,), FEDISTILL) for client in HOMES}


def test_the_question_names_one_client_and_nothing_of_the_servers_folders():
    grid = Grid(dict.fromkeys(HOMES.values(), answer()))
    join(grid, HOMES, CONFIG, TASK, least=3, seconds=5, progress=Silent(), stopped=lambda: False)
    assert "/ours" not in str([unpack_instruction(message.content) for message in grid.asked])
    keys = json.loads(keys_for_clients(CONFIG))
    assert keys["data.private"] == "at-clients"
    assert {name for name, value in CONFIG.flat().items() if keys[name] != value} == {
        "data.source", "data.validation", "teacher.model", "runtime.cache",
    }  # fmt: skip
    assert from_flat(keys).data.clients == 3  # and they are keys that a client takes


@pytest.mark.parametrize(
    ("node", "words"),
    [
        (answer(client=1), "not from client 2"),
        (answer(client=True), "not from client 2"),
        (answer(train=-1), "a count of examples"),
        (answer(train=2**31), "a count of examples"),
        (answer(heldout=1.5), "a count of examples"),
        (answer(held=("x",)), "list of hashes"),
        (answer(held=("a" * 64,) * 1001), "list of hashes"),
        (answer(version="9.9"), "it has fedistill 9.9, this server"),
        (answer(version="\x1b[2J"), "not a short word"),
        (another_node, "from another node"),
        (lambda message: Message(Error(code=1, reason="OSError at home.py:1"), reply_to=message), "OSError"),
        (
            lambda message: Message(RecordDict({"joined": ConfigRecord({"json": "{"})}), reply_to=message),
            "not readable",
        ),
        (lambda message: Message(RecordDict({"student": ConfigRecord({})}), reply_to=message), "not one record"),
        (lambda message: None, "2 of 3 clients have joined in 0 s; 3 are needed"),
    ],
)
def test_who_does_not_fit_is_left_out_and_the_others_are_enough_or_not(node, words):
    nodes = {100: answer(), 101: answer(), 102: node}
    assert sorted(ask(nodes, least=2, seconds=0.3)) == [0, 1]
    with pytest.raises(RunFailed, match=words) as error:
        ask(nodes, seconds=0.3)
    assert "\x1b" not in str(error.value)


def test_one_that_comes_later_is_waited_for():
    nodes = {100: answer(), 101: answer()}
    threading.Timer(0.3, nodes.__setitem__, (102, answer())).start()
    assert sorted(ask(nodes, seconds=20)) == [0, 1, 2]


def test_a_stop_is_noticed():
    with pytest.raises(Interrupted):
        ask({}, seconds=60, stopped=lambda: True)


def test_one_that_goes_away_and_comes_back_and_a_question_that_is_lost_are_asked_again(monkeypatch):
    monkeypatch.setattr("server.joining.AGAIN_SECONDS", 0.3)
    away = [Error(code=ErrorCode.NODE_UNAVAILABLE, reason="away"), None]

    def node(message):
        if not away:
            return answer()(message)
        error = away.pop(0)
        if error is None:
            return None
        reply = Message(error, reply_to=message)
        reply.metadata.__dict__["_src_node_id"] = SUPERLINK_NODE_ID
        return reply

    assert sorted(ask({100: answer(), 101: answer(), 102: node}, seconds=20)) == [0, 1, 2]


def test_a_client_that_calls_itself_away_has_failed():
    own = Error(code=ErrorCode.NODE_UNAVAILABLE, reason="away")
    with pytest.raises(RunFailed, match="2 of 3 clients have joined"):
        ask({100: answer(), 101: answer(), 102: lambda message: Message(own, reply_to=message)})


def test_who_answers_both_of_two_questions_is_one_client(monkeypatch):
    """The first fails late, the second is well: the others have all their time still."""
    monkeypatch.setattr("server.joining.AGAIN_SECONDS", 0.0)
    replies = []

    def twice(message):
        replies.append(message)
        if len(replies) == 1:
            return Message(Error(code=1, reason="OSError"), reply_to=message)
        return answer()(message)

    class Two(Grid):
        def pull_messages(self, ids):
            return super().pull_messages(ids) if len(replies) > 1 else []

    nodes = {100: answer(), 101: twice}
    threading.Timer(0.6, nodes.__setitem__, (102, answer())).start()
    found = join(
        Two(nodes), HOMES, CONFIG, TASK, least=3, seconds=20, progress=Silent(), stopped=lambda: False
    )  # fmt: skip
    assert sorted(found) == [0, 1, 2]
