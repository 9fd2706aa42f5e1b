"""Error feedback: what a compressed update left out is added to the client's next one.

With C a lossy compression, u_t the update of round t and e_t the residual:

    sent_t = C(u_t + e_t),    e_(t+1) = u_t + e_t - sent_t

so that the sum of what was sent is the sum of the updates but for the last residual (Seide et al. 2014,
https://www.isca-archive.org/interspeech_2014/seide14_interspeech.html; EF-SGD, Karimireddy et al. 2019,
https://arxiv.org/abs/1901.09847). A residual is as private as an update and never leaves the client.

A residual may be used only if the update it was left by is in the global model: see `clients.round_files`.
"""

from collections.abc import Mapping
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from clients.round_files import MissingState, RoundFiles
from common.compression import Parts, Shapes, Update, Wire, compress, decompress


class MissingFeedback(MissingState):
    """The residual that a client needs is not on disk, or not as it was written."""


class ErrorFeedback(RoundFiles):
    """The residuals of a run's clients."""

    what: ClassVar[str] = "error feedback"
    label: ClassVar[str] = "residual"
    missing: ClassVar[type[MissingState]] = MissingFeedback

    def load(self, client: int, base: int, shapes: Shapes) -> Update:
        """The residual that the client's update of round ``base`` left, float32 arrays of these shapes.

        Base 0 says that the server has taken no update of this client: nothing is left out yet, all zeros.

        Raises:
            MissingFeedback: there is no file, or it is damaged, of another client or round, or of other shapes.
        """
        if base == 0:
            return {name: np.zeros(shape, dtype=np.float32) for name, shape in shapes.items()}
        return super().load(client, base, shapes)


def compress_with_feedback(
    update: Mapping[str, NDArray[np.float32]],
    residual: Mapping[str, NDArray[np.float32]],
    wire: Wire,
    rng: np.random.Generator,
) -> tuple[Parts, Update]:
    """What travels of an update and the residual before it, and the residual after it.

    Args:
        update, residual: float32 arrays of the same names and shapes; neither is changed.
        rng: see `common.compression.compress`.

    Raises:
        ValueError: their names or shapes differ.
        NotFinite: their sum cannot be sent.
    """
    shapes = {name: array.shape for name, array in update.items()}
    if {name: array.shape for name, array in residual.items()} != shapes:
        raise ValueError("the residual's names and shapes are not the update's")
    to_send: Update = {name: np.add(update[name], residual[name], dtype=np.float32) for name in update}
    parts = compress(to_send, wire, rng)
    # what the server will make of the parts, not what we meant by them
    sent = decompress(parts, shapes, wire)
    return parts, {name: to_send[name] - sent[name] for name in update}
