"""Exact search, and exact search over the rows that came after an index was built.

N rows, M queries, D dimensions, K neighbours.
"""

import contextlib
import threading

import numpy as np
import torch

from mmalign import kernels
from mmalign.errors import VectorError
from mmalign.index.rows import Rows, shared
from mmalign.index.spec import Bools, Floats, Index, Ints, Shards

# Whoever asks twice is likely to ask again, so norms are then bounded once and for all.
# After so many queries, one byte for each number is held in memory, up to so many of them: coding
# takes as long as a few hundred searches, which are then half again as fast, or three times if
# several are asked at once.
CODED_AFTER, CODED_BYTES = 256, 1 << 30
# Share of the rows that a query must look at to count as one of them.
PREPARED = 0.25


class Exact(Index):
    """Compares every row; final. The meaning of all other indexes."""

    def __init__(
        self, shards: Shards, first_row: int = 0, coded_bytes: float = CODED_BYTES
    ) -> None:
        """Search rows `first_row` and on of the shards' vectors, each (rows, D) float16.

        Up to `coded_bytes` of memory may be taken to answer many queries faster.
        """
        self.first_row = first_row
        self.coded_bytes = coded_bytes
        self.shards = []
        for shard in shards:
            kept = shard[max(0, first_row) :]
            first_row -= len(shard)
            if len(kept):
                self.shards.append(shared(kept))
        self.rows = sum(len(s) for s in self.shards)
        self.asked, self.prepared = 0, False
        self.corpus: kernels.Corpus | None = None
        self._lock = threading.Lock()

    def search(
        self, queries_MD: Floats, k: int, allow_N: Bools | None = None, *, asked: str = "text"
    ) -> tuple[Floats, Ints]:
        """See `Index.search`."""
        if not self.rows:
            raise VectorError("there are no vectors to search")
        queries = torch.from_numpy(np.ascontiguousarray(queries_MD, dtype=np.float32))
        allow = None
        if allow_N is not None:
            allow = torch.from_numpy(allow_N[self.first_row : self.first_row + self.rows])
        # To prepare reads every row: not for a filter that leaves few.
        if allow is None or int(allow.count_nonzero()) >= PREPARED * self.rows:
            self._prepare_if_worth(len(queries))
        width = min(k, self.rows)
        scores, rows = kernels.topk(queries, self.corpus or self.shards, width, allow=allow)
        scores_MK = np.full((len(queries), k), -np.inf, np.float32)
        rows_MK = np.full((len(queries), k), -1, np.int64)
        scores_MK[:, :width], rows_MK[:, :width] = scores.numpy(), rows.numpy()
        rows_MK[rows_MK >= 0] += self.first_row
        return scores_MK, rows_MK

    def _prepare_if_worth(self, queries: int) -> None:
        with self._lock:
            before, self.asked = self.asked, self.asked + queries
            with_codes = before <= CODED_AFTER < self.asked and self._can_code()
            # One thread prepares; the others compare unprepared rows meanwhile, with equal results.
            if not with_codes and (not before or self.prepared):
                return
            self.prepared = True
        self._prepare(with_codes=with_codes)

    def _can_code(self) -> bool:
        return kernels.has_int8() and self.rows * self.shards[0].shape[1] <= self.coded_bytes

    def _prepare(self, *, with_codes: bool) -> None:
        # A row that prepare refuses is no reason to fail: what it does to a search, that says.
        with contextlib.suppress(VectorError):
            corpus = kernels.prepare(self.shards, with_codes=with_codes)
            # Codes that another thread has made meanwhile are kept.
            if with_codes or self.corpus is None:
                self.corpus = corpus


class Extended(Index):
    """An index joined with exact search over the rows added since it was built; final."""

    def __init__(self, index: Index, vectors: Rows) -> None:
        """`vectors` are all of the store, of which `index` covers the first rows."""
        self.index = index
        self.vectors = vectors
        self.tail = Exact(vectors.shards, first_row=index.rows)
        self.rows = vectors.total

    def search(
        self, queries_MD: Floats, k: int, allow_N: Bools | None = None, *, asked: str = "text"
    ) -> tuple[Floats, Ints]:
        """See `Index.search`."""
        scores, rows = self.index.search(queries_MD, k, allow_N, asked=asked)
        if self.tail.rows:
            tail_scores, tail_rows = self.tail.search(queries_MD, k, allow_N)
            scores = np.concatenate([scores, tail_scores], axis=1)
            rows = np.concatenate([rows, tail_rows], axis=1)
            order = np.argsort(-scores, axis=1, kind="stable")[:, :k]
            scores = np.take_along_axis(scores, order, axis=1)
            rows = np.take_along_axis(rows, order, axis=1)
        return scores, rows
