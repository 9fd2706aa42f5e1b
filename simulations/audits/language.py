"""A language prior of the public text: how likely one word piece follows another.

Bigrams, mixed with single pieces so that nothing is impossible (Jelinek and Mercer 1980):

    P(b | a) = k n(a, b) / n(a) + (1 - k) (n(b) + 1) / (N + V)

LAMP uses GPT-2 here; a federation has no language model of its own that the server could ask, but it has public text.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from common.tokens import Tokens

MIXED = 0.9  # k


@dataclass(frozen=True)
class Bigrams:
    """Counts of pieces and of neighbours in some texts.

    Attributes:
        single: (V,) n(b).
        before: (V,) n(a), of pieces that another follows.
        keys: ascending a V + b of the pairs, with their ``counts``.
    """

    single: NDArray[np.int64]
    before: NDArray[np.int64]
    keys: NDArray[np.int64]
    counts: NDArray[np.int64]

    @classmethod
    def of(cls, tokens: Tokens, rows: NDArray[np.int64], vocabulary: int) -> "Bigrams":
        texts = [tokens.pieces(rows[place : place + 1]).astype(np.int64) for place in range(len(rows))]
        first = np.concatenate([text[:-1] for text in texts])
        second = np.concatenate([text[1:] for text in texts])
        keys, counts = np.unique(first * vocabulary + second, return_counts=True)
        single = np.bincount(np.concatenate(texts), minlength=vocabulary)
        return cls(single, np.bincount(first, minlength=vocabulary), keys, counts)

    def surprise(self, text: Sequence[int]) -> float:
        """Mean of -log P over the neighbours in a text: the log of its perplexity."""
        pieces = np.asarray(text, dtype=np.int64)
        first, second, vocabulary = pieces[:-1], pieces[1:], len(self.single)
        wanted = first * vocabulary + second
        at = np.minimum(np.searchsorted(self.keys, wanted), len(self.keys) - 1)
        together = np.where(self.keys[at] == wanted, self.counts[at], 0)
        alone = (self.single[second] + 1) / (self.single.sum() + vocabulary)
        return float(-np.log(MIXED * together / np.maximum(self.before[first], 1) + (1 - MIXED) * alone).mean())
