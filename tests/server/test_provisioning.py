"""The lattice of students and the choice of one for a device."""

import pytest

from common.config import from_flat
from common.cost import Work, predict_cost
from common.devices import PRESETS, DeviceProfile
from common.errors import InputError
from common.models import count_parameters, load_teacher
from common.slim import cut_student
from server.provisioning import Together, broken_budget, choose_student, fit_tiers, make_lattice, tiers_together
from server.teacher import find_teacher


def lattice_of(teacher, **keys):
    flat = {"teacher.model": str(teacher), "student.layers": 3, "data.max-length": 32}
    config = from_flat(flat | {key.replace("__", ".").replace("_", "-"): value for key, value in keys.items()})
    return config, make_lattice(config, find_teacher(str(teacher)))


def device(**figures: float) -> DeviceProfile:
    return DeviceProfile.model_validate({**PRESETS["laptop"], **{k.replace("_", "-"): v for k, v in figures.items()}})


def test_the_lattice_is_ordered_and_every_student_is_a_beginning_of_the_largest(tiny_teacher):
    _, lattice = lattice_of(tiny_teacher)
    top = lattice.students[0].shape
    assert len(lattice.students) == 3 * 2 * 4  # of 2 heads there are 2 and 1; of 32 neurons 32, 24, 16 and 8
    parameters = [student.size.parameters for student in lattice.students]
    assert parameters == sorted(parameters, reverse=True)
    for student in lattice.students:
        shape = student.shape
        assert shape.layers == top.layers[: len(shape.layers)]
        assert all(kept == whole[: len(kept)] for kept, whole in zip(shape.heads, top.heads, strict=False))
        assert all(kept == whole[: len(kept)] for kept, whole in zip(shape.neurons, top.neurons, strict=False))


def test_parameters_are_those_of_the_students_that_are_really_cut(tiny_teacher):
    _, lattice = lattice_of(tiny_teacher, student__embedding_rank=3)
    teacher = load_teacher(tiny_teacher)
    assert lattice.teacher.parameters == count_parameters(teacher)
    for student in (lattice.students[0], lattice.students[9], lattice.students[-1]):
        assert student.size.parameters == count_parameters(cut_student(teacher, student.shape))


def test_the_keys_are_the_top_of_the_lattice(tiny_teacher):
    _, lattice = lattice_of(tiny_teacher, student__layers=2, student__heads=1, student__neurons=12)
    assert lattice.students[0].name == "2/1/12"
    assert len(lattice.students) == 2 * 1 * 4
    _, trimmed = lattice_of(tiny_teacher, student__target_ratio=0.77)
    assert 0.76 < trimmed.students[0].size.parameters / trimmed.teacher.parameters <= 0.77
    assert len({student.shape.pieces for student in trimmed.students}) == 1


def test_only_students_that_the_losses_can_train(tiny_teacher):
    _, lattice = lattice_of(tiny_teacher, distill__hidden_layers="0:1,1:2")  # needs two layers
    assert {student.size.layers for student in lattice.students} == {3, 2}


def test_students_of_unequal_devices_lie_inside_one_another(tiny_teacher):
    config, lattice = lattice_of(tiny_teacher)
    work = Work.of(config)
    cost = {student.name: predict_cost(student.size, lattice.teacher, device(), work) for student in lattice.students}
    # by itself the second would have few layers of full width; the third all layers, narrow
    devices = {
        "small": device(memory_mb=cost["1/1/8"].training_mb + 0.06),  # the larger students' models
        "flat": device(latency_ms=cost["1/2/32"].latency_ms),
        "whole": device(),
        "narrow": device(memory_mb=cost["3/1/16"].training_mb),  # by itself
        "none": device(memory_mb=0.001),
    }
    choices = {name: choose_student(lattice, profile, work) for name, profile in devices.items()}
    found = fit_tiers(lattice, choices, work)
    assert list(found) == ["small", "flat", "whole", "narrow"]
    assert found["whole"].name == "3/2/32"
    assert choices["narrow"].best.name == "3/1/16"
    assert found["narrow"].name == "1/1/8"  # no room to train that inside another
    check_budgets(lattice, found, devices, work)
    keys = tiers_together(config, lattice, list(found.values())).keys
    shape = {"teacher.model": str(tiny_teacher), "student.layers": 3, "student.heads": 2, "student.neurons": 32}
    checked = from_flat({"task": "sst2", **shape, **keys, "data.clients": 4})  # each fits into the next
    names = [f"{size.layers}/{size.heads}/{size.neurons}" for size in checked.student.sizes]
    own = [[*names, "3/2/32"][tier] for tier in checked.student.holders]
    assert own == [student.name for student in found.values()]
    assert tiers_together(config, lattice, [lattice.students[0]] * 2) == Together({}, "")


def test_a_student_that_as_a_tier_has_no_loss_is_not_printed_as_one(tiny_teacher):
    """By itself it compares its own last layer; as a tier the whole student's, which it has not."""
    losses = {"soft-weight": 0.0, "hard-weight": 0.0, "hidden-weight": 1.0, "hidden-layers": "last"}
    keys = {f"distill__{name}": value for name, value in losses.items()} | {"student__width-selection": "random"}
    config, lattice = lattice_of(tiny_teacher, **keys)
    together = tiers_together(config, lattice, [lattice.students[0], lattice.students[-1]])
    assert together.keys == {}
    assert "compare layers that 1 layers do not hold" in together.refused


@pytest.mark.parametrize(
    "keys", [{"server__strategy": "median"}, {"server__packing": "off"}, {"student__train_embeddings": True}]
)
def test_tiers_that_a_run_would_refuse_are_withheld_with_the_reason(tiny_teacher, keys):
    config, lattice = lattice_of(tiny_teacher, **keys)
    together = tiers_together(config, lattice, [lattice.students[0], lattice.students[-1]])
    assert together.keys == {}
    assert together.refused.startswith("student.tiers: clients of each tier are added up by themselves, ")
    assert next(iter(keys)).replace("__", ".").replace("_", "-") in together.refused


def check_budgets(lattice, found, devices, work):
    """Each with those inside its student, and with the models of all."""
    tiers = {student.size for student in (lattice.students[0], *found.values())}
    for name, student in found.items():
        cost = predict_cost(student.size, lattice.teacher, devices[name], work, list(tiers))
        assert not broken_budget(cost, devices[name]), name


@pytest.mark.parametrize(
    ("budget", "figure"), [("memory_mb", "training_mb"), ("max_seconds", "round_s"), ("energy_j", "energy_j")]
)
def test_what_is_trained_inside_counts_against_a_devices_budgets(tiny_teacher, budget, figure):
    """A device has just room for the whole student with the smallest inside, then for a little less."""
    config, lattice = lattice_of(tiny_teacher)
    work, top, least = Work.of(config), lattice.students[0], lattice.students[-1]
    alone = getattr(predict_cost(top.size, lattice.teacher, device(), work), figure)
    both = getattr(predict_cost(top.size, lattice.teacher, device(), work, [least.size, top.size]), figure)
    assert both > alone
    small = device(latency_ms=predict_cost(least.size, lattice.teacher, device(), work).latency_ms)
    for given, fits in ((both, True), (both - 1e-6 * (both - alone), False)):
        devices = {"large": device(**{budget: given}), "small": small}
        choices = {name: choose_student(lattice, profile, work) for name, profile in devices.items()}
        assert choices["large"].best == top  # by itself
        found = fit_tiers(lattice, choices, work)
        assert (found["large"] == top) == fits
        assert found["small"] == least
        check_budgets(lattice, found, devices, work)


def test_the_largest_that_fits_and_why_none_larger(tiny_teacher):
    config, lattice = lattice_of(tiny_teacher)
    work = Work.of(config)
    slow = {"tokens_per_s": 100.0, "layer_ms": 10.0, "single_tokens_per_s": 1e9, "max_seconds": 1e6, "energy_j": 1e9}
    choice = choose_student(lattice, device(**slow, latency_ms=25.0), work)
    assert choice.best is not None
    assert choice.best.name == "2/2/32"  # three layers take 30 ms
    assert {refusal.reason for refusal in choice.refused} == {"latency 30 ms > 25 ms"}
    larger = [student for student in lattice.students if student.size.parameters > choice.best.size.parameters]
    assert [refusal.candidate for refusal in choice.refused] == larger


@pytest.mark.parametrize(
    "keys",
    [
        {"student__model": "small"},
        {"distill__general_rounds": 1},
        {"privacy__unit": "example", "privacy__epsilon": 8.0},
        {"privacy__secure_aggregation": True},
    ],
    ids=str,
)
def test_costs_that_are_not_predicted_are_named(tiny_teacher, keys):
    with pytest.raises(
        InputError, match=r"^(student.model|distill.general-rounds|privacy.[a-z-]+) = .*: what it costs a device is not"
    ):
        lattice_of(tiny_teacher, **keys)


@pytest.mark.parametrize("strategy", ["fedmd", "ds-fl", "fedkd"])
def test_costs_of_clients_with_models_of_their_own_are_not_told(tiny_teacher, strategy):
    with pytest.raises(InputError, match=rf"server.strategy = '{strategy}'"):
        lattice_of(tiny_teacher, server__strategy=strategy)


@pytest.mark.parametrize(
    ("budget", "reason"),
    [("memory_mb", "memory"), ("latency_ms", "latency"), ("max_seconds", "round"), ("energy_j", "energy")],
)
def test_each_budget_binds(tiny_teacher, budget, reason):
    config, lattice = lattice_of(tiny_teacher)
    choice = choose_student(lattice, device(**{budget: 1e-9}), Work.of(config))
    assert choice.best is None
    assert len(choice.refused) == len(lattice.students)
    assert all(refusal.reason.startswith(f"{reason} ") for refusal in choice.refused)


def test_a_budget_that_is_just_met_is_met(tiny_teacher):
    config, lattice = lattice_of(tiny_teacher)
    work, top = Work.of(config), lattice.students[0]
    exact = predict_cost(top.size, lattice.teacher, device(), work).training_mb
    assert choose_student(lattice, device(memory_mb=exact), work).best == top
    less = choose_student(lattice, device(memory_mb=exact * (1 - 1e-7)), work).refused[0].reason
    needed, budget = (text.split()[-2] for text in less.split(" > "))
    assert needed != budget, less  # told apart, however close


def test_more_than_the_teacher_has(tiny_teacher):
    with pytest.raises(InputError, match=r"student.heads = 3: the teacher has 2"):
        lattice_of(tiny_teacher, student__heads=3)
