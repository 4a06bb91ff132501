"""Hits that are near to a query and unlike each other: maximal marginal relevance.

The next hit is the candidate with the highest

    (1 - diversity) * relevance - diversity * similarity to the most similar hit before it.

Source: Carbonell and Goldstein 1998, "The use of MMR, diversity-based reranking for reordering
documents and producing summaries".

Cosines of a text with images and of images with each other have ranges of their own, which differ
by model. Therefore both are scaled on the first candidates: relevance is 0 for the last of them and
1 for the best, similarity is their mean cosine with each other at 0, and 1 for the same vector.

The hit at place i is chosen from the nearest max(`FIRST`, 5 i), however many are asked for, so that
pages are parts of one order.

Shapes: K candidates, D dimensions.
"""

import numpy as np

from mmalign.arrays import Floats, Ints

# Candidates at the start, and for each hit.
FIRST, EACH = 256, 5


def candidates(count: int) -> int:
    """Return how many of the nearest rows so many hits are chosen from."""
    return max(FIRST, EACH * count)


def diverse_order(scores_K: Floats, vectors_KD: Floats, diversity: float, count: int) -> Ints:
    """Return the numbers of the chosen candidates in their order; of equals the nearest first.

    Args:
        scores_K: Scores, best first.
        vectors_KD: Unit vectors; zero for a candidate that is like no other.
        diversity: From 0 to 1.
        count: How many to choose; fewer if there are fewer candidates.
    """
    if not len(scores_K):
        return np.zeros(0, np.int64)
    first_FD = vectors_KD[:FIRST]
    best, last = float(scores_K[0]), float(scores_K[:FIRST][-1])
    relevance_K = (scores_K - last) / max(best - last, 1e-6)
    pairs = len(first_FD) * (len(first_FD) - 1)
    own, total = float((first_FD**2).sum()), float((first_FD.sum(0) ** 2).sum())
    mean = (total - own) / max(pairs, 1)
    similarity_K = np.zeros(len(scores_K), np.float32)
    is_left_K = np.ones(len(scores_K), np.bool_)
    chosen: list[int] = []
    for place in range(1, min(count, len(scores_K)) + 1):
        among = slice(0, candidates(place))
        marginal = (1 - diversity) * relevance_K[among] - diversity * similarity_K[among]
        chosen.append(int(np.argmax(np.where(is_left_K[among], marginal, -np.inf))))
        is_left_K[chosen[-1]] = False
        cosines_K = vectors_KD @ vectors_KD[chosen[-1]]
        np.maximum(similarity_K, (cosines_K - mean) / max(1 - mean, 1e-6), out=similarity_K)
    return np.array(chosen)
