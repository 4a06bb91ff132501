"""Embed the rows of a store with another model, and swap when all of them are done.

    rows without new vectors -> their samples in the sources -> encode -> a file a shard -> swap

Searches go on with the old vectors until the swap. A killed run is continued by the next one.

Shapes: N rows of the store, deleted ones included; L rows of a shard.
"""

import time
import zlib
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from mmalign.arrays import Ints
from mmalign.data import Record, SpilledRecords, in_batches, stream
from mmalign.embedding.changes import LOOKUP_BATCH, ScanOptions
from mmalign.embedding.stored import StoredRows
from mmalign.encoding.batches import report_truncated
from mmalign.encoding.pipeline import Encoded, Pipeline
from mmalign.errors import StoreError, shell_command
from mmalign.modality import TEXT
from mmalign.model import Encoder
from mmalign.progress import bar, say
from mmalign.store import (
    UNKNOWN,
    ModelCard,
    NextSpace,
    Row,
    Store,
    add_failures,
    open_store,
)
from mmalign.store.groups import NextVectors, Shard
from mmalign.store.manifest import Manifest

COMMIT_SECONDS = 60.0
NO_CAPTION = "its text has no caption to be embedded again"
OUTCOME_COLUMNS = ("id", "uri", "captions", "checksum")


@dataclass(frozen=True)
class Rebuilt:
    """What `rebuild` did."""

    rows: int = 0
    """Rows whose vectors were computed with the new model."""
    is_complete: bool = True
    """Whether the store holds the vectors of the new model now; if not, others build the rest."""


def rebuild(
    path: Path,
    encoder: Encoder,
    card: ModelCard,
    options: ScanOptions,
    *,
    precision: str,
    yes: bool,
) -> Rebuilt:
    """Embed the rows of a store with another model, and swap when all of them are done.

    Captions are those of the rows. An image is looked for in the sources, then where the row says
    that it is; it must have the content that the row was made from.

    Args:
        path: The store.
        encoder: The new model.
        card: What the store records of it.
        options: The sources; of several parts, each takes some of the shards.
        precision: The arithmetic of the encoder, to be recorded.
        yes: Swap even if there are images that cannot be read.

    Raises:
        StoreError: Images cannot be read; what was computed is kept.
    """
    run = _Rebuild(path, encoder, NextSpace(path, card, precision=precision), options)
    run.begin()
    is_complete = run.until_swapped(yes)
    report_truncated(encoder, run.pipeline.texts.truncated)
    return Rebuilt(run.rows, is_complete)


@dataclass(frozen=True)
class _Outcome:
    """What became of a row."""

    number: int
    row: Row
    """Its id, its uri and its new vectors."""
    problem: str
    """Why there are not all vectors that it had; empty if there are."""
    is_left: bool
    """Whether the problem is that the sources have another image for it, which the pass over what
    changed embeds."""


class _Rebuild:
    def __init__(self, path: Path, encoder: Encoder, new: NextSpace, options: ScanOptions) -> None:
        self.path, self.new, self.options = path, new, options
        self.name = new.model.identity
        self.pipeline = Pipeline(encoder, thumbnails=False)
        self.rows = 0
        self.listed: set[str] = set()
        """Where the samples are that the store lists as failures."""
        self.unread: dict[str, dict[int, _Outcome]] = {}
        """Rows that have problems, by the name of the shard and their number in it."""

    def begin(self) -> None:
        """Record which model is being built, and say what happens."""
        before = self.new.begin()
        manifest = open_store(self.path).manifest
        done = sum(shard.rows - shard.deleted_rows for shard in manifest.shards if shard.next)
        so_far = f" ({done} of {manifest.rows} rows are done)" if done else ""
        if before and before.identity != self.name:
            so_far = f", in place of those of {before.identity} that were begun"
        old = manifest.model.identity
        say(
            f"{self.path} holds embeddings of {old}: vectors of {self.name} are built beside them"
            f"{so_far}; searches go on with {old} until all are there"
        )

    def until_swapped(self, yes: bool) -> bool:
        """Build until nothing is left to do; return whether the store was swapped."""
        while True:
            store = open_store(self.path)
            if self.new.is_current(store.manifest):
                return True
            rows = self._rows_to_do(store)
            if rows:
                self._build(store, rows)
                continue
            left = {
                shard: {row for row, outcome in unread.items() if outcome.is_left}
                for shard, unread in self.unread.items()
            }
            remaining = self.new.swap(left, anyway=yes)
            if remaining is None:
                self._say_swapped(store)
                return True
            if remaining.shards and not any(map(self._is_mine, remaining.shards)):
                parts = f"{len(remaining.shards)} of {len(store.manifest.shards)} shards"
                say(f"{self.path}: {parts} have no vectors of {self.name} yet: run the other parts")
                return False
            if not remaining.shards:
                self._refuse(remaining.rows, len(store))

    def _rows_to_do(self, store: Store) -> dict[int, Ints]:
        """Return the rows to embed, by the number of their shard.

        Of a shard that has new vectors, these are rows that lack them. Shards of other parts are
        looked at, too, when each has new vectors.
        """
        shards, first = store.manifest.shards, 0
        all_written = all(shard.next for shard in shards)
        rows: dict[int, Ints] = {}
        for number, shard in enumerate(shards):
            if all_written or self._is_mine(shard.name):
                missing = self.new.missing(store.manifest, shard)
                missing = np.setdiff1d(missing, list(self.unread.get(shard.name, ())))
                if len(missing) or shard.next is None:
                    rows[number] = missing + first
            first += shard.rows
        return rows

    def _is_mine(self, shard: str) -> bool:
        number, parts = self.options.part
        return zlib.crc32(shard.encode()) % parts == number - 1

    def _build(self, store: Store, rows: Mapping[int, Ints]) -> None:
        """Embed rows; write each shard when it is done, and commit from time to time.

        Args:
            store: The generation that the rows belong to.
            rows: Rows by the number of their shard, in order.
        """
        total = sum(map(len, rows.values()))
        self.listed = {f["uri"] for f in store.failures() if not f["embedded"]}
        with SpilledRecords() as spilled, bar("rebuild", total, "rows") as progress:
            samples = _Samples(store, np.concatenate([*rows.values()]), self.options, spilled)
            with closing(self._embedded(store, rows, samples)) as embedded, self._commits() as add:
                for number, own in rows.items():
                    by_row = {}
                    for outcome in islice(embedded, len(own)):
                        by_row[store.row_in_shard(outcome.number)] = outcome
                        progress.update()
                        progress.set_postfix_str(self.pipeline.describe(), refresh=False)
                    shard = store.manifest.shards[number]
                    add(shard, self._write(store.manifest, shard, by_row))

    @contextmanager
    def _commits(self) -> Iterator[Callable[[Shard, NextVectors | None], None]]:
        """Yield a function that takes new vectors of shards, which are committed from time to time.

        What was taken is also committed when Ctrl-C ends the block.
        """
        written: dict[str, tuple[NextVectors | None, NextVectors]] = {}
        committed_at = time.monotonic()

        def add(shard: Shard, new: NextVectors | None) -> None:
            nonlocal committed_at
            if new:
                written[shard.name] = shard.next, new
            if time.monotonic() - committed_at > COMMIT_SECONDS:
                self.new.commit(written)
                written.clear()
                committed_at = time.monotonic()

        try:
            yield add
        except KeyboardInterrupt:
            self.new.commit(written)
            raise
        self.new.commit(written)

    def _embedded(
        self, store: Store, rows: Mapping[int, Ints], samples: "_Samples"
    ) -> Generator[_Outcome, None, None]:
        """Embed the samples of rows, and yield what became of each, in their order."""
        for good, skips in self.pipeline.run(_records(store, rows, samples)):
            encoded = {int(one.record.id): one for one in good}
            reasons = {int(skip.id): skip.reason for skip in skips}
            numbers = sorted({*encoded, *reasons})
            for number, row in zip(numbers, store.rows(numbers, OUTCOME_COLUMNS), strict=True):
                reason = reasons.get(number) or _other_content(encoded[number], row["checksum"])
                if reason:
                    (texts_CD,) = self.pipeline.texts([row["captions"]])
                    new = Row(row["id"], row["uri"], (), {TEXT.name: texts_CD})
                else:
                    new = _row(encoded[number], row["id"], row["uri"])
                is_left = bool(reason) and number in encoded and samples.has(number)
                if reason and not samples.has(number):
                    reason += "; no source that was given has it"
                yield _Outcome(number, new, reason, is_left)

    def _write(
        self, manifest: Manifest, shard: Shard, outcomes: Mapping[int, _Outcome]
    ) -> NextVectors | None:
        """Write the new vectors of a shard: those that it had, and what came of some of its rows.

        None if nothing came of them. Rows that have problems are listed.
        """
        new = None
        if shard.next is None or not all(outcome.problem for outcome in outcomes.values()):
            rows = self.new.rows(shard)
            for row, outcome in outcomes.items():
                rows[row] = outcome.row
            new = self.new.write(shard, rows)
            lacking = {*self.new.missing(manifest, replace(shard, next=new)).tolist()}
            outcomes = {
                row: replace(outcome, problem=outcome.problem or NO_CAPTION)
                if row in lacking
                else outcome
                for row, outcome in outcomes.items()
            }
        unread = {row: outcome for row, outcome in outcomes.items() if outcome.problem}
        self.unread.setdefault(shard.name, {}).update(unread)
        self.rows += len(outcomes) - len(unread)
        self._list_failures(outcomes.values())
        return new

    def _list_failures(self, outcomes: Iterable[_Outcome]) -> None:
        """List rows that have problems, and mark those as resolved that were listed and have none.

        Those that are left to another pass are not listed.
        """
        told = [o for o in outcomes if not o.is_left and (o.problem or o.row.uri in self.listed)]
        failures: list[dict[str, Any]] = [
            {"id": o.row.id, "uri": o.row.uri, "reason": o.problem or None, "embedded": False}
            for o in told
        ]
        if failures:
            add_failures(self.path, failures)

    def _refuse(self, rows: Mapping[str, Ints], total: int) -> None:
        """Refuse to swap without some rows; return if there is one that was not tried yet."""
        lost = [
            self.unread.get(shard, {}).get(row)
            for shard, own in rows.items()
            for row in own.tolist()
        ]
        first = lost[0]
        if first is None or None in lost:
            return
        raise StoreError(
            f"{self.path}: {len(lost)} of {total} rows cannot be embedded with {self.name}; the "
            f"first is {first.row.uri}: {first.problem}; searches go on with the old vectors: give "
            "the sources that are missing, do without the vectors of these rows with --yes "
            "(Python: yes=True), or embed into a new store"
        )

    def _say_swapped(self, before: Store) -> None:
        index = f"; build an index of them with {shell_command('index', self.path)}"
        say(
            f"{self.path} holds embeddings of {self.name} now"
            f"{index if before.manifest.index else ''}"
        )


class _Samples:
    """Where the images of rows are, as the sources say."""

    def __init__(
        self, store: Store, rows: Ints, options: ScanOptions, spilled: SpilledRecords
    ) -> None:
        """Scan the sources for the samples of some rows.

        Raises:
            DataError: A source does not exist.
        """
        self._spilled = spilled
        self._places_N = np.full(store.manifest.physical_rows, -1, np.int64)
        if not len(rows):
            return
        wanted_N = np.zeros(store.manifest.physical_rows, np.bool_)
        wanted_N[rows] = True
        stored = StoredRows(store)
        found = stream(options.sources, options.caption_keys, options.image_column)
        with closing(found) as scanned:
            records = (record for record in scanned if isinstance(record, Record))
            for batch in in_batches(records, LOOKUP_BATCH):
                for record, row in zip(batch, stored.rows_of(batch), strict=True):
                    if row and wanted_N[row["number"]] and not self.has(row["number"]):
                        self._places_N[row["number"]] = spilled.add(record)

    def has(self, number: int) -> bool:
        """Return whether a source has the sample of a row."""
        return bool(self._places_N[number] >= 0)

    def of(self, number: int) -> Record | None:
        """Return the sample of a row, if a source has it."""
        return self._spilled.at(int(self._places_N[number])) if self.has(number) else None


def _records(store: Store, rows: Mapping[int, Ints], samples: _Samples) -> Iterator[Record]:
    """Yield a record of the image and the captions of each row, named by the number of the row."""
    for own in rows.values():
        for numbers in in_batches(own.tolist(), LOOKUP_BATCH):
            for number, row in zip(numbers, store.rows(numbers, OUTCOME_COLUMNS), strict=True):
                record = samples.of(number) or Record(row["id"], row["uri"], row["uri"])
                yield replace(record, id=str(number), captions=tuple(row["captions"]), meta={})


def _other_content(encoded: Encoded, checksum: bytes) -> str:
    """Return a problem if an image is not the one that a row was made from."""
    is_same = checksum in (UNKNOWN, encoded.item.checksum)
    return "" if is_same else "its image is another one now"


def _row(encoded: Encoded, row_id: str, uri: str) -> Row:
    return Row(row_id, uri, (), encoded.vectors, positions=encoded.positions)
