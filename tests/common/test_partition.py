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

from common.corpus import Table
from common.errors import InputError
from common.keys import DataKeys
from common.partition import cut_clients, cut_groups, cut_holdout, text_groups
from common.seeding import generator, seed_for

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


@settings(max_examples=60)
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


@pytest.mark.parametrize("partition", ["iid", "dirichlet", "shards", "zipf"])
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


@pytest.mark.parametrize("alpha", [0.05, 1.0, 1e4])
@pytest.mark.parametrize("partition", ["dirichlet", "shards"])
@pytest.mark.parametrize("seed", [0, 7])
def test_dirichlet_and_shard_cuts_are_those_of_flowers_partitioners(partition, alpha, seed):
    from datasets import Dataset
    from flwr_datasets.partitioner import DirichletPartitioner, ShardPartitioner

    drawn, rows = np.random.default_rng(seed), np.arange(3, 303)  # 300 rows: no multiple of 13 clients or 39 shards
    labels = drawn.choice([-1, 0, 1, 2, 7], 310, p=[0.1, 0.6, 0.1, 0.15, 0.05])
    data = table([f"t{i}" for i in range(310)], labels=labels)
    given = keys(partition, 13, alpha=alpha, shards_per_client=3)

    own = seed_for(seed, "clients") % 2**32
    flower = (
        ShardPartitioner(13, "class", num_shards_per_partition=3, seed=own)
        if partition == "shards"
        else DirichletPartitioner(13, "class", alpha=alpha, min_partition_size=0, seed=own)
    )
    shuffled = generator(seed, "order").permutation(rows)
    flower.dataset = Dataset.from_dict({"row": shuffled, "class": labels[shuffled]})
    expected = [sorted(flower.load_partition(client)["row"][:]) for client in range(13)]
    assert [part.tolist() for part in cut_clients(data, rows, given, seed)] == expected


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
    for partition in ("iid", "dirichlet", "shards", "zipf"):
        with pytest.raises(InputError, match=r"data.clients = 11: only 10 private examples"):
            cut_clients(classes(), np.arange(10), keys(partition, 11), seed=0)


def test_more_label_shards_than_examples_are_refused():
    with pytest.raises(InputError, match=r"data.shards-per-client = 3: 4 clients need 12 label shards, and only 10 "):
        cut_clients(classes(), np.arange(10), keys("shards", 4, shards_per_client=3), seed=0)


def test_zipf_sizes_fall_as_a_power_of_the_rank():
    cut = cut_clients(classes(), np.arange(385), keys("zipf", 10, alpha=2.0), seed=0)
    # one each, and 375 in proportion to 1, 1/4, 1/9, ...: 241.97, 60.49, 26.89, 15.12, 9.68, 6.72, 4.94, 3.78, 2.99,
    # 2.42; rounding down leaves 7, one each for the first seven
    assert [len(part) for part in cut] == [243, 62, 28, 17, 11, 8, 6, 4, 3, 3]


@pytest.mark.parametrize("alpha", [1e-9, 0.5, 1.0, 3.0, 1e6])
@pytest.mark.parametrize("clients", [1, 3, 399, 400])
def test_zipf_shards_use_every_row_once_and_leave_nobody_empty(clients, alpha):
    cut = cut_clients(classes(), np.arange(400), keys("zipf", clients, alpha=alpha), seed=0)
    sizes = np.array([len(part) for part in cut])
    assert sorted(np.concatenate(cut).tolist()) == list(range(400))
    assert sizes.min() >= 1
    assert (np.diff(sizes) <= 0).all()
    law = np.arange(1.0, clients + 1) ** -alpha
    assert (np.abs(sizes - 1 - (400 - clients) * law / law.sum()) <= 1).all()


def test_zipf_shards_differ_in_size_and_not_in_their_classes():
    data = classes(4000)
    cut = cut_clients(data, np.arange(4000), keys("zipf", 4, alpha=1.0), seed=0)
    assert np.abs(shares(data, cut) - 0.25).max() < 0.08  # three standard errors of the smallest, 481


def flat(parts):
    return np.concatenate(parts).tolist()


@pytest.fixture(scope="module")
def crowd():
    """A table for ten thousand clients: 50,000 rows of 48,000 texts, so that clients share some."""
    drawn = np.random.default_rng(0)
    words = drawn.integers(0, 48_000, 50_000)
    owners = [f"o{owner}" for owner in drawn.permutation(50_000) % 10_000]
    return table([f"text {word}" for word in words], labels=drawn.integers(0, 4, 50_000), owners=owners)


@pytest.mark.parametrize("partition", ["iid", "dirichlet", "shards", "zipf", "natural"])
def test_ten_thousand_clients_share_out_a_table(crowd, partition):
    """Every row has one owner; a text is trained on or held out, never both; a fifth is held out."""
    groups, rows = text_groups(crowd), np.arange(50_000)
    cut = cut_clients(crowd, rows, keys(partition, 0 if partition == "natural" else 10_000), seed=1)
    shards = cut_holdout(cut, groups, 0.2, 2, seed=1)
    assert len(cut) == len(shards) == 10_000
    # 20,000 label shards have 2 rows each, of 2.5
    assert len(set(flat(cut))) == len(flat(cut)) == (40_000 if partition == "shards" else 50_000)
    sizes = np.array([len(part) for part in cut])
    assert (shards.train_sizes + shards.heldout_sizes).tolist() == np.where(sizes >= 2, sizes, 0).tolist()
    train, heldout = (flat([getattr(shard, side) for shard in shards]) for side in ("train", "heldout"))
    assert not set(groups[train]) & set(groups[heldout])
    assert sorted(train + heldout) == sorted(flat([part for part in cut if len(part) >= 2]))
    assert len(heldout) / len(train + heldout) == pytest.approx(0.2, abs=0.06)  # one of four is a quarter


def test_held_out_groups_are_drawn_client_by_client(crowd):
    """The rule, spelled out: what an earlier client decided stays; then, in a drawn order, whatever still fits."""
    groups = text_groups(crowd) // 3  # larger groups, of many clients
    cut = cut_clients(crowd, np.arange(50_000), keys("dirichlet", 500, alpha=0.3), seed=2)
    shards = cut_holdout(cut, groups, 0.3, 8, seed=2)
    side = {}
    for client, shard in enumerate(shards):
        rows = cut[client] if len(cut[client]) >= 8 else cut[client][:0]
        names, sizes = np.unique(groups[rows], return_counts=True)
        held = sum(size for name, size in zip(names, sizes, strict=True) if side.get(name))
        for position in generator(2, "holdout", client).permutation(len(names)):
            if names[position] not in side:
                side[names[position]] = held + sizes[position] <= max(round(0.3 * len(rows)), 1)
                held += side[names[position]] * sizes[position]
        heldout = np.array([side[group] for group in groups[rows]], dtype=bool)
        assert (shard.train.tolist(), shard.heldout.tolist()) == (rows[~heldout].tolist(), rows[heldout].tolist())


def test_shards_are_ranges_of_one_array():
    shards = cut_holdout([np.arange(4), np.arange(4, 12), np.arange(12, 22)], text_groups(classes()), 0.25, 5, seed=0)
    assert shards.starts.tolist() == [0, 0, 8, 18]
    assert shards.cuts.tolist() == [0, 6, 16]
    assert shards.train_sizes.tolist() == [0, 6, 8]
    assert shards.heldout_sizes.tolist() == [0, 2, 2]
    assert sorted(shards.order[6:8].tolist() + shards.order[:6].tolist()) == list(range(4, 12))
    assert shards[2].heldout.tolist() == shards.order[16:18].tolist()


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
    for partition in ("iid", "dirichlet", "shards", "zipf", "natural"):
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
    for partition in ("iid", "dirichlet", "shards", "zipf"):
        cuts = [np.concatenate(cut_clients(data, rows, keys(partition, 6), seed)).tolist() for seed in range(4)]
        assert all(a != b for a, b in pairwise(cuts))
