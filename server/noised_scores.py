"""Scores from counts that are noised before anybody reads them.

Each client scores its first `privacy.scores-examples` held-out examples, B at most. An example adds one to a cell of
the student's confusion matrix and one to a cell of the teacher's, so that a client moves both together by at most
B sqrt(2) in L2 norm, which the noise is measured in. Noised counts below 0 count as 0; scores follow from the counts.
"""

import numpy as np
from numpy.typing import NDArray

from common.dataset import FederatedDataset
from common.errors import InputError
from common.metrics import ScoreSpec
from server.client_privacy import ClientPrivacy
from server.scoring import WHO, TieredScores


class NoisedScores(TieredScores):
    """As `TieredScores`, for a run without tiers.

    Args:
        everyone: all clients score, not a cohort.
    """

    def __init__(self, data: FederatedDataset, privacy: ClientPrivacy, number: int, *, everyone: bool) -> None:
        super().__init__(data, np.zeros(data.clients, dtype=np.int64), 1)
        self.privacy, self.number, self.rate = privacy, number, 1.0 if everyone else privacy.rate
        most = privacy.keys.scores_examples
        self.held = {client: min(count, most) for client, count in self.held.items()}
        self._released = privacy.released.find("scores", number)

    def by_tier(self, who: str) -> list[NDArray[np.int64]]:
        """The counts, noised when they are first asked for."""
        if self._released is None:
            totals = {name: self.totals[self.names[name][0]].totals["statistics"] for name in WHO}
            self._released = self.privacy.release_statistics(self.number, totals, self.rate)
        return [self._released[who]]


def check_counts(spec: ScoreSpec, share: float) -> None:
    """Raise `InputError` where the statistics are no confusion matrix."""
    if spec.num_labels == 1 or spec.multi_label:
        what = "moments and ranks of a regression" if spec.num_labels == 1 else "counts of several classes at once"
        raise InputError(f"privacy.scores-share = {share}: {what} cannot be noised; give 0, and they are not protected")
