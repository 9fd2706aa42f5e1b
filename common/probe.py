"""How many word pieces a device has room for: found by passing two made-up batches through the student.

Memory and time of a forward and backward pass are straight lines through the two points. Taken is the largest budget,
of ``token_budget`` halved again and again, that fits and is at most a tenth slower for each piece than the fastest.
The made-up texts are as long as the longest window there is: memory for a piece grows with the length it stands in.

On a GPU memory is the allocator's peak. On a CPU it is what the backward pass needs of the forward pass, counted, times
`PASSING`: the process's peak would count what was there before.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import psutil
import torch
from torch import Tensor

from common.dataset import Split
from common.device import Compute, free_memory, is_out_of_memory
from common.distillation import Room, Student, begin, restore, set_gradients
from common.objective import Examples, batch_of
from common.recipe import Recipe
from common.seeding import generator
from common.tokens import Tokens

SHARE = 0.5  # of free memory that is taken: the optimiser's memory comes later, and other programs live too
PASSING = 2.0  # on the CPU, the most that a pass takes over what it keeps for the way back: 1.3 to 2.0 was measured
ROWS = (2, 8)  # of the made-up batches
TIMES = 3  # each is timed, the shortest counts
SLOWER = 0.1  # than the fastest budget that fits


@dataclass(frozen=True)
class Point:
    """A pass that was measured."""

    pieces: int
    memory: float
    seconds: float


def find_room(
    student: Student,
    weights: dict[str, Tensor],
    like: Examples,
    *,
    recipe: Recipe,
    compute: Compute,
    teacher: Any,
    share: float = SHARE,
    limit: int = 0,
) -> Room:
    """What this device has room for, at most the recipe's ``micro_budget``.

    Args:
        like: the data whose pieces, labels and longest text the made-up batches have.
        share: of the device's free memory that may be taken.
        limit: bytes that this process may hold altogether; 0: no more is said.
    """
    longest = int(np.diff(like.data.tokens.offsets).max())  # of the windows: each passes by itself
    most = recipe.micro_budget // longest
    if most < ROWS[0]:
        return Room(recipe.micro_budget)
    free = share * free_memory(compute.device)
    if limit:
        free = min(free, max(limit - psutil.Process().memory_info().rss, 0))
    points: list[Point] = []
    for rows in sorted({ROWS[0], min(ROWS[1], most)}):
        try:
            points.append(
                _measure(
                    student, weights, made_up(like, rows, longest), recipe=recipe, compute=compute, teacher=teacher
                )
            )
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            return Room(points[-1].pieces if points else longest)
    return Room(choose(recipe.micro_budget, points[0], points[-1], free))


def choose(budget: int, small: Point, large: Point, free: float) -> int:
    """The largest of ``budget``, half of it, ... down to the small point's that fits and is fast enough."""
    apart = max(large.pieces - small.pieces, 1)
    memory = max((large.memory - small.memory) / apart, 0.0)
    seconds = max((large.seconds - small.seconds) / apart, 0.0)
    budgets = [budget]
    while budgets[-1] // 2 >= small.pieces:
        budgets.append(budgets[-1] // 2)
    fitting = [one for one in budgets if small.memory + memory * (one - small.pieces) <= free] or budgets[-1:]
    speed = {one: one / (small.seconds + seconds * (one - small.pieces)) for one in fitting}
    return max(one for one in fitting if speed[one] >= (1.0 - SLOWER) * max(speed.values()))


def made_up(like: Examples, rows: int, length: int) -> Examples:
    """Random texts of one window of this many pieces each, with labels and soft targets of 0."""
    rng = generator(0, "probe", rows)
    data = like.data

    def tokens(real: Tokens) -> Tokens:
        highest = int(real.ids.max()) + 1
        return Tokens(
            ids=rng.integers(min(real.pad + 1, highest - 1), highest, rows * length, dtype=np.int32),
            offsets=np.arange(rows + 1, dtype=np.int64) * length,
            starts=np.ones(rows * length, dtype=np.bool_),
            second=np.full(rows, length, dtype=np.int32),
            pad=real.pad,
            typed=real.typed,
        )

    taught = None if like.taught is None else tokens(like.taught)
    labels = np.zeros((rows, *data.labels.shape[1:]), data.labels.dtype)
    split = Split(tokens(data.tokens), labels, np.zeros((rows, 16), np.uint8))
    soft = np.zeros((rows, like.soft.shape[1]), dtype=np.float32)
    return Examples(split, np.arange(rows, dtype=np.int64), soft, taught)


def _measure(
    student: Student, weights: dict[str, Tensor], examples: Examples, *, recipe: Recipe, compute: Compute, teacher: Any
) -> Point:
    """Memory of the first pass and time of the best of the next ones; no weight moves."""
    vocabulary = examples.data.tokens.vocabulary(examples.rows) if student.words else None
    state = begin(student, weights, recipe, vocabulary)

    def run() -> None:
        batch = batch_of(examples, examples.rows, recipe, compute)
        set_gradients(state, [batch], recipe=recipe, compute=compute, teacher=teacher)

    try:
        with _memory(student.model, compute.device) as used:
            run()
        seconds = min(_timed(run, compute.device) for _ in range(TIMES))
    finally:
        student.optimizer.zero_grad(set_to_none=True)
        restore(student)
    return Point(int(examples.data.tokens.offsets[-1]), used(), seconds)


def _timed(run: Callable[[], None], device: torch.device) -> float:
    began = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began


@contextmanager
def _memory(model: torch.nn.Module, device: torch.device) -> Iterator[Callable[[], float]]:
    """Gives a function that says, afterwards, how many bytes were taken at the peak."""
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        yield lambda: float(torch.cuda.max_memory_allocated(device) - before)
        return
    there = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in there:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor.detach()  # the tensor itself would hold on to itself

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        yield lambda: PASSING * sum(kept.values())
