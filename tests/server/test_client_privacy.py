"""DP-FedAvg: who is drawn, what is added, what it costs, and what a run that is taken up again owes."""

import math

import numpy as np
import pytest

from common.accounting import epsilon, noise_for, spent
from common.clipping import BELOW, below, clip
from common.config import from_flat
from common.errors import InputError
from common.fixed_point import SCALE, ExactSum
from common.wire import ClientLine, own_update, pack_reply
from server.aggregation import Rejected
from server.client_privacy import ClientPrivacy
from server.clipped import clipped_intake
from server.ledger import Charge, Ledger

SHAPES = {"a": (3, 2), "b": (4,)}
CLIENTS = 20
SIZES = dict.fromkeys(range(CLIENTS), 9)


def privacy(folder=None, done=0, shapes=SHAPES, **keys):
    given = {"server.cohort": 5, "rounds": 4, "privacy.unit": "client", "privacy.accountant": "rdp", "data.clients": 20}
    found = ClientPrivacy(from_flat(given | {name.replace("__", ".").replace("_", "-"): v for name, v in keys.items()}),
                          CLIENTS, shapes)  # fmt: skip
    found.begin(done, folder)
    return found


def drawn(count, norm, seed=0):
    """Updates of this norm."""
    rng, found = np.random.default_rng(seed), []
    for _ in range(count):
        update = {name: rng.normal(size=shape) for name, shape in SHAPES.items()}
        length = math.sqrt(sum(np.square(part).sum() for part in update.values()))
        found.append({name: np.float32(part * norm / length) for name, part in update.items()})
    return found


def lines(clients, problems=()):
    return [ClientLine(one, 0 if one in problems else 9, 0.1, problem="OSError" if one in problems else "")
            for one in clients]  # fmt: skip


def packed(mechanism, found, problems=(), bound=None):
    """A node's reply: the sum of clipped updates of clients 0, 1, ..."""
    total = ExactSum(mechanism.shapes(SHAPES))
    for client, update in enumerate(found):
        if client not in problems:
            clipped, norm = clip(update, bound or mechanism.clip_norm)
            total.add(clipped | (below(norm, mechanism.clip_norm) if BELOW in total.totals else {}), 1)
    return pack_reply({"update": total.compact}, lines(range(len(found)), problems)), frozenset(range(len(found)))


def each(found):
    groups = {
        own_update(client): {f"{name}|values": part for name, part in update.items()}
        for client, update in enumerate(found)
    }
    return pack_reply(groups, lines(range(len(found)))), frozenset(range(len(found)))


def taken(mechanism, *replies, number=1):
    intake = clipped_intake(mechanism, SHAPES, SIZES, number)
    for content, clients in replies:
        intake.take(content, clients)
    return intake


# --- who is drawn -------------------------------------------------------------------------------


def test_each_client_is_in_a_round_by_itself_and_no_seed_draws_it_again():
    mechanism = privacy()
    sizes = [len(mechanism.cohort(np.arange(CLIENTS))) for _ in range(2000)]
    assert np.mean(sizes) == pytest.approx(5, abs=0.25)
    assert np.var(sizes) == pytest.approx(20 * 0.25 * 0.75, rel=0.2)  # binomial: a fixed cohort would have none
    assert len({privacy().cohort(np.arange(CLIENTS)) for _ in range(10)}) > 5


def test_everyone_is_in_each_round_without_a_cohort():
    assert privacy(server__cohort=0).cohort(np.arange(3)) == (0, 1, 2)


# --- what is added ------------------------------------------------------------------------------


def test_the_mean_has_a_public_denominator_and_every_client_the_same_weight():
    mechanism, found = privacy(privacy__clip_norm=2.0), drawn(3, norm=1.0)
    update = taken(mechanism, packed(mechanism, found)).update()
    for name in SHAPES:
        np.testing.assert_allclose(update[name], sum(np.float64(one[name]) for one in found) / 5, atol=1e-9)


def test_a_zero_a_nan_and_a_missing_update_count_as_zero():
    mechanism, found = privacy(privacy__clip_norm=2.0), drawn(2, norm=1.0)
    nothing = {name: np.zeros(shape, np.float32) for name, shape in SHAPES.items()}
    bad = {**nothing, "b": np.float32([math.nan, 0, 0, 0])}
    alone = taken(mechanism, packed(mechanism, found)).update()
    off = privacy(privacy__clip_norm=2.0, server__packing="off")
    content, clients = each([*found, nothing, bad])
    intake = clipped_intake(off, SHAPES, SIZES, 1)
    _, refused = intake.take(content, clients)
    assert list(refused) == [3]
    for other in (taken(mechanism, packed(mechanism, [*found, nothing, bad], problems=(3,))), intake):
        assert {name: part.tobytes() for name, part in other.update().items()} == {
            name: part.tobytes() for name, part in alone.items()
        }


def test_an_empty_cohort_is_a_step_of_noise():
    shapes = {"a": (1000, 200)}
    mechanism = privacy(shapes=shapes, privacy__noise_multiplier=1.5, privacy__clip_norm=0.4)
    update = clipped_intake(mechanism, shapes, SIZES, 1).update()
    assert update["a"].std() == pytest.approx(1.5 * 0.4 / 5, rel=0.02)  # its standard error is 0.16 %
    assert len(mechanism.ledger.charges) == 1


def test_the_noise_has_the_calibrated_deviation():
    shapes = {"a": (1000, 200)}
    mechanism = privacy(shapes=shapes, privacy__epsilon=3.0, privacy__clip_norm=0.4, server__cohort=0, rounds=7)
    expected = noise_for(3.0, rate=1.0, steps=7, delta=1e-5, accountant="rdp")
    total = np.full((1000, 200), 17, dtype=np.int64)
    noise = mechanism.release(1, {"a": total})["a"] - 17 / (CLIENTS * SCALE)
    assert noise.std() == pytest.approx(expected * 0.4 / CLIENTS, rel=0.02)


def test_a_small_cohort_can_have_a_large_ones_noise():
    shapes = {"a": (1000, 200)}
    keys = {"privacy__noise_multiplier": 1.5, "privacy__clip_norm": 0.4, "privacy__noise_cohort": 1000}
    mechanism = privacy(shapes=shapes, **keys)
    assert mechanism.release(1, {"a": np.zeros((1000, 200), np.int64)})["a"].std() == pytest.approx(
        1.5 * 0.4 / 1000, rel=0.02
    )
    assert mechanism.population == 4000  # a quarter of them in a round, as here
    assert mechanism.epsilon == epsilon(noise_multiplier=1.5, rate=0.25, steps=1, delta=1e-5, accountant="rdp")


def test_an_update_is_drawn_once():
    intake = taken(mechanism := privacy(privacy__noise_multiplier=1.0))
    assert intake.update() is intake.update()
    assert len(mechanism.ledger.charges) == 1


def test_the_server_refuses_a_sum_beyond_what_its_clients_can_add():
    mechanism, found = privacy(privacy__clip_norm=1.0), drawn(1, norm=50.0)
    taken(mechanism, packed(mechanism, found))
    with pytest.raises(Rejected, match="beyond 1 times the clip norm"):
        taken(mechanism, packed(mechanism, found, bound=1.01))


def test_the_server_clips_again_what_comes_by_itself():
    mechanism, found = privacy(privacy__clip_norm=1.0, server__packing="off"), drawn(2, norm=50.0)
    update = taken(mechanism, each(found)).update()
    for name in SHAPES:
        np.testing.assert_allclose(update[name], sum(one[name] / 50 for one in found) / 5, atol=1e-6)


# --- adaptive clipping --------------------------------------------------------------------------


@pytest.mark.parametrize(("start", "packing"), [(0.1, "on"), (0.1, "off"), (300.0, "on")])
def test_the_clip_norm_goes_to_the_norm_that_updates_have(start, packing):
    keys = {"privacy__clip_norm": start, "privacy__adaptive_clip": 0.5, "server__packing": packing}
    mechanism = privacy(**keys, server__cohort=0, rounds=100)
    for number in range(1, 101):
        found = [clip(update, mechanism.clip_norm)[0] for update in drawn(CLIENTS, norm=10.0, seed=number)]
        reply = each(found) if packing == "off" else packed(mechanism, drawn(CLIENTS, norm=10.0, seed=number))
        taken(mechanism, reply, number=number).update()
    assert mechanism.clip_norm == pytest.approx(10.0, rel=0.11)  # it moves by exp(0.1) a round


def test_both_sums_of_a_round_cost_what_one_of_the_whole_noise_costs():
    shapes = {"a": (1000, 200)}
    mechanism = privacy(shapes=shapes, privacy__noise_multiplier=2.0, privacy__adaptive_clip=0.5, privacy__delta=1e-6)
    updates = mechanism._update_noise()
    assert mechanism._below_noise() == 2.0  # a twentieth of 5 would be less
    assert updates**-2 + (2 * 2.0) ** -2 == pytest.approx(2.0**-2)
    assert updates == pytest.approx(2.0 / math.sqrt(0.75))
    found = mechanism.release(1, {"a": np.zeros((1000, 200), np.int64), BELOW: np.zeros(1, np.int64)})
    assert set(found) == {"a"}
    assert found["a"].std() == pytest.approx(updates / 5, rel=0.02)
    assert mechanism.ledger.steps("update") == [(2.0, 0.25, 1)]


# --- what it costs ------------------------------------------------------------------------------


def test_steps_of_several_kinds_add_up():
    kinds = [(20.0, 1.0, 30), (15.0, 1.0, 20), (20.0, 1.0, 10)]
    one = (40 / 20.0**2 + 20 / 15.0**2) ** -0.5  # without sampling they are one step of less noise
    for accountant in ("pld", "prv", "rdp"):
        expected = epsilon(noise_multiplier=one, rate=1.0, steps=1, delta=1e-5, accountant=accountant)
        assert spent(kinds, delta=1e-5, accountant=accountant) == pytest.approx(expected, rel=0.01)


def test_the_noise_that_is_found_is_the_least_that_is_enough():
    for target, done in ((0.05, ()), (2.0, ()), (300.0, ()), (2.0, ((4.0, 1.0, 2),))):
        found = noise_for(target, rate=1.0, steps=9, delta=1e-5, accountant="rdp", done=done)
        for noise, enough in ((found, True), (found * 0.999, False)):
            assert (spent([*done, (noise, 1.0, 9)], delta=1e-5, accountant="rdp") <= target) == enough


def release(mechanism, *numbers):
    for number in numbers:
        mechanism.release(number, {"a": np.zeros((3, 2), np.int64)})
    return mechanism


ALL = {"server__cohort": 0, "privacy__epsilon": 2.0}


def test_a_run_spends_its_epsilon_and_no_more(tmp_path):
    mechanism = release(privacy(tmp_path, **ALL), 1, 2, 3, 4)
    assert 1.99 < mechanism.epsilon <= 2.0
    with pytest.raises(InputError, match=r"privacy.epsilon = 2.0: .* nothing is left"):
        privacy(tmp_path, done=4, rounds=5, **ALL)


def test_a_release_that_no_checkpoint_holds_is_taken_from_disk(tmp_path):
    first = privacy(tmp_path, **ALL, privacy__adaptive_clip=0.5)
    told = first.release(1, {"a": np.zeros((3, 2), np.int64), BELOW: np.zeros(1, np.int64)})
    again = privacy(tmp_path, **ALL, privacy__adaptive_clip=0.5)
    assert again.noise == first.noise
    assert again.released_before(1)["a"].tobytes() == told["a"].tobytes()
    assert again.clip_norm == first.clip_norm != 1.0
    assert again.released_before(2) is None
    assert 1.99 < release(again, 2, 3, 4).epsilon <= 2.0


def test_a_round_that_is_done_again_is_paid_for_by_the_rounds_to_come(tmp_path):
    first = release(privacy(tmp_path, **ALL), 1, 2)
    (tmp_path / "released-update.safetensors").unlink()  # killed once round 2 was charged
    again = privacy(tmp_path, done=1, **ALL)
    assert again.noise > first.noise
    release(again, 2, 3, 4)
    assert len(again.ledger.charges) == 5
    assert 1.98 < again.epsilon <= 2.0
    assert privacy(tmp_path, done=4, **ALL).epsilon == again.epsilon


def test_a_run_that_lost_nothing_goes_on_with_the_same_noise(tmp_path):
    first = release(privacy(tmp_path, **ALL), 1)
    assert privacy(tmp_path, done=1, **ALL).noise == first.noise


def test_a_line_that_was_never_finished_was_never_released(tmp_path):
    path = tmp_path / "privacy.jsonl"
    Ledger(path).charge(Charge(1, "update", 1.0, 0.5))
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"round": 2, "wh')
    assert len(Ledger(path).charges) == 1
    assert path.read_bytes() == whole
    path.write_bytes(b"[]\n" + whole)
    with pytest.raises(InputError, match="not a ledger"):
        Ledger(path)


@pytest.mark.parametrize("wrong", [1e-9, 1e6])
def test_a_clip_norm_that_the_sums_cannot_hold_is_refused(wrong):
    with pytest.raises(InputError, match=r"privacy.clip-norm"):
        ClientPrivacy(from_flat({"privacy.unit": "client", "privacy.clip-norm": wrong}), 10**4, SHAPES)


# --- scores -------------------------------------------------------------------------------------


def test_scores_have_their_share_of_epsilon():
    mechanism = privacy(privacy__epsilon=4.0, privacy__scores_share=0.25, server__cohort=0)
    for number in (1, 2, 3, 4):
        mechanism.release(number, {"a": np.zeros((3, 2), np.int64)})
        mechanism.release_statistics(number, {"student": np.zeros(4, np.int64)}, 1.0)
    share = spent(mechanism.ledger.steps("scores"), delta=0.25e-5, accountant="rdp")
    assert 0.99 < share <= 1.0
    assert 2.98 < mechanism.epsilon - share <= 3.0


def test_scores_of_cohorts_and_of_everyone_at_the_end_are_planned_for():
    mechanism = privacy(privacy__scores_share=0.25, server__cohort=5)
    assert mechanism._scorings(4) == ((0.25, 3), (1.0, 1))
    assert privacy(server__scores="all")._scorings(4) == ((0.25, 0), (1.0, 4))
    assert privacy(server__scores="cohort")._scorings(4) == ((0.25, 4), (1.0, 0))
    rare = privacy(server__cohort=5, server__scores_every=3, rounds=8)  # after rounds 3, 6 and 8
    assert rare._scorings(8) == ((0.25, 2), (1.0, 1))
    assert rare._scorings(5) == ((0.25, 1), (1.0, 1))
    assert rare._scorings(1) == ((0.25, 0), (1.0, 1))


def test_counts_are_noised_by_what_a_client_can_add_to_both_tables():
    mechanism = privacy(
        privacy__noise_multiplier=1.0, privacy__scores_share=0.5, privacy__scores_examples=8, server__cohort=0
    )
    totals = {who: np.full(40_000, 10**6, dtype=np.int64) for who in ("student", "teacher")}
    found = mechanism.release_statistics(1, totals, 1.0)
    for counts in found.values():
        assert counts.std() == pytest.approx(mechanism.noise_scores * 8 * math.sqrt(2), rel=0.02)
    nothing = {"student": np.zeros(1000, np.int64)}
    assert mechanism.release_statistics(2, nothing, 1.0)["student"].min() == 0


def test_cohorts_that_may_be_too_few_for_a_secure_sum_are_refused():
    """Of 20 with a chance of a quarter, two or fewer come every eleventh time; all of them always are enough."""
    keys = {"privacy__secure_aggregation": True, "privacy__noise_multiplier": 1.0}
    with pytest.raises(InputError, match=r"server\.cohort = 5: fewer than 3 of 20 clients may be drawn"):
        privacy(**keys)
    privacy(**keys, server__cohort=0)
