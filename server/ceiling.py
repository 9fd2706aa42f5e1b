"""The ceiling: what the teacher's encoder reaches when it is fine-tuned centrally on all train text.

Nobody in a federation could do that: the private shards never meet. It says how much of what is possible at all a
student keeps, where the share of the teacher says how much of what it was taught.
"""

from dataclasses import dataclass

import numpy as np

from common.config import Config
from common.dataset import FederatedDataset, prepare_dataset
from common.device import choose_compute
from common.errors import InputError
from common.keys import AT_CLIENTS
from common.models import count_parameters, load_teacher
from common.partition import Index
from common.progress import Progress
from common.store import cache_folder
from server.teacher import Teacher, check_head, check_length, find_teacher, labelled_rows, tuned
from server.validation import validate


@dataclass(frozen=True)
class Ceiling:
    """A centrally fine-tuned encoder, in the cache, with its scores on public validation."""

    model: Teacher
    data: FederatedDataset
    params: int
    validation: dict[str, float]


def prepare_ceiling(config: Config, progress: Progress) -> Ceiling:
    """Fine-tune ``teacher.model`` on the whole train table with the teacher's own recipe, or take it from the cache.

    A model that has the task's head already begins with it.

    Raises:
        InputError: a key, a file or the combination of both is wrong.
    """
    if config.data.private == AT_CLIENTS:
        raise InputError(f"data.private = {AT_CLIENTS!r}: the private texts are with the clients; there is no ceiling")
    source = find_teacher(config.teacher.model)
    compute = choose_compute(config.runtime.device, config.client.precision)
    check_length(source, config.data.max_length)
    cache = cache_folder(config.runtime.cache)
    data = prepare_dataset(config, source.folder, cache, progress)
    check_head(source, data.task, len(data.train))
    rows = labelled_rows(data, train_rows(config, data))
    if not len(rows):
        raise InputError(f"{config.data.source}: no example has a label to fine-tune on")
    teacher = tuned(config, source, data, rows, cache=cache, progress=progress)
    model = load_teacher(teacher.folder).to(compute.device)
    return Ceiling(teacher, data, count_parameters(model), validate(model, data, compute, progress))


def train_rows(config: Config, data: FederatedDataset) -> Index:
    """The rows of the train table; without those that are scored where the validation split was cut from it."""
    if config.task != "text" or config.data.validation:
        return np.arange(len(data.train))
    scored = {key.tobytes() for split in data.validation.values() for key in np.asarray(split.keys)}
    return np.flatnonzero([key.tobytes() not in scored for key in np.asarray(data.train.keys)])
