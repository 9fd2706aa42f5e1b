"""The lesson of a run: its data, and the teacher that fits them."""

from dataclasses import dataclass
from typing import Any

from common.config import Config
from common.corpus import Corpus
from common.dataset import FederatedDataset, prepare_dataset
from common.device import Compute, choose_compute
from common.errors import InputError
from common.keys import AT_CLIENTS, PUBLIC
from common.models import load_teacher
from common.progress import Progress
from common.public_text import apart_from, load_public_text
from common.secure_sum import LEAST
from common.store import cache_folder
from server.robust import check_byzantine
from server.teacher import Teacher, TeacherSource, check_head, check_length, labelled_rows, prepare_teacher
from server.validation import validate


@dataclass(frozen=True)
class Lesson:
    """The data of a run and a teacher that fits it, with the model and its scores on public validation.

    Attributes:
        text: public text besides the task's own, apart from what is private or scored.
    """

    data: FederatedDataset
    teacher: Teacher
    model: Any
    validation: dict[str, float]
    compute: Compute
    text: tuple[str, ...] = ()


def prepare_lesson(config: Config, source: TeacherSource, progress: Progress, corpus: Corpus | None = None) -> Lesson:
    """Read and cut the data, take or fine-tune the teacher, score it.

    Raises:
        InputError: a key, a file or the combination of both is wrong.
    """
    compute = choose_compute(config.runtime.device, config.client.precision)
    check_length(source, config.data.max_length)
    cache = cache_folder(config.runtime.cache)
    text = load_public_text(config)
    data = prepare_dataset(config, source.folder, cache, progress, corpus)
    if corpus is not None or config.data.private != AT_CLIENTS:  # else a teacher alone is wanted, without clients
        check_clients(config, data)
    public_text = public_texts(config, data, text, progress)
    check_head(source, data.task, len(labelled_rows(data, data.public)))
    teacher = prepare_teacher(config, source, data, cache, progress)
    model = load_teacher(teacher.folder).to(compute.device)
    return Lesson(data, teacher, model, validate(model, data, compute, progress), compute, tuple(public_text))


def public_texts(config: Config, data: FederatedDataset, text: list[str], progress: Progress) -> list[str]:
    """Of the texts of ``data.public-text`` those that no client holds and no score is of.

    Raises:
        InputError: the student is to be warmed up on public text, and there is none.
    """
    found = apart_from(data, text)
    if left_out := len(text) - len(found):
        progress.line(
            f"data.public-text: {left_out:,} of {len(text):,} left out: clients hold them, or scores are of them"
        )
    if config.student.general_epochs and not found and not len(data.public):
        raise InputError(
            f"student.general-epochs = {config.student.general_epochs}: no public text; give data.public-text, or a "
            "larger data.public-fraction"
        )
    if config.student.warm_epochs and not len(data.public):
        raise InputError(
            f"student.warm-epochs = {config.student.warm_epochs}: no example is public; give a larger "
            "data.public-fraction, or 0"
        )
    return found


def check_clients(config: Config, data: FederatedDataset) -> None:
    """Raise `InputError` when the cohort is larger than the clients that take part, or too small for the rule."""
    ready = len(data.eligible)
    told = f"{ready} of {data.clients} clients hold data.min-examples = {config.data.min_examples} private examples"
    if config.server.cohort > ready:
        raise InputError(
            f"server.cohort = {config.server.cohort}: {told}; give a smaller cohort, fewer clients or a smaller minimum"
        )
    if (holders := len(config.student.holders)) and holders != data.clients:
        raise InputError(
            f"student.tier-of = {config.student.tier_of!r}: {holders} tiers, {data.clients} clients; give one for each"
        )
    if config.privacy.secure_aggregation and ready < LEAST:
        raise InputError(
            f"privacy.secure-aggregation = true: {told}, and fewer than {LEAST} hide nobody; give a smaller minimum "
            "or more clients"
        )
    if config.client.grow_batch and ready < 2:
        raise InputError(f"client.grow-batch = true: {told}, and one has no noise scale; give a smaller minimum")
    if config.server.strategy in PUBLIC and not len(data.public):
        raise InputError(
            f"data.public-fraction = {config.data.public_fraction}: no example is public, and server.strategy = "
            f"{config.server.strategy!r} learns on public text; give a larger share"
        )
    check_byzantine(config.server.strategy, config.server.cohort or ready, config.server.byzantine)
