"""Find rows by id: 64-bit hashes find the candidates, the ids themselves decide.

A store may hold tens of millions of ids, so no Python object is kept per id.

N rows, M requested ids.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mmalign.arrays import Hashes, Ints
from mmalign.store.manifest import Shard
from mmalign.store.shards import open_shard


def hashes(ids: Sequence[str]) -> Hashes:
    """Hash ids, shape (N,), by Python's hash; it differs between processes and is never stored."""
    return np.fromiter(map(hash, ids), np.int64, len(ids)).view(np.uint64)


class IdIndex:
    """Hashes of N rows, sorted into about N buckets by their first bits; final.

    A lookup reads one bucket, with one row on average: about 16 bytes per row, O(1) per lookup.
    """

    def __init__(self, hashes_N: Hashes, rows_N: Ints) -> None:
        """Index rows by the hashes of their ids."""
        order = np.argsort(hashes_N)
        bits = max(1, len(order).bit_length() - 1)
        row_dtype = np.uint32 if not len(rows_N) or rows_N.max() < 2**32 else np.int64
        self.hashes, self.rows = hashes_N[order], rows_N[order].astype(row_dtype)
        self.shift = np.uint64(64 - bits)
        edges = np.arange(2**bits, dtype=np.uint64) << self.shift
        starts = np.searchsorted(self.hashes, edges).astype(row_dtype)
        self.starts = np.append(starts, row_dtype(len(order)))

    def candidates(self, hashes_M: Hashes) -> Iterator[tuple[Ints, Ints]]:
        """Yield (positions in M, rows) of equal hashes, each position at most once per round."""
        bucket = (hashes_M >> self.shift).astype(np.int64)
        wanted = np.arange(len(hashes_M))
        at, end = self.starts[bucket].astype(np.int64), self.starts[bucket + 1]
        while len(wanted):
            inside = at < end
            wanted, at, end = wanted[inside], at[inside], end[inside]
            equal = self.hashes[at] == hashes_M[wanted]
            yield wanted[equal], self.rows[at[equal]].astype(np.int64)
            at = at + 1


class IdCache:
    """The ids of shards, hashed only once per shard; final.

    For code that commits many generations: a commit costs microseconds per shard.
    """

    def __init__(self, store: Path, dim: int) -> None:
        self.store, self.dim = store, dim
        self._hashes: dict[str, Hashes] = {}

    def add(self, shard: Shard, ids: Sequence[str]) -> None:
        """Hash and keep the ids of a shard."""
        self._hashes[shard.name] = hashes(ids)

    def find(self, shards: Sequence[Shard], ids: Sequence[str]) -> list[dict[str, int]]:
        """Return, for each shard, the live rows with these ids, keyed by id."""
        wanted = set(ids)
        hashes_M = np.unique(hashes(list(wanted)))
        # Twenty bits of the hash rule out most rows, by a table that fits the cache.
        table, mask = np.zeros(1 << 20, np.bool_), np.uint64((1 << 20) - 1)
        table[hashes_M & mask] = True
        found = []
        for shard in shards:
            hashes_N = self._hashes_of(shard)
            rows = np.flatnonzero(table[hashes_N & mask])
            rows = rows[_is_in(hashes_N[rows], hashes_M)]
            found.append(self._live_rows(shard, rows, wanted) if len(rows) else {})
        return found

    def with_ids_deleted(self, shards: Sequence[Shard], ids: Sequence[str]) -> tuple[Shard, ...]:
        """Return the shards with these ids deleted wherever they are live."""
        return with_rows_deleted(shards, self.find(shards, ids))

    def _hashes_of(self, shard: Shard) -> Hashes:
        if shard.name not in self._hashes:
            self.add(shard, open_shard(self.store, shard, self.dim).ids())
        return self._hashes[shard.name]

    def _live_rows(self, shard: Shard, rows: Ints, wanted: set[str]) -> dict[str, int]:
        rows = rows[shard.live[rows]]
        ids = open_shard(self.store, shard, self.dim).ids(rows) if len(rows) else []
        return {i: row for i, row in zip(ids, rows.tolist(), strict=True) if i in wanted}


def _is_in(hashes_N: Hashes, sorted_M: Hashes) -> NDArray[np.bool_]:
    """Do what numpy's `isin` does, which would sort the M again in each call."""
    positions_N = np.minimum(np.searchsorted(sorted_M, hashes_N), len(sorted_M) - 1)
    is_in_N: NDArray[np.bool_] = sorted_M[positions_N] == hashes_N
    return is_in_N


def with_rows_deleted(
    shards: Sequence[Shard], found: Sequence[dict[str, int]]
) -> tuple[Shard, ...]:
    """Return the shards with the rows that `IdCache.find` found deleted."""
    return tuple(s.with_rows_deleted(list(f.values())) for s, f in zip(shards, found, strict=True))
