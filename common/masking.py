"""General distillation: a student learns its language from a masked-LM teacher, without labels, before its task.

DistilBERT's triple loss (Sanh et al. 2019, https://arxiv.org/abs/1910.01108): at the masked places the softened
distribution over pieces that the teacher gives, and the piece itself; at all places the direction of its last hidden
states. Masks follow BERT (Devlin et al. 2019, https://arxiv.org/abs/1810.04805, appendix A.1).

The student is its encoder under the teacher's masked-LM head, which is frozen: both are equally wide. It reads its own
pieces, and so does the teacher, by the numbers that it has for them; the head knows these pieces alone.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from common.dataset import load_tokenizer
from common.errors import InputError
from common.families import FAMILIES, family_of
from common.models import load_frozen
from common.tokens import Tokens

UNASKED = -1  # where nothing is to be guessed


@dataclass(frozen=True)
class Masking:
    """How pieces are masked; their numbers are the student's.

    Attributes:
        mask: the piece that stands for another.
        ordinary: ascending, all pieces that are not special: those that are masked, and that stand in at random.
        probability: of each to be masked.
        numbers: (pieces,) the teacher's number of each; None: the same.
    """

    mask: int
    ordinary: NDArray[np.int64]
    probability: float
    numbers: NDArray[np.int64] | None = None

    def draw(self, tokens: Tokens, rng: np.random.Generator) -> tuple[Tokens, Tokens]:
        """The examples masked, and what is to be guessed: pieces at their places, `UNASKED` at all others.

        Of the pieces that are drawn 8 in 10 become the mask, 1 in 10 any piece, 1 in 10 stay. An example of which none
        was drawn gives one, if it has any.
        """
        ids, owners = tokens.ids, tokens.owners()
        able = np.isin(ids, self.ordinary)
        draws = rng.random(len(ids))
        lowest = np.ones(len(tokens))
        np.minimum.at(lowest, owners[able], draws[able])
        chosen = able & ((draws < self.probability) | (draws == lowest[owners]))
        how, others = rng.random(len(ids)), rng.choice(self.ordinary, len(ids))
        shown = np.where(chosen & (how < 0.8), self.mask, np.where(chosen & (how < 0.9), others, ids))
        asked = np.where(chosen, ids, UNASKED)
        return replace(tokens, ids=shown.astype(np.int32)), replace(tokens, ids=asked.astype(np.int32), pad=UNASKED)

    def as_teacher_counts(self, pieces: Tensor) -> Tensor:
        """The same pieces by the teacher's numbers."""
        return pieces if self.numbers is None else torch.from_numpy(self.numbers).to(pieces.device)[pieces]


def open_masking(tokenizer_folder: Path, probability: float, taught: Path | None = None) -> Masking:
    """How a student masks that reads with this tokenizer.

    Args:
        taught: folder of the teacher's tokenizer, where the student's pieces are some of its.
    """
    tokenizer = load_tokenizer(tokenizer_folder)
    pieces = tokenizer.get_vocab()
    ordinary = np.setdiff1d(list(pieces.values()), tokenizer.all_special_ids)
    numbers = None
    if taught is not None:
        theirs = load_tokenizer(taught).get_vocab()
        numbers = np.array([theirs[name] for name in sorted(pieces, key=pieces.__getitem__)])
    return Masking(int(tokenizer.mask_token_id), ordinary, probability, numbers)


def load_masked_teacher(folder: Path) -> Any:
    """The teacher with its masked-LM head, frozen and in evaluation mode.

    Raises:
        InputError: models of this family have no such head, the folder has none, or its tokenizer no mask.
    """
    from transformers import AutoConfig

    where = "distill.general-rounds"
    family = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False).model_type
    if not FAMILIES[family].masked:
        able = ", ".join(name for name, entry in FAMILIES.items() if entry.masked)
        raise InputError(
            f"{where}: models of the family {family!r} guess no masked pieces; give a teacher.model of {able}, or 0"
        )
    model, missing = load_frozen("AutoModelForMaskedLM", folder)
    if missing:
        raise InputError(
            f"{where}: teacher.model has no masked-LM head ({folder} lacks {len(missing)} of its weights, e.g. "
            f"{missing[0]}); give one that was trained with it, e.g. bert-base-uncased, or 0"
        )
    if load_tokenizer(folder).mask_token_id is None:
        raise InputError(f"{where}: the tokenizer of teacher.model in {folder} has no mask_token; set it, or give 0")
    return model


def keep_guesses(model: Any, numbers: NDArray[np.int64]) -> None:
    """Let the masked-LM head know these pieces alone, in this order."""
    whole, kept = model.get_output_embeddings(), torch.from_numpy(numbers)
    with torch.random.fork_rng(devices=[]):
        decoder = nn.Linear(whole.in_features, len(kept))
    with torch.no_grad():
        decoder.weight.copy_(whole.weight[kept])
        decoder.bias.copy_(whole.bias[kept])
    model.set_output_embeddings(decoder.requires_grad_(False))


def guess(model: Any, states: Tensor) -> Tensor:
    """(places, pieces) logits of a masked-LM head for (places, hidden) last hidden states."""
    for path in family_of(model).masked:
        states = model.get_submodule(path)(states)
    return states
