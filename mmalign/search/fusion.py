"""Two rankings into one: rows near to a query, and rows whose captions have its words.

Reciprocal rank fusion: a row counts 1 / (60 + its rank) in each ranking that has it. Cormack,
Clarke and Buettcher, "Reciprocal rank fusion outperforms Condorcet and individual rank learning
methods", SIGIR 2009, from which the 60 is. The sum only orders; it is no relevance.

Shapes: K candidates, W rows found by words, N rows, V vectors, D dimensions.
"""

from dataclasses import dataclass

import numpy as np

from mmalign.arrays import Bools, Floats, Ints
from mmalign.search.lexical import Matches

SMOOTHING = 60
# Rows of each ranking that take part, at least: pages up to here are parts of one order.
DEPTH = 256
VECTORS, WORDS, BOTH = "vectors", "words", "both"


@dataclass(frozen=True)
class Fused:
    """Candidates of both rankings in their common order."""

    scores_K: Floats
    """Cosines."""
    numbers_K: Ints
    """Numbers of the best vectors."""
    words_K: Floats
    """BM25 of the words, 0 if the captions have none."""
    found_by_K: tuple[str, ...]
    complete: bool
    """Whether one of them has all the words."""

    def cut(self, page: slice) -> "Fused":
        """Return a part of them."""
        return Fused(
            self.scores_K[page], self.numbers_K[page], self.words_K[page], self.found_by_K[page],
            self.complete,
        )  # fmt: skip


def depth(wanted: int) -> int:
    """Return how many rows of each ranking are fused for so many results."""
    reached = DEPTH
    while reached < wanted:
        reached *= 4
    return reached


def fused_order(scores_K: Floats, words_K: Floats, by_vector_K: Bools) -> Ints:
    """Return the numbers of candidates from the best to the last; of equals, the nearest first.

    Args:
        scores_K: Cosines, which rank what was found by vectors.
        words_K: BM25, above 0 for what was found by words, which it ranks.
        by_vector_K: Which were found by vectors.
    """
    sums_K = np.zeros(len(scores_K))
    for found, ranked_by in (
        (np.flatnonzero(by_vector_K), scores_K),
        (np.flatnonzero(words_K > 0), words_K),
    ):
        order = found[np.lexsort((-scores_K[found], -ranked_by[found]))]
        sums_K[order] += 1 / (SMOOTHING + 1 + np.arange(len(order)))
    return np.lexsort((-scores_K, -sums_K))


def best_rows(matches: Matches, allowed_N: Bools | None, count: int) -> Ints:
    """Return the rows with the highest scores by words (W,), at most `count`; of equals the first.

    Args:
        matches: What the words found.
        allowed_N: Which rows may be found; None for all.
        count: How many at most.
    """
    has_N = matches.scores_N > 0
    rows = np.flatnonzero(has_N if allowed_N is None else has_N & allowed_N)
    if len(rows) > count:
        scores = matches.scores_N[rows]
        least = np.partition(scores, -count)[-count]
        above = rows[scores > least]
        rows = np.concatenate([above, rows[scores == least][: count - len(above)]])
    return rows


def fuse(
    near: tuple[Floats, Ints, Ints], worded: tuple[Floats, Ints, Ints], matches: Matches
) -> Fused:
    """Fuse what was found by vectors with what was found by words.

    Args:
        near: Scores, numbers of the best vectors and rows of what was found by vectors.
        worded: The same of what was found by words.
        matches: BM25 of all rows.
    """
    is_new_W = ~np.isin(worded[2], near[2])
    scores_K = np.concatenate([near[0], worded[0][is_new_W]])
    numbers_K = np.concatenate([near[1], worded[1][is_new_W]])
    rows_K = np.concatenate([near[2], worded[2][is_new_W]])
    by_vector_K = np.arange(len(rows_K)) < len(near[2])
    # A row behind the last that the words ranked has no rank by words.
    words_K = np.where(np.isin(rows_K, worded[2]), matches.scores_N[rows_K], 0)
    order = fused_order(scores_K, words_K, by_vector_K)
    found_by = tuple(
        WORDS if not by_vector_K[i] else BOTH if words_K[i] > 0 else VECTORS for i in order.tolist()
    )
    complete = bool(matches.complete_N[rows_K].any())
    return Fused(scores_K[order], numbers_K[order], words_K[order], found_by, complete)


def best_vectors(
    query_D: Floats, vectors_VD: Floats, numbers_V: Ints, owners_V: Ints
) -> tuple[Floats, Ints, Ints]:
    """Return the score and number of the best vector of each row, and the row.

    Args:
        query_D: Unit vector of the query.
        vectors_VD: All vectors of some rows.
        numbers_V: Their numbers.
        owners_V: Their rows.
    """
    scores_V = (vectors_VD.astype(np.float64) @ query_D.astype(np.float64)).astype(np.float32)
    order = np.lexsort((-scores_V, owners_V))
    first = np.unique(owners_V[order], return_index=True)[1]
    best = order[first]
    return scores_V[best], numbers_V[best], owners_V[best]
