"""Keys come from a file, the command line or Flower, mean the same from each, and are refused by name."""

import tomllib
from pathlib import Path

import pytest

from common.config import Config, from_flat, load_config
from common.errors import InputError

PYPROJECT = Path(__file__).parents[2] / "pyproject.toml"


def refusal(flat):
    with pytest.raises(InputError) as caught:
        from_flat(flat)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    "wrong, near",
    [
        ("round", "rounds"),
        ("data.client", "data.clients"),
        ("data.partition_by", "data.partition-by"),
        ("distill.temprature", "distill.temperature"),
        ("student.layer", "student.layers"),
        ("sever.cohort", "server.cohort"),
    ],
)
def test_an_unknown_key_names_the_nearest_one(wrong, near):
    assert refusal({wrong: 1}) == f"{wrong}: no such key; did you mean {near}?"


def test_an_unknown_key_far_from_all_names_none():
    assert "did you mean" not in refusal({"zzz.qqqqqq": 1})


@pytest.mark.parametrize(
    "key, value",
    [
        ("rounds", 0),
        ("rounds", "three"),
        ("rounds", "3"),
        ("rounds", 2.5),
        ("rounds", True),
        ("rounds", float("nan")),
        ("seed", -1),
        ("seed", 2**63),
        ("task", "sst"),
        ("task", 2),
        ("data.clients", -1),
        ("data.partition", "random"),
        ("data.alpha", 0.0),
        ("data.alpha", float("inf")),
        ("data.min-examples", 1),
        ("data.public-fraction", -0.01),
        ("data.public-fraction", 1.01),
        ("data.public-fraction", float("nan")),
        ("data.holdout-fraction", 7),
        ("data.max-length", 513),
        ("data.source", True),
        ("teacher.epochs", 0),
        ("teacher.lr", 0.0),
        ("student.layers", 0),
        ("student.dropout", 1.0),
        ("student.train-embeddings", 1),
        ("student.train-embeddings", "yes"),
        ("distill.temperature", 0.0),
        ("distill.soft-weight", -1.0),
        ("distill.hidden-weight", float("inf")),
        ("distill.hidden-loss", "l1"),
        ("client.lr", float("nan")),
        ("client.lr", True),
        ("client.clip-norm", -1.0),
        ("client.precision", "fp16"),
        ("client.proximal", -0.1),
        ("server.strategy", "fedsgd"),
        ("server.lr", -1.0),
        ("server.lr", False),
        ("server.momentum", 1.0),
        ("server.tau", 0.0),
        ("server.byzantine", -1),
        ("server.norm-bound", -1.0),
        ("server.norm-bound", "1"),
        ("server.packing", "yes"),
        ("server.wire", "fp8"),
        ("server.topk", 0.0),
        ("server.svd-energy-end", 1.5),
        ("server.over-select", 0.9),
        ("server.keep-checkpoints", 0),
        ("server.max-lost-fraction", 1.5),
        ("server.round-timeout", 0.0),
        ("runtime.threads", 0),
        ("runtime.device", "gpu"),
    ],
)
def test_a_value_that_does_not_fit_is_refused_with_its_key_and_itself(key, value):
    assert refusal({key: value}).startswith(f"{key} = {value!r}: ")


@pytest.mark.parametrize(
    "flat, named",
    [
        ({"data.clients": 4, "data.partition": "iid", "server.cohort": 5}, ("server.cohort = 5", "data.clients = 4")),
        ({"task": "text"}, ("data.source",)),
        ({"task": "text", "data.source": "a.csv", "data.partition": "natural"}, ("data.partition-by",)),
        ({"data.holdout-fraction": 1.0}, ("data.holdout-fraction",)),
        ({"task": "sst2", "data.validation": "a.csv"}, ("data.validation = 'a.csv'", "task = 'text'")),
        ({"task": "sst2", "data.text-columns": "a"}, ("data.text-columns = 'a'", "'sst2'")),
        ({"data.label-column": "stars"}, ("data.label-column = 'stars'", "'toy'")),
        (
            {"rounds": 5, "distill.general-rounds": 3, "server.average-rounds": 3},
            ("distill.general-rounds = 3", "server.average-rounds = 3 of rounds = 5"),
        ),
        (
            {"rounds": 5, "distill.general-rounds": 3, "client.grow-batch": True, "client.lr-decay": "constant"},
            ("distill.general-rounds = 3", "client.grow-batch = true"),
        ),
        ({"distill.soft-weight": 0.0, "distill.hard-weight": 0}, ("distill.soft-weight", "hard-weight")),
        (
            {"student.target-ratio": 0.4, "student.vocabulary": 100},
            ("student.target-ratio", "student.vocabulary = 100"),
        ),
        *[
            (
                {key: 1, "distill.soft-weight": 0.0, "distill.hard-weight": 0.0, "distill.cls-weight": 1.0},
                ("student.width-selection = 'importance'", "distill.soft-weight", "'random'"),
            )
            for key in ("student.heads", "student.neurons")
        ],
        *[
            (
                {"server.packing": "on", "server.strategy": rule},
                ("server.packing = 'on'", f"server.strategy = {rule!r}"),
            )
            for rule in ("median", "trimmed-mean", "krum", "multi-krum")
        ],
        *[
            ({"server.packing": "on", "server.wire": wire}, ("server.packing = 'on'", f"server.wire = {wire!r}"))
            for wire in ("fp16", "int8", "topk", "svd")
        ],
        ({"server.packing": "on", "server.norm-bound": 0.5}, ("server.packing = 'on'", "server.norm-bound = 0.5")),
    ],
)
def test_keys_that_contradict_each_other_are_named(flat, named):
    message = refusal(flat)
    assert all(name in message for name in named)


def test_a_file_is_overlaid_by_settings(tmp_path):
    path = tmp_path / "run.toml"
    path.write_text('rounds = 7\nseed = 3\n[data]\npartition = "iid"\nclients = 4\n[client]\nlr = 1\n')
    config = load_config(path, ["rounds=2", "data.alpha = 0.5", "student.layer-selection=0,1,2", "data.source=x y.csv"])
    assert (config.rounds, config.seed, config.data.clients, config.data.alpha) == (2, 3, 4, 0.5)
    assert config.client.lr == 1.0
    assert config.student.layer_selection == "0,1,2"
    assert config.data.source == "x y.csv"


@pytest.mark.parametrize("setting", ["rounds", "=3", " = 3", ""])
def test_a_setting_without_key_or_value_is_refused(setting):
    with pytest.raises(InputError, match="key=value"):
        load_config(None, [setting])


def test_a_broken_or_missing_file_is_named(tmp_path):
    broken = tmp_path / "broken.toml"
    broken.write_text("rounds = = 3")
    for path in (broken, tmp_path / "missing.toml", tmp_path):
        with pytest.raises(InputError, match=str(path)):
            load_config(path)


def test_a_section_given_as_a_value_and_a_value_given_as_a_section_are_refused(tmp_path):
    path = tmp_path / "run.toml"
    for text in ("data = 3", "[rounds]\nx = 1", "[data.source]\nx = 1"):
        path.write_text(text)
        with pytest.raises(InputError, match=r"^(data|rounds)"):
            load_config(path)


def test_text_that_looks_like_a_number_stays_text():
    config = load_config(None, ["task=text", "data.source=2024", "student.layer-selection=1", "data.text-columns=7.5"])
    assert (config.data.source, config.student.layer_selection, config.data.text_columns) == ("2024", "1", "7.5")


@pytest.mark.parametrize(
    "flat",
    [
        {},
        {"task": "sst2", "data.clients": 7, "server.cohort": 3, "client.lr": 1e-5, "student.train-embeddings": True},
        {"task": "text", "data.source": 'C:\\a "b"\n', "data.partition": "natural", "data.partition-by": "who, é"},
    ],
)
def test_keys_survive_flat_and_toml(flat, tmp_path):
    config = from_flat(flat)
    assert from_flat(config.flat()) == config
    (tmp_path / "config.toml").write_text(config.toml())
    assert load_config(tmp_path / "config.toml") == config


def test_auto_is_resolved_by_the_task():
    assert from_flat({}).data.partition == "natural"
    assert from_flat({}).data.partition_by == "domain"
    sst2 = from_flat({"task": "sst2"}).data
    assert (sst2.partition, sst2.clients) == ("dirichlet", 10)
    assert from_flat({"task": "text", "data.source": "a.csv", "data.partition-by": "shop"}).data.partition == "natural"


@pytest.mark.parametrize(
    ("flat", "packing"),
    [
        ({}, "on"),
        ({"server.strategy": "fedprox"}, "on"),
        ({"server.strategy": "fedyogi", "server.norm-bound": 0.0}, "on"),
        ({"server.strategy": "median"}, "off"),
        ({"server.strategy": "trimmed-mean"}, "off"),
        ({"server.strategy": "krum"}, "off"),
        ({"server.strategy": "multi-krum"}, "off"),
        ({"server.norm-bound": 0.5}, "off"),
        ({"server.wire": "int8"}, "off"),
        ({"server.wire": "fp32"}, "on"),
    ],
    ids=str,
)
def test_packing_is_resolved_by_what_needs_each_clients_own_update(flat, packing):
    for given in ({}, {"server.packing": "auto"}, {"server.packing": packing}):
        assert from_flat(flat | given).server.packing == packing


def test_packing_can_be_switched_off_where_it_would_be_allowed():
    assert from_flat({"server.packing": "off"}).server.packing == "off"


@pytest.mark.parametrize("given", [{}, {"server.lr": 0.0}, {"server.lr": 0}], ids=str)
def test_a_server_step_of_0_becomes_the_strategys_own(given):
    for strategy in ("fedadam", "fedyogi", "fedadagrad"):
        assert from_flat({"server.strategy": strategy, **given}).server.lr == 0.01
    for strategy in ("fedavg", "fedprox", "fedavgm", "median", "trimmed-mean", "krum", "multi-krum"):
        assert from_flat({"server.strategy": strategy, **given}).server.lr == 1.0
    assert from_flat({"server.strategy": "fedadam", "server.lr": 0.5}).server.lr == 0.5


def test_what_neither_file_nor_setting_gives_is_the_bases(tmp_path):
    base = from_flat({"task": "sst2", "rounds": 9, "seed": 4, "data.clients": 7, "server.strategy": "fedadam"})
    assert load_config(base=base) == base
    path = tmp_path / "run.toml"
    path.write_text("rounds = 10\nseed = 5\n")
    found = load_config(path, ["seed=6", "client.lr=0.5"], base)
    assert found.flat() == base.flat() | {"rounds": 10, "seed": 6, "client.lr": 0.5}
    with pytest.raises(InputError, match="rounds = 0"):
        load_config(None, ["rounds=0"], base)


def test_flowers_table_holds_exactly_our_keys_and_defaults():
    table = tomllib.loads(PYPROJECT.read_text())["tool"]["flwr"]["app"]["config"]
    flat = {}
    for name, value in table.items():
        flat.update({f"{name}.{key}": v for key, v in value.items()} if isinstance(value, dict) else {name: value})
    unresolved = Config.model_construct().flat()  # `auto` as it stands, for a task given with --run-config
    assert flat == unresolved
    assert {key: type(value) for key, value in flat.items()} == {key: type(v) for key, v in unresolved.items()}
    assert from_flat(flat) == Config()


def test_an_empty_section_that_does_not_exist_is_refused(tmp_path):
    path = tmp_path / "a.toml"
    path.write_text("[secrecy]\n")
    with pytest.raises(InputError, match=r"^secrecy: no such key"):
        load_config(path)
    path.write_text("[data]\n")
    assert load_config(path) == Config()
