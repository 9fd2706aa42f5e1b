"""A lesson, and students made for it: what the tests of the student before round 1 start from."""

import numpy as np

from common.config import from_flat
from common.inference import predict
from common.progress import Silent
from server.lesson import prepare_lesson
from server.origin import open_origin
from server.student import prepare_student
from server.teacher import find_teacher
from tests.conftest import FP32

WARM = {"student__warm_epochs": 2, "student__warm_lr": 0.01, "student__vocabulary": 120}


class School:
    """A lesson in a cache of its own, and students for it."""

    def __init__(self, teacher, source, cache, **keys):
        self.flat = {
            "task": "text", "data.source": str(source), "data.clients": 3, "data.max-length": 48, "data.alpha": 10.0,
            "data.public-fraction": 0.4, "teacher.model": str(teacher), "runtime.cache": str(cache),
            "student.layers": 2, "client.token-budget": 256, **keys,
        }  # fmt: skip
        self.lesson = prepare_lesson(self.config(), find_teacher(str(teacher)), Silent())

    def config(self, **keys):
        flat = {name.replace("__", ".").replace("_", "-"): value for name, value in keys.items()}
        return from_flat({**self.flat, **flat})

    def student(self, lesson=None, **keys):
        config, lesson = self.config(**keys), lesson or self.lesson
        return prepare_student(config, lesson, open_origin(config, lesson, Silent()), Silent())


def states(pupil):
    return pupil.model.state_dict()


def disagreement(school, pupil):
    """Mean squared difference of the student's logits from the teacher's on the public rows."""
    rows = np.asarray(school.lesson.data.public)
    own = predict(pupil.model, pupil.data.train.tokens, rows, FP32)
    theirs = predict(school.lesson.model, school.lesson.data.train.tokens, rows, FP32)
    return np.square(own - theirs).mean()
