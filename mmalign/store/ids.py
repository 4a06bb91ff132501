"""Find rows by id: 64-bit hashes find the candidates, the ids themselves decide.

Each shard has the hashes of its ids, sorted, in its file: a lookup is a binary search in memory
mapped pages, and nothing is read or kept in memory for the other rows.

N rows of a shard, M requested ids.
"""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from mmalign.arrays import Hashes, Ints
from mmalign.store.groups import Shard
from mmalign.store.model_card import ModelCard
from mmalign.store.schema import id_hashes
from mmalign.store.shards import ShardReader


def hashes(texts: Sequence[str]) -> Hashes:
    """Hash texts by Python's hash, shape (N,); it differs between processes and is never stored."""
    return np.fromiter(map(hash, texts), np.int64, len(texts)).view(np.uint64)


def candidates(shard: ShardReader, hashes_M: Hashes) -> Iterator[tuple[Ints, Ints]]:
    """Yield (positions in M, rows) of equal hashes, each position at most once per round."""
    hashes_N, rows_N = shard.id_hashes
    at = np.searchsorted(hashes_N, hashes_M)
    if not len(hashes_N) or not (hashes_N.take(at, mode="clip") == hashes_M).any():
        return
    wanted = np.arange(len(hashes_M))
    while len(wanted):
        inside = at < len(hashes_N)
        wanted, at = wanted[inside], at[inside]
        equal = hashes_N[at] == hashes_M[wanted]
        wanted, at = wanted[equal], at[equal]
        if len(wanted):
            rows = rows_N[at].astype(np.int64)
            if rows.max() >= len(hashes_N):
                raise shard.file("rows").refuse("has hashes of ids without rows")
            yield wanted, rows
        at = at + 1


class OpenShards:
    """Shards of a store, opened once. For code that commits many generations."""

    def __init__(self, store: Path, model: ModelCard) -> None:
        self.store, self.model = store, model
        self._readers: dict[str, ShardReader] = {}

    def find(self, shards: Sequence[Shard], ids: Sequence[str]) -> list[dict[str, int]]:
        """Return, for each shard, the live rows with these ids, keyed by id."""
        names = list(dict.fromkeys(ids))
        hashes_M = id_hashes(names)
        order_M = np.argsort(hashes_M)  # neighbours share pages
        names, hashes_M = [names[i] for i in order_M], hashes_M[order_M]
        self._readers = {s.row_file.name: self._open(s) for s in shards}
        return [self._find(shard, names, hashes_M) for shard in shards]

    def with_ids_deleted(self, shards: Sequence[Shard], ids: Sequence[str]) -> tuple[Shard, ...]:
        """Return the shards with these ids deleted wherever they are live."""
        return with_rows_deleted(shards, self.find(shards, ids))

    def with_rows_at_deleted(
        self, shards: Sequence[Shard], places: Iterable[tuple[str, str]]
    ) -> tuple[Shard, ...]:
        """Return the shards with rows deleted that have one of these ids, and the uri beside it."""
        wanted = set(places)
        found = self.find(shards, [name for name, _ in sorted(wanted)])
        at_uri = [
            {name: row for name, row in rows.items() if (name, self._uri(shard, row)) in wanted}
            for shard, rows in zip(shards, found, strict=True)
        ]
        return with_rows_deleted(shards, at_uri)

    def _uri(self, shard: Shard, row: int) -> str:
        return str(self._readers[shard.row_file.name].column("uri")[row].as_py())

    def _open(self, shard: Shard) -> ShardReader:
        known = self._readers.get(shard.row_file.name)
        return known or ShardReader(self.store, shard, self.model)

    def _find(self, shard: Shard, ids: Sequence[str], hashes_M: Hashes) -> dict[str, int]:
        reader = self._readers[shard.row_file.name]
        found: dict[str, int] = {}
        for wanted, rows in candidates(reader, hashes_M):
            live = shard.live[rows]
            names = reader.ids(rows[live])
            for i, name, row in zip(wanted[live], names, rows[live].tolist(), strict=True):
                if name == ids[i]:
                    found[name] = row
        return found


def with_rows_deleted(
    shards: Sequence[Shard], found: Sequence[dict[str, int]]
) -> tuple[Shard, ...]:
    """Return the shards with the rows that `OpenShards.find` found deleted."""
    return tuple(s.with_rows_deleted(list(f.values())) for s, f in zip(shards, found, strict=True))
