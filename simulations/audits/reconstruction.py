"""How much of a text an attack has got back, and how much of it anybody would guess.

ROUGE-N is the F1 of the N-grams that two texts share, ROUGE-L that of their longest common subsequence (Lin 2004,
https://aclanthology.org/W04-1013), by Google's `rouge-score`. Token recall and precision count word pieces: of the
multiset, in which a piece counts as often as it is there, and of the set.

A guess knows the public text and nothing of the update: as many pieces as the attack has found, the most frequent ones;
and public texts at random. An attack that finds nothing answers with the guess.
"""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment

from common.errors import InputError
from common.tokens import Tokens

Text = Sequence[int]  # word pieces, without special ones
ROUGE = ("rouge1", "rouge2", "rougeL")
DRAWS = 20  # of random public texts


def token_scores(found: Text, truth: Text) -> dict[str, float]:
    """Recall and precision of found pieces: ``recall`` and ``precision`` of the multiset, ``set_...`` of the set.

    Of nothing found the precision is 0.
    """

    def scores(one: Counter[int], other: Counter[int]) -> tuple[float, float]:
        shared = (one & other).total()
        return shared / max(other.total(), 1), shared / max(one.total(), 1)

    recall, precision = scores(Counter(map(int, found)), Counter(map(int, truth)))
    set_recall, set_precision = scores(Counter(set(map(int, found))), Counter(set(map(int, truth))))
    return {"recall": recall, "precision": precision, "set_recall": set_recall, "set_precision": set_precision}


class Judge:
    """Compares texts, and guesses.

    Args:
        tokenizer: writes pieces out as text.
        special: pieces that stand for no text.
        tokens, public: the public text is these rows of the tokens.
    """

    def __init__(self, tokenizer: Any, special: NDArray[np.int64], tokens: Tokens, public: NDArray[np.int64]) -> None:
        self.tokenizer, self.special, self.tokens, self.public = tokenizer, special, tokens, public
        counts = np.bincount(tokens.pieces(public), minlength=len(tokenizer))
        counts[special] = -1
        self.frequent = np.argsort(-counts, kind="stable")
        self.scorer = _scorer()

    def texts(self, rows: NDArray[np.int64]) -> list[list[int]]:
        """The pieces of some rows, without special ones."""
        found = [self.tokens.pieces(rows[place : place + 1]) for place in range(len(rows))]
        return [one[~np.isin(one, self.special)].tolist() for one in found]

    def usual(self, texts: int) -> list[int]:
        """The most frequent pieces, as many different ones as so many public texts have in the middle."""
        rng = np.random.default_rng(0)
        counts = [len({p for text in self.drawn(texts, rng) for p in text}) for _ in range(DRAWS)]
        return [int(piece) for piece in self.frequent[: int(np.median(counts))]]

    def drawn(self, count: int, rng: np.random.Generator) -> list[list[int]]:
        """Public texts at random."""
        return self.texts(rng.choice(self.public, min(count, len(self.public)), replace=False))

    def of_tokens(self, found: Text, truth: Sequence[Text]) -> dict[str, float]:
        """Of pieces without an order: `token_scores`, and as ``guess_...`` those of as many frequent pieces."""
        whole = [piece for text in truth for piece in text]
        guess = token_scores(self.frequent[: len(set(map(int, found)))].tolist(), whole)
        return token_scores(found, whole) | {f"guess_{name}": value for name, value in guess.items()}

    def of_texts(self, found: Sequence[Text], truth: Sequence[Text]) -> dict[str, float]:
        """Of texts: `token_scores` of all together and `rouge`, and both of the guess, the better of the two ways.

        The found texts are set against the true ones in the way that fits best.
        """
        whole = [piece for text in truth for piece in text]
        pieces = [piece for text in found for piece in text]
        rng, drawn = np.random.default_rng(0), []
        for _ in range(DRAWS):
            texts = self.drawn(len(truth), rng)
            drawn.append(token_scores([p for text in texts for p in text], whole) | self.rouge(texts, truth))
        random = {name: float(np.mean([one[name] for one in drawn])) for name in drawn[0]}
        frequent = self.frequent[: max(len(pieces) // max(len(found), 1), 1)].tolist()
        common = token_scores(frequent * len(truth), whole) | self.rouge([frequent] * len(truth), truth)
        guess = {f"guess_{name}": max(random[name], common[name]) for name in random}
        return token_scores(pieces, whole) | self.rouge(found, truth) | guess

    def rouge(self, found: Sequence[Text], truth: Sequence[Text]) -> dict[str, float]:
        """Mean F1 over the true texts; one that none is found for counts 0."""
        said, true = [self.written(text) for text in found], [self.written(text) for text in truth]
        table = np.zeros((3, len(true), max(len(said), len(true))))
        for row, reference in enumerate(true):
            for column, text in enumerate(said):
                scores = self.scorer.score(reference, text)
                table[:, row, column] = [scores[name].fmeasure for name in ROUGE]
        rows, columns = linear_sum_assignment(-(table[0] + table[2]))
        return {name: float(table[place, rows, columns].mean()) for place, name in enumerate(ROUGE)}

    def written(self, text: Text) -> str:
        return str(self.tokenizer.decode(list(map(int, text)), skip_special_tokens=True))


def _scorer() -> Any:
    try:
        from rouge_score.rouge_scorer import RougeScorer  # type: ignore[import-untyped]
    except ImportError:
        raise InputError("rouge-score is not installed: pip install 'fedistill[privacy]'") from None
    return RougeScorer(list(ROUGE))
