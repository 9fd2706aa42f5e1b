"""The server's own training: its student learns from an ensemble's outputs on public text, whose labels are not read.

Nothing in it depends on which client answered first, or through which worker. Its bits depend on the number of
threads that torch uses at the server.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from common.distillation import learn, learnt
from common.inference import predict
from common.objective import Examples
from common.progress import Progress, Step
from common.public import public_recipe, public_rows
from common.recipe import make_recipe
from server.preparation import Federation

Weights = Mapping[str, NDArray[np.float32]]
SERVER = -1  # in the place of a client's id: what the server's random choices come from


def rows_of_round(federation: Federation, number: int) -> NDArray[np.int64]:
    """Ascending rows of the public split that a round uses."""
    config = federation.config
    return public_rows(federation.data.public, config.server.public_sample, config.seed, number)


def put(federation: Federation, weights: Weights) -> Any:
    """The server's student, with these weights."""
    arrays = {name: torch.from_numpy(np.array(array)) for name, array in weights.items()}
    return federation.tiers.load(0, arrays)


def outputs_of(
    federation: Federation, models: Iterable[Weights], rows: NDArray[np.int64], advance: Callable[[int], None]
) -> NDArray[np.float64]:
    """(models, rows, num_labels) the logits of students with these weights; their module is left with the last ones."""
    tokens = federation.pupil.data.train.tokens
    found = []
    for weights in models:
        student = put(federation, weights)
        found.append(predict(student, tokens, rows, federation.compute, advance))
    return np.stack(found).astype(np.float64)


def distil_from(
    federation: Federation,
    weights: Weights,
    rows: NDArray[np.int64],
    soft: NDArray[np.float32],
    *,
    number: int,
    temperature: float,
    progress: Progress,
    tick: Callable[[], None],
) -> tuple[dict[str, NDArray[np.float32]], float]:
    """Train the student from these weights on public rows.

    Args:
        soft: (rows, num_labels) the ensemble's logits.
        number: the round.

    Returns:
        The weights after it, and the mean loss over all steps.
    """
    config, pupil, compute = federation.config, federation.pupil, federation.compute
    recipe = make_recipe(config, number, pupil.shape, federation.lesson.model.config, federation.data.task.regression)
    recipe = public_recipe(recipe, config.server, temperature)
    arrays = {name: torch.from_numpy(np.array(array)).to(compute.device) for name, array in weights.items()}
    whole = len(federation.tiers) - 1
    start = federation.tiers.part(whole, arrays)
    total = len(rows) * recipe.epochs
    with progress.step(f"round {number}/{config.rounds} distil on {len(rows):,} public examples", total) as bar:
        state = learn(
            federation.tiers.student(whole), start, Examples(pupil.data.train, rows, soft, pupil.taught),
            recipe=recipe, compute=compute, seed=config.seed, who=(number, SERVER), advance=ticking(bar, tick),
        )  # fmt: skip
    after = {name: tensor.cpu().numpy().copy() for name, tensor in (arrays | learnt(state, start)).items()}
    return after, float(state.totals[0]) / max(state.seen, 1)


def ticking(bar: Step, tick: Callable[[], None]) -> Callable[[int], None]:
    """Moves a bar on, and lets the run be stopped."""

    def advance(amount: int) -> None:
        tick()
        bar.advance(amount)

    return advance
