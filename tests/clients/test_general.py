"""A worker in general rounds: the masked-LM teacher is that of the run, and what it learns travels as ever."""

import numpy as np
import pytest
import torch
from transformers import AutoModelForSequenceClassification

from clients.general import GeneralWorker
from common.compression import decompress, wire_for
from common.hashing import hash_tensors
from common.masking import load_masked_teacher
from common.store import cache_folder
from common.wire import Instruction, own_update, pack, unpack_instruction
from tests.conftest import make_dataset, make_masked_teacher, make_needs, make_reviews

CLIENTS = (0, 1, 2)
HEAD = ("bert.pooler.", "classifier.")


@pytest.fixture(scope="module")
def make_worker(tmp_path_factory):
    folder = tmp_path_factory.mktemp("general")
    masked, reviews = make_masked_teacher(folder / "masked"), make_reviews(folder / "reviews.csv")
    tuned = make_masked_teacher(folder / "tuned")  # the same encoder with the task's head, as if fine-tuned
    torch.manual_seed(0)
    AutoModelForSequenceClassification.from_pretrained(masked).save_pretrained(tuned)
    right = hash_tensors(load_masked_teacher(masked).state_dict())

    def make(digest=right, **keys):
        given = {"rounds": 3, "distill__general_rounds": 1, "student__layers": 2, "client__lr": 0.01, **keys}
        config, data = make_dataset(reviews, tuned, cache_folder(), **given)
        needs = make_needs(tuned, data, (0, 3))
        return GeneralWorker(config, masked=str(masked), masked_hash=digest, **needs)

    return make


def train(worker, number, clients=CLIENTS):
    arrays = {name: weight.detach().numpy().copy() for name, weight in worker.tiers.initial().items()}
    asked = Instruction("0" * 16, number, "", clients, (0,) * len(clients), *[""] * 5)
    return worker.train(arrays, asked, lambda count: None)


def test_the_first_rounds_are_general_and_the_next_of_the_task(make_worker):
    worker = make_worker()
    groups, lines = train(worker, 1)
    assert all(line.mlm_loss > 0 < line.soft_loss and line.hard_loss == 0 and not line.problem for line in lines)
    still = {name for name, total in groups["update"].items() if not np.any(total)}
    assert still == {name for name in worker.shapes if name.startswith(HEAD)}
    _, lines = train(worker, 2)
    assert all(line.mlm_loss == 0 < line.hard_loss and not line.problem for line in lines)
    assert worker._tutor is None  # its memory is free


def test_a_clients_sum_does_not_depend_on_its_company(make_worker):
    whole, _ = train(make_worker(), 1)
    parts = [train(make_worker(), 1, (client,))[0] for client in reversed(CLIENTS)]
    for name, total in whole["update"].items():
        assert np.array_equal(total, sum(part["update"][name] for part in parts)), name


@pytest.mark.parametrize("wire", ["fp16", "int8", "topk", "svd"])
def test_arrays_that_do_not_move_travel_on_every_wire(make_worker, wire):
    worker = make_worker(server__wire=wire)
    groups, lines = train(worker, 1, (1,))
    assert not lines[0].problem
    found = decompress(groups[own_update(1)], worker.shapes, wire_for(worker.config.server, 1, 3))
    assert all(np.isfinite(array).all() for array in found.values())
    moved = {name for name, array in found.items() if np.any(array)}
    assert moved and not any(name.startswith(HEAD) for name in moved)


def test_another_masked_lm_teacher_is_refused(make_worker):
    with pytest.raises(ValueError, match="masked-LM teacher's weights are not those of this run"):
        train(make_worker(digest="0" * 64), 1)


def test_its_folder_and_hash_travel_only_where_there_is_one():
    plain = Instruction("0" * 16, 1, "{}", (1,), (0,), "t", "h", "d", "s", "h")
    assert "masked" not in pack(plain, None)["instruction"]["json"]
    asked = Instruction("0" * 16, 1, "{}", (1,), (0,), "t", "h", "d", "s", "h", masked="folder", masked_hash="f" * 64)
    assert unpack_instruction(pack(asked, None)) == asked
