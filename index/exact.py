"""Exact search, and exact search over the rows that came after an index was built.

Shapes: N rows, M queries, D dimensions, K neighbours.
"""

import contextlib
import threading

import numpy as np
import torch

from mmalign import kernels
from mmalign.arrays import Bools, Floats, Ints
from mmalign.errors import VectorError
from mmalign.index.owners import Owners
from mmalign.index.spec import Index, Shards
from mmalign.index.vectors import VectorReader, shared_tensor

# The first search computes bounds on the norms, while other searches wait; above PREPARED_BYTES the
# second search does, as reading so many vectors twice for a single answer takes long.
# After CODED_AFTER queries, codes of one byte per value are kept in memory, at most MAX_CODE_BYTES,
# if measured to be faster. Coding takes as long as a few hundred searches, so it runs in a thread.
PREPARED_BYTES = 4 << 30
CODED_AFTER, MAX_CODE_BYTES = 256, 1 << 30
# Only queries that are compared with at least this share of the rows are counted.
MIN_SHARE_TO_COUNT = 0.25


class Exact(Index):
    """Compares every row. The ground truth for all other indexes."""

    def __init__(
        self,
        shards: Shards,
        first_row: int = 0,
        max_code_bytes: float = MAX_CODE_BYTES,
        owners: Owners | None = None,
    ) -> None:
        """Prepare to search the shards, each (vectors, D) float16, from vector `first_row` on.

        Up to `max_code_bytes` of memory may be used to answer many queries faster.
        """
        self.first_row = first_row
        self.owners = owners
        self.max_code_bytes = max_code_bytes
        self.shards = []
        for shard in shards:
            remaining = shard[max(0, first_row) :]
            first_row -= len(shard)
            if len(remaining):
                self.shards.append(shared_tensor(remaining))
        self.rows = sum(len(s) for s in self.shards)
        self.bytes = sum(s.nbytes for s in self.shards)
        self.queries_seen, self.prepared = 0, False
        self.corpus: kernels.Corpus | None = None
        self.coding_thread: threading.Thread | None = None
        self._lock = threading.Lock()

    def search(
        self,
        queries_MD: Floats,
        k: int,
        allow_N: Bools | None = None,
        *,
        query_modality: str = "text",
    ) -> tuple[Floats, Ints]:
        """See `Index.search`."""
        if not self.rows:
            raise VectorError("there are no vectors to search")
        if self.owners is None:
            return self._search_vectors(queries_MD, k, allow_N)

        def find(numbers_Q: Ints, count: int) -> tuple[Floats, Ints]:
            return self._search_vectors(queries_MD[numbers_Q], count, allow_N)

        return self.owners.search(find, len(queries_MD), k, self.rows)

    def _search_vectors(
        self, queries_MD: Floats, k: int, allow_N: Bools | None
    ) -> tuple[Floats, Ints]:
        """Find the k nearest vectors, whichever rows they belong to."""
        queries = torch.from_numpy(np.ascontiguousarray(queries_MD, dtype=np.float32))
        allow = None
        if allow_N is not None:
            allow = torch.from_numpy(allow_N[self.first_row : self.first_row + self.rows])
        # Preparing reads every row: not worth it for a filter that allows few.
        if allow is None or int(allow.count_nonzero()) >= MIN_SHARE_TO_COUNT * self.rows:
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
            seen_before, self.queries_seen = self.queries_seen, self.queries_seen + queries
            if not self.prepared and (seen_before or self.bytes <= PREPARED_BYTES):
                self.prepared = True
                # An invalid row is not an error here: the search reports it if it matters.
                with contextlib.suppress(VectorError):
                    self.corpus = kernels.prepare(self.shards)
            if (
                self.coding_thread is None
                and self.queries_seen > CODED_AFTER
                and self._can_code(queries)
            ):
                self.coding_thread = threading.Thread(target=self._code, name="mmalign codes")
                with contextlib.suppress(RuntimeError):  # no more threads, or the process is ending
                    self.coding_thread.start()

    def _can_code(self, queries: int) -> bool:
        if self.corpus is None or self.rows * self.corpus.dim > self.max_code_bytes:
            return False
        return kernels.codes_are_faster(self.corpus, queries)

    def _code(self) -> None:
        """Encode all vectors, unless the process ends first."""

        def tick() -> None:
            if not threading.main_thread().is_alive():
                raise InterruptedError

        assert self.corpus is not None
        # Without codes, or without the memory for them, searches continue as before.
        with contextlib.suppress(InterruptedError, MemoryError, RuntimeError):
            self.corpus = kernels.add_codes(self.corpus, tick)


class Extended(Index):
    """An index combined with exact search over the rows added since it was built.

    The vectors of a row are all in one part, as rows are never changed.
    """

    def __init__(self, index: Index, vectors: VectorReader) -> None:
        """Combine an index over the first rows with the vectors of the whole store."""
        self.index = index
        self.vectors = vectors
        self.tail = Exact(vectors.shards, first_row=index.rows, owners=vectors.owners)
        self.rows = vectors.total

    def search(
        self,
        queries_MD: Floats,
        k: int,
        allow_N: Bools | None = None,
        *,
        query_modality: str = "text",
    ) -> tuple[Floats, Ints]:
        """See `Index.search`."""
        scores, rows = self.index.search(queries_MD, k, allow_N, query_modality=query_modality)
        if self.tail.rows:
            tail_scores, tail_rows = self.tail.search(queries_MD, k, allow_N)
            scores = np.concatenate([scores, tail_scores], axis=1)
            rows = np.concatenate([rows, tail_rows], axis=1)
            order = np.argsort(-scores, axis=1, kind="stable")[:, :k]
            scores = np.take_along_axis(scores, order, axis=1)
            rows = np.take_along_axis(rows, order, axis=1)
        return scores, rows
