"""A prepared student is opened as it was saved, or refused."""

from dataclasses import replace

import numpy as np
import pytest
import safetensors.torch
import torch

from common.dataset import load_tokenizer
from common.hashing import hash_tensors
from common.models import load_teacher
from common.pupil import open_pupil, save_pupil
from common.slim import Shape, cut_student
from common.vocabulary import choose_pieces, piece_bounds, save_trimmed
from tests.conftest import make_dataset, make_reviews


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def data(tiny_teacher, cache, tmp_path_factory):
    return make_dataset(make_reviews(tmp_path_factory.mktemp("reviews") / "a.csv"), tiny_teacher, cache)[1]


@pytest.fixture
def saved(tiny_teacher, tmp_path):
    """A student of two layers, in a folder with its teacher's tokenizer."""
    teacher = load_teacher(tiny_teacher)
    shape = Shape.whole(teacher.config, (0, 3))
    model = cut_student(teacher, shape)
    load_tokenizer(tiny_teacher).save_pretrained(tmp_path / "pupil")
    save_pupil(model, shape, tmp_path / "pupil", own_pieces=False)
    return tmp_path / "pupil", model, shape


def test_a_student_is_opened_as_it_was_saved(saved, data, cache):
    folder, model, shape = saved
    pupil = open_pupil(folder, data, cache)
    assert pupil.hash == hash_tensors(model.state_dict()) == hash_tensors(pupil.model.state_dict())
    assert (pupil.shape, pupil.folder, pupil.key) == (shape, folder, "pupil")
    assert pupil.data is data
    assert pupil.taught is None


def test_a_student_with_pieces_of_its_own_reads_the_data_in_them(tiny_teacher, data, cache, tmp_path):
    teacher, tokenizer = load_teacher(tiny_teacher), load_tokenizer(tiny_teacher)
    pieces = choose_pieces(tokenizer, np.zeros(len(tokenizer), np.int64), piece_bounds(tokenizer)[0])
    save_trimmed(tiny_teacher, pieces, tmp_path)
    shape = replace(Shape.whole(teacher.config, (0, 3)), pieces=len(pieces))
    save_pupil(cut_student(teacher, shape, pieces=pieces), shape, tmp_path, own_pieces=True)
    pupil = open_pupil(tmp_path, data, cache)
    assert pupil.taught is data.train.tokens
    own = pupil.data.train.tokens
    assert len(own) == len(data.train.tokens)
    assert own.ids.max() < len(pieces) < data.train.tokens.ids.max() + 1
    assert len(own.ids) > len(data.train.tokens.ids)


def test_changed_weights_are_refused(saved, data, cache):
    folder, model, _ = saved
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state["classifier.bias"] = torch.nextafter(state["classifier.bias"], torch.tensor(9.0))
    safetensors.torch.save_file(state, folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"^the student's weights are not those that were prepared$"):
        open_pupil(folder, data, cache)


def test_a_student_that_is_not_here_is_said_so(data, cache, tmp_path):
    with pytest.raises(FileNotFoundError):
        open_pupil(tmp_path / "nowhere", data, cache)
