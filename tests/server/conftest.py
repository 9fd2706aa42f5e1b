"""A teacher and a lesson that students are cut from."""

import pytest
import torch

from common.models import load_teacher
from tests.conftest import make_reviews, make_teacher
from tests.school import School


@pytest.fixture(scope="module")
def strong_teacher(tmp_path_factory):
    """A random teacher with weights large enough that layers and words make a difference."""
    folder = make_teacher(tmp_path_factory.mktemp("strong"))
    model, rng = load_teacher(folder), torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.add_(0.15 * torch.randn(parameter.shape, generator=rng))
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def school(strong_teacher, tmp_path_factory):
    folder = tmp_path_factory.mktemp("school")
    return School(strong_teacher, make_reviews(folder / "reviews.csv", 200), folder / "cache")
