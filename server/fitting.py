"""The student of a given size: what `student.target-ratio` chooses of its shape.

Half of a small model is its word embedding, and the student is to be small in the same proportions: it keeps at least
the teacher's number of word pieces times the ratio. Where its layers leave less room than that, they keep fewer heads
and neurons, the same share of both, as far as the keys leave these open. The vocabulary takes what is then left. With a
factored embedding pieces are so cheap that one head less can make room for more than all of them: then the number of
neurons is chosen separately. Where the keys give heads and neurons, the vocabulary alone takes what is left.
"""

from bisect import bisect_left
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from common.config import Config, changed
from common.errors import InputError
from common.families import head_count, neuron_count
from common.models import count_parameters
from common.slim import Shape, build
from common.vocabulary import piece_bounds


def fit_width(config: Config, model: Any, layers: tuple[int, ...], teacher: int) -> Config:
    """The keys with `student.heads` and `student.neurons` where these have to be fewer than all for the ratio.

    Args:
        model: what the student is cut from; its weights are not read, so it may be on the meta device.
        teacher: how many parameters the teacher has.

    Raises:
        InputError: fewer heads and neurons do not go with the other keys.
    """
    keys, most, every = config.student, head_count(model.config), neuron_count(model.config)
    if not keys.target_ratio or (keys.heads and keys.neurons):
        return config
    vocabulary = model.config.vocab_size
    fewest = keys.target_ratio * vocabulary

    def of(heads: int, neurons: int) -> Config:
        width = {"heads": keys.heads or heads % most, "neurons": keys.neurons or neurons % every}  # 0: all
        return config.model_copy(update={"student": keys.model_copy(update=width)})

    def room(heads: int, neurons: int) -> float:
        return _room(of(heads, neurons), model, layers, teacher)

    steps = [(heads, max(every * heads // most, 1)) for heads in range(most, 0, -1)]
    place = bisect_left(steps, fewest, key=lambda step: room(*step))
    found = steps[min(place, most - 1)]
    if place and not fewest <= room(*found) <= vocabulary:  # one step leaves too little room, the next too much
        heads, neurons = steps[place - 1]
        choices = [(heads, range(1, neurons + 1)), *((one, range(few, every + 1)) for one, few in steps[place:][:1])]
        found = _between(choices, room, fewest, vocabulary) or steps[place - 1]
    fitting = of(*found)
    if fitting.student == keys:
        return config
    try:
        return changed(config, {f"student.{name}": getattr(fitting.student, name) for name in ("heads", "neurons")})
    except InputError as error:
        raise InputError(
            f"student.target-ratio = {keys.target_ratio}: for that heads and neurons have to go; {error}"
        ) from None


def _between(
    choices: list[tuple[int, range]], room: Callable[[int, int], float], fewest: float, most: float
) -> tuple[int, int] | None:
    """The first number of heads with the most neurons that leave room for ``fewest`` to ``most`` pieces.

    Args:
        choices: numbers of heads, and of neurons to go with each.
        room: of heads and neurons; the fewer of them, the more.
    """
    for heads, neurons in choices:
        falling = neurons[::-1]
        place = bisect_left(falling, fewest, key=partial(room, heads))
        if place < len(falling) and room(heads, falling[place]) <= most:
            return heads, falling[place]
    return None


def fitting_pieces(config: Config, model: Any, layers: tuple[int, ...], tokenizer: Any, teacher: int) -> int:
    """How many word pieces bring the student to its share of the teacher's parameters; 0: all.

    Args:
        model, teacher: as in `fit_width`, which comes before.
        tokenizer: its.

    Raises:
        InputError: fewer than must be kept would be left, or all are too few.
    """
    keys, vocabulary = config.student, int(model.config.vocab_size)
    fewest, most = piece_bounds(tokenizer)
    room = _room(config, model, layers, teacher)
    width = _width(config, model)

    def ratio(pieces: int) -> float:
        return keys.target_ratio - (room - pieces) * width / teacher

    if room < fewest:
        raise InputError(
            f"student.target-ratio = {keys.target_ratio}: this student has {ratio(fewest):.3f} of the teacher's "
            "parameters at least; give fewer student.layers, heads or neurons"
            + ("" if keys.embedding_rank else ", or a student.embedding-rank")
        )
    if keys.target_ratio > ratio(vocabulary) + 0.001:
        raise InputError(
            f"student.target-ratio = {keys.target_ratio}: with all word pieces this student has "
            f"{ratio(vocabulary):.3f} of the teacher's parameters; give at most that, or more student.layers, heads or "
            "neurons"
        )
    return 0 if room >= vocabulary else min(int(room), most)


def _room(config: Config, model: Any, layers: tuple[int, ...], teacher: int) -> float:
    """For how many word pieces the rest of the student leaves room."""
    keys, whole = config.student, model.config
    shape = replace(Shape.whole(whole, layers), rank=keys.embedding_rank).beginning(
        len(layers), keys.heads, keys.neurons
    )
    plan = type(whole).from_dict({**whole.to_dict(), "num_hidden_layers": len(layers)})
    width = _width(config, model)
    with torch.device("meta"):
        rest = count_parameters(build(plan, shape)) - int(whole.vocab_size) * width
    return (keys.target_ratio * teacher - rest) / width


def _width(config: Config, model: Any) -> int:
    """Parameters of a row of the word embedding."""
    return config.student.embedding_rank or int(model.get_input_embeddings().embedding_dim)
