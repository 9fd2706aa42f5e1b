"""A text stands on one side of every cut, a private row in one shard, and every cut does what its name says."""

import hashlib
import os
import subprocess
import sys
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from common.config import DataKeys
from common.corpus import Table
from common.errors import InputError
from common.partition import cut_clients, cut_groups, cut_holdout, text_groups
from common.seeding import generator

WRITTEN = ("good film", "Good  film", "GOOD FILM ", "bad film", "bad\tFilm", "cold soup", "Straße", "STRASSE", "x", "y")
texts = st.sampled_from(WRITTEN)


def table(*columns, labels=None, owners=None):
    return Table(tuple(map(list, columns)), np.zeros(len(columns[0])) if labels is None else labels, owners)


def classes(rows=400, k=4):
    """A table sorted by class, as files often are."""
    return table([f"text {i}" for i in range(rows)], labels=np.repeat(np.arange(k), rows // k))


def texts_of(table, rows):
    return {" ".join(column[row].casefold().split()) for column in table.texts for row in rows}


def keys(partition, clients, **more):
    return DataKeys.model_validate(
        {"partition": partition, "clients": clients, **{k.replace("_", "-"): v for k, v in more.items()}}
    )


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(texts, texts), min_size=1, max_size=30), st.sampled_from([1, 2]), st.integers(0, 99))
@example([("x", "y"), ("y", "good film"), ("bad film", "x"), ("GOOD FILM ", "cold soup"), ("Straße", "Straße")], 2, 0)
def test_a_text_never_stands_on_both_sides_of_a_cut(pairs, columns, seed):
    data = table(*list(zip(*pairs, strict=True))[:columns])
    groups = text_groups(data)
    public, private = cut_groups(groups, 0.3, generator(seed, "public"))
    assert sorted([*public, *private]) == list(range(len(pairs)))
    assert texts_of(data, public).isdisjoint(texts_of(data, private))

    owner = generator(seed, "test").integers(0, 4, len(private))
    shards = cut_holdout([private[owner == c] for c in range(4)], groups, 0.3, 2, seed)
    train = np.concatenate([shard.train for shard in shards])
    heldout = np.concatenate([shard.heldout for shard in shards])
    assert texts_of(data, train).isdisjoint(texts_of(data, heldout))
    for client, shard in enumerate(shards):
        rows = private[owner == client]
        assert sorted([*shard.train, *shard.heldout]) == (rows.tolist() if len(rows) >= 2 else [])


def test_groups_of_pairs_are_what_shared_sentences_connect():
    #   a-b  c-b  c-d | e-f | g-G
    groups = text_groups(table(["a", "c", "C ", "e", "g"], ["b", "B", "d", "f", "G"]))
    assert groups[0] == groups[1] == groups[2]
    assert len({groups[0], groups[3], groups[4]}) == 3


@pytest.mark.parametrize("share", [0.0, 0.2, 0.5, 1.0])
def test_a_cut_of_different_texts_has_the_share_that_was_asked(share):
    chosen, rest = cut_groups(np.arange(1000), share, generator(0, "public"))
    assert (len(chosen), len(rest)) == (1000 * share, 1000 - 1000 * share)
    assert list(chosen) == sorted(chosen)


def test_every_shard_holds_out_its_own_share():
    data = classes()
    shards = cut_holdout([np.arange(0, 100), np.arange(100, 110), np.arange(110, 114)], text_groups(data), 0.2, 2, 0)
    assert [(len(s.train), len(s.heldout)) for s in shards] == [(80, 20), (8, 2), (3, 1)]
    assert all(not len(s.heldout) for s in cut_holdout([np.arange(9)], text_groups(data), 0.0, 2, 0))


def test_what_one_client_holds_out_no_other_trains_on():
    """Two clients that hold the same ten texts hold the same ones out."""
    words = [f"text {i % 10}" for i in range(20)]
    shards = cut_holdout([np.arange(10), np.arange(10, 20)], text_groups(table(words)), 0.3, 2, 0)
    assert [len(s.heldout) for s in shards] == [3, 3]
    assert (shards[0].heldout + 10).tolist() == shards[1].heldout.tolist()


def test_a_client_with_too_few_examples_keeps_none():
    shards = cut_holdout([np.arange(4), np.arange(4, 12)], text_groups(classes()), 0.25, 5, 0)
    assert [len(s) for s in shards] == [0, 8]


@pytest.mark.parametrize("partition", ["iid", "dirichlet", "shards"])
def test_every_private_row_is_in_exactly_one_shard(partition):
    rows = np.arange(40, 400)
    cut = cut_clients(classes(), rows, keys(partition, 9, alpha=0.3), seed=5)
    assert len(cut) == 9
    assert sorted(np.concatenate(cut).tolist()) == rows.tolist()
    assert all(list(part) == sorted(part) for part in cut)


def shares(data, cut, k=4):
    return np.stack([np.bincount(data.labels[part], minlength=k) / max(len(part), 1) for part in cut])


def test_iid_shards_are_equally_large_and_mixed():
    data = classes(4000)
    cut = cut_clients(data, np.arange(4000), keys("iid", 7), seed=0)
    sizes = [len(part) for part in cut]
    assert max(sizes) - min(sizes) <= 1
    assert np.abs(shares(data, cut) - 0.25).max() < 0.08  # four standard errors


def test_alpha_is_how_even_dirichlet_shards_are():
    data = classes(4000)
    even, skewed = (
        cut_clients(data, np.arange(4000), keys("dirichlet", 8, alpha=alpha), seed=0) for alpha in (1e4, 0.1)
    )
    assert np.abs(shares(data, even) - 0.25).max() < 0.05
    assert np.ptp([len(part) for part in even]) < 50
    filled = [part for part in skewed if len(part) > 20]
    assert np.median(shares(data, filled).max(axis=1)) > 0.6
    assert np.ptp([len(part) for part in skewed]) > 300


def test_a_dirichlet_cut_may_leave_a_client_empty():
    cut = cut_clients(classes(40), np.arange(40), keys("dirichlet", 30, alpha=0.05), seed=0)
    assert min(map(len, cut)) == 0


def test_label_shards_give_each_client_so_many_classes_at_most():
    data = classes()
    cut = cut_clients(data, np.arange(400), keys("shards", 10, shards_per_client=2), seed=0)
    assert [len(part) for part in cut] == [40] * 10
    assert all(len(set(data.labels[part])) <= 2 for part in cut)


def test_iid_and_natural_cuts_are_those_of_flowers_partitioners():
    from datasets import Dataset
    from flwr_datasets.partitioner import IidPartitioner, NaturalIdPartitioner

    def flowers(partitioner, **columns):
        partitioner.dataset = Dataset.from_dict(columns)
        parts = [partitioner.load_partition(number)["row"][:] for number in range(partitioner.num_partitions)]
        return [sorted(part) for part in parts]

    owners = [f"o{7 * i % 5}" for i in range(103)]
    data, rows = table([f"t{i}" for i in range(103)], owners=owners), np.arange(103)
    natural = cut_clients(data, rows, keys("natural", 0, partition_by="who"), seed=4)
    assert [part.tolist() for part in natural] == flowers(
        NaturalIdPartitioner(partition_by="who"), row=rows, who=owners
    )
    shuffled = generator(4, "order").permutation(rows)
    iid = cut_clients(data, rows, keys("iid", 6), seed=4)
    assert [part.tolist() for part in iid] == flowers(IidPartitioner(num_partitions=6), row=shuffled)


def test_natural_clients_are_the_owners_by_name():
    owners = ["zoe", "adam", "zoe", "mia", "adam", "mia", "zoe"]
    data = table(list("abcdefg"), owners=owners)
    natural = keys("natural", 0, partition_by="who")
    cut = cut_clients(data, np.array([0, 1, 2, 4, 5, 6]), natural, seed=0)
    assert [part.tolist() for part in cut] == [[1, 4], [5], [0, 2, 6]]
    with pytest.raises(InputError, match=r"data.clients = 5: the column 'who' has 3 values .* give 0 or 3"):
        cut_clients(data, np.arange(7), keys("natural", 5, partition_by="who"), seed=0)


def test_scores_are_skewed_by_their_whole_part():
    data = table([f"t{i}" for i in range(600)], labels=np.repeat([0.4, 1.2, 2.9, 3.0, 4.1, 5.0], 100))
    cut = cut_clients(data, np.arange(600), keys("shards", 5, shards_per_client=1), seed=0)
    parts = {tuple(sorted({min(int(score), 4) for score in data.labels[part]})) for part in cut}
    assert all(len(part) <= 2 for part in parts)


def test_more_clients_than_examples_is_refused():
    for partition in ("iid", "dirichlet", "shards"):
        with pytest.raises(InputError, match=r"data.clients = 11: only 10 private examples"):
            cut_clients(classes(), np.arange(10), keys(partition, 11), seed=0)


DIGEST = """
import hashlib, numpy as np
from tests.common.test_partition import digest
print(digest())
"""


def digest():
    """Of every kind of cut of one table, held-out rows and all."""
    found = hashlib.sha256()
    data = classes()
    data = table(data.texts[0], data.texts[0][::-1], labels=data.labels, owners=[f"o{i % 7}" for i in range(400)])
    groups = text_groups(data)
    public, private = cut_groups(groups, 0.2, generator(3, "public"))
    found.update(public.tobytes())
    for partition in ("iid", "dirichlet", "shards", "natural"):
        cut = cut_clients(data, private, keys(partition, 0 if partition == "natural" else 6, alpha=0.5), seed=3)
        for shard in cut_holdout(cut, groups, 0.2, 2, 3):
            found.update(shard.train.tobytes() + b"|" + shard.heldout.tobytes())
    return found.hexdigest()


def test_cuts_are_the_same_in_every_call_and_python_process():
    other = subprocess.run(
        [sys.executable, "-c", DIGEST],
        check=False,
        env={**os.environ, "PYTHONHASHSEED": "12345"},
        capture_output=True,
        text=True,
    )
    assert other.stdout.strip() == digest() == digest(), other.stderr


def test_a_seed_changes_every_drawn_cut():
    data, rows = classes(), np.arange(400)
    for partition in ("iid", "dirichlet", "shards"):
        cuts = [np.concatenate(cut_clients(data, rows, keys(partition, 6), seed)).tolist() for seed in range(4)]
        assert all(a != b for a, b in pairwise(cuts))
