"""Learning from an ensemble on public text: which rows of a round, and how a student learns there.

Server and clients follow the same recipe: the usual loss on outputs, with the ensemble's outputs where the teacher's
stand and no label read. Adam with a falling rate for the distillation is that of Lin et al. 2020
(https://arxiv.org/abs/2006.07242); here it falls to a tenth in a straight line.
"""

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from common.keys import ServerKeys
from common.partition import Index
from common.recipe import INSIDE, PARTS, Recipe
from common.seeding import generator


def public_rows(public: Index, sample: int, seed: int, round_number: int) -> NDArray[np.int64]:
    """Ascending rows of the public split that a round uses: drawn from (seed, round); all when 0 or too few are asked.

    Args:
        public: row numbers of the public split.
        sample: how many.
    """
    rows = np.asarray(public, dtype=np.int64)
    if 0 < sample < len(rows):
        rows = generator(seed, "public-sample", round_number).choice(rows, size=sample, replace=False)
    return np.sort(rows)


def public_recipe(recipe: Recipe, keys: ServerKeys, temperature: float) -> Recipe:
    """A round's recipe turned to public text, for the epochs and at the rate of public text.

    Soft targets alone, and what a student teaches those inside it.
    """
    return replace(
        recipe,
        epochs=keys.public_epochs,
        lr=keys.public_lr,
        last_lr=keys.public_lr / 10,
        temperature=temperature,
        weights={part: recipe.weights[part] if part in INSIDE else float(part == "soft") for part in PARTS},
        adaptive=False,
        proximal=0.0,
        sgd=False,
    )
