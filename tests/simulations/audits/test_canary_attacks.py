"""Canaries in whole runs of a tiny federation: below what is claimed with noise, found without."""

import pytest

from common.config import from_flat
from common.errors import InputError
from common.progress import Silent
from simulations.audits.client_canaries import ClientCanaries
from simulations.audits.example_canaries import ExampleCanaries
from simulations.audits.mechanism_canaries import MechanismCanaries
from simulations.laboratory import Laboratory
from tests.conftest import make_reviews, make_teacher

KEYS = {
    "task": "text", "data.clients": 6, "data.alpha": 50.0, "data.max-length": 32, "data.public-fraction": 0.3,
    "student.layers": 2, "client.lr": 0.01, "client.epochs": 1, "rounds": 3, "client.precision": "fp32",
    "server.packing": "off", "distill.soft-weight": 0.0, "distill.hard-weight": 1.0,
}  # fmt: skip
EXAMPLE = {"privacy.unit": "example", "privacy.lot": 16, "privacy.epsilon": 3.0}
CLIENT = {"privacy.unit": "client", "privacy.noise-multiplier": 3.0}


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    folder = tmp_path_factory.mktemp("canaries")
    teacher = make_teacher(folder / "teacher")
    source = make_reviews(folder / "reviews.csv", 400)

    def make(**keys):
        return Laboratory(
            from_flat({**KEYS, "teacher.model": str(teacher), "data.source": str(source), **keys}), Silent()
        )

    return make


def bounds(attack, lab):
    return {row["variant"].split(", ")[-1]: row for row in attack.run(lab, Silent())}


def test_example_canaries_are_found_in_an_overfit_student_and_not_under_noise(lab):
    found = bounds(ExampleCanaries(canaries=120), lab(**{"data.clients": 1, "client.epochs": 20}))
    assert found["any scores"]["success"] > 0.5 and found["any scores"]["chance"] == 0.0
    noised = bounds(ExampleCanaries(canaries=120), lab(**EXAMPLE))["any scores"]
    assert noised["success"] < noised["chance"]
    assert 2.5 < noised["chance"] <= 3.0  # what the clients' ledgers say, of a share of examples that the coins decide


def test_canary_clients_are_found_and_stay_below_their_epsilon_under_noise(lab):
    plain = bounds(ClientCanaries(), lab())
    assert list(plain) == ["any scores"]
    assert plain["any scores"]["success"] > 2.0 and plain["any scores"]["right"] == plain["any scores"]["guesses"]
    noised = bounds(ClientCanaries(canaries=600), lab(**CLIENT))
    claimed = noised["any scores"]["chance"]
    assert 0.0 < noised["any scores"]["success"] < claimed
    assert 0.4 * claimed < noised["normal scores"]["success"] < claimed
    assert noised["normal scores"]["estimate"] == pytest.approx(claimed, rel=0.35)


def test_clients_that_train_on_a_part_of_their_shard_are_among_the_canaries(lab):
    parts = lab(**{"client.share": 0.3})
    seen, take = [], parts.take
    parts.take = lambda intake, groups, lines: (take(intake, groups, lines), seen.append(set(intake.kept)))
    assert bounds(ClientCanaries(canaries=30), parts)["any scores"]["guesses"] > 0
    assert seen == [set(range(6))] * 3


def test_the_mechanism_of_a_run_is_audited_at_its_own_noise(lab):
    client = bounds(MechanismCanaries(), lab(**CLIENT))
    assert client["any scores"]["steps"] == 3 and client["normal scores"]["rate"] == 1.0
    assert 0.4 * client["any scores"]["chance"] < client["normal scores"]["success"] < client["any scores"]["chance"]
    example = bounds(MechanismCanaries(canaries=500), lab(**EXAMPLE))
    assert list(example) == ["any scores"]
    assert 0.0 <= example["any scores"]["success"] < example["any scores"]["chance"] <= 3.01
    (nothing,) = MechanismCanaries().run(lab(), Silent())
    assert nothing["success"] is None and nothing["note"] == "nothing is noised"


def test_masked_updates_are_noised_as_others_are_and_no_canary_client_can_be_put_in(lab):
    keys = {**CLIENT, "server.packing": "on", "privacy.secure-aggregation": True}
    for more in ({}, {"privacy.distributed-noise": True}):
        masked = lab(**keys, **more)
        found = bounds(MechanismCanaries(), masked)["normal scores"]
        assert 0.4 * found["chance"] < found["success"] < found["chance"]
        (nothing,) = ClientCanaries().run(masked, Silent())
        assert nothing["success"] is None and nothing["note"].startswith("privacy.secure-aggregation = true")


def test_what_canaries_cannot_be_put_into_is_refused(lab):
    with pytest.raises(InputError, match=r"example-canaries\.canaries = 4: give at least 16"):
        list(ExampleCanaries(canaries=4).run(lab(), Silent()))
    with pytest.raises(InputError, match=r"server\.strategy = 'krum'"):
        list(ClientCanaries().run(lab(**{"server.strategy": "krum"}), Silent()))
