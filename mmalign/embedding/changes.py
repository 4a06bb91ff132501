"""Compare a store with its sources: samples it lacks, and rows whose samples are gone.

Shapes: N rows of the store, deleted ones included.
"""

import zlib
from collections.abc import Generator, Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import PurePosixPath
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from mmalign.data import (
    Record,
    Skip,
    SpilledRecords,
    Stamps,
    canonical_place,
    count_found,
    expand_sources,
    fallback_id,
    in_batches,
    in_threads,
    nothing_usable,
    stream,
)
from mmalign.embedding.stored import Row, ScannedLocations, StoredRows, uri_prefixes
from mmalign.encoding.modalities import decode_workers
from mmalign.progress import say
from mmalign.store import Store, meta_json

# Samples that are looked up in the store at once.
LOOKUP_BATCH = 1_000
Outcome = Literal["added", "changed", "present"]


@dataclass(frozen=True)
class ScanOptions:
    """The options of a scan."""

    sources: Sequence[str]
    caption_keys: Sequence[str] = ("captions",)
    image_column: str | None = None
    compare_checksums: bool = False
    """Read every image that the store holds, and compare its content."""
    part: tuple[int, int] = (1, 1)
    """(i, n): only the i-th of n equal parts of the samples."""

    def includes(self, found: Record | Skip) -> bool:
        """Return whether a sample is in this part; the answer is the same on every machine."""
        number, parts = self.part
        return zlib.crc32(found.id.encode()) % parts == number - 1


@dataclass(frozen=True)
class Scanned:
    """What a scan says of the rows of a store: which of them may have moved to another place."""

    seen: bytes
    """A bit for each row, the highest of a byte first: 1 if the sources still have it."""
    locations: ScannedLocations


@dataclass
class ChangeSet:
    """The result of a scan."""

    records: SpilledRecords
    """Samples that must be read: new ones, and those that may have changed."""
    stored: StoredRows
    seen_N: NDArray[np.bool_]
    """Rows of the store that the sources still have, or may have."""
    locations: ScannedLocations = field(default_factory=lambda: ScannedLocations((), ()))
    found_count: int = 0
    """Samples and files of this part that were found, usable or not."""
    present: int = 0
    """Samples that are unchanged in the store, as far as can be told without reading them."""
    captioned: int = 0
    """Number of samples that have a caption."""
    modalities: set[str] = field(default_factory=set)
    """Of the samples that must be read."""
    skips: list[Skip] = field(default_factory=list)
    stamps: Stamps = field(default_factory=Stamps)

    @property
    def samples(self) -> int:
        """Return the number of samples without errors in the scan."""
        return self.present + len(self.records)

    def scanned(self) -> Scanned:
        """Return what matching samples with rows needs of the scan, as a value."""
        return Scanned(np.packbits(self.seen_N).tobytes(), self.locations)

    def stamp_of(self, record: Record) -> int:
        """Return the stamp that shows whether a sample has changed; 0 if it is not accessible."""
        try:
            return self.stamps.of(record)
        except OSError:
            return 0  # reading it will report why


def find_changes(store: Store, options: ScanOptions, spilled: SpilledRecords) -> ChangeSet:
    """Scan sources for samples that are missing from a store, or may have changed since.

    They are written to a temporary file. A sample counts as unchanged if its location, size,
    modification time, captions and metadata are the same as before.

    Raises:
        DataError: A source does not exist, or none holds a usable sample.
    """
    changes = ChangeSet(
        spilled, StoredRows(store), np.zeros(store.manifest.physical_rows, np.bool_)
    )

    def records() -> Generator[Record, None, None]:
        with closing(
            stream(options.sources, options.caption_keys, options.image_column)
        ) as scanned:
            for found in scanned:
                if isinstance(found, Record):
                    yield found
                elif found.affects == "place" or options.includes(found):
                    changes.skips.append(found)

    with closing(records()) as scanned:
        for batch in in_batches(scanned, LOOKUP_BATCH):
            _collect_changed(changes, batch, options)
    changes.found_count = count_found(changes.samples, changes.skips)
    if not changes.samples and options.part[1] == 1:
        raise nothing_usable(options.sources, changes.skips, options.caption_keys)
    _keep_rows_of_unusable(changes)
    locations = expand_sources(options.sources)
    scanned_locations = [*locations, *(canonical_place(p) for p in locations)]
    unread = [s.uri for s in changes.skips if s.affects == "place"]
    changes.locations = ScannedLocations(uri_prefixes(scanned_locations), uri_prefixes(unread))
    return changes


def _collect_changed(changes: ChangeSet, records: Sequence[Record], options: ScanOptions) -> None:
    """Separate samples that are unchanged in the store from those that must be read."""
    rows = changes.stored.rows_of(records)
    changes.seen_N[[row["number"] for row in rows if row]] = True
    in_part = [pair for pair in zip(records, rows, strict=True) if options.includes(pair[0])]
    workers = decode_workers()
    stamps = in_threads(
        changes.stamp_of, [record for record, _ in in_part], workers, ahead=4 * workers
    )
    for (record, row), stamp in zip(in_part, stamps, strict=True):
        changes.captioned += bool(record.captions)
        unchanged = row and row["uri"] == record.uri and row["stamp"] == stamp
        if unchanged and not options.compare_checksums:
            changes.present += 1
        else:
            changes.records.add(replace(record, stamp=stamp))
            changes.modalities.add(record.modality)


def _keep_rows_of_unusable(changes: ChangeSet) -> None:
    """Mark the rows of samples that can no longer be used as seen: the samples are not gone."""
    store = changes.stored.store
    unusable = [s for s in changes.skips if s.affects != "place"]
    if len(store) and unusable:
        rows = store.find([s.id for s in unusable])
        changes.seen_N[rows[rows >= 0]] = True
        for found in changes.stored.rows_at([s.uri for s in unusable]):
            changes.seen_N[[row["number"] for row in found]] = True


@dataclass(frozen=True)
class Match:
    """The outcome for a sample that was read."""

    outcome: Outcome
    id: str
    """The id of its row in the store."""
    replaces: tuple[tuple[str, str], ...] = ()
    """Ids and uris of other rows, which this one replaces: they are deleted."""
    moved: bool = False
    """Whether its file had another location or name when it was last embedded."""
    up_to_date: bool = False
    """Whether the row in the store is already up to date."""
    moved_rows: tuple[int, ...] = ()
    """Numbers of the rows that followed their content to this sample."""


class RowMatcher:
    """Decides for each sample, once it has been read, which row of the store it belongs to."""

    def __init__(self, stored: StoredRows, scanned: Scanned) -> None:
        """Take the rows of a store, and what a scan of all sources says of them."""
        self.stored, self.locations = stored, scanned.locations
        bits = np.frombuffer(scanned.seen, np.uint8)
        self.seen_N = np.unpackbits(bits, count=stored.store.manifest.physical_rows)
        self._moved_rows: set[int] = set()
        self._unclaimed: dict[bytes, dict[str, Row]] = {}
        """By checksum: the rows with this content whose location is gone, by id, in their order."""

    def match(self, records: Sequence[Record], checksums: Sequence[bytes]) -> list[Match]:
        """Return the outcome for some samples, given the checksums of their images."""
        rows = self.stored.rows_of(records)
        return [self._match(*one) for one in zip(records, rows, checksums, strict=True)]

    def _match(self, record: Record, row: Row | None, checksum: bytes) -> Match:
        if row is None:
            return self._match_new(record, checksum)
        (stored_row,) = self.stored.store.rows([row["number"]], ("captions", "meta", "checksum"))
        row_id, old_id = self._choose_id(record, row), row["id"]
        same_text = stored_row["captions"] == list(record.captions) and stored_row[
            "meta"
        ] == meta_json(record.meta)
        moved = _container(record.uri, record) != _container(row["uri"], record)
        if stored_row["checksum"] == checksum:
            same = same_text and row_id == old_id and not moved
            up_to_date = same and row["uri"] == record.uri and row["stamp"] == record.stamp
            outcome: Outcome = "present" if same else "changed"
            return Match(outcome, row_id, _others(row_id, row), moved, up_to_date)
        claimed = self._claim_moved(record, checksum)
        replaced, numbers = _others(row_id, row, *claimed), tuple(r["number"] for r in claimed)
        return Match("changed", row_id, replaced, bool(claimed), moved_rows=numbers)

    def _match_new(self, record: Record, checksum: bytes) -> Match:
        claimed = self._claim_moved(record, checksum)
        row_id = record.id if self._is_free(record.id) else fallback_id(record)
        outcome: Outcome = "changed" if claimed else "added"
        replaced, numbers = _others(row_id, *claimed), tuple(r["number"] for r in claimed)
        return Match(outcome, row_id, replaced, bool(claimed), moved_rows=numbers)

    def _choose_id(self, record: Record, row: Row) -> str:
        """Return the id of a row, or the new id that its source now gives, if that is free."""
        old_id: str = row["id"]
        if not record.id_from_source or old_id in (record.id, fallback_id(record)):
            return old_id
        return record.id if self._is_free(record.id) else old_id

    def _is_free(self, row_id: str) -> bool:
        row = self.stored.row_with_id(row_id)
        return row < 0 or row in self._moved_rows

    def _claim_moved(self, record: Record, checksum: bytes) -> list[Row]:
        """Claim a row with this content whose location is gone, if any; that of its id if it can.

        So copies of an image in a folder that has moved each keep their row, whoever is first.
        """
        if checksum not in self._unclaimed:
            numbers = self.stored.rows_with_content(checksum)
            rows = self.stored.numbered(numbers[self.seen_N[numbers] == 0])
            gone = {row["id"]: row for row in rows if self.locations.is_gone(row["uri"])}
            self._unclaimed[checksum] = gone
        left = self._unclaimed[checksum]
        name = record.id if record.id in left else next(iter(left), None)
        claimed = [] if name is None else [left.pop(name)]
        self._moved_rows.update(row["number"] for row in claimed)
        return claimed


def find_removed(changes: ChangeSet, moved_rows: Iterable[int]) -> list[int]:
    """List the rows to delete: embedded from these sources, which no longer have their images.

    Rows that followed their content to another place are not listed.

    If a folder, tar or table could not be listed completely, no row below it is listed. If a file
    could not be read, and the store has no row at its location, no row with its file name is
    listed: the file may have been moved there.
    """
    store = changes.stored.store
    for skip in changes.skips:
        if skip.affects == "place":
            say(f"warning: {skip.uri}: {skip.reason}; its rows are kept")
    unread = [s.uri for s in changes.skips if s.reason.startswith("cannot be read")]
    rows = changes.stored.rows_at(unread)
    unread_names = {_file_name(uri) for uri, known in zip(unread, rows, strict=True) if not known}
    gone_N = ~changes.seen_N if store.live is None else ~changes.seen_N & store.live
    gone_N[list(moved_rows)] = False
    gone = []
    for numbers in in_batches(np.flatnonzero(gone_N).tolist(), LOOKUP_BATCH):
        for number, row in zip(numbers, store.rows(numbers, ("uri",)), strict=True):
            uri = row["uri"]
            inside = (
                uri.startswith(changes.locations.scanned) and _file_name(uri) not in unread_names
            )
            if inside and changes.locations.is_gone(uri):
                gone.append(number)
    return gone


def _others(row_id: str, *rows: Row) -> tuple[tuple[str, str], ...]:
    return tuple((row["id"], row["uri"]) for row in rows if row["id"] != row_id)


def _file_name(uri: str) -> str:
    return PurePosixPath(uri).name


def _container(uri: str, record: Record) -> str:
    """Return the file that contains a sample: a row number in a table is not a location."""
    return uri.rpartition("#")[0] if record.row >= 0 else uri
