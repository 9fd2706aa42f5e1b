"""Skewed labels: what a client's shares of the classes do to its student, and how to take that out of the loss.

A client that has mostly one class teaches its student to say so. With each class's share here over its share elsewhere
added, as a logarithm, to the logits under the label's loss, the shift is in the loss and not in the student (logit
adjustment, Menon et al. 2021, https://arxiv.org/abs/2007.07314; for federations with skewed labels Zhang et al. 2022,
https://arxiv.org/abs/2209.00189).
"""

import numpy as np
from numpy.typing import NDArray


def prior_shift(own: NDArray[np.int64], public: NDArray[np.int64], classes: int) -> NDArray[np.float32]:
    """(classes,) log of each class's share among a client's labels over its share among public ones.

    Args:
        own, public: labels, -1 for none. A class is counted once more than it is there, so that none has a share of 0;
            without public labels all classes are taken to be as frequent.
    """
    shares = [np.bincount(labels[labels >= 0], minlength=classes) + 1.0 for labels in (own, public)]
    here, there = (share / share.sum() for share in shares)
    return np.asarray(np.log(here / there), dtype=np.float32)
