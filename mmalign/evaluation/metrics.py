"""Retrieval and classification metrics: NumPy in, numbers out.

Shapes: M queries, N candidates, K ranks, C classes.

Scores are computed elsewhere; ties are broken by row.
"""

from collections.abc import Sequence

import numpy as np

from mmalign.arrays import Ints


def recall_at(
    ranked_MK: Ints, owners_N: Ints, wanted_M: Ints, ks: Sequence[int]
) -> dict[int, float]:
    """Compute the share of queries with at least one correct candidate among their first k.

    Candidate n is correct for query m if `owners_N[n] == wanted_M[m]`. With images as candidates
    and captions as queries this is text->image recall (one correct image per caption); with
    captions as candidates it is image->text recall (any of the image's captions counts).

    Args:
        ranked_MK: Candidate rows, best first, shape (M, K); -1 if there is none.
        owners_N: The owner (an image number) of each candidate, shape (N,).
        wanted_M: The correct owner for each query, shape (M,).
        ks: The depths to report, each at most K.

    >>> ranked = np.array([[0, 1], [0, 1], [1, 0]])
    >>> recall_at(ranked, np.array([0, 1]), np.array([0, 1, 1]), [1, 2])
    {1: 0.6666666666666666, 2: 1.0}
    """
    hit_MK = (owners_N[ranked_MK] == wanted_M[:, None]) & (ranked_MK >= 0)
    return {k: float(hit_MK[:, :k].any(axis=1).mean()) for k in ks}


def mean_reciprocal_rank(ranked_MK: Ints, owners_N: Ints, wanted_M: Ints) -> float:
    """Compute the mean over queries of 1 / rank of the first correct candidate (0 if none in K).

    Arguments are those of `recall_at`.

    >>> ranked = np.array([[0, 1], [0, 1], [1, 0]])
    >>> mean_reciprocal_rank(ranked, np.array([0, 1]), np.array([0, 1, 1]))
    0.8333333333333334
    """
    hit_MK = (owners_N[ranked_MK] == wanted_M[:, None]) & (ranked_MK >= 0)
    ranks_M = hit_MK.argmax(axis=1) + 1
    return float(np.where(hit_MK.any(axis=1), 1 / ranks_M, 0.0).mean())


def accuracy(ranked_MK: Ints, labels_M: Ints, ks: Sequence[int] = (1, 5)) -> dict[str, float]:
    """Compute zero-shot accuracy: `acc1`, `acc5` and `mean_per_class_recall`.

    Args:
        ranked_MK: Class numbers, best first, shape (M, K).
        labels_M: The true class of each image, shape (M,).
        ks: The depths to report; those above K are left out.

    >>> accuracy(np.array([[0, 1], [0, 1], [1, 0]]), np.array([0, 0, 0]), ks=[1])
    {'acc1': 0.6666666666666666, 'mean_per_class_recall': 0.6666666666666666}
    """
    right_MK = ranked_MK == labels_M[:, None]
    out = {f"acc{k}": float(right_MK[:, :k].any(1).mean()) for k in ks if k <= ranked_MK.shape[1]}
    per_class = [right_MK[labels_M == c, 0].mean() for c in np.unique(labels_M)]
    return out | {"mean_per_class_recall": float(np.mean(per_class))}
