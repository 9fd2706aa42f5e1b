"""The teacher of general rounds: what ``teacher.model`` was before it was fine-tuned, with its masked-LM head."""

from dataclasses import dataclass
from pathlib import Path

from common.hashing import hash_tensors
from common.masking import load_masked_teacher
from server.teacher import TeacherSource


@dataclass(frozen=True)
class MaskedTeacher:
    """A folder that workers open, and the hash of its weights as a masked LM."""

    folder: Path
    hash: str


def prepare_masked_teacher(source: TeacherSource) -> MaskedTeacher:
    """Raises `InputError` when the source has no masked-LM head, or its family knows none."""
    return MaskedTeacher(source.folder, hash_tensors(load_masked_teacher(source.folder).state_dict()))
