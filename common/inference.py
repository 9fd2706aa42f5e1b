"""Running a frozen model over examples so that an example's output does not depend on its company.

A matrix kernel may round a row differently when the shape of the batch changes. So every forward pass has
`ROWS` rows (short blocks are filled up by repeating a row) and a padded length that is a function of the window's
own length alone: the same window gives the same bits in any batch, worker or process. An example's windows are added
in their order, so that its logits do too.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from common.device import Compute
from common.tokens import Tokens

ROWS = 32


def padded_lengths(lengths: NDArray[np.int64]) -> NDArray[np.int64]:
    """Round each length up: to a multiple of 8 up to 64, of 32 above."""
    step = np.where(lengths <= 64, 8, 32)
    return (lengths + step - 1) // step * step


@torch.inference_mode()
def predict(
    model: Any,
    tokens: Tokens,
    rows: NDArray[np.int64],
    compute: Compute,
    advance: Callable[[int], None] = lambda amount: None,
) -> NDArray[np.float32]:
    """Logits of some rows, (len(rows), num_labels) float32, bit-identical for an example in any company."""
    model.eval()
    model.set_attn_implementation("sdpa")  # training may have chosen another
    if not len(rows):
        return np.zeros((0, model.config.num_labels), dtype=np.float32)
    windows, counts = tokens.windows(rows)
    widths = padded_lengths(tokens.widths(windows))
    last = np.zeros(len(windows), dtype=np.int64)
    last[np.cumsum(counts) - 1] = 1
    result: NDArray[np.float32] | None = None
    limit = int(getattr(model.config, "max_position_embeddings", 512))
    for width in np.unique(widths):
        places = np.flatnonzero(widths == width)
        for start in range(0, len(places), ROWS):
            part = places[start : start + ROWS]
            block = np.concatenate([windows[part], np.repeat(windows[part[:1]], ROWS - len(part))])
            inputs = tokens.window_batch(block, min(int(width), limit))
            inputs = {name: tensor.to(compute.device) for name, tensor in inputs.items()}
            with compute.autocast():
                logits = model(**inputs).logits[: len(part)].float().cpu().numpy()
            if result is None:
                result = np.empty((len(windows), logits.shape[1]), dtype=np.float32)
            result[part] = logits
            advance(int(last[part].sum()))
    assert result is not None
    return result if len(windows) == len(rows) else _mean(result, counts)


def _mean(logits: NDArray[np.float32], counts: NDArray[np.int64]) -> NDArray[np.float32]:
    """The mean of each example's windows, added one after the other: its bits do not depend on how many others have."""
    first = np.cumsum(counts) - counts
    total = logits[first]
    for place in range(1, int(counts.max())):
        more = np.flatnonzero(counts > place)
        total[more] += logits[first[more] + place]
    return np.asarray(total / counts[:, None].astype(np.float32))
