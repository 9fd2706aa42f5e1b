"""Secure sums between the real server and the real clients' side: only models and Flower's network are missing."""

import json
from contextlib import suppress
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from flwr.app import ArrayRecord, Error
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chi2

from clients.secure_sum import Member, masked_sum, members_of, say
from common.config import from_flat
from common.errors import RunFailed
from common.fixed_point import ExactSum
from common.secure_sum import threshold_of
from common.wire import LOSSES, ClientLine, pack_reply, pack_told, unpack_instruction
from server.intake import Summed
from server.secure_sum import MaskedWords, SecureSum, layout_of
from tests.server.memory_grid import Run

SHAPES = {"a": (400, 3), "b": (7,)}
MASKED = layout_of({"update": SHAPES})
STAGES = {"query.keys": Member.keys, "query.shares": Member.letters, "query.unmask": Member.reveal}
KEYS = {"server.cohort": 3, "privacy.secure-aggregation": True}


@pytest.fixture(autouse=True)
def _inside_an_app(monkeypatch):
    from flwr.supercore.task_identity import TaskIdentity

    for name in ("_run_id", "_node_id", "_task_id"):
        monkeypatch.setattr(TaskIdentity, name, 1)


def update_of(client, number=1):
    rng = np.random.default_rng([number, client])
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in SHAPES.items()}


def plain_sum(clients, number=1):
    """What nodes would add up without masks."""
    total = ExactSum(SHAPES)
    for client in clients:
        total.add(update_of(client, number), examples_of(client))
    return total.totals


def examples_of(client):
    return 11 + 7 * client


def line_of(client):
    return ClientLine(client, examples_of(client), 0.5 + client, score=0.25, **dict.fromkeys(LOSSES, 1.5))


class Cohort:
    """Clients on two nodes, of which some are lost before they do a stage.

    Attributes:
        lost: the clients that do not do a stage any more, by kind of message.
        seen: contents of all replies.
        lines: of those that are masked sums.
    """

    def __init__(self, folder, size, **keys):
        self.folder, self.lost, self.seen, self.number = folder, {}, [], 0
        self.lines: list[ClientLine] = []
        (folder / "run").mkdir(exist_ok=True)
        self.worker = SimpleNamespace(cache=folder, shapes=SHAPES, config=from_flat({**KEYS, **keys}))
        self.run = Run(folder / "run", {1: self.answer, 2: self.answer}, tuple(range(size)))
        self.phases = []
        self.secure = SecureSum(self.run.exchange, self.worker.config, self.phases.append)

    def answer(self, node, clients):
        message = self.run.grid.messages[-1]
        instruction, kind = unpack_instruction(message.content), message.metadata.message_type
        gone = set(clients) & self.lost.get(kind, set())
        if gone == set(clients):
            return Error(code=1, reason="gone")
        if kind in STAGES:
            members = members_of(self.folder / "secure-sums", instruction, 0.66)
            told, lines = say((one for one in members if one.client not in gone), STAGES[kind])
            lines += [ClientLine(client, 0, 0.0, problem="gone") for client in gone]
            content = pack_told(told, lines)
        else:
            groups, lines = masked_sum(self.worker, "train", instruction, lambda one: self.train(one, gone))
            self.lines += lines
            content = pack_reply(groups, lines)
        self.seen.append((kind, content))
        return content

    def train(self, instruction, gone):
        (client,) = instruction.clients
        if client in gone:
            return {}, [ClientLine(client, 0, 0.0, problem="gone")]
        total = ExactSum(SHAPES)
        total.add(update_of(client, instruction.round), examples_of(client))
        return {"update": total.compact}, [line_of(client)]

    def sum(self, clients=None):
        """One secure sum; the clients in it, and what it was of."""
        self.number += 1
        run, streaming = self.run, self.run.streaming
        ready = self.secure.begin("train", self.number, clients or run.clients, streaming)
        words = MaskedWords(MASKED)
        messages = run.exchange.open("train", self.number, ready, grid=streaming, arrays={}, info="")
        phase = run.exchange.collect(streaming, streaming.send_and_receive(messages, timeout=1.0), words.take)
        return phase.accepted, self.secure.open(words, phase.accepted, streaming)

    def masked_once(self):
        """Has all members' words masked, and no sum opened; what its nodes were asked."""
        ready = self.secure.begin("train", 1, self.run.clients, self.run.streaming)
        messages = self.run.exchange.open("train", 1, ready, grid=self.run.streaming, arrays={}, info="")
        asked = [unpack_instruction(message.content) for message in messages]
        self.run.streaming.grid.push_messages(messages)
        assert {kind for kind, _ in self.seen} >= {"train"} and asked
        return asked

    def kept(self):
        """All that lies on the clients' disks."""
        return {str(path): path.read_text() for path in self.folder.glob("secure-sums/*/*/*.json")}


def holds(cohort, survivors, opened):
    """The opened sum is the plain one of these clients."""
    plain = plain_sum(survivors, cohort.number)
    assert all((opened.group("update")[name] == plain[name]).all() for name in SHAPES)
    assert opened.examples == sum(map(examples_of, survivors))
    assert [line.client for line in opened.lines] == sorted(survivors)


@pytest.mark.parametrize("size", [4, 16])
def test_the_opened_sum_has_the_bits_of_the_plain_one(tmp_path, size):
    cohort = Cohort(tmp_path, size)
    survivors, opened = cohort.sum()
    assert survivors == set(range(size))
    holds(cohort, survivors, opened)
    assert opened.losses["loss"] == pytest.approx(1.5)
    assert opened.spread == {"mean": 0.25, "std": 0.0, "clients": size}
    intake = Summed(SHAPES, {})
    intake.put(opened.group("update"), opened.lines, opened.examples)
    expected = {name: part / (opened.examples * 2.0**32) for name, part in plain_sum(survivors).items()}
    assert all((intake.update()[name] == expected[name]).all() for name in SHAPES)


@pytest.mark.parametrize("stage", ["query.keys", "query.shares", "train", "query.unmask"])
def test_clients_may_be_lost_before_any_stage(tmp_path, stage):
    cohort = Cohort(tmp_path, 6)
    cohort.lost = {stage: {1, 4}}
    survivors, opened = cohort.sum()
    assert survivors == (set(range(6)) if stage == "query.unmask" else {0, 2, 3, 5})
    holds(cohort, survivors, opened)


@settings(max_examples=15)
@given(data=st.data())
def test_any_losses_give_the_sum_of_the_rest_or_a_clean_end(tmp_path_factory, data):
    size = data.draw(st.integers(4, 9))
    cohort = Cohort(tmp_path_factory.mktemp("cohort"), size)
    gone, need = set(), threshold_of(0.66, size)
    for stage in ("query.keys", "query.shares", "train", "query.unmask"):
        gone = gone | data.draw(st.sets(st.integers(0, size - 1), max_size=2))
        cohort.lost[stage] = gone
    summed = set(range(size)) - cohort.lost["train"]
    if size - len(gone) >= need:
        survivors, opened = cohort.sum()
        assert survivors == summed
        holds(cohort, survivors, opened)
    else:
        with pytest.raises(RunFailed, match=f"of {size} clients are left after .* needs {need}"):
            cohort.sum()


def test_what_the_server_receives_is_noise_but_for_the_sum(tmp_path):
    """One client a message: what would be seen of each alone."""
    cohort = Cohort(tmp_path, 4)
    cohort.run.exchange.suspects = {("train", client) for client in range(4)}  # who is suspected travels alone
    _, opened = cohort.sum()
    vectors = [array.numpy() for kind, reply in cohort.seen if kind == "train" for array in reply["update"].values()]
    assert len(vectors) == 4
    counts = np.bincount(np.concatenate(vectors).view(np.uint8), minlength=256)
    expected = counts.sum() / 256
    assert ((counts - expected) ** 2 / expected).sum() < chi2.ppf(1 - 1e-6, 255)
    for client in range(4):
        plain = plain_sum([client])["a"].reshape(-1)
        for vector in vectors:
            seen = MASKED.cut(vector.view(np.uint64))["update/a"].reshape(-1)
            assert not (seen == plain).any()
            assert abs(np.corrcoef(seen, plain)[0, 1]) < 6 / np.sqrt(len(plain))
    for _, reply in cohort.seen:  # no count, loss, score or time of one client in any reply
        for line in json.loads(reply["clients"]["json"]):
            assert line["examples"] == 0
            assert line["score"] is None
            assert all(line[name] is None for name in LOSSES)
            assert not any(isinstance(record, ArrayRecord) and set(record) != {"masked"} for record in reply.values())
    assert opened.examples == sum(map(examples_of, range(4)))


def test_a_client_tells_one_kind_of_share_of_each_peer_and_nothing_when_asked_for_the_other(tmp_path):
    cohort = Cohort(tmp_path, 5)
    cohort.lost = {"train": {3}}
    asked = []
    true = Cohort.answer

    def twice(node, clients):
        if cohort.run.grid.messages[-1].metadata.message_type == "query.unmask" and not asked:
            asked.append(unpack_instruction(cohort.run.grid.messages[-1].content))
        return true(cohort, node, clients)

    cohort.run.grid.nodes = {1: twice, 2: twice}
    cohort.sum()
    (instruction,) = asked
    question = json.loads(instruction.secure)
    assert question["survivors"] == [0, 1, 2, 4]
    for survivors in ([0, 1, 2, 3, 4], [0, 1, 2], [0, 1, 2, 3]):
        other = SimpleNamespace(**vars(instruction) | {"secure": json.dumps({**question, "survivors": survivors})})
        told, lines = say(members_of(tmp_path / "secure-sums", other, 0.66), Member.reveal)
        assert told == {}
        assert {line.problem for line in lines} == {"secure sum: it has answered for other members"}
    told, _ = say(members_of(tmp_path / "secure-sums", instruction, 0.66), Member.reveal)  # a lost answer comes again
    for said in told.values():
        assert set(said["own"]) == {"0", "1", "2", "4"}
        assert set(said["key"]) == {"3"}


def test_the_same_masks_never_cover_two_updates(tmp_path):
    cohort = Cohort(tmp_path, 4)
    asked = cohort.masked_once()
    first = [reply["update"]["masked"].numpy() for kind, reply in cohort.seen if kind == "train"]
    again = [masked_sum(cohort.worker, "train", one, lambda i: cohort.train(i, set())) for one in asked]
    assert all((one["update"]["masked"] == two).all() for (one, _), two in zip(again, first, strict=True))

    def another(instruction):
        groups, lines = cohort.train(instruction, set())
        groups["update"]["b"][0] += 1
        return groups, lines

    for one in asked:
        groups, lines = masked_sum(cohort.worker, "train", one, another)
        assert groups == {}
        assert {line.problem for line in lines} == {"secure sum: it has masked another update with these keys"}


def test_what_is_noised_anew_each_time_is_masked_once_and_its_budget_not_spent_again(tmp_path):
    cohort = Cohort(tmp_path, 4, **{"privacy.unit": "example", "privacy.epsilon": 8.0})
    asked = cohort.masked_once()
    for one in asked:
        groups, lines = masked_sum(cohort.worker, "train", one, lambda one: pytest.fail("it trains again"))
        assert groups == {}
        assert {line.problem for line in lines} == {
            "secure sum: its update of this round was masked, and cannot be made again"
        }


@pytest.mark.parametrize(
    ("given", "told"),
    [({"epsilon": 4.7853, "lifetime_epsilon": 4.0}, (4.8, 4.0)), ({}, (None, None))],
)
def test_what_is_spent_is_told_to_the_next_tenth(tmp_path, given, told):
    cohort = Cohort(tmp_path, 3)
    train = cohort.train

    def spending(instruction, gone):
        groups, (line,) = train(instruction, gone)
        return groups, [replace(line, **given)]

    cohort.train = spending
    cohort.sum()
    assert {(line.epsilon, line.lifetime_epsilon) for line in cohort.lines} == {told}


def test_a_spent_budget_is_told_without_figures(tmp_path):
    cohort = Cohort(tmp_path, 3)
    told = "its privacy budget is spent: epsilon is 7.99, this round would make it 9.26, and its limit is 8"
    cohort.train = lambda instruction, gone: ({}, [ClientLine(instruction.clients[0], 0, 0.0, problem=told)])
    with suppress(RunFailed):
        cohort.sum()
    assert {line.problem for line in cohort.lines} == {"its privacy budget is spent"}


def test_secrets_are_on_no_disk_after_the_sum_and_for_no_other_to_read(tmp_path):
    cohort = Cohort(tmp_path, 5)
    cohort.lost = {"query.unmask": {2}}
    cohort.sum()
    files = list(tmp_path.glob("secure-sums/*/*/*.json"))
    assert {path.stat().st_mode & 0o777 for path in files} == {0o600}
    left = [json.loads(text) for text in cohort.kept().values()]
    assert [sorted(one) for one in left].count(["answer", "survivors"]) == 4  # the lost one's go with its next sum
    cohort.lost = {}
    cohort.sum()
    assert [sorted(json.loads(text)) for text in cohort.kept().values()] == [["answer", "survivors"]] * 5


def test_a_wrong_share_is_noticed_and_others_open_the_sum(tmp_path, monkeypatch):
    cohort = Cohort(tmp_path, 6)
    reveal = Member.reveal

    def lying(member):
        answer = json.loads(json.dumps(reveal(member)))
        if member.client == 0:
            answer["own"]["4"] = "00" * 16
        return answer

    monkeypatch.setitem(STAGES, "query.unmask", lying)
    survivors, opened = cohort.sum()
    holds(cohort, survivors, opened)


def test_two_clients_are_no_crowd(tmp_path):
    with pytest.raises(RunFailed, match="a sum of 2 clients hides nobody"):
        Cohort(tmp_path, 4).sum((1, 2))


def test_with_distributed_noise_nobody_ever_holds_a_sum_without(tmp_path):
    keys = {"unit": "client", "distributed-noise": True, "noise-multiplier": 0.5, "clip-norm": 2.0}
    cohort = Cohort(tmp_path, 6, **{f"privacy.{name}": value for name, value in keys.items()})
    cohort.lost = {"train": {1}}
    cohort.run.exchange.noise = 0.5 * 2.0
    survivors, opened = cohort.sum()
    noise = opened.group("update")["a"] - plain_sum(survivors)["a"]
    need = threshold_of(0.66, 6)
    expected = 0.5 * 2.0 * 2.0**32 * np.sqrt(len(survivors) / (need - 1))  # more than asked, never less
    assert noise.std() == pytest.approx(expected, rel=0.15)
    assert (opened.examples, need) == (0, 4)
    assert len(opened.lines) == 5
