"""What does not go with privacy of clients is refused before anything starts, and the key is named."""

import pytest

from common.config import from_flat
from common.errors import InputError

CLIENT = {"privacy.unit": "client", "privacy.epsilon": 8.0}


@pytest.mark.parametrize(
    ("given", "told"),
    [
        *[({"server.strategy": name}, f"server.strategy = '{name}'") for name in ("median", "krum", "feddf", "fedmd")],
        ({"server.strategy": "fedkd"}, "server.strategy = 'fedkd'"),
        ({"server.wire": "int8"}, "server.wire = 'int8'"),
        ({"server.norm-bound": 2.0}, "server.norm-bound = 2.0"),
        ({"server.cohort": 4, "server.over-select": 1.5}, "server.over-select = 1.5"),
        ({"student.tiers": "2:6:0:0.5"}, "student.tiers"),
        ({"client.grow-batch": True, "client.lr-decay": "constant"}, "client.grow-batch = true"),
        ({"student.heads": 6}, "student.width-selection = 'importance'"),
        ({"privacy.noise-multiplier": 1.0}, "privacy.noise-multiplier = 1.0"),
        ({"privacy.scores-share": 1.0}, "privacy.scores-share = 1.0"),
        ({"privacy.scores-share": 0.1, "task": "stsb"}, "task = 'stsb'"),
        ({"privacy.unit": "none"}, "privacy.epsilon = 8.0"),
    ],
)
def test_what_lets_a_client_move_more_is_refused(given, told):
    with pytest.raises(InputError) as caught:
        from_flat({**CLIENT, **given})
    assert told in str(caught.value)


@pytest.mark.parametrize("key", ["adaptive-clip", "noise-cohort", "scores-share"])
def test_keys_of_unit_client_need_it(key):
    value = 100 if key == "noise-cohort" else 0.5
    with pytest.raises(InputError, match=f"privacy.{key} = {value}: it is of privacy.unit = 'client'"):
        from_flat({f"privacy.{key}": value})


@pytest.mark.parametrize("name", ["fedavg", "fedprox", "fedavgm", "fedadam", "fedyogi", "fedadagrad"])
@pytest.mark.parametrize("packing", ["auto", "off"])
def test_rules_that_follow_the_mean_are_fine(name, packing):
    from_flat({**CLIENT, "server.strategy": name, "server.packing": packing, "privacy.adaptive-clip": 0.5})


@pytest.mark.parametrize(
    ("keys", "told"),
    [
        ({"unit": "client", "scores-share": 0.2, "epsilon": 8.0}, r"privacy\.scores-share = 0\.2"),
        ({"unit": "client"}, "there is no noise to share"),
    ],
)
def test_noise_that_clients_share_leaves_none_to_the_server(keys, told):
    shared = {"secure-aggregation": True, "distributed-noise": True}
    with pytest.raises(InputError, match=told):
        from_flat({f"privacy.{name}": value for name, value in {**shared, **keys}.items()})


@pytest.mark.parametrize("key", ["student.dropout", "client.max-seconds", "client.energy-budget"])
def test_an_example_moves_no_more_than_its_own_gradient(key):
    with pytest.raises(InputError, match=rf"privacy\.unit = 'example' does not fit {key}"):
        from_flat({"privacy.unit": "example", "privacy.epsilon": 8.0, key: 0.5})
