"""What a run would do: its bytes are those of the messages, its times those of the arithmetic."""

import io
import json
import re
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from clients.device_profile import Line
from common.accounting import noise_for
from common.config import from_flat
from common.dataset import load_tokenizer
from common.errors import InputError
from common.models import count_parameters
from common.progress import Lines, Silent
from server.preparation import prepare
from simulations import describe
from simulations.describe import bytes_of, examine, lines, shard_sheet, spoken
from simulations.planned_privacy import planned_privacy
from simulations.simulate import say_what_runs
from tests.conftest import make_teacher


def test_a_packed_round_is_a_student_down_twice_and_a_sum_up_for_each_worker():
    """1,000 weights: 4 bytes each to two workers, to train and to score; 8 bytes each of a sum."""
    keys = {"server.packing": "on", "runtime.workers": 2, "data.clients": 10}
    sent = bytes_of(from_flat(keys), 1000, 10)
    assert (sent.down, sent.up) == (4 * 1000 * 4, 8 * 1000 * 2)
    assert (sent.client_down, sent.client_up) == (8000, 8000)


def test_what_is_scored_seldom_is_sent_seldom():
    """Of ten rounds the fourth, the eighth and the last are scored."""
    keys = {"server.packing": "on", "runtime.workers": 2, "data.clients": 10, "rounds": 10, "server.scores-every": 4}
    sent = bytes_of(from_flat(keys), 1000, 10)
    assert (sent.down, sent.client_down) == (4 * 1000 * 2 * 1.3, 4 * 1000 * 1.3)


def test_without_packing_each_client_sends_its_own():
    keys = {"server.wire": "fp16", "server.packing": "off", "runtime.workers": 2, "data.clients": 10}
    sent = bytes_of(from_flat({**keys, "server.cohort": 5}), 1000, 10)
    assert (sent.down, sent.up) == (4 * 1000 * 4, 2 * 1000 * 5)
    assert bytes_of(from_flat({"server.strategy": "fedmd"}), 1000, 10) is None


@pytest.fixture
def keys(tmp_path, monkeypatch):
    monkeypatch.setattr(describe, "probe", lambda config, progress: type("P", (), {"training": Line(1e9, 0.0, ())}))
    return {
        "teacher.model": str(make_teacher(tmp_path / "encoder", labels=0)), "data.limit": 300, "data.max-length": 32,
        "data.clients": 9, "student.layers": 2, "runtime.workers": 2, "runtime.cache": str(tmp_path / "cache"),
    }  # fmt: skip


def test_a_federation_is_described_without_running_it(tmp_path, keys):
    found = examine(from_flat(keys), Silent())
    assert found == json.loads(json.dumps(found))
    shards = found["shards"]
    assert [sum(row) for row in shards["counts"]] == [
        train + held for train, held in zip(shards["train"], shards["held_out"], strict=True)
    ]
    assert sum(map(sum, shards["counts"])) + found["public"] == 300
    assert (found["teacher"]["fine_tuned"], found["teacher"]["there"]) == (True, False)
    assert found["seconds"]["total"] == pytest.approx(
        found["seconds"]["start"] + found["seconds"]["fine_tuning"] + found["seconds"]["once"]
        + found["rounds"] * found["seconds"]["round"]
    )  # fmt: skip
    assert not list((tmp_path / "cache").glob("teachers/*"))  # nothing was fine-tuned
    assert max(map(len, lines(found))) <= 80
    sheet = shard_sheet(found)
    assert sheet.sections[0][-1][0] == "all"


def test_examples_whose_ends_are_not_read_are_counted_before_a_run_and_as_it_starts(tmp_path, keys):
    """Two windows of 12 that share two pieces: 18 pieces of text and the two special ones around them."""
    keys |= {"teacher.model": str(make_teacher(tmp_path / "headed")), "data.max-length": 12, "student.vocabulary": 100}
    config = from_flat({**keys, "data.windows": 2, "data.stride": 2})
    found, federation = examine(config, Silent()), prepare(config, Silent())
    texts = federation.data.train.texts[0].all()

    def told(folder):
        count = sum(len(pieces) > 20 for pieces in load_tokenizer(folder)(texts)["input_ids"])
        assert 0 < count < len(texts)
        what = "data.windows = 2 of data.max-length = 12 pieces"
        return f"{count:,} of {len(texts):,} examples are longer than {what}: their ends are not read"

    assert found["ends"] == told(tmp_path / "headed")
    assert found["ends"] in re.sub(r"\s+", " ", " ".join(lines(found)))
    assert max(map(len, lines(found))) <= 80
    out = io.StringIO()
    say_what_runs(Lines(out), config, federation)
    assert told(tmp_path / "headed") in out.getvalue().splitlines()
    assert f"in the student's own pieces, {told(federation.pupil.folder)}" in out.getvalue().splitlines()
    assert examine(from_flat({**keys, "data.max-length": 64, "data.windows": 2}), Silent())["ends"] == ""


def test_a_student_of_another_model_is_measured_by_its_teacher_and_travels_with_its_projection(tmp_path, keys):
    keys |= {
        "teacher.model": str(make_teacher(tmp_path / "wide", width=32, seed=1)),
        "student.model": str(make_teacher(tmp_path / "narrow", labels=0, layers=3)),
        "student.target-ratio": 0.19, "distill.hidden-weight": 1.0,
    }  # fmt: skip
    config = from_flat(keys)
    found, federation = examine(config, Silent())["student"], prepare(config, Silent())
    assert found["sent"] == sum(array.size for array in federation.weights().values())
    assert found["pieces"] == federation.pupil.shape.pieces
    assert found["parameters"] == count_parameters(federation.student)


def test_tiers_are_checked_and_their_bytes_not_told(keys):
    found = examine(from_flat({**keys, "student.layers": 2, "student.tiers": "1/0/0@0.5"}), Silent())
    assert found["bytes_per_round"] is None
    assert any(
        "each tier's part of the student travels; their bytes are not predicted" in line for line in lines(found)
    )
    with pytest.raises(InputError, match=r"student\.tiers = .*: 99 heads; the teacher has 2"):
        examine(from_flat({**keys, "student.layers": 2, "student.tiers": "1/99/0@0.5"}), Silent())


def test_what_privacy_it_would_give_is_told(keys):
    """All nine clients in each of five rounds; of examples, lots of 16 in one pass a round."""
    rdp = {"privacy.epsilon": 8.0, "privacy.accountant": "rdp"}
    (told,) = examine(from_flat({**keys, **rdp, "privacy.unit": "client"}), Silent())["privacy"]
    noise = noise_for(8.0, rate=1.0, steps=5, delta=1e-5, accountant="rdp")
    assert told == f"privacy of clients: noise of {noise:.4g} clip norms, epsilon 8 at delta 1e-05 (rdp) in all"

    found = examine(from_flat({**keys, **rdp, "privacy.unit": "example", "privacy.lot": 16}), Silent())
    sizes = min(found["shards"]["train"]), max(found["shards"]["train"])
    assert len(found["privacy"]) == 2
    for size, words in zip(sizes, found["privacy"], strict=True):
        steps = 5 * -(-size // 16)
        noise = noise_for(8.0, rate=min(1.0, 16 / size), steps=steps, delta=1e-5, accountant="rdp")
        assert f"noise of {noise:.4g} clip norms for {size} of them, epsilon " in words
    told = examine(
        from_flat({**keys, **rdp, "privacy.unit": "example", "privacy.lot": 16, "privacy.lifetime-epsilon": 4.0}),
        Silent(),
    )["privacy"]
    assert told[-1].startswith("clients will decline: privacy.lifetime-epsilon = 4.0 is less than")


def test_the_client_that_spends_most_is_told_of_though_it_is_neither_the_smallest_nor_the_largest():
    """One more than a lot of 64: twice the steps, and nearly each of its examples in each of them."""
    keys = {"privacy.unit": "example", "privacy.noise-multiplier": 2.0, "privacy.lot": 64, "rounds": 5}
    data: Any = SimpleNamespace(train_sizes=np.array([64, 65, 1000]), eligible=np.arange(3))
    told = planned_privacy(from_flat({**keys, "privacy.accountant": "prv"}), data, 10)
    assert [re.search(r"for ([\d,]+) of them, epsilon ([\d.]+)", words).groups() for words in told] == [
        ("64", "4.99"), ("65", "7.42"), ("1,000", "1.29"),
    ]  # fmt: skip


def test_texts_of_others_are_not_described():
    with pytest.raises(InputError, match="the private texts are with the clients"):
        examine(from_flat({"task": "text", "data.source": "a.csv", "data.private": "at-clients"}), Silent())


def test_times_are_told_in_words():
    assert [spoken(seconds) for seconds in (3.21, 42.4, 240.0, 9000.0)] == ["3.2 s", "42 s", "4 min", "2.5 h"]


REFUSED: dict[str, dict[str, Any]] = {
    "no text": {"data.public-text": "nowhere.txt"},
    "no example to warm up on": {"labels": 2, "data.public-fraction": 0.0, "student.warm-epochs": 1},
    "no text to warm up on": {"labels": 2, "data.public-fraction": 0.0, "student.general-epochs": 1},
    "a layer that the mentor has not": {
        "server.strategy": "fedkd",
        "client.mentor-layers": 1,
        "distill.hidden-layers": "1:1",
    },
    "a head of another task": {"origin": 3},
    "more heads than the student's origin has": {"origin": 0, "student.heads": 9},
    "relation heads that do not divide the student": {
        "origin": 0,
        "origin width": 8,
        "student.heads": 1,
        "distill.relation-weight": 1.0,
        "distill.relation-heads": 8,
    },
    "layers that the teacher has not": {"origin": 0, "distill.hidden-layers": "1:4", "distill.hidden-weight": 1.0},
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_a_run_refuses_is_refused(tmp_path, keys, name):
    given = {**keys, **REFUSED[name]}
    if labels := given.pop("labels", 0):
        given["teacher.model"] = str(make_teacher(tmp_path / "ready", labels=labels))
    if (labels := given.pop("origin", None)) is not None:
        width = given.pop("origin width", 16)
        given["student.model"] = str(make_teacher(tmp_path / "origin", labels=labels, layers=5, seed=1, width=width))
    config = from_flat(given)
    with pytest.raises(InputError) as run:
        prepare(config, Silent())
    with pytest.raises(InputError) as described:
        examine(config, Silent())
    assert str(described.value) == str(run.value)


def test_layers_are_paired_with_those_of_the_teacher_though_the_student_is_of_another_model(tmp_path, keys):
    keys["teacher.model"] = str(make_teacher(tmp_path / "deep", labels=0, layers=4))
    keys["student.model"] = str(make_teacher(tmp_path / "shallow", labels=0, layers=2, seed=1))
    assert examine(from_flat({**keys, "distill.hidden-layers": "1:3", "distill.hidden-weight": 1.0}), Silent())
