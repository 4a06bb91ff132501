"""Rows that a query leaves out: `dress ! stripes`.

The rest of the query is ranked by as with `dress - 0.75:stripes`, which keeps most of what is
excluded from the best hits. Beside that, a row is left out if its score to an excluded item lies
more than `ABOVE` standard deviations above the mean of all rows. So an item leaves out about a
sixth of a store that has nothing of it, and never more than half of any (Cantelli's inequality).
What else was tried: docs/decisions/0018-exclusion-and-mixed-queries.md.

Shapes: N rows, V vectors of a modality, E items, D dimensions.
"""

from collections.abc import Sequence

import numpy as np

from mmalign.arrays import Bools, Floats
from mmalign.index.vectors import shared_tensor
from mmalign.search.snapshot import Snapshot

VECTORS_AT_A_TIME = 65_536
# The weight by which an excluded item is subtracted.
SUBTRACTED = 0.75
# Standard deviations.
ABOVE = 1.0


def left_out(snapshot: Snapshot, excluded_ED: Sequence[Floats], to: str) -> Bools:
    """Return which rows (N,) are left out; every vector is scored.

    Args:
        snapshot: What is searched.
        excluded_ED: Unit vectors of the excluded items.
        to: The modality whose vectors are compared; a row is compared by its best.
    """
    left_out_N = np.zeros(snapshot.store.manifest.physical_rows, np.bool_)
    for vector_D in excluded_ED:
        scores_N = _best_scores(snapshot, vector_D, to)
        is_compared_N = np.isfinite(scores_N)
        if snapshot.store.live is not None:
            is_compared_N &= snapshot.store.live
        compared = scores_N[is_compared_N]
        if len(compared):
            mean, deviation = (float(f(compared, dtype=np.float64)) for f in (np.mean, np.std))
            left_out_N |= scores_N > mean + ABOVE * deviation
    return left_out_N


def _best_scores(snapshot: Snapshot, vector_D: Floats, to: str) -> Floats:
    """Return the score of the best vector of each row, (N,); -inf for rows without one."""
    scores = [np.zeros(0, np.float32)]
    for shard in snapshot.store.vectors(to):
        for first in range(0, len(shard), VECTORS_AT_A_TIME):
            block = shared_tensor(shard[first : first + VECTORS_AT_A_TIME]).float()
            scores.append((block @ shared_tensor(vector_D)).numpy())
    scores_V = np.concatenate(scores)
    owners_V = snapshot.owners(to)
    if owners_V is None:
        return scores_V
    best_N = np.full(snapshot.store.manifest.physical_rows, -np.inf, np.float32)
    np.maximum.at(best_N, owners_V, scores_V)
    return best_N
