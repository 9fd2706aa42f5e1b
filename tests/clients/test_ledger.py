"""What a client has spent of its privacy: written before anything is sent, added up over runs, never begun anew."""

import json
import math
import multiprocessing

import numpy as np
import pytest

from clients.ledger import LAST, NAME, Declined, Ledger, data_hash
from common.accounting import spent

ROUND = (1.0, 0.5, 4)  # noise multiplier, rate, steps
OTHER = (2.0, 0.25, 8)
WAY = {"delta": 1e-5, "accountant": "rdp"}
RUN, LATER = "a" * 16, "b" * 16


def keys(*numbers):
    return np.array([[number] * 16 for number in numbers], dtype=np.uint8)


def claim(ledger, run=RUN, number=1, steps=ROUND, limit=math.inf):
    return ledger.claim(run, number, steps, limit=limit, **WAY)


def lines(ledger):
    return (ledger.folder / NAME).read_text().splitlines()


def test_rounds_runs_and_mechanisms_that_differ_add_up(tmp_path):
    folder = tmp_path / "one"
    first = claim(Ledger(folder, keys(1, 2)))
    assert first == (spent([ROUND], **WAY),) * 2
    claim(Ledger(folder, keys(1, 2)), number=2)
    later = claim(Ledger(folder, keys(1, 2)), run=LATER, steps=OTHER)
    assert later.run == spent([OTHER], **WAY)
    assert later.ever == spent([(1.0, 0.5, 8), OTHER], **WAY) > later.run


def test_a_round_over_the_limit_is_declined_and_not_written_down(tmp_path):
    ledger = Ledger(tmp_path / "one", keys(1))
    limit = spent([(1.0, 0.5, 8)], **WAY)
    claim(ledger, limit=limit)
    claim(ledger, number=2, limit=limit)
    with pytest.raises(Declined, match=r"its privacy budget is spent: epsilon is .* and its limit is"):
        claim(ledger, number=3, limit=limit)
    assert len(lines(ledger)) == 2


def test_what_was_trained_without_noise_is_spent_for_good(tmp_path):
    ledger = Ledger(tmp_path / "one", keys(1))
    assert claim(ledger, steps=(0.0, 0.5, 1)).ever == math.inf
    with pytest.raises(Declined, match="epsilon is inf"):
        claim(ledger, run=LATER, limit=1000.0)


def test_an_example_keeps_what_it_has_spent_when_the_data_are_cut_in_another_way(tmp_path):
    folder = tmp_path / "one"
    claim(Ledger(folder, keys(1, 2, 3)))
    assert claim(Ledger(folder, keys(3, 4)), run=LATER).ever == spent([(1.0, 0.5, 8)], **WAY)
    # 4 alone has been in one round, 5 in none
    assert claim(Ledger(folder, keys(4, 5)), run=LATER).ever == spent([(1.0, 0.5, 8)], **WAY)
    assert claim(Ledger(folder, keys(5, 6)), run=LATER).ever == spent([(1.0, 0.5, 8)], **WAY)
    assert claim(Ledger(folder, keys(7)), run=LATER).ever == spent([ROUND], **WAY)


def test_the_same_texts_in_any_order_are_the_same_data():
    assert data_hash(keys(1, 2, 2)) == data_hash(keys(2, 1)) != data_hash(keys(1, 3))


@pytest.mark.parametrize("damage", ["a byte", "a line", "the end", "half a line", "the file", "all", "the data"])
def test_a_damaged_ledger_is_never_begun_anew(tmp_path, damage):
    ledger = Ledger(tmp_path / "one", keys(1))
    claim(ledger)
    claim(Ledger(ledger.folder, keys(1, 2)), number=2)
    path = ledger.folder / NAME
    text = path.read_text()
    first, second = text.splitlines(keepends=True)
    found = {"a byte": text.replace('"noise": 1.0', '"noise": 9.0', 1), "a line": second, "the end": first,
             "half a line": text[:-30], "all": ""}  # fmt: skip
    if damage == "the file":
        path.unlink()
    elif damage == "the data":
        (ledger.folder / f"{data_hash(keys(1, 2))}.npy").unlink()
    else:
        path.write_text(found[damage])
    with pytest.raises(Declined, match="its privacy ledger is damaged"):
        claim(ledger, number=3)
    assert damage == "the data" or not path.exists() or path.read_text() == found[damage]


def test_a_line_whose_hash_was_not_written_any_more_counts(tmp_path):
    ledger = Ledger(tmp_path / "one", keys(1))
    claim(ledger)
    before = (ledger.folder / LAST).read_bytes()
    claim(ledger, number=2)
    (ledger.folder / LAST).write_bytes(before)  # killed in between
    assert claim(ledger, number=3).ever == spent([(1.0, 0.5, 12)], **WAY)


def _claim_some(folder):
    for number in range(5):
        claim(Ledger(folder, keys(1)), number=number)


def test_processes_that_write_at_the_same_time_lose_no_line(tmp_path):
    folder = tmp_path / "one"
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=_claim_some, args=(folder,)) for _ in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    found = [json.loads(line) for line in lines(Ledger(folder, keys(1)))]
    assert sorted(entry["round"] for entry in found) == sorted([*range(5)] * 3)
    assert claim(Ledger(folder, keys(1))).ever == spent([(1.0, 0.5, 64)], **WAY)
