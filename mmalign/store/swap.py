"""Vectors of a new model beside the current ones of a store, and the swap when all are there.

    begin -> write and commit, shard by shard -> swap, in one generation

Until the swap nobody reads the new vectors, and all changes of the store go on.

L rows of a shard.
"""

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa

from mmalign import files
from mmalign.arrays import Floats, Ints
from mmalign.errors import IdentityError, StoreError, shell_command
from mmalign.store import manifest as manifests
from mmalign.store.groups import Groups, NextVectors, Shard, StoredFile
from mmalign.store.manifest import Manifest
from mmalign.store.model_card import ModelCard
from mmalign.store.schema import Row, vector_batch
from mmalign.store.shards import ShardReader, write_next, write_rows_with
from mmalign.store.upgrade import is_old


@dataclass(frozen=True)
class Remaining:
    """What keeps a store from being swapped."""

    shards: tuple[str, ...]
    """Names of shards without new vectors."""
    rows: Mapping[str, Ints]
    """By name of the shard: rows that have no new vectors, and have some now."""


class NextSpace:
    """The vectors of a model that are to take the place of those of a store; final."""

    def __init__(self, store: Path, model: ModelCard, *, precision: str = "") -> None:
        """Take a store and the new model.

        Args:
            store: The folder.
            model: The new model.
            precision: The arithmetic of its vectors, to be recorded.
        """
        self.store, self.model, self.precision = store, model, precision
        self._groups = Groups(store)
        self._missing: dict[tuple[str, str], Ints] = {}
        self._unstamped: dict[tuple[str, str], StoredFile] = {}

    def begin(self) -> ModelCard | None:
        """Record that vectors of the model are being built; return the model whose were before.

        What was built of that one so far is dropped, unless it is the same.

        Raises:
            IdentityError: The store has vectors of a modality that the model does not make.
            StoreError: It has shards of format 2.
        """
        before: ModelCard | None = None

        def change(base: Manifest) -> Manifest:
            nonlocal before
            before = base.next
            for modality in base.model.positions.keys() - self.model.positions.keys():
                raise IdentityError(
                    f"{self.store} has vectors of {modality!r}, which {self.model.identity} does "
                    "not make: embed into a new store"
                )
            if any(map(is_old, base.shards)):
                remedy = shell_command("upgrade", self.store)
                raise StoreError(f"{self.store}: has shards of format 2; run {remedy}")
            return base if self.is_current(base) else base.with_next(self.model)

        manifests.commit(self.store, change, self.model, groups=self._groups)
        return before

    def is_current(self, base: Manifest) -> bool:
        """Return whether the swap has been done."""
        return base.model.identity == self.model.identity

    def missing(self, base: Manifest, shard: Shard) -> Ints:
        """Return the live rows that lack new vectors of a modality of which they have some now.

        Args:
            base: The generation that has the shard.
            shard: The shard; if it has no new vectors at all, all its live rows lack them.

        Raises:
            StoreError: A file of the shard is missing or damaged.
        """
        live_L = shard.live
        if shard.next is None:
            return np.flatnonzero(live_L)
        key = shard.vector_file.name, shard.next.file.name
        if key not in self._missing:
            current = ShardReader(self.store, shard, base.model)
            following = ShardReader(self.store, shard.swapped(), self.model)
            lacks_L = np.zeros(shard.rows, np.bool_)
            for modality in base.model.positions:
                old_L, new_L = (np.diff(r.offsets(modality)) for r in (current, following))
                lacks_L |= (old_L > 0) & (new_L == 0)
            self._missing[key] = np.flatnonzero(lacks_L)
        return self._missing[key][live_L[self._missing[key]]]

    def rows(self, shard: Shard) -> list[Row]:
        """Copy the new vectors of each row of a shard; without any if there are none yet.

        Raises:
            StoreError: Their file is damaged: copied damage would get a matching hash.
        """
        vectors_L: list[dict[str, Floats]] = [{} for _ in range(shard.rows)]
        positions_L: list[dict[str, Floats]] = [{} for _ in range(shard.rows)]
        if shard.next is not None:
            reader = ShardReader(self.store, shard.swapped(), self.model)
            file = reader.file("vectors")
            if files.sha256(file.path) != shard.next.file.sha256:
                raise file.refuse("damaged")
            for modality, size in self.model.positions.items():
                ends_L = reader.offsets(modality)[1:]
                vectors = np.split(reader.vectors(modality).astype(np.float32), ends_L)
                for row, own in zip(vectors_L, vectors, strict=False):
                    row[modality] = own
                if size:
                    positions = np.split(reader.positions(modality), ends_L)
                    for row, own in zip(positions_L, positions, strict=False):
                        row[modality] = own
        pairs = zip(vectors_L, positions_L, strict=True)
        return [Row("", "", (), vectors, positions=positions) for vectors, positions in pairs]

    def write(self, shard: Shard, rows: Sequence[Row]) -> NextVectors:
        """Write the new vectors of all rows of a shard; deleted ones need none."""
        batch = vector_batch(rows, self.model.dim, self.model.positions)
        return write_next(self.store, shard.name, batch, self.precision, self.model.identity)

    def commit(self, written: Mapping[str, tuple[NextVectors | None, NextVectors]]) -> None:
        """Commit new vectors by the names of their shards, in one generation.

        Args:
            written: What a shard had, and what it gets. One that was changed meanwhile is left out.

        Raises:
            StoreError: The vectors of another model are being built now.
        """

        def change(base: Manifest) -> Manifest:
            if self.is_current(base):
                return base
            self._require_begun(base)
            return replace(base, shards=tuple(map(with_next, base.shards)))

        def with_next(shard: Shard) -> Shard:
            before, after = written.get(shard.name, (None, None))
            return replace(shard, next=after) if after and shard.next == before else shard

        manifests.commit(self.store, change, self.model, groups=self._groups)

    def swap(self, excused: Mapping[str, Set[int]], *, anyway: bool = False) -> Remaining | None:
        """Let the new vectors take the place of the current ones, if all are there.

        An index of the old ones goes with them. The next `embed` reads the samples of rows without
        new vectors again, even if they look unchanged.

        Args:
            excused: Rows that may lack new vectors, by the name of their shard.
            anyway: Let all rows lack them whose shard has been written.

        Returns:
            What is still to be done; None if the swap is done.
        """
        remaining: Remaining | None = None

        def change(base: Manifest) -> Manifest:
            nonlocal remaining
            remaining = None
            if self.is_current(base):
                return base
            self._require_begun(base)
            unwritten = tuple(shard.name for shard in base.shards if shard.next is None)
            lacking = {s.name: self.missing(base, s) for s in base.shards if s.next}
            wanted = {
                name: np.setdiff1d(rows, list(excused.get(name, ())))
                for name, rows in lacking.items()
            }
            wanted = {name: rows for name, rows in wanted.items() if len(rows)}
            if unwritten or (wanted and not anyway):
                remaining = Remaining(unwritten, wanted)
                return base
            shards = [self._unstamp(base, shard, lacking[shard.name]) for shard in base.shards]
            return replace(base, shards=tuple(shards)).swapped()

        manifests.commit(self.store, change, self.model, groups=self._groups)
        return remaining

    def _require_begun(self, base: Manifest) -> None:
        if base.next is None or base.next.identity != self.model.identity:
            other = base.next.identity if base.next else base.model.identity
            raise StoreError(
                f"{self.store}: another process has begun with {other}, and what was built of "
                f"{self.model.identity} was dropped; run it again"
            )

    def _unstamp(self, base: Manifest, shard: Shard, rows: Ints) -> Shard:
        """Return a shard that knows nothing of the sources of some rows, so that they are read."""
        if not len(rows):
            return shard
        assert shard.next is not None
        key = shard.row_file.name, shard.next.file.name
        if key not in self._unstamped:
            reader = ShardReader(self.store, shard, base.model)
            stamps_L = reader.column("stamp").to_numpy().copy()
            stamps_L[rows] = 0
            self._unstamped[key] = write_rows_with(reader, "stamp", pa.array(stamps_L))
        return replace(shard, row_file=self._unstamped[key])
