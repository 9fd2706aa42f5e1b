"""What clients with private steps send, spend and decline."""

import json
from dataclasses import replace

import numpy as np
import pytest

from clients.example_privacy import begin_round, calibrated_noise
from clients.ledger import NAME, Declined, Ledger
from clients.private_steps import Lots
from clients.worker import ClientRefused, Worker
from common.accounting import epsilon, noise_for
from common.array_bytes import WireError
from common.config import from_flat
from common.errors import InputError
from common.privacy_keys import PrivacyKeys
from common.wire import LOSSES, Instruction, pack_reply, unpack_lines
from tests.conftest import make_dataset, make_needs, make_reviews

KEYS = {
    "privacy__unit": "example", "privacy__epsilon": 4.0, "privacy__lot": 16, "privacy__accountant": "prv",
    "client__precision": "fp32", "student__layers": 2, "rounds": 2,
}  # fmt: skip
CLIENTS = (0, 1, 2)


class Place:
    """A worker and the weights that its clients start from."""

    def __init__(self, tiny_teacher, folder, **keys):
        from common.store import cache_folder

        self.config, data = make_dataset(
            make_reviews(folder / "reviews.csv"), tiny_teacher, cache_folder(), data__clients=3, **{**KEYS, **keys}
        )
        self.needs = make_needs(tiny_teacher, data, (0, 3))
        self.worker = Worker(self.config, **self.needs)
        self.worker.ledgers = folder / "ledgers"
        self.arrays = {name: weight.numpy().copy() for name, weight in self.worker.tiers.initial().items()}

    def asked(self, number, run="0" * 16):
        return Instruction(run, number, json.dumps(self.config.flat()), CLIENTS, (0,) * 3, **self.needs)

    def train(self, number, run="0" * 16):
        asked = self.asked(number, run)
        groups, lines = self.worker.train(self.arrays, asked, lambda count: None)
        update = {name: np.asarray(getattr(part, "values", part)).copy() for name, part in groups["update"].items()}
        return update, lines


@pytest.fixture
def place(tiny_teacher, tmp_path):
    return Place(tiny_teacher, tmp_path)


def test_clients_say_what_they_have_spent_and_nothing_of_their_losses(place):
    first, lines = place.train(1)
    assert [line.problem for line in lines] == [""] * 3
    for line in lines:
        assert line.examples == len(place.worker.data.shard(line.client).train)
        assert all(getattr(line, name) is None for name in LOSSES)
        lots = Lots(16, line.examples)
        noise = noise_for(4.0, rate=lots.rate, steps=2 * lots.steps, delta=1e-5, accountant="prv")
        wanted = epsilon(noise_multiplier=noise, rate=lots.rate, steps=lots.steps, delta=1e-5, accountant="prv")
        assert line.epsilon == line.lifetime_epsilon == pytest.approx(wanted)
    _, lines = place.train(2)
    assert all(3.9 < line.epsilon <= 4.0 for line in lines)  # all rounds together spend what the run may
    assert any(update.any() for update in first.values())


def test_a_second_run_on_the_same_data_is_declined_by_name(place):
    for number in (1, 2):
        place.train(number)
    update, lines = place.train(1, run="1" * 16)
    assert not any(array.any() for array in update.values())
    assert [line.examples for line in lines] == [0, 0, 0]
    for line in lines:
        assert line.problem.startswith("its privacy budget is spent: epsilon is ")
        assert line.problem.endswith(", and its limit is 4")
    # the line is one that the server takes
    assert unpack_lines(pack_reply({}, lines), frozenset(CLIENTS)) == lines


def test_what_was_trained_on_is_never_held_out_on_a_device(place, tmp_path):
    """Another seed cuts the data in another way; scores are exact, and on nobody's ledger."""
    place.worker.ledger = str(tmp_path / "ledger")
    place.train(1)
    _, lines = place.worker.evaluate(place.arrays, place.asked(1), lambda count: None)
    assert [line.problem for line in lines] == [""] * 3
    shard = place.worker.data.shard(0)
    Ledger(tmp_path / "ledger", place.worker._keys(shard.heldout[:1])).claim(
        "1" * 16, 1, (1.0, 0.5, 1), limit=100.0, delta=1e-5, accountant="prv"
    )
    with pytest.raises(ClientRefused, match="it has trained on some of what this run holds out"):
        place.worker.evaluate(place.arrays, place.asked(2), lambda count: None)


def test_heads_are_not_weighed_where_examples_are_hidden(place):
    with pytest.raises(ClientRefused, match="no heads and neurons chosen on its clients' examples"):
        place.worker.weigh(CLIENTS, lambda count: None)


def test_a_larger_lifetime_takes_the_second_run_too_and_tells_both(tiny_teacher, tmp_path):
    place = Place(tiny_teacher, tmp_path, privacy__lifetime_epsilon=100.0)
    place.train(1)
    _, lines = place.train(1, run="1" * 16)
    for line in lines:
        assert line.epsilon < line.lifetime_epsilon < 2 * line.epsilon


def test_what_was_begun_is_spent_even_if_it_fails(place, monkeypatch):
    def broken(*given, **named):
        folders = list(place.worker.ledgers.iterdir())
        assert any((folder / NAME).is_file() and (folder / NAME).stat().st_size for folder in folders)
        raise MemoryError

    monkeypatch.setattr("clients.worker.distil", broken)
    _, lines = place.train(1)
    assert [line.problem for line in lines] == ["MemoryError"] * 3
    monkeypatch.undo()
    _, lines = place.train(2)
    assert all(3.9 < line.epsilon <= 4.0 for line in lines)


def test_the_seed_gives_lots_and_noise_to_nobody(place, tiny_teacher, tmp_path_factory):
    other = Place(tiny_teacher, tmp_path_factory.mktemp("other"))
    (one, _), (two, _) = place.train(1), other.train(1)
    assert all(not np.array_equal(one[name], two[name]) for name in one)


def test_without_noise_nothing_is_bounded_and_that_is_said(tiny_teacher, tmp_path):
    place = Place(tiny_teacher, tmp_path, privacy__epsilon=0.0)
    _, lines = place.train(1)
    assert [(line.problem, line.epsilon, line.lifetime_epsilon) for line in lines] == [("", None, None)] * 3


def test_an_epsilon_that_no_noise_reaches_is_declined(place, tmp_path, monkeypatch):
    monkeypatch.setattr("common.accounting.MOST_NOISE", 0.5)
    asked = Instruction("0" * 16, 1, "", (0,), (0,), **place.needs)
    keys = np.zeros((9, 16), np.uint8)
    with pytest.raises(Declined, match=r"privacy\.epsilon = 4\.0: not even noise of 0\.5 clip norms"):
        begin_round(place.config, asked, keys, cache=tmp_path, ledger=tmp_path / "ledger")
    assert not (tmp_path / "ledger").exists()


def test_the_noise_is_found_once_and_kept(tmp_path, monkeypatch):
    keys, lots = PrivacyKeys(unit="example", epsilon=2.0, accountant="prv"), Lots(64, 200)
    found = calibrated_noise(keys, lots, 12, tmp_path)
    monkeypatch.setattr("clients.example_privacy.noise_for", None)
    assert calibrated_noise(keys, lots, 12, tmp_path) == found
    assert calibrated_noise(replace_epsilon(keys, 0.0, 1.5), lots, 12, tmp_path) == 1.5


def replace_epsilon(keys, value, noise):
    return keys.model_copy(update={"epsilon": value, "noise_multiplier": noise})


@pytest.mark.parametrize("value", [-0.1, "8", True, float("nan"), float("inf")])
def test_the_server_takes_no_impossible_epsilon(value):
    from common.wire import ClientLine

    line = ClientLine(0, 1, 0.1, epsilon=1.0)
    for name in ("epsilon", "lifetime_epsilon"):
        with pytest.raises(WireError, match=f"client 0: {name} is not a number from 0 up"):
            unpack_lines(pack_reply({}, [replace(line, **{name: value})]), frozenset({0}))


@pytest.mark.parametrize(
    "key, value",
    [
        ("server.strategy", "ds-fl"), ("student.train-embeddings", True), ("student.tiers", "1/0/0@0.5"),
        ("student.heads", 2), ("data.windows", 2), ("distill.hidden-weight", 0.5), ("distill.cls-weight", 0.5),
        ("distill.relation-weight", 0.5), ("distill.general-rounds", 1), ("distill.prior-correction", True),
        ("client.grow-batch", True), ("privacy.adaptive-clip", 0.5), ("privacy.noise-cohort", 100),
        ("privacy.scores-share", 0.1), ("privacy.distributed-noise", True), ("privacy.noise-multiplier", 1.0),
    ],
)  # fmt: skip
def test_what_is_not_one_example_s_own_is_refused_by_name(key, value):
    flat = {"privacy.unit": "example", "privacy.epsilon": 8.0}
    flat |= {"client.lr-decay": "constant"} if key == "client.grow-batch" else {}
    named = "student.width-selection" if key == "student.heads" else key
    with pytest.raises(InputError, match=named):
        from_flat({**flat, key: value})


def test_random_heads_know_nothing_of_the_data_and_an_epsilon_needs_a_unit():
    from_flat(
        {"privacy.unit": "example", "privacy.epsilon": 8.0, "student.heads": 2, "student.width-selection": "random"}
    )
    for key in ("privacy.epsilon", "privacy.lifetime-epsilon"):
        with pytest.raises(InputError, match=key):
            from_flat({key: 8.0})
