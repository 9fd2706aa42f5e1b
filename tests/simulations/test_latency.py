"""Models take turns; what is measured is one text, one thread."""

import torch

from simulations.latency import WARM, medians


def test_every_model_reads_every_text_and_another_begins_each_time():
    threads, seen = torch.get_num_threads(), []

    def reader(name):
        def call(place):
            seen.append((name, place, torch.get_num_threads()))

        return call

    found = medians({name: reader(name) for name in "ab"}, count=6, laps=2, advance=lambda: None)
    assert set(found) == {"a", "b"}
    assert all(seconds > 0 for seconds in found.values())
    timed = seen[2 * WARM :]
    assert [(name, place) for name, place, _ in timed[:6]] == [
        ("a", 0), ("b", 0), ("b", 1), ("a", 1), ("a", 2), ("b", 2),
    ]  # fmt: skip
    for name in "ab":
        assert sorted(place for who, place, _ in timed if who == name) == sorted([*range(6)] * 2)
    assert {count for *_, count in seen} == {1}
    assert torch.get_num_threads() == threads
