"""Rows that a query leaves out: `dress ! stripes`.

Shapes: N rows, V vectors of a modality, D dimensions.
"""

from collections.abc import Sequence

import numpy as np

from mmalign.arrays import Bools, Floats
from mmalign.errors import UsageError
from mmalign.index.vectors import shared_tensor
from mmalign.search.snapshot import Snapshot

VECTORS_AT_A_TIME = 65_536

Excluded = tuple[str | None, Floats]
"""An item: its words, if it is a text, and its unit vector (D,)."""


def left_out(
    snapshot: Snapshot, excluded: Sequence[Excluded], query_D: Floats | None, to: str
) -> Bools:
    """Return which rows (N,) are left out.

    A row is left out if it is likely what an excluded text asks for, see `Snapshot.likely`. Where
    nobody can say what is likely, it is left out if its score to an excluded item is higher than
    its score to the rest of the query.

    Args:
        snapshot: What is searched.
        excluded: The excluded items.
        query_D: The unit vector of the rest of the query; None if there is none.
        to: The modality whose vectors are compared; a row is compared by its best.

    Raises:
        UsageError: Nobody can say what is likely, and the query only excludes.
    """
    left_out_N = np.zeros(snapshot.store.manifest.physical_rows, np.bool_)
    rest_N = None
    for text, vector_D in excluded:
        likely_N = snapshot.likely(vector_D, to, text)
        if likely_N is None:
            if query_D is None:
                raise UsageError("the query only excludes: say before ! what is to be found")
            rest_N = _best_scores(snapshot, query_D, to) if rest_N is None else rest_N
            likely_N = _best_scores(snapshot, vector_D, to) > rest_N
        left_out_N |= likely_N
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
