"""A generation of a store, memory-mapped: zero-copy vectors, rows by number or id.

N rows, including deleted ones; M requested numbers or ids; D dimensions; P captions (each with the
number of its row).
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
from mmalign.arrays import Bools, Halves, Ints
from mmalign.errors import StoreError, nearest, shell_command
from mmalign.progress import say
from mmalign.store import manifest as manifests
from mmalign.store.failures import read_failures
from mmalign.store.ids import IdIndex, hashes
from mmalign.store.manifest import Manifest, ModelCard
from mmalign.store.schema import schema
from mmalign.store.shards import ShardFile, open_shard

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
    def _opened(self) -> dict[int, ShardFile]:
        return {}

    def _file(self, shard: int) -> ShardFile:
        if shard not in self._opened:
            dim = self.manifest.model.dim
            self._opened[shard] = open_shard(self.path, self.manifest.shards[shard], dim)
        return self._opened[shard]

    def open_all(self) -> None:
        """Open every shard, so that shards removed by a later generation stay readable here.

        Raises:
            StoreError: A shard is missing or damaged.
        """
        _ = self._files

    @property
    def _files(self) -> list[ShardFile]:
        return [self._file(shard) for shard in range(len(self.manifest.shards))]

    def vectors(self, modality: str) -> list[Halves]:
        """Return one zero-copy (rows, D) float16 view per shard of "image" or "text", in row order.

        Deleted rows are included; see `live`. Text vectors are numbered by caption;
        `caption_owners` has their row numbers.
        """
        columns = schema(self.manifest.model.dim).names
        modalities = [c.removesuffix("_embedding") for c in columns if c.endswith("_embedding")]
        if modality not in modalities:
            raise StoreError(
                f"{self.path}: no {modality!r} vectors: {nearest(modality, modalities)}"
            )
        return [file.vectors(modality) for file in self._files]

    def vectors_of(self, modality: str, number: int) -> NDArray[np.float32]:
        """Copy the vectors of one row: shape (1, D) for "image", one per caption for "text"."""
        shard = self.shard_of(number)
        first = self._ends[shard] - self.manifest.shards[shard].rows
        column = self._file(shard).column(f"{modality}_embedding").slice(int(number - first), 1)
        if not pa.types.is_fixed_size_list(column.type):
            column = column.flatten()
        flat = column.flatten().to_numpy(zero_copy_only=False).astype(np.float32)
        return flat.reshape(-1, self.manifest.model.dim)  # type: ignore[no-any-return]

    def shard_of(self, number: int) -> int:
        """Return the number of the shard that holds a row."""
        return int(np.searchsorted(self._ends, number, side="right"))

    @cached_property
    def live(self) -> Bools | None:
        """Mask of the rows that are not deleted, shape (N,); None if all are live."""
        if not any(s.deleted_rows for s in self.manifest.shards):
            return None
        return np.concatenate([s.live for s in self.manifest.shards])

    @cached_property
    def caption_owners(self) -> Ints:
        """Row number of each caption, shape (P,), including captions of deleted rows."""
        counts = [file.column("captions").value_lengths().to_numpy() for file in self._files]
        counts_N = np.concatenate(counts) if counts else np.zeros(0, np.int32)
        return np.repeat(np.arange(len(counts_N), dtype=np.int64), counts_N)

    def find(self, ids: Sequence[str]) -> Ints:
        """Return the row number of each id, shape (M,); -1 if no live row has it."""
        rows_M = np.full(len(ids), -1, np.int64)
        for positions, rows in self._id_index.candidates(hashes(ids)):
            found = self.rows(rows, ("id",))
            same = [row["id"] == ids[i] for row, i in zip(found, positions, strict=True)]
            rows_M[positions[same]] = rows[same]
        return rows_M

    @cached_property
    def _id_index(self) -> IdIndex:
        all_hashes = [hashes(file.ids()) for file in self._files]
        hashes_N = np.concatenate(all_hashes) if all_hashes else np.zeros(0, np.uint64)
        rows_N = np.arange(len(hashes_N)) if self.live is None else np.flatnonzero(self.live)
        return IdIndex(hashes_N[rows_N], rows_N)

    def rows(self, numbers: Sequence[int] | Ints, columns: Sequence[str]) -> list[dict[str, Any]]:
        """Read columns of the given rows, in their order; only shards that hold them are opened.

        Raises:
            IndexError: A row number is out of range.
        """
        numbers_M = np.asarray(numbers, np.int64)
        if len(numbers_M) and not 0 <= numbers_M.min() <= numbers_M.max() < self._rows:
            raise IndexError(f"{self.path} has rows 0 to {self._rows - 1}")
        shards_M = np.searchsorted(self._ends, numbers_M, side="right")
        out: list[dict[str, Any]] = [{} for _ in numbers_M]
        for shard in np.unique(shards_M).tolist():
            here = np.flatnonzero(shards_M == shard)
            first = self._ends[shard] - self.manifest.shards[shard].rows
            inside = numbers_M[here] - first
            for name in columns:
                values = _values(self._file(shard).column(name), inside)
                for i, value in zip(here.tolist(), values, strict=True):
                    out[i][name] = value
        return out

    @property
    def _rows(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def batches(
        self, columns: Sequence[str], numbers: Ints | None = None
    ) -> Iterator[pa.RecordBatch]:
        """Yield columns of each shard, in row order, for all rows or some.

        Args:
            columns: Names of columns.
            numbers: Wanted rows, ascending, all by default; shards without any of them are skipped.
        """
        for shard, (card, end) in enumerate(zip(self.manifest.shards, self._ends, strict=True)):
            first = end - card.rows
            inside = np.arange(card.rows)
            if numbers is not None:
                inside = numbers[slice(*np.searchsorted(numbers, (first, end)))] - first
            if len(inside):
                file = self._file(shard)
                fields = pa.schema([file.batch.schema.field(name) for name in columns])
                checked = [file.column(name) for name in columns]
                batch = pa.record_batch(checked, schema=fields)
                yield batch if len(inside) == card.rows else batch.take(pa.array(inside))

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


def _values(column: pa.Array, rows_M: Ints) -> list[Any]:
    """Read rows of a column; a few singly, as `take` costs as much as ten single reads."""
    if len(rows_M) <= FEW_ROWS:
        return [column[row].as_py() for row in rows_M.tolist()]
    return column.take(pa.array(rows_M)).to_pylist()  # type: ignore[no-any-return]


def open_store(path: str | Path) -> Store:
    """Open the newest readable generation of a store; no shard is opened.

    Raises:
        StoreError: There is no store, or it cannot be read.
    """
    return Store(Path(path), manifests.newest(Path(path)))


def open_or_new(path: str | Path, model: ModelCard) -> Store:
    """Open the store of a model, or an empty one if none exists; nothing is written.

    Raises:
        IdentityError: The store holds embeddings of another model.
        StoreError: It cannot be read.
    """
    if not manifests.generations(Path(path)):
        return Store(Path(path), Manifest(0, model))
    store = open_store(path)
    manifests.require_model(store.path, store.manifest, model)
    return store
