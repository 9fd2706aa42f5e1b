"""What the rows of an embedding's update tell: which words a client has, and how long its longest text is.

A row of the word embedding gets a gradient only where its piece is in the batch,

    dL/dE[v] = sum over places p with piece v of dL/dx_p,

so that the rows that have moved are the client's pieces, after any number of steps of any optimiser; a row of the
position embedding moves where a text reaches that far (Melis et al. 2019, https://arxiv.org/abs/1805.04049; Gupta et
al. 2022, https://arxiv.org/abs/2205.08514). Decoupled weight decay moves every row that is trained, but along itself:
u = -c E[v]. Frozen embeddings send no rows.

Under Gaussian noise all rows move: where one has not, there is none. A row of H numbers that has nothing but noise of
deviation s has |u|^2 / s^2 of a chi-square distribution with H degrees; s is told by the rows themselves, most of which
are noise. A row counts as moved above the quantile that one row of noise in all would exceed.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

Rows = NDArray[np.int64]
POSITIONS = ("position_embeddings.weight", "wpe.weight")
ROUNDING = 2.0**-20  # of a row, what float32 steps of decay along it may leave across it


def moved_rows(update: NDArray[np.float32], weight: NDArray[np.float32]) -> Rows:
    """Rows of (n, H) that something else than decay and noise has moved."""
    across = _across(update, weight)
    if not across.all() or len(across) <= 2:  # noise would have moved every row
        return np.flatnonzero(across)
    norms, width = np.square(update, dtype=np.float64).sum(axis=1), update.shape[1]
    variance = np.median(norms) / stats.chi2.median(width)
    return np.flatnonzero(norms > variance * stats.chi2.isf(1.0 / len(norms), width))


def _across(update: NDArray[np.float32], weight: NDArray[np.float32]) -> NDArray[np.bool_]:
    """(n,) whether a row's update has a part that is not along the row itself."""
    u, w = update.astype(np.float64), weight.astype(np.float64)
    lengths = np.maximum(np.square(w).sum(axis=1), 1e-30)
    along = (u * w).sum(axis=1) / lengths
    left = np.sqrt(np.square(u - along[:, None] * w).sum(axis=1))
    return np.asarray((np.abs(u).max(axis=1) > 0) & ((along >= 0) | (left > ROUNDING * np.sqrt(lengths))))


def words_of(model: Any) -> str:
    """Name of the word embedding's weight."""
    table = model.get_input_embeddings().weight
    return str(next(name for name, parameter in model.named_parameters() if parameter is table))


def _named(update: Mapping[str, Any], ends: tuple[str, ...]) -> str:
    return next((name for name in update if name.endswith(ends)), "")


def found_pieces(model: Any, update: Mapping[str, NDArray[np.float32]], special: Rows) -> Rows | None:
    """The word pieces whose rows have moved, ascending, without special ones; None: no rows were sent."""
    name = words_of(model)
    if name not in update:
        return None
    moved = moved_rows(update[name], model.get_parameter(name).detach().numpy())
    return np.setdiff1d(moved, special)


def longest_text(model: Any, update: Mapping[str, NDArray[np.float32]]) -> int | None:
    """Pieces of the longest text, special ones included; None: no rows were sent, or the model has no such table."""
    name = _named(update, POSITIONS)
    return None if not name else len(moved_rows(update[name], model.get_parameter(name).detach().numpy()))
