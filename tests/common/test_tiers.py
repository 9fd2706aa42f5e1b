"""Which student each client holds: a pure function; and which sizes make sense."""

import numpy as np
import pytest

from common.config import from_flat
from common.errors import InputError
from common.tiers import Size, assign_tiers, read_sizes


def test_sizes_are_read_smallest_first():
    assert read_sizes("2/4/256@0.5, 4/6/512@0.3", (6, 12, 1536)) == (Size(2, 4, 256, 0.5), Size(4, 6, 512, 0.3))
    assert read_sizes("", (6, 0, 0)) == ()
    assert read_sizes("2/0/0@.5", (3, 0, 0)) == (Size(2, 0, 0, 0.5),)
    # groups of clients whose scores are wanted apart may hold the same
    assert len(read_sizes("2/4/8@0.5,2/4/8@0.3", (2, 4, 8))) == 2


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("2/4@0.5", "LAYERS/HEADS/NEURONS@SHARE"),
        ("0/4/8@0.5", "LAYERS/HEADS/NEURONS@SHARE"),
        ("2/4/8@", "LAYERS/HEADS/NEURONS@SHARE"),
        ("2/4/8@0.5,", "LAYERS/HEADS/NEURONS@SHARE"),
        ("3/4/8@0.2,2/4/8@0.2", "3/4/8 does not fit into 2/4/8"),
        ("2/4/16@0.2,3/4/8@0.2", "2/4/16 does not fit into 3/4/8"),
        ("4/1/8@0.5", "4/1/8 does not fit into 3/all/all"),
        ("1/1/8@0.5,2/1/8@0.5", "leave no client"),
        ("1/1/8@0.0", "leave no client"),
        ("1/1/8@1.5", "leave no client"),
        ("1/1/8", "LAYERS/HEADS/NEURONS@SHARE"),
    ],
)
def test_other_texts_are_refused_by_the_key(text, told):
    with pytest.raises(InputError, match=r"student\.tiers = ") as error:
        from_flat({"student.layers": 3, "student.tiers": text})
    assert told in str(error.value)


@pytest.mark.parametrize(
    ("keys", "named"),
    [
        ({"server.strategy": "median"}, "server.strategy = 'median'"),
        ({"server.norm-bound": 1.0}, "server.norm-bound = 1.0"),
        ({"server.wire": "int8"}, "server.wire = 'int8'"),
        ({"server.packing": "off"}, "server.packing = 'off'"),
        ({"student.train-embeddings": True}, "student.train-embeddings = true"),
    ],
)
def test_tiers_refuse_what_needs_equal_updates(keys, named):
    with pytest.raises(InputError) as error:
        from_flat({"student.layers": 3, "student.tiers": "1/1/8@0.5", **keys})
    assert "student.tiers" in str(error.value) and named in str(error.value)
    from_flat({"student.layers": 3, **keys})  # without tiers they are fine


def test_a_list_says_which_client_holds_which():
    keys = {"student.layers": 3, "student.tiers": "1/1/8,2/1/8", "student.tier-of": "1, 3,2,1", "data.clients": 4}
    config = from_flat({"task": "sst2", **keys})
    assert config.tier_of(4).tolist() == [0, 2, 1, 0]
    assert config.tier_of(4).tolist() == from_flat(config.flat() | {"seed": 1}).tier_of(4).tolist()


@pytest.mark.parametrize(
    ("keys", "told"),
    [
        ({"student.tier-of": "1,4"}, r"student\.tier-of = '1,4': '4': give a number from 1, the smallest, to 3"),
        ({"student.tier-of": "0,1"}, r"'0': give a number from 1"),
        ({"student.tier-of": "1,,2"}, r"'': give a number from 1"),
        ({"student.tier-of": "1,2,3"}, r"3 tiers for data\.clients = 2; give one for each client"),
        ({"student.tiers": ""}, r"student\.tier-of = '1,3': student\.tiers is empty"),
        ({"student.tiers": "1/1/8@0.5,2/1/8@0.2"}, r"'1/1/8@0\.5': give LAYERS/HEADS/NEURONS alone"),
    ],
)
def test_a_list_that_does_not_fit_is_refused_by_the_key(keys, told):
    flat = {"task": "sst2", "student.layers": 3, "student.tiers": "1/1/8,2/1/8", "student.tier-of": "1,3"}
    with pytest.raises(InputError, match=told):
        from_flat({**flat, "data.clients": 2, **keys})


@pytest.mark.parametrize("mode", ["sliced", "exclusive"])
def test_a_mode_without_tiers_is_refused(mode):
    with pytest.raises(InputError, match=rf"student\.tier-mode = '{mode}'.*student\.tiers is empty"):
        from_flat({"student.tier-mode": mode})


def test_heads_of_a_tier_are_chosen_by_importance_which_needs_a_loss_on_outputs():
    keys = {"student.layers": 3, "student.tiers": "1/1/0@0.5", "distill.hidden-weight": 1.0}
    assert from_flat(keys).student.narrows
    assert not from_flat({**keys, "student.tiers": "1/0/0@0.5"}).student.narrows
    with pytest.raises(InputError, match="width-selection = 'importance'"):
        from_flat({**keys, "distill.soft-weight": 0.0, "distill.hard-weight": 0.0})


def test_shares_are_met_and_everyone_has_a_tier():
    sizes = (Size(1, 0, 0, 0.5), Size(2, 0, 0, 0.3))
    found = assign_tiers(7, 20, sizes)
    assert np.bincount(found).tolist() == [10, 6, 4]
    assert np.array_equal(found, assign_tiers(7, 20, sizes))
    assert not np.array_equal(found, assign_tiers(8, 20, sizes))
    assert not np.array_equal(found, np.sort(found))  # not by number: neighbours in the data differ
    assert np.bincount(assign_tiers(0, 3, sizes), minlength=3).tolist() == [2, 0, 1]  # 1.5 and 2.4 of 3 clients
    assert assign_tiers(0, 5, ()).tolist() == [0] * 5
