"""General distillation at a client: the first rounds, in which it distils its text without task and labels."""

from pathlib import Path
from typing import Any

import numpy as np

from clients.worker import Finished, Groups, Worker
from common.config import Config
from common.hashing import hash_tensors
from common.masking import Masking, keep_guesses, load_masked_teacher, open_masking
from common.objective import Examples
from common.recipe import Recipe, general_recipe
from common.wire import ClientLine, Instruction


class GeneralWorker(Worker):
    """Works for clients whose first rounds are general.

    Args:
        masked, masked_hash: folder of the teacher with its masked-LM head; its weights are compared with the hash.
    """

    def __init__(self, config: Config, *, masked: str, masked_hash: str, **needs: str) -> None:
        super().__init__(config, **needs)
        self.masked, self.masked_hash = Path(masked), masked_hash
        self._tutor: tuple[Any, Masking] | None = None  # the model and how pieces are masked, while rounds are general

    def train(
        self, arrays: dict[str, Any], instruction: Instruction, finished: Finished
    ) -> tuple[Groups, list[ClientLine]]:
        """As `Worker.train`.

        Raises:
            ValueError: the masked-LM teacher in the folder is another one.
        """
        if instruction.round > self.config.distill.general_rounds:
            self._tutor = None
        elif self._tutor is None:
            self._tutor = self._open()
        return super().train(arrays, instruction, finished)

    def _open(self) -> tuple[Any, Masking]:
        model = load_masked_teacher(self.masked)
        if hash_tensors(model.state_dict()) != self.masked_hash:
            raise ValueError("the masked-LM teacher's weights are not those of this run")
        trimmed = self.pupil.taught is not None
        taught = self.masked if trimmed else None
        masking = open_masking(self.pupil.folder, self.config.distill.mask_probability, taught)
        if masking.numbers is not None:
            keep_guesses(model, masking.numbers)
        return model.to(self.compute.device), masking

    def _lesson(self, instruction: Instruction, client: int) -> tuple[Recipe, Examples, Any]:
        if self._tutor is None:
            return super()._lesson(instruction, client)
        model, masking = self._tutor
        recipe = general_recipe(self._round_recipe(instruction, int(self.tier_of[client])), self.config.distill)
        rows = self._rows_of(client)
        return (
            recipe,
            Examples(self.pupil.data.train, rows, np.zeros((len(rows), 0), np.float32), masking=masking),
            model,
        )
