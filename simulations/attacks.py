"""What a hostile client does to its update or its labels: the attacks that robust rules are tested against.

sign flip     sends minus its update                      Li et al. 2019, https://arxiv.org/abs/1811.03761
scaling       sends its update many times over            Bagdasaryan et al. 2020, https://arxiv.org/abs/1807.00459
label flip    trains honestly on labels K - 1 - label     Fang et al. 2020, https://arxiv.org/abs/1911.11815
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

Update = Mapping[str, NDArray[np.float32]]


def sign_flip(update: Update) -> dict[str, NDArray[np.float32]]:
    """Minus the update: a step uphill, of a length that no bound on norms can see."""
    return {name: -array for name, array in update.items()}


def scale(update: Update, factor: float) -> dict[str, NDArray[np.float32]]:
    """The update times a factor; a negative one also turns it around."""
    return {name: array * np.float32(factor) for name, array in update.items()}


def flip_labels(labels: NDArray[Any], classes: int) -> NDArray[Any]:
    """Class k becomes classes - 1 - k, same shape and type; of an odd number the middle class stays.

    Raises:
        ValueError: a label is not one of 0 ... classes - 1.
    """
    if labels.size and not 0 <= labels.min() <= labels.max() < classes:
        raise ValueError(f"labels {labels.min()} to {labels.max()}; {classes} classes are 0 to {classes - 1}")
    return (classes - 1 - labels).astype(labels.dtype)
