"""Rows with several vectors: each is found once, by its best vector.

Shapes: V vectors, M queries, Q queries that are short of rows, R vectors found, K rows.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from mmalign.arrays import Bools, Floats, Ints


@dataclass(frozen=True)
class Owners:
    """The row of each vector, where some rows have several."""

    rows_V: Ints
    """Row numbers, ascending; shared, not copied."""
    count: int
    """Number of rows that have a vector."""

    @classmethod
    def of(cls, rows_V: Ints | None) -> "Owners | None":
        """Return None if no row has several vectors: then vectors stand for rows."""
        if rows_V is None or not len(rows_V):
            return None
        count = 1 + int(np.count_nonzero(rows_V[1:] != rows_V[:-1]))
        return None if count == len(rows_V) else cls(rows_V, count)

    @property
    def mean(self) -> float:
        """Mean number of vectors of a row."""
        return len(self.rows_V) / self.count

    def of_vectors(self, vectors_MR: Ints) -> Ints:
        """Return the row of each vector; -1 stays -1."""
        return np.where(vectors_MR < 0, -1, self.rows_V[np.maximum(vectors_MR, 0)])

    def best(self, scores_MR: Floats, vectors_MR: Ints, k: int) -> tuple[Floats, Ints]:
        """Keep the first vector of each row, and the first k of these.

        Args:
            scores_MR: Scores, best first.
            vectors_MR: Vector numbers; -1 means none.
            k: Number of rows.

        Returns:
            scores (M, K) and vector numbers (M, K); -inf and -1 if there are fewer rows.
        """
        kept_MR = _is_first(self.of_vectors(vectors_MR)) & (vectors_MR >= 0)
        order_MK = np.argsort(~kept_MR, axis=1, kind="stable")[:, :k]
        kept_MK = np.take_along_axis(kept_MR, order_MK, axis=1)
        scores_MK = np.full((len(vectors_MR), k), -np.inf, np.float32)
        vectors_MK = np.full((len(vectors_MR), k), -1, np.int64)
        width = order_MK.shape[1]
        scores = np.take_along_axis(scores_MR, order_MK, axis=1)
        vectors = np.take_along_axis(vectors_MR, order_MK, axis=1)
        scores_MK[:, :width] = np.where(kept_MK, scores, -np.inf)
        vectors_MK[:, :width] = np.where(kept_MK, vectors, -1)
        return scores_MK, vectors_MK

    def search(
        self, find: Callable[[Ints, int], tuple[Floats, Ints]], queries: int, k: int, limit: int
    ) -> tuple[Floats, Ints]:
        """Find the k best rows of each query with a search for vectors.

        It starts with as many vectors as k rows have on average. The number is doubled for the
        queries that are short of rows.

        Args:
            find: Takes query numbers (Q,) and a number of vectors R. Returns the best R vectors:
                scores (Q, R), best first, and vector numbers (Q, R), -1 if there are fewer.
            queries: Number of queries.
            k: Number of rows.
            limit: Number of vectors that `find` can return at most.

        Returns:
            As `best`.
        """
        scores_MK = np.full((queries, k), -np.inf, np.float32)
        vectors_MK = np.full((queries, k), -1, np.int64)
        short_Q = np.arange(queries)
        count = min(limit, math.ceil(k * self.mean))
        while len(short_Q):
            scores_QR, vectors_QR = find(short_Q, count)
            scores_MK[short_Q], vectors_MK[short_Q] = self.best(scores_QR, vectors_QR, k)
            if count >= limit:
                break
            is_short_Q = (vectors_MK[short_Q, -1] < 0) & (vectors_QR[:, -1] >= 0)
            short_Q = short_Q[is_short_Q]
            count = min(limit, 2 * count)
        return scores_MK, vectors_MK


def _is_first(rows_MR: Ints) -> Bools:
    """Mark the first occurrence of each row number in each line."""
    order_MR = np.argsort(rows_MR, axis=1, kind="stable")
    sorted_MR = np.take_along_axis(rows_MR, order_MR, axis=1)
    is_new_MR = np.ones(rows_MR.shape, np.bool_)
    is_new_MR[:, 1:] = sorted_MR[:, 1:] != sorted_MR[:, :-1]
    is_first_MR = np.empty(rows_MR.shape, np.bool_)
    np.put_along_axis(is_first_MR, order_MR, is_new_MR, axis=1)
    return is_first_MR
