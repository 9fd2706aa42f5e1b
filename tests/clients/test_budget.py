"""A client stops where its time, energy or memory is spent, and says how much it has done."""

import dataclasses
import itertools
import json

import numpy as np
import pytest
import torch

from clients.budget import joules, limit_of, used
from clients.worker import Worker
from common.config import from_flat
from common.errors import InputError
from common.keys import ClientKeys
from common.seeding import generator
from common.wire import ClientLine, Instruction
from server.aggregation import Rejected, UpTo, check_count
from tests.conftest import make_dataset, make_needs, make_reviews
from tests.scene import RECIPE, WHO, Scene, distil


def test_energy_counters_of_packages_alone_are_added(tmp_path):
    assert joules(tmp_path) is None
    for zone, energy in (("intel-rapl:0", 2_000_000), ("intel-rapl:1", 500_000), ("intel-rapl:0:0", 7_000_000)):
        (tmp_path / zone).mkdir()
        (tmp_path / zone / "energy_uj").write_text(f"{energy}\n")
    assert joules(tmp_path) == 2.5
    (tmp_path / "intel-rapl:1" / "energy_uj").unlink()
    assert joules(tmp_path) is None


def test_energy_from_counters_or_the_model():
    assert used(10.0, 30.0, 4.0, threads=2) == (20.0, "rapl")
    for before, after in ((None, None), (30.0, 10.0)):  # ran over
        assert used(before, after, 4.0, threads=2) == (40.0, "assumed: 5 W a busy core")


@pytest.mark.parametrize(
    ("keys", "seconds"),
    [({"max-seconds": 3.0}, 3), ({"energy-budget": 20.0}, 2), ({"max-seconds": 9.0, "energy-budget": 40.0}, 4)],
)
def test_what_may_be_spent_is_time_or_energy_whichever_is_first(monkeypatch, keys, seconds):
    monkeypatch.setattr("clients.budget.joules", lambda: None)  # by the model: 2 threads draw 10 W
    now = itertools.count()
    spent = limit_of(ClientKeys.model_validate(keys), 2, clock=lambda: next(now))
    assert [spent() for _ in range(6)].index(True) + 1 == seconds
    assert not any(limit_of(ClientKeys(), 2, clock=lambda: next(now))() for _ in range(50))


def test_training_that_stops_is_that_of_its_first_steps_and_counts_what_it_saw(tiny_teacher):
    scene = Scene(tiny_teacher)
    recipe = dataclasses.replace(RECIPE, token_budget=64, epochs=2)
    asked = iter(range(100))
    update = distil(
        scene.student, scene.weights, scene.examples, recipe=recipe, compute=scene_compute(), seed=0, who=WHO,
        teacher=scene.teacher, spent=lambda: next(asked) == 1,
    )  # fmt: skip
    assert next(asked) == 2
    assert 0 < update.examples < len(scene.rows)
    assert update.weight == update.examples
    moved = {name: array.copy() for name, array in update.arrays.items()}
    whole = scene.distil(recipe)
    assert whole.examples == len(scene.rows)  # of two passes each example counts once
    assert any(not np.array_equal(moved[name], whole.arrays[name]) for name in moved)


def test_two_passes_that_stop_after_the_first_are_one(tiny_teacher):
    scene = Scene(tiny_teacher)
    one, steps = dataclasses.replace(RECIPE, token_budget=64, epochs=1), []
    common = {"compute": scene_compute(), "seed": 0, "who": WHO, "teacher": scene.teacher}
    first = distil(
        scene.student, scene.weights, scene.examples, recipe=one, spent=lambda: bool(steps.append(1)), **common
    )
    wanted = {name: array.copy() for name, array in first.arrays.items()}
    left = iter(range(1, len(steps) + 1))
    two = dataclasses.replace(one, epochs=2)
    stopped = distil(
        scene.student, scene.weights, scene.examples, recipe=two, spent=lambda: next(left) == len(steps), **common
    )
    assert len(steps) > 2
    assert stopped.examples == first.examples == len(scene.rows)
    for name, array in wanted.items():
        assert np.array_equal(stopped.arrays[name], array)


def scene_compute():
    from tests.conftest import FP32

    return FP32


def test_the_server_takes_less_than_all_only_where_that_was_asked_for():
    line = ClientLine(3, 5, 0.1)
    check_count(line, UpTo({3: 9}))
    for wrong, sizes in ((line, {3: 9}), (ClientLine(3, 10, 0.1), UpTo({3: 9})), (ClientLine(3, 0, 0.1), UpTo({3: 9}))):
        with pytest.raises(Rejected, match="examples; it has 9"):
            check_count(wrong, sizes)


def trained(tiny_teacher, tmp_path, number=1, kind=Worker, **keys):
    """A client's update and line of a round under some keys."""
    config, data = make_dataset(
        make_reviews(tmp_path / "reviews.csv"), tiny_teacher, tmp_path / "cache", client__precision="fp32",
        student__layers=2, runtime__cache=str(tmp_path / "cache"), **keys,
    )  # fmt: skip
    needs = make_needs(tiny_teacher, data, (0, 3))
    from common.store import cache_folder

    source = cache_folder() / "students" / needs["student"]
    target = tmp_path / "cache" / "students" / needs["student"]
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        target.symlink_to(source)
    worker = kind(config, **needs)
    asked = Instruction("0" * 16, number, json.dumps(config.flat()), (0,), (0,), **needs)
    arrays = {name: weight.numpy().copy() for name, weight in worker.tiers.initial().items()}
    groups, lines = worker.train(arrays, asked, lambda count: None)
    return groups["update"], lines[0], worker


def test_a_client_out_of_time_sends_what_it_has_and_says_how_much(tiny_teacher, tmp_path):
    keys = {"client__token_budget": 64, "data__clients": 1}
    _, whole, _ = trained(tiny_teacher, tmp_path, **keys)
    update, line, _ = trained(tiny_teacher, tmp_path, **keys, client__max_seconds=1e-6)
    assert line.problem == ""
    assert 0 < line.examples < whole.examples
    assert any(np.asarray(getattr(array, "values", array)).any() for array in update.values())


def test_a_round_over_some_examples_is_training_on_these_alone(tiny_teacher, tmp_path):
    keys = {"data__clients": 1, "client__lr_decay": "constant"}
    _, whole, worker = trained(tiny_teacher, tmp_path, **keys)
    rows = worker.data.shard(0).train

    class Chosen(Worker):
        def _rows_of(self, client):
            return rows[np.sort(generator(self.config.seed, "examples", 2, 0).choice(len(rows), 8, replace=False))]

    found, line, _ = trained(tiny_teacher, tmp_path, number=2, **keys, client__share=8 / len(rows))
    wanted, other, _ = trained(tiny_teacher, tmp_path, number=2, kind=Chosen, **keys)
    assert line.examples == other.examples == 8 < whole.examples == len(rows)
    same_update(found, wanted)
    another, _, _ = trained(tiny_teacher, tmp_path, number=3, **keys, client__share=8 / len(rows))
    with pytest.raises(AssertionError):
        same_update(another, found)
    _, line, _ = trained(tiny_teacher, tmp_path, **keys, client__share=1e-9)
    assert line.examples == 1


def same_update(one, other):
    assert one.keys() == other.keys()
    for name in one:
        a, b = (np.asarray(getattr(group[name], "values", group[name])) for group in (one, other))
        np.testing.assert_array_equal(a, b)


def test_under_a_memory_limit_batches_pass_in_parts_and_give_the_same_update(tiny_teacher, tmp_path):
    keys = {"client__token_budget": 4096, "data__clients": 1, "client__optimizer": "sgd", "client__lr": 0.05}
    free, _, _ = trained(tiny_teacher, tmp_path, **keys)
    tight, line, worker = trained(tiny_teacher, tmp_path, **keys, client__memory_limit=1)  # less than it holds already
    assert line.problem == ""
    room = worker._rooms[0]
    assert room.pieces < 4096
    for name, total in free.items():
        a, b = (np.asarray(getattr(each, "values", each), dtype=np.float64) for each in (total, tight[name]))
        assert np.allclose(a, b, atol=1e-3 * max(np.abs(a).max(), 1))


def test_budgets_need_a_method_that_can_stop():
    for key in ("max-seconds", "energy-budget", "memory-limit"):
        with pytest.raises(InputError, match=rf"client\.{key} = 5"):
            from_flat({"server.strategy": "fedkd", "distill.hard-weight": 0.5, f"client.{key}": 5})


def test_plain_steps_are_torchs_sgd_and_a_warm_start_keeps_adamw(tiny_teacher):
    scene = Scene(tiny_teacher)
    recipe = dataclasses.replace(
        RECIPE, sgd=True, lr=0.05, weight_decay=0.0, clip_norm=0.0, token_budget=10_000, epochs=3
    )
    ours, _ = scene.learn(recipe)
    for name, parameter in scene.student.trained.items():
        parameter.data.copy_(scene.weights[name])
    theirs = torch.optim.SGD(scene.student.trained.values(), lr=0.05)
    from common.distillation import begin, set_gradients
    from common.objective import batch_of
    from tests.conftest import FP32

    for _ in range(3):
        state = begin_in_place(begin, scene, recipe)
        set_gradients(
            state, [batch_of(scene.examples, np.arange(len(scene.rows)), recipe, FP32)], recipe=recipe, compute=FP32,
            teacher=scene.teacher,
        )  # fmt: skip
        theirs.step()
    for name, weight in ours.items():
        assert torch.allclose(weight, scene.student.trained[name], atol=2e-6)


def begin_in_place(begin, scene, recipe):
    now = {name: parameter.detach().clone() for name, parameter in scene.student.trained.items()}
    return begin(scene.student, now, recipe)


def test_plain_steps_decay_apart_from_the_gradient():
    from common.distillation import descend

    weight = torch.nn.Parameter(torch.tensor([2.0, -1.0]))
    still = torch.nn.Parameter(torch.tensor([5.0]))
    weight.grad = torch.tensor([1.0, 4.0])
    descend([weight, still], lr=0.1, decay=0.5)
    assert torch.allclose(weight.detach(), torch.tensor([2.0 * 0.95 - 0.1, -0.95 - 0.4]))
    assert still.item() == 5.0


def test_plain_steps_do_not_go_with_models_of_ones_own():
    with pytest.raises(InputError, match=r"client\.optimizer = 'sgd'"):
        from_flat({"server.strategy": "fedkd", "distill.hard-weight": 0.5, "client.optimizer": "sgd"})
