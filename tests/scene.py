"""A teacher, a student cut from it and one client's examples: what the tests of distillation start from."""

from dataclasses import replace

import numpy as np

from clients.distillation import distil
from common.dataset import Split
from common.distillation import Student, learn
from common.inference import predict
from common.models import freeze_embeddings, load_teacher
from common.objective import Examples
from common.recipe import PARTS, Recipe
from tests.conftest import FP32, make_sentences, make_student, make_tokens

WEIGHTS = {**dict.fromkeys(PARTS, 0.0), "soft": 0.7, "hard": 0.3}
RECIPE = Recipe(
    epochs=2, lr=0.003, weight_decay=0.01, clip_norm=1.0, token_budget=128, temperature=2.0, weights=WEIGHTS,
    adaptive=False, hidden_loss="cosine", hidden_pairs=((0, 1), (1, 3)), relation_pairs=((1, 3),), relation_heads=2,
    regression=False,
)  # fmt: skip
WHO = (3, 17)


def weighing(recipe=RECIPE, **weights):
    """The recipe with other weights of its parts."""
    return replace(recipe, weights={**recipe.weights, **weights})


class Scene:
    """A teacher, a student cut from it, and one client's rows of a larger table."""

    def __init__(self, folder, labels=2, dropout=0.0, embeddings=False):
        self.teacher = load_teacher(folder)
        self.take(make_student(self.teacher, (0, 3), dropout=dropout), embeddings)
        tokens = make_tokens(folder, make_sentences(60))
        rng = np.random.default_rng(0)
        truth = rng.integers(0, labels, 60) if labels > 1 else rng.uniform(0, 5, 60)
        self.data = Split(tokens, truth, np.zeros((60, 16), dtype=np.uint8))
        self.rows = np.array([*range(5, 35), 50, 41])
        self.examples = self.of(self.data)

    def take(self, model, embeddings=False):
        """Go on with another student."""
        self.student = Student.of(model, freeze_embeddings(model, embeddings))
        self.weights = {name: weight.detach().clone() for name, weight in self.student.trained.items()}

    def of(self, data, rows=None, taught=None):
        """Some rows, the client's own if none are given, with the teacher's outputs."""
        rows = self.rows if rows is None else rows
        return Examples(data, rows, predict(self.teacher, taught or self.data.tokens, rows, FP32), taught)

    def learn(self, recipe=RECIPE, compute=FP32, seed=0, who=WHO, examples=None):
        """Train; the weights afterwards, whole, by name, and what training has added up, by name."""
        state = learn(
            self.student, self.weights, examples or self.examples, recipe=recipe, compute=compute, seed=seed, who=who,
            teacher=self.teacher,
        )  # fmt: skip
        found = {name: parameter.detach().clone() for name, parameter in state.trained.items()}
        if state.vocabulary is not None:
            words = self.weights[self.student.words].clone()
            words[state.vocabulary] = found[self.student.words]
            found[self.student.words] = words
        return found, dict(zip(("loss", *PARTS), (state.totals / state.seen).tolist(), strict=True))

    def distil(self, recipe=RECIPE, compute=FP32, seed=0, who=WHO, examples=None):
        """A client's update."""
        return distil(
            self.student, self.weights, examples or self.examples, recipe=recipe, compute=compute, seed=seed, who=who,
            teacher=self.teacher,
        )  # fmt: skip


class Forbidden:
    """Labels nobody may look at."""

    def __getattr__(self, name):
        raise AssertionError("a label was read")

    __getitem__ = __array__ = __len__ = __iter__ = __getattr__


def bits(weights):
    return b"".join(weights[name].detach().numpy().tobytes() for name in sorted(weights))
