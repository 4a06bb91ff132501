"""One shard: written once, memory-mapped, and each column checked before it is first read.

What lies on a disk may be damaged, and Arrow follows the offsets that it reads. So nothing of a
shard is used before Arrow has compared it with its bounds; a shard that fails is refused by name.
"""

import contextlib
import os
import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from mmalign import files
from mmalign.errors import StoreError, shell_command
from mmalign.store.manifest import Shard
from mmalign.store.schema import schema

Vectors = NDArray[np.float16]
Ints = NDArray[np.int64]

MAGIC_BYTES = 8


def write_shard(store: Path, batch: pa.RecordBatch) -> Shard:
    """Write a new file under shards/; the hash is of what was meant, not of what a disk gave back.

    The name is random: two writers never meet, and a shard that no manifest names is no data.
    """
    name = f"{secrets.token_hex(8)}.arrow"
    try:
        with files.atomic_file(store / "shards" / name) as draft:
            with pa.ipc.new_file(draft, batch.schema) as out:
                out.write_batch(batch)
            return Shard(name, len(batch), draft.bytes, draft.sha256())
    except FileNotFoundError as error:
        told = "gone before it was finished, as nothing was written to it for so long; run it again"
        raise StoreError(f"{error.filename}: {told}") from None


class ShardFile:
    """An open shard file; final. Opening it reads its outline only."""

    def __init__(self, path: Path, dim: int, footer: bool = True) -> None:
        """Map a file of one record batch with the columns of a store.

        Without its footer a file can be read as well, from its first byte on.

        Raises:
            StoreError: It is missing or damaged.
        """
        self.path, self.dim = path, dim
        self._columns: dict[str, pa.Array] = {}
        try:
            mapped = _mapped(path)
            self.bytes = mapped.size()
            self.batch = _only_batch(mapped, footer)
        except FileNotFoundError:
            raise self.refuse(
                "missing (if the store was compacted since it was opened, open it again)"
            ) from None
        except (OSError, ValueError, pa.ArrowException) as error:
            raise self.refuse(f"cannot be read: {error}") from None
        if self.batch.schema != schema(dim):
            raise self.refuse("its outline is not that of a shard")

    def column(self, name: str) -> pa.Array:
        """Return a column; its first reading checks every offset and every letter of it."""
        if name not in self._columns:
            column = self.batch.column(name)
            try:
                column.validate(full=True)
            except (ValueError, pa.ArrowException) as error:
                raise self.refuse(f"{name} cannot be read: {error}") from None
            if _has_nulls(column):
                raise self.refuse(f"{name} has rows without a value")
            self._columns[name] = column
        return self._columns[name]

    def vectors(self, modality: str) -> Vectors:
        """Return the vectors of a modality, one a row or one a caption, uncopied."""
        column = self.column(f"{modality}_embedding")
        if not pa.types.is_fixed_size_list(column.type):
            if not column.value_lengths().equals(self.column("captions").value_lengths()):
                raise self.refuse(f"has other captions than {modality} vectors")
            column = column.flatten()
        flat: Vectors = column.flatten().to_numpy(zero_copy_only=True)
        return flat.reshape(-1, self.dim)

    def ids(self, rows: Ints | None = None) -> list[str]:
        """Return the ids of some rows, or of all."""
        column = self.column("id")
        return (column if rows is None else column.take(pa.array(rows))).to_pylist()  # type: ignore[no-any-return]

    def refuse(self, what: str) -> StoreError:
        """Return the error for a file that cannot be used."""
        store = self.path.parents[1]
        remedy = f"see {shell_command('verify', store)} and {shell_command('repair', store)}"
        return StoreError(f"{self.path}: shard {what}; {remedy}")


def open_shard(store: Path, shard: Shard, dim: int) -> ShardFile:
    """Open a shard.

    Raises:
        StoreError: It is missing, or not what the manifest says.
    """
    file = ShardFile(store / "shards" / shard.name, dim)
    rows = len(file.batch)
    if (file.bytes, rows) != (shard.bytes, shard.rows):
        written = f"{shard.bytes} bytes and {shard.rows} rows were written"
        raise file.refuse(f"{file.bytes} bytes and {rows} rows, where {written}")
    return file


def _mapped(path: Path) -> pa.BufferReader:
    """Map a file. The mapping outlives its handle: a thousand open shards need no handles.

    What is read through `source` itself Arrow asks the kernel for, page by page: four times as slow
    where the pages are there, and a whole shard from the disk where a row was wanted.
    """
    files.require_regular(path)
    with pa.memory_map(os.fsencode(path)) as source:
        first, size = source.read_buffer(1), source.size()
    return pa.BufferReader(pa.foreign_buffer(first.address, size, base=first))


def _only_batch(source: pa.BufferReader, footer: bool) -> pa.RecordBatch:
    if not footer:
        source.seek(MAGIC_BYTES)
        return pa.ipc.open_stream(source).read_next_batch()
    reader = pa.ipc.open_file(source)
    if reader.num_record_batches != 1:
        raise ValueError(f"{reader.num_record_batches} record batches, not one")
    return reader.get_batch(0)


def _has_nulls(array: Any) -> bool:
    nested = pa.types.is_list(array.type) or pa.types.is_fixed_size_list(array.type)
    return bool(array.null_count) or (nested and _has_nulls(array.values))


def what_is_left(path: Path, dim: int, columns: Sequence[str]) -> list[tuple[Any, ...]]:
    """Read some columns of a damaged shard, row by row, if that can be done; else nothing."""
    for footer in (True, False):
        with contextlib.suppress(StoreError):
            file = ShardFile(path, dim, footer)
            return list(zip(*(file.column(name).to_pylist() for name in columns), strict=True))
    return []
