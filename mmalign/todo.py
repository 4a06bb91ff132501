"""What a store lacks of some sources, and what it holds that they no longer have.

N rows of the store, deleted ones included.
"""

import hashlib
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmalign import modality
from mmalign.data import (
    Record,
    SampleProblem,
    Skip,
    Spool,
    expand,
    in_threads,
    nothing_usable,
    read_image,
    spelled,
    stamp,
    stream,
)
from mmalign.progress import say
from mmalign.store import Store, meta_json

# Samples whose place in the store is looked up at once.
LOOKED_UP = 1_000
COLUMNS = ("uri", "captions", "meta", "stamp", "checksum")


@dataclass(frozen=True)
class Wanted:
    """What is asked of a scan."""

    sources: Sequence[str]
    caption_keys: Sequence[str] = ("captions",)
    image_column: str | None = None
    checksum: bool = False
    """Compare the content of every image that the store holds."""
    part: tuple[int, int] = (1, 1)
    """(i, n): only the i-th of n equal parts of the samples."""

    def takes(self, record: Record) -> bool:
        """Say whether a sample is in this part, on whichever machine it is asked."""
        number, parts = self.part
        return zlib.crc32(record.id.encode()) % parts == number - 1


@dataclass
class Todo:
    """What a scan found; `records` are to be embedded; final."""

    records: Spool
    seen_N: NDArray[np.bool_]
    """Rows of the store that the sources still have."""
    samples: int = 0
    changed: int = 0
    """Of the records, those that the store holds in an older state."""
    skips: list[Skip] = field(default_factory=list)

    @property
    def present(self) -> int:
        """Samples that the store holds as they are."""
        return self.samples - len(self.records)

    @property
    def total(self) -> int:
        """Samples that were found, with those that cannot be used."""
        return self.samples + sum(not s.kept for s in self.skips)


def find_todo(store: Store, wanted: Wanted, spool: Spool) -> Todo:
    """Scan sources for what a store lacks, or holds in an older state; it is put on the spool.

    A sample is as it was where its size, time of last change, captions and metadata are; where
    only the time differs, its content decides.

    Raises:
        DataError: A source does not exist, or none holds a usable sample.
    """
    todo = Todo(spool, np.zeros(store.manifest.physical_rows, np.bool_))

    def records() -> Iterator[Record]:
        for found in stream(wanted.sources, wanted.caption_keys, wanted.image_column):
            if isinstance(found, Skip):
                todo.skips.append(found)
            else:
                todo.samples += 1
                yield found

    everything = parts(records(), LOOKED_UP)
    for found in everything:
        mine = [record for record in found if wanted.takes(record)]
        todo.samples -= len(found) - len(mine)
        _add_lacking(todo, store, mine, wanted.checksum)
    if not todo.samples and wanted.part[1] == 1:
        raise nothing_usable(wanted.sources, todo.skips, wanted.caption_keys)
    # What can no longer be used is not gone: its row stays.
    rows = store.find([s.id for s in todo.skips]) if len(store) else np.zeros(0, np.int64)
    todo.seen_N[rows[rows >= 0]] = True
    return todo


def removed(store: Store, sources: Sequence[str], todo: Todo) -> list[int]:
    """List the rows whose images lay in the sources and were not seen there.

    What could not be listed to its end may still hold what was not seen: below such a place
    nothing counts as removed.
    """
    places = expand(sources)
    inside = _below([*places, *(spelled(p) for p in places)])
    unread = [s for s in todo.skips if s.lost == "place"]
    for skip in unread:
        say(f"warning: {skip.uri}: {skip.reason}; no row of it is removed")
    unsure = _below([s.uri for s in unread])
    gone_N = ~todo.seen_N if store.live is None else ~todo.seen_N & store.live
    gone = []
    for numbers in parts(np.flatnonzero(gone_N).tolist(), LOOKED_UP):
        for number, row in zip(numbers, store.rows(numbers, ("uri",)), strict=True):
            uri = row["uri"]
            if uri.startswith(inside) and not uri.startswith(unsure):
                gone.append(number)
    return gone


def _below(places: Iterable[str]) -> tuple[str, ...]:
    """Return how the uris begin that lie in some folders, tars and tables."""
    return tuple(place.rstrip("/") + end for place in places for end in ("/", "#"))


def parts(items: Iterable[Any], size: int) -> Iterator[list[Any]]:
    """Yield the items in lists of a size, the last one shorter."""
    rest = iter(items)
    return iter(lambda: list(islice(rest, size)), [])


def _add_lacking(todo: Todo, store: Store, records: Sequence[Record], checksum: bool) -> None:
    """Note what the store does not hold as it is, and what it holds."""
    if not len(store):
        for record in records:
            todo.records.add(record)
        return
    rows, records = _held(store, records)
    todo.seen_N[[row["number"] for row in rows if row]] = True
    pairs = list(zip(records, rows, strict=True))
    workers = modality.decode_workers()
    changed = in_threads(lambda pair: _changed(*pair, checksum), pairs, workers, ahead=4 * workers)
    for record, row, new in zip(records, rows, changed, strict=True):
        if new:
            todo.records.add(record)
            todo.changed += bool(row)


def _changed(record: Record, row: dict[str, Any], checksum: bool) -> bool:
    if not row:
        return True
    try:
        if row["stamp"] == stamp(record) and not checksum:
            return False
        content = hashlib.sha256(read_image(record)).digest()
    except (SampleProblem, OSError):
        # It cannot be read: let the embedding say so.
        return True
    words = (row["captions"], row["meta"])
    return words != (list(record.captions), meta_json(record.meta)) or content != row["checksum"]


def _held(store: Store, records: Sequence[Record]) -> tuple[list[dict[str, Any]], list[Record]]:
    """Find the row of each record, {} for none; a record whose id is taken gets its uri as id."""
    found: list[dict[str, Any]] = [{} for _ in records]
    named = list(records)
    for _ in range(2):
        numbers = store.find([r.id for r in named])
        there = np.flatnonzero(numbers >= 0)
        for i, row in zip(there.tolist(), store.rows(numbers[there], COLUMNS), strict=True):
            if row["uri"] == named[i].uri:
                found[i] = {**row, "number": int(numbers[i])}
            else:
                named[i] = replace(named[i], id=named[i].uri)
    return found, named
