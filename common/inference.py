"""Running a frozen model over examples so that an example's output does not depend on its company.

A matrix kernel may round a row differently when the shape of the batch changes. So every forward pass has
`ROWS` rows (short blocks are filled up by repeating a row) and a padded length that is a function of the
example's own length alone: the same example gives the same bits in any batch, worker or process.
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
    widths = padded_lengths(tokens.lengths(rows))
    result: NDArray[np.float32] | None = None
    limit = int(getattr(model.config, "max_position_embeddings", 512))
    for width in np.unique(widths):
        places = np.flatnonzero(widths == width)
        for start in range(0, len(places), ROWS):
            part = places[start : start + ROWS]
            block = np.concatenate([rows[part], np.repeat(rows[part[:1]], ROWS - len(part))])
            inputs = tokens.batch(block, min(int(width), limit))
            inputs = {name: tensor.to(compute.device) for name, tensor in inputs.items()}
            with compute.autocast():
                logits = model(**inputs).logits[: len(part)].float().cpu().numpy()
            if result is None:
                result = np.empty((len(rows), logits.shape[1]), dtype=np.float32)
            result[part] = logits
            advance(len(part))
    assert result is not None
    return result
