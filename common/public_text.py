"""Public text without labels, beside a task's own: a file of lines, or the public parts of all GLUE tasks there are."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from common.config import Config
from common.corpus import load_corpus
from common.dataset import FederatedDataset
from common.errors import InputError
from common.files import read_lines
from common.partition import cut_groups, normal_form, text_groups
from common.seeding import generator
from common.tasks import GLUE

ALL_GLUE = "glue"
LOST, MOVED = 0.25, 3  # the share of words that a copy misses, and by how many places the others stray


def load_public_text(config: Config) -> list[str]:
    """The different texts of ``data.public-text``, in their order; none when the key is empty.

    Raises:
        InputError: the file is not there, is no text or holds none; or there is no GLUE text.
    """
    name = config.data.public_text
    if not name:
        return []
    if name == ALL_GLUE:
        return list(dict.fromkeys(_all_glue(config)))
    path = Path(name).expanduser()
    if not path.is_file():
        raise InputError(
            f"data.public-text = {name!r}: no such file; give one with a text on each line, or {ALL_GLUE!r}"
        )
    texts = [line.strip() for line in read_lines(path)]
    found = list(dict.fromkeys(text for text in texts if text))
    if not found:
        raise InputError(f"data.public-text = {name!r}: no text in it; give a file with a text on each line")
    return found


def apart_from(data: FederatedDataset, texts: list[str]) -> list[str]:
    """The texts that neither a client of the run holds nor its public validation, in their order.

    Tasks share sentences (STS-B has some of MRPC's), and a file may repeat what a client holds: a text stands on one
    side of every cut. Clients on devices of their own are not known here; for their text the file's owner answers.
    """
    if not texts:
        return []
    elsewhere = np.setdiff1d(np.arange(len(data.train)), data.public)
    others = [(data.train, elsewhere)] + [(split, np.arange(len(split))) for split in data.validation.values()]
    taken = {normal_form(text) for split, rows in others for column in split.texts for text in column.take(rows)}
    return [text for text in texts if normal_form(text) not in taken]


def in_pairs(own: Sequence[tuple[str, str]], texts: Sequence[str], rng: np.random.Generator) -> list[tuple[str, str]]:
    """What a student of a task on pairs reads in general distillation: ``own`` pairs, and each text once more.

    What two texts have in common is read across them, so the heads that do so are mended by pairs alone. Half of the
    texts stand two by two, which have little in common, half beside a copy of themselves that has lost words and
    their order (the noise of Lample et al. 2018, https://arxiv.org/abs/1711.00043, section 2.3). Of an odd half's
    last text nothing is made.
    """
    order = rng.permutation(len(texts)).tolist()
    strange, alike = order[: len(texts) // 2], order[len(texts) // 2 :]
    pairs = [(texts[one], texts[other]) for one, other in zip(strange[::2], strange[1::2], strict=False)]
    return [*own, *pairs, *((texts[place], _worn(texts[place], rng)) for place in alike)]


def _worn(text: str, rng: np.random.Generator) -> str:
    """A copy without some of the words, the others near their places."""
    words = text.split()
    kept = [word for word, stays in zip(words, rng.random(len(words)) >= LOST, strict=True) if stays] or words
    return " ".join(kept[place] for place in np.argsort(np.arange(len(kept)) + rng.uniform(0, MOVED, len(kept))))


def _all_glue(config: Config) -> list[str]:
    """Of each task in ``data.source`` the texts that would be public if it were the run's."""
    folder = Path(config.data.source).expanduser()
    if not config.data.source or config.task not in GLUE:
        raise InputError(
            f"data.public-text = {ALL_GLUE!r} needs a GLUE task and a folder of GLUE tasks in data.source, but task = "
            f"{config.task} and data.source = {config.data.source!r}; give these, or a file"
        )
    texts: list[str] = []
    for task in sorted(name for name in GLUE if (folder / name).is_dir()):
        # `natural` would ask for this task's own column, and the clients' files are of this task alone
        data = config.data.model_copy(update={"partition": "iid", "private": ""})
        table = load_corpus(config.model_copy(update={"task": task, "data": data})).train
        public, _ = cut_groups(text_groups(table), config.data.public_fraction, generator(config.seed, "public"))
        part = table.take(np.asarray(public))
        texts += [text for row in zip(*part.texts, strict=True) for text in row if text]
    return texts
