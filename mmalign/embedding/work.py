"""Work items: slices of a scan that can be encoded anywhere, and receipts of what was written.

    scan -> slices -> encode: reads, computes, writes shards -> receipts -> one committer

An item is a value that can be sent as JSON. Whoever encodes it needs the store's folder, the model
and the sources, and commits nothing: `store.commit_receipts` makes the rows part of the store.

In one call of `encode`, a row moves to one sample only. Where the items of a scan are encoded in
several calls, two samples of the same content may take the place of the same row, and another one
stays without an image until the next scan.
"""

import base64
import json
import re
import secrets
import time
import zlib
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import chain
from typing import Any

from mmalign.data import Record, Skip, in_batches
from mmalign.embedding.changes import ChangeSet, Match, RowMatcher, Scanned
from mmalign.embedding.stored import ScannedLocations, StoredRows
from mmalign.encoding.modalities import is_model_of, model_card
from mmalign.encoding.pipeline import Encoded, Pipeline
from mmalign.errors import DataError, IdentityError, StoreError
from mmalign.model import Encoder
from mmalign.store import (
    ROWS_PER_SHARD,
    ModelCard,
    Receipt,
    Row,
    Store,
    joined_model,
    meta_json,
    write_rows,
)
from mmalign.values import json_value

# After so many seconds a receipt is given for the records that are done.
COMMIT_SECONDS = 60.0
NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,63}")
RECORD_TYPES = {
    "id": str, "uri": str, "path": str, "offset": int, "length": int, "row": int, "column": str,
    "captions": tuple, "meta": dict, "id_from_source": bool, "stamp": int,
}  # fmt: skip


@dataclass(frozen=True)
class WorkItem:
    """Records to be encoded, and what decides which rows of a store they become."""

    name: str
    generation: int
    """The generation of the store that the sources were compared with; 0 if there was none."""
    model: str
    """Identity of the store's model."""
    thumbnails: bool
    """Whether rows get thumbnails."""
    scanned: Scanned
    """What the whole scan says of the rows of that generation; all items of a scan share it."""
    records: tuple[Record, ...] = field(repr=False)

    def to_json(self) -> str:
        """Return the item as JSON; the metadata of its records becomes JSON values, as in rows."""
        values = {
            "name": self.name,
            "generation": self.generation,
            "model": self.model,
            "thumbnails": self.thumbnails,
            "seen": base64.b64encode(zlib.compress(self.scanned.seen)).decode(),
            "locations": asdict(self.scanned.locations),
            "records": [_record_values(record) for record in self.records],
        }
        return json.dumps(values, separators=(",", ":"))

    @staticmethod
    def from_json(text: str | bytes) -> "WorkItem":
        """Read an item.

        Raises:
            DataError: It was not made by mmalign.
        """
        try:
            values = json.loads(text)
            locations = {name: tuple(places) for name, places in values["locations"].items()}
            seen = zlib.decompress(base64.b64decode(values["seen"], validate=True))
            item = WorkItem(
                values["name"],
                values["generation"],
                values["model"],
                values["thumbnails"],
                Scanned(seen, ScannedLocations(**locations)),
                tuple(map(_record, values["records"])),
            )
            wrong = next(_invalid(item), None)
        except (
            KeyError, TypeError, AttributeError, ValueError, RecursionError, zlib.error,
        ) as error:  # fmt: skip
            wrong = f"invalid fields: {error}"
        if wrong:
            raise DataError(f"a work item not made by mmalign: {wrong}")
        return item


def _record_values(record: Record) -> dict[str, Any]:
    values = {name: getattr(record, name) for name in RECORD_TYPES}
    return {**values, "meta": json_value(record.meta)}


def _record(values: dict[str, Any]) -> Record:
    return Record(**{**values, "captions": tuple(values["captions"])})


def _invalid(item: WorkItem) -> Iterator[str]:
    """Yield values that mmalign never writes."""
    if not (isinstance(item.name, str) and NAME.fullmatch(item.name)):
        yield f"the name {item.name!r}"
    if type(item.generation) is not int or item.generation < 0:
        yield f"the generation {item.generation!r}"
    if type(item.model) is not str or type(item.thumbnails) is not bool:
        yield f"the model {item.model!r} with thumbnails {item.thumbnails!r}"
    places = (*item.scanned.locations.scanned, *item.scanned.locations.incomplete)
    if not all(isinstance(place, str) for place in places):
        yield "a location that is no text"
    for record in item.records:
        for name, kind in RECORD_TYPES.items():
            if type(getattr(record, name)) is not kind:
                yield f"the {name} {getattr(record, name)!r} of a record"
        if not all(isinstance(caption, str) for caption in record.captions):
            yield f"a caption of {record.id!r} that is no text"


def slices(
    changes: ChangeSet, *, thumbnails: bool = True, most: int = ROWS_PER_SHARD
) -> Iterator[WorkItem]:
    """Cut the records of a scan into items, one at a time.

    Args:
        changes: The result of the scan.
        thumbnails: Whether rows get thumbnails.
        most: Records of an item.
    """
    compared, scanned = changes.stored.store.manifest, changes.scanned()
    scan = secrets.token_hex(4)
    for number, records in enumerate(in_batches(changes.records, most)):
        yield WorkItem(
            f"{scan}-{number:06d}",
            compared.generation,
            compared.model.identity,
            thumbnails,
            scanned,
            tuple(records),
        )


def encode(
    items: Iterable[WorkItem],
    stored: StoredRows,
    encoder: Encoder,
    *,
    precision: str = "",
    count: int = 0,
    progress: Callable[[int, str], None] = lambda done, busy: None,
) -> Iterator[Receipt]:
    """Encode items of one scan in one pipeline, write their rows as shards, and yield receipts.

    There is a receipt when an item ends and when `COMMIT_SECONDS` have passed, and after Ctrl-C one
    of what is done, before the interrupt goes on to the caller. Nothing is committed.

    Args:
        items: Taken one by one, when their records are needed.
        stored: The rows of the generation that the items were cut against.
        encoder: The model of that store.
        precision: The arithmetic of the encoder, to be recorded.
        count: Number of records of all items; 0 if unknown.
        progress: Called after each batch with its number of records, and what is busy.

    Raises:
        IdentityError: An item or the encoder is of another model than the store.
        StoreError: An item was cut against another generation.
        DataError: Two items are not of the same scan.
    """
    todo = iter(items)
    first = next(todo, None)
    if first is None:
        return
    _require_fit(first, stored, encoder)
    encoding = _Encoding(first, stored, encoder, precision)
    yield from encoding.run(_Queue(chain([first], todo), count), progress)


def card_of(store: Store, encoder: Encoder, modalities: Iterable[str]) -> ModelCard:
    """Return the model of a store with the towers of some modalities.

    Raises:
        IdentityError: The store holds vectors of another tower.
    """
    own = model_card(encoder, sorted({*modalities}))
    own = replace(own, identity=store.manifest.model.identity)
    return joined_model(store.path, store.manifest.model, own)


def _require_fit(item: WorkItem, stored: StoredRows, encoder: Encoder) -> None:
    store = stored.store
    card, rows = store.manifest.model, store.manifest.physical_rows
    if item.model != card.identity or not is_model_of(encoder, card):
        raise IdentityError(
            f"{store.path} holds embeddings of {card.identity}, the work item {item.name} is for "
            f"{item.model}, the model is {encoder.identity}: nothing was encoded"
        )
    if item.generation != store.manifest.generation or len(item.scanned.seen) != (rows + 7) // 8:
        raise StoreError(
            f"{store.path}: the work item {item.name} was cut against generation {item.generation},"
            f" not {store.manifest.generation}: open that one, or scan the sources again"
        )


class _Queue:
    """The records of several items as one stream, and where those on their way belong; final."""

    def __init__(self, items: Iterator[WorkItem], count: int) -> None:
        self._items, self._count = items, count
        self._taken: deque[tuple[WorkItem, int]] = deque()

    def __length_hint__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Record]:
        first: WorkItem | None = None
        for item in self._items:
            first = first or item
            if _setting(item) != _setting(first):
                raise DataError(f"the work items {first.name} and {item.name} are of two scans")
            for number, record in enumerate(item.records):
                self._taken.append((item, number))
                yield record

    def in_order(
        self, good: Iterable[tuple[Encoded, Match]], skips: Iterable[Skip]
    ) -> Iterator[tuple[WorkItem, int, tuple[Encoded, Match] | Skip]]:
        """Yield the results of a batch in the order of its records, each with its place."""
        encoded, skipped = deque(good), deque(skips)
        while encoded or skipped:
            item, number = self._taken.popleft()
            is_encoded = encoded and encoded[0][0].record.id == item.records[number].id
            yield item, number, (encoded.popleft() if is_encoded else skipped.popleft())


def _setting(item: WorkItem) -> tuple[object, ...]:
    return item.generation, item.model, item.thumbnails, item.scanned


@dataclass
class _Done:
    """What was done of an item since its last receipt."""

    item: WorkItem
    first: int = 0
    end: int = 0
    rows: list[Row] = field(default_factory=list)
    replaces: list[tuple[str, str]] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)
    skipped: list[Skip] = field(default_factory=list)
    moved_rows: list[int] = field(default_factory=list)

    def add(self, encoded: Encoded, match: Match) -> None:
        self.counts[match.outcome] += 1
        self.counts["moved"] += match.moved
        self.moved_rows += match.moved_rows
        if not match.up_to_date:
            self.rows.append(_row(encoded, match.id))
            self.replaces += match.replaces


class _Encoding:
    """Encodes the records of a queue, and writes them item by item."""

    def __init__(
        self, first: WorkItem, stored: StoredRows, encoder: Encoder, precision: str
    ) -> None:
        self.matcher, self.precision = RowMatcher(stored, first.scanned), precision
        self.store = stored.store
        self.pipeline = Pipeline(encoder, thumbnails=first.thumbnails, known=stored.earlier_result)
        self.done = _Done(first)
        self.told: Counter[str] = Counter()

    def run(self, queue: _Queue, progress: Callable[[int, str], None]) -> Iterator[Receipt]:
        """Yield receipts in the order of the items."""
        given_at = time.monotonic()
        try:
            for good, skips in self.pipeline.run(queue):
                for item, number, result in queue.in_order(self._matched(good), skips):
                    self._add(item, number, result)
                    if self.done.end == len(item.records):
                        yield self._receipt()
                        given_at = self._start_next()
                if self.done.end > self.done.first and _is_due(given_at):
                    yield self._receipt()
                    given_at = self._start_next()
                progress(len(good) + len(skips), self.pipeline.describe())
        except KeyboardInterrupt:
            if self.done.end > self.done.first:
                yield self._receipt()
            raise

    def _matched(self, good: Sequence[Encoded]) -> Iterator[tuple[Encoded, Match]]:
        records, checksums = [e.record for e in good], [e.item.checksum for e in good]
        return zip(good, self.matcher.match(records, checksums), strict=True)

    def _add(self, item: WorkItem, number: int, result: tuple[Encoded, Match] | Skip) -> None:
        if self.done.item is not item:
            self.done = _Done(item)
        if isinstance(result, Skip):
            self.done.skipped.append(result)
        else:
            self.done.add(*result)
        self.done.end = number + 1

    def _receipt(self) -> Receipt:
        """Write the rows of what is done."""
        done = self.done
        written = write_rows(
            self.store.path,
            card_of(self.store, self.pipeline.encoder, (m for r in done.rows for m in r.vectors)),
            done.rows,
            precision=self.precision,
            replaces=done.replaces,
        )
        return replace(
            written,
            item=done.item.name,
            first=done.first,
            end=done.end,
            counts=dict(done.counts + self._untold()),
            skipped=tuple(map(asdict, done.skipped)),
            moved_rows=tuple(done.moved_rows),
        )

    def _start_next(self) -> float:
        """Leave the rest of the item to another receipt; return the time.

        Only when a receipt was taken: if Ctrl-C comes before, its rows are written once more, and
        replace themselves.
        """
        self.done = _Done(self.done.item, self.done.end, self.done.end)
        return time.monotonic()

    def _untold(self) -> Counter[str]:
        """Return what the pipeline has counted since the last receipt; it is some batches ahead."""
        counted = Counter(encoded=self.pipeline.encoded, cut_captions=self.pipeline.texts.truncated)
        new, self.told = counted - self.told, counted
        return new


def _is_due(given_at: float) -> bool:
    return time.monotonic() - given_at > COMMIT_SECONDS


def _row(encoded: Encoded, row_id: str) -> Row:
    record = encoded.record
    return Row(
        id=row_id,
        uri=record.uri,
        captions=record.captions,
        vectors=encoded.vectors,
        positions=encoded.positions,
        meta=meta_json(record.meta),
        thumbnail=encoded.item.decoded.thumbnail,
        stamp=encoded.item.stamp,
        checksum=encoded.item.checksum,
    )
