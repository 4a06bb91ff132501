"""Find the rows of a store by location and content: which row a sample is, and which one moved.

A row follows its content. The sample at a row's location belongs to that row, whatever its name is
now; if a source itself names its samples, the name decides. A new file may be one that was moved:
then some row has its checksum, and the location of that row is gone.

Shapes: N rows of the store, deleted ones included; D dimensions.
"""

import threading
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmalign import files
from mmalign.arrays import Ints
from mmalign.data import Record, fallback_id, is_derived_id, is_gone
from mmalign.encoding.pipeline import Known
from mmalign.modality import TEXT, is_of_rows
from mmalign.store import UNKNOWN, Store
from mmalign.store.ids import hashes

Row = dict[str, Any]
# Columns that show whether a sample is unchanged, without its image.
CHANGE_COLUMNS = ("id", "uri", "stamp")


class _Lookup:
    """Rows indexed by one of their values, about 16 bytes per row."""

    def __init__(
        self, store: Store, column: str, hashed: Callable[[Any], NDArray[np.uint64]]
    ) -> None:
        found = [hashed(batch.column(0)) for batch in store.batches((column,))]
        hashes_N = np.concatenate(found) if found else np.zeros(0, np.uint64)
        rows_N = np.arange(len(hashes_N)) if store.live is None else np.flatnonzero(store.live)
        order = np.argsort(hashes_N[rows_N], kind="stable")
        row_dtype = np.uint32 if len(hashes_N) < 2**32 else np.int64
        self.hashes, self.rows = hashes_N[rows_N][order], rows_N[order].astype(row_dtype)

    def candidates(self, hashes_M: NDArray[np.uint64]) -> list[Ints]:
        """Return, for each of M hashes, the live rows that have it, in ascending order."""
        starts = np.searchsorted(self.hashes, hashes_M)
        ends = np.searchsorted(self.hashes, hashes_M, side="right")
        return [self.rows[a:b].astype(np.int64) for a, b in zip(starts, ends, strict=True)]


class StoredRows:
    """The rows of one generation, found by their samples. Safe to use from threads."""

    def __init__(self, store: Store) -> None:
        """Take a store; its columns are read when they are first needed."""
        self.store = store
        self._lock = threading.Lock()
        self._undamaged: dict[int, bool] = {}

    @cached_property
    def _by_location(self) -> _Lookup:
        return _Lookup(self.store, "uri", lambda column: hashes(column.to_pylist()))

    @cached_property
    def _by_checksum(self) -> _Lookup:
        return _Lookup(self.store, "checksum", _first_bytes)

    def rows_at(self, uris: Sequence[str]) -> list[list[Row]]:
        """Return the rows at each of some locations: number, id, uri, stamp."""
        if not len(self.store):
            return [[] for _ in uris]
        found = self._by_location.candidates(hashes(uris))
        rows = iter(self.numbered(np.concatenate([np.zeros(0, np.int64), *found])))
        return [
            [row for row in islice(rows, len(numbers)) if row["uri"] == uri]
            for uri, numbers in zip(uris, found, strict=True)
        ]

    def rows_of(self, records: Sequence[Record]) -> list[Row | None]:
        """Return the row of each record, as far as its location or name determines it."""
        if not len(self.store):
            return [None for _ in records]
        rows_at_uri = self.rows_at([r.uri for r in records])
        pairs = list(zip(records, rows_at_uri, strict=True))
        named = self._named([pair for pair in pairs if pair[0].id_from_source])
        return [named.get(record.id) or _matching_row(record, rows) for record, rows in pairs]

    def _named(self, pairs: Sequence[tuple[Record, list[Row]]]) -> dict[str, Row]:
        """Return the rows of records that are named by their source, by record id.

        Args:
            pairs: The records, and the rows at their locations.
        """
        # Two tables of the same name may use the same ids. A table that contains its images is
        # recognized by its location; one that names files, if most of them are rows of a table of
        # its name.
        total = Counter(_source_name(r.id) for r, rows in pairs if r.row < 0)
        in_store = Counter(
            _source_name(r.id)
            for r, rows in pairs
            if r.row < 0 and any(_source_name(row["id"]) == _source_name(r.id) for row in rows)
        )
        found: dict[str, Row] = {}
        for id_of in (lambda r: r.id, fallback_id):
            numbers = self.store.find([id_of(r) for r, _ in pairs])
            positions = np.flatnonzero(numbers >= 0)
            for i, row in zip(positions.tolist(), self.numbered(numbers[positions]), strict=True):
                record, prefix = pairs[i][0], _source_name(pairs[i][0].id)
                same = _is_same_location(record, row)
                if same or (record.row < 0 and 2 * in_store[prefix] >= total[prefix]):
                    found.setdefault(record.id, row)
        return found

    def row_with_id(self, row_id: str) -> int:
        """Return the number of the row with an id, or -1."""
        return int(self.store.find([row_id])[0]) if len(self.store) else -1

    def rows_with_content(self, checksum: bytes) -> Ints:
        """Return the rows whose image has this checksum."""
        if not len(self.store) or checksum == UNKNOWN:
            return np.zeros(0, np.int64)
        numbers = self._by_checksum.candidates(_first_bytes_of(checksum))[0]
        rows = self.store.rows(numbers, ("checksum",))
        same = [row["checksum"] == checksum for row in rows]
        return numbers[same]

    def earlier_result(self, checksum: bytes) -> Known | None:
        """Return the results for an image with this content, if it was embedded before."""
        for number in self.rows_with_content(checksum)[:1].tolist():
            if not self._is_undamaged(self.store.shard_of(number)):
                break
            (row,) = self.store.rows([number], ("captions", "thumbnail"))
            vectors, positions = {}, {}
            for name in filter(is_of_rows, self.store.modalities):
                vectors_VD = self.store.vectors_of(name, number)
                if len(vectors_VD):
                    vectors[name] = vectors_VD
                    positions[name] = self.store.positions_of(name, number)
            texts_CD = self.store.vectors_of(TEXT.name, number)
            texts = dict(zip(row["captions"], texts_CD, strict=True))
            return Known(vectors, positions, texts, row["thumbnail"])
        return None

    def _is_undamaged(self, shard: int) -> bool:
        """Return whether a shard is undamaged: copied damage would look valid."""
        with self._lock:
            if shard not in self._undamaged:
                card = self.store.manifest.shards[shard]
                folder = self.store.path / "shards"
                self._undamaged[shard] = all(
                    files.sha256(folder / file.name) == file.sha256
                    for file in set(card.current_files.values())
                )
            return self._undamaged[shard]

    def numbered(self, numbers: Ints) -> list[Row]:
        """Return some rows: number, id, uri, stamp."""
        found = self.store.rows(numbers, CHANGE_COLUMNS)
        return [
            {**row, "number": number} for row, number in zip(found, numbers.tolist(), strict=True)
        ]


@dataclass(frozen=True)
class ScannedLocations:
    """The places that a scan has covered, and those it could not list completely."""

    scanned: tuple[str, ...]
    """URI prefixes of everything in the sources."""
    incomplete: tuple[str, ...]

    def is_gone(self, uri: str) -> bool:
        """Return whether a sample that a scan did not see is gone, also from its location."""
        if uri.startswith(self.incomplete):
            return False
        return is_gone(uri, inside=uri.startswith(self.scanned))


def uri_prefixes(places: Iterable[str]) -> tuple[str, ...]:
    """Return the URI prefixes of everything in some folders, tars and tables."""
    return tuple(place.rstrip("/") + end for place in places for end in ("/", "#"))


def _matching_row(record: Record, rows: Sequence[Row]) -> Row | None:
    """Return the row that has a record's location, and was found in the same way.

    An image may be in a folder and be named by a table, each with its own captions: two samples.
    """
    if record.id_from_source and record.row >= 0:
        return None
    for row in rows:
        if row["id"] == record.id:
            return row
    derived = is_derived_id(record.id, record.uri)
    for row in rows:
        named = row["id"] in (record.uri, *([] if derived else [fallback_id(record)]))
        same_table = not derived and _source_name(row["id"]) == _source_name(record.id)
        if named or same_table or (derived and is_derived_id(row["id"], record.uri)):
            return row
    return None


def _is_same_location(record: Record, row: Row) -> bool:
    if record.row >= 0:
        return bool(row["uri"].rpartition("#")[0] == record.path)
    return bool(row["uri"] == record.uri)


def _source_name(row_id: str) -> str:
    return PurePosixPath(row_id).parts[0] if row_id.startswith("/") else row_id.partition("/")[0]


def _first_bytes(column: Any) -> NDArray[np.uint64]:
    width = column.type.byte_width
    content = np.frombuffer(column.buffers()[1], np.uint8)
    rows = content[column.offset * width : (column.offset + len(column)) * width]
    return np.ascontiguousarray(rows.reshape(-1, width)[:, :8]).view(np.uint64)[:, 0]


def _first_bytes_of(checksum: bytes) -> NDArray[np.uint64]:
    return np.frombuffer(checksum[:8], np.uint64)
