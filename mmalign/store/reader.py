"""A generation of a store, memory-mapped: zero-copy vectors, rows by number or id.

N rows, including deleted ones; M requested numbers or ids; V vectors of a modality, D dimensions.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from mmalign import files
from mmalign.arrays import Bools, Floats, Halves, Ints
from mmalign.errors import StoreError, nearest, shell_command
from mmalign.progress import say
from mmalign.store import manifest as manifests
from mmalign.store.failures import read_failures
from mmalign.store.fields import joined, kind_of
from mmalign.store.groups import Shard
from mmalign.store.ids import candidates
from mmalign.store.manifest import Manifest
from mmalign.store.model_card import ModelCard
from mmalign.store.schema import FIELDS, embedding_column, fixed_lists, id_hashes
from mmalign.store.shards import ShardReader

FEW_ROWS = 4


@dataclass(frozen=True)
class Store:
    """One generation of a store, open for reading; it never changes; final.

    A shard is opened on first use.
    """

    path: Path
    manifest: Manifest

    def __len__(self) -> int:
        return self.manifest.rows

    @cached_property
    def _ends(self) -> Ints:
        return np.cumsum([s.rows for s in self.manifest.shards], dtype=np.int64)

    @cached_property
    def _sizes(self) -> Ints:
        return np.array([s.rows for s in self.manifest.shards], np.int64)

    @cached_property
    def _opened(self) -> dict[int, ShardReader]:
        return {}

    def _shard(self, number: int) -> ShardReader:
        if number not in self._opened:
            shard, model = self.manifest.shards[number], self.manifest.model
            self._opened[number] = ShardReader(self.path, shard, model)
        return self._opened[number]

    def open_all(self) -> None:
        """Open every shard, so that shards removed by a later generation stay readable here.

        Raises:
            StoreError: A shard is missing or damaged.
        """
        _ = self.live
        for shard in self._shards:
            shard.open_all()

    @property
    def _shards(self) -> list[ShardReader]:
        return [self._shard(number) for number in range(len(self.manifest.shards))]

    def vectors(self, modality: str) -> list[Halves]:
        """Return one zero-copy (V, D) float16 view per shard, in the order of the rows.

        A row may have any number of vectors of a modality; `owners` has the row of each. Those of
        deleted rows are included; see `live`.

        Raises:
            StoreError: The store has no vectors of this modality.
        """
        self._require(modality)
        return [shard.vectors(modality) for shard in self._shards]

    def _require(self, modality: str) -> None:
        known = self.modalities
        if modality not in known:
            raise StoreError(f"{self.path}: no {modality!r} vectors: {nearest(modality, known)}")

    def vectors_of(self, modality: str, number: int) -> NDArray[np.float32]:
        """Copy the vectors of one row, (V, D)."""
        shard, inside = self._vectors_in(modality, number)
        return shard.vectors(modality)[inside].astype(np.float32)

    def positions_of(self, modality: str, number: int) -> Floats:
        """Copy where in their item the vectors of one row are, (V, numbers of a position)."""
        shard, inside = self._vectors_in(modality, number)
        return shard.positions(modality)[inside].copy()

    def _vectors_in(self, modality: str, number: int) -> tuple[ShardReader, slice]:
        """Return the shard of a row, and which vectors of the shard are those of the row."""
        self._require(modality)
        shard = self._shard(self.shard_of(number))
        row = self.row_in_shard(number)
        return shard, slice(*shard.offsets(modality)[row : row + 2])

    def owners(self, modality: str) -> Ints:
        """Return the row number of each vector of a modality, (V,), those of deleted rows too."""
        if modality not in self._owners:
            self._require(modality)
            counts = [np.diff(shard.offsets(modality)) for shard in self._shards]
            counts_N = np.concatenate([np.zeros(0, np.int64), *counts])
            self._owners[modality] = np.repeat(np.arange(len(counts_N)), counts_N)
        return self._owners[modality]

    @cached_property
    def _owners(self) -> dict[str, Ints]:
        return {}

    def positions(self, modality: str, numbers: Ints) -> Floats:
        """Return where in their item some vectors of a modality are, one row for each.

        Raises:
            StoreError: The store has no vectors of this modality.
        """
        self._require(modality)
        size = self.manifest.model.positions[modality]
        ends = np.cumsum([len(shard.vectors(modality)) for shard in self._shards])
        found = np.zeros((len(numbers), size), np.float32)
        for i, number in enumerate(numbers.tolist()):
            shard = int(np.searchsorted(ends, number, side="right"))
            found[i] = self._shard(shard).positions(modality)[number - ends[shard]]
        return found

    def shard_of(self, number: int) -> int:
        """Return the number of the shard that holds a row."""
        return int(np.searchsorted(self._ends, number, side="right"))

    def row_in_shard(self, number: int) -> int:
        """Return the number that a row has in its shard."""
        shard = self.shard_of(number)
        return int(number - self._ends[shard] + self._sizes[shard])

    @cached_property
    def live(self) -> Bools | None:
        """Mask of the rows that are not deleted, shape (N,); None if all are live."""
        if not any(s.deleted_rows for s in self.manifest.shards):
            return None
        return np.concatenate([s.live for s in self.manifest.shards])

    def find(self, ids: Sequence[str]) -> Ints:
        """Return the row number of each id, shape (M,); -1 if no live row has it."""
        hashes_M = id_hashes(ids)
        rows_M = np.full(len(ids), -1, np.int64)
        for shard, end in zip(self._shards, self._ends, strict=True):
            live = None
            for wanted, rows in candidates(shard, hashes_M):
                live = shard.shard.live if live is None else live
                for i, row, name in zip(wanted, rows, shard.ids(rows), strict=True):
                    if live[row] and name == ids[i]:
                        rows_M[i] = end - shard.shard.rows + row
        return rows_M

    def rows(self, numbers: Sequence[int] | Ints, columns: Sequence[str]) -> list[dict[str, Any]]:
        """Read columns of the given rows, in their order; only shards that hold them are opened.

        Raises:
            IndexError: A row number is out of range.
        """
        numbers_M = self._in_range(numbers)
        shards_M = np.searchsorted(self._ends, numbers_M, side="right")
        firsts = self._ends[shards_M] - self._sizes[shards_M]
        places: dict[int, list[int]] = {}
        for i, shard in enumerate(shards_M.tolist()):
            places.setdefault(shard, []).append(i)
        inside_M = (numbers_M - firsts).tolist()
        out: list[dict[str, Any]] = [{} for _ in inside_M]
        for shard, here in places.items():
            reader = self._shard(shard)
            inside = [inside_M[i] for i in here]
            for name in columns:
                values = _values(self._column(reader, name), inside)
                for i, value in zip(here, values, strict=True):
                    out[i][name] = value
        return out

    def by_shard(self, numbers: Sequence[int] | Ints) -> Iterator[tuple[Shard, Ints]]:
        """Yield the shards that hold the given rows, with the numbers of these in the shard.

        Raises:
            IndexError: A row number is out of range.
        """
        numbers_M = np.unique(self._in_range(numbers))
        for shard, end in zip(self.manifest.shards, self._ends, strict=True):
            first = end - shard.rows
            inside = numbers_M[slice(*np.searchsorted(numbers_M, (first, end)))] - first
            if len(inside):
                yield shard, inside

    def _in_range(self, numbers: Sequence[int] | Ints) -> Ints:
        numbers_M = np.asarray(numbers, np.int64)
        if len(numbers_M) and not 0 <= numbers_M.min() <= numbers_M.max() < self._rows:
            raise IndexError(f"{self.path} has rows 0 to {self._rows - 1}")
        return numbers_M

    @property
    def _rows(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def batches(
        self, columns: Sequence[str], numbers: Ints | None = None
    ) -> Iterator[pa.RecordBatch]:
        """Yield columns of each shard, in row order, for all rows or some.

        Args:
            columns: Names from `Store.columns`.
            numbers: Wanted rows, ascending, all by default; shards without any of them are skipped.
        """
        for shard, (card, end) in enumerate(zip(self.manifest.shards, self._ends, strict=True)):
            first = end - card.rows
            inside = None
            if numbers is not None:
                inside = numbers[slice(*np.searchsorted(numbers, (first, end)))] - first
            if inside is None or len(inside):
                reader = self._shard(shard)
                checked = [self._column(reader, name) for name in columns]
                batch = pa.record_batch(checked, schema=self.arrow_schema(columns))
                whole = inside is None or len(inside) == card.rows
                yield batch if whole else batch.take(pa.array(inside))

    @property
    def modalities(self) -> tuple[str, ...]:
        """Names of the modalities that the store has room for, the main one first."""
        return tuple(self.manifest.model.positions)

    @property
    def columns(self) -> list[str]:
        """Names of all columns: those of the rows, and the vectors of each modality."""
        return [*FIELDS, *map(embedding_column, self.manifest.model.positions)]

    def arrow_schema(self, columns: Sequence[str]) -> pa.Schema:
        """Return the types of columns as `batches` gives them.

        The column of a modality holds vectors if each row has exactly one, else lists of vectors.
        """
        vector = pa.list_(pa.float16(), self.manifest.model.dim)
        fields = []
        for name in columns:
            kind = vector if name in FIELDS or self._is_single(name) else pa.list_(vector)
            fields.append(FIELDS.get(name) or pa.field(name, kind, nullable=False))
        return pa.schema(fields)

    def is_single(self, modality: str) -> bool:
        """Whether each row has exactly one vector of a modality: its number is that of the row.

        Raises:
            StoreError: The store has no vectors of this modality.
        """
        self._require(modality)
        return self._is_single(embedding_column(modality))

    def _is_single(self, column: str) -> bool:
        if column not in self._single:
            modality = column.removesuffix("_embedding")
            self._single[column] = all(shard.is_single(modality) for shard in self._shards)
        return self._single[column]

    @cached_property
    def _single(self) -> dict[str, bool]:
        return {}

    def _column(self, shard: ShardReader, name: str) -> pa.Array:
        if name in FIELDS:
            return shard.column(name)
        modality = name.removesuffix("_embedding")
        self._require(modality)
        if self._is_single(name):
            return fixed_lists(shard.vectors(modality))
        return shard.list_column(modality)

    def field(self, name: str) -> pa.ChunkedArray | None:
        """Return a field of the metadata as a typed column over all rows, a chunk per shard.

        None if a shard has it only in the JSON, or no row has it.
        """
        found = [shard.field(name) for shard in self._shards]
        if not all(complete for _, complete in found):
            return None
        sizes = (shard.rows for shard in self.manifest.shards)
        return joined([(column, rows) for (column, _), rows in zip(found, sizes, strict=True)])

    @cached_property
    def fields(self) -> dict[str, str]:
        """The fields of the metadata and what they hold: "number", "truth", "text" or "json".

        "json" is any value, as a list. Fields that only rows of format 2 have are missing.
        """
        types: dict[str, set[pa.DataType | None]] = {}
        for shard in self._shards:
            for name in (*shard.field_types, *(shard.json_fields or ())):
                types.setdefault(name, set()).add(shard.field_types.get(name))
        if any(shard.json_fields is None for shard in self._shards):
            return dict.fromkeys(types, "json")
        return {name: kind_of(found) for name, found in types.items()}

    def column(self, name: str) -> list[Any]:
        """Read one column of all live rows, in row order."""
        live = None if self.live is None else np.flatnonzero(self.live)
        return [v for batch in self.batches((name,), live) for v in batch.column(0).to_pylist()]

    def failures(self) -> list[dict[str, Any]]:
        """Return every sample without an embedding, and why; the last entry per sample counts."""
        return read_failures(self.path)

    @cached_property
    def index_folder(self) -> Path | None:
        """Folder of the index of this generation; None if there is none or it is damaged."""
        card = self.manifest.index
        if card is None:
            return None
        folder = self.path / "index" / card.name
        description = folder / "index.json"
        if not description.exists() or files.sha256(description) != card.sha256:
            remedy = shell_command("repair", self.path)
            say(f"warning: {description}: damaged; exact search is used instead; run {remedy}")
            return None
        return folder


def _values(column: pa.Array, rows: Sequence[int]) -> list[Any]:
    """Read rows of a column; a few singly, as `take` costs as much as ten single reads."""
    if len(rows) <= FEW_ROWS:
        return [column[row].as_py() for row in rows]
    return column.take(pa.array(rows)).to_pylist()  # type: ignore[no-any-return]


def open_store(path: str | Path) -> Store:
    """Open the newest readable generation of a store; no shard is opened.

    Raises:
        StoreError: There is no store, or it cannot be read.
    """
    manifest = manifests.newest(Path(path))
    if manifest.format < manifests.FORMAT and path not in _noted:
        _noted.add(path)
        remedy = f"{shell_command('upgrade', path)} makes one of format {manifests.FORMAT} of it"
        say(f"{path} is a store of format {manifest.format}, which is only read: {remedy}")
    return Store(Path(path), manifest)


# Stores of an earlier format that were reported: once each is enough.
_noted: set[str | Path] = set()


def open_or_new(path: str | Path, model: ModelCard) -> Store:
    """Open a store, or an empty one of a model if none exists; nothing is written.

    Raises:
        StoreError: It cannot be read.
    """
    if not manifests.generations(Path(path)):
        return Store(Path(path), Manifest(0, model))
    return open_store(path)
