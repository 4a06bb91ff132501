"""One shard: written once, memory-mapped, with each column checked before its first read.

A file may be damaged, and Arrow follows the offsets that it reads. So no column is used before
Arrow has checked its bounds; the error for a shard that fails names the file.
"""

import contextlib
import os
import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from mmalign import files
from mmalign.arrays import Halves, Ints
from mmalign.errors import StoreError, shell_command
from mmalign.store.manifest import Shard
from mmalign.store.schema import schema

MAGIC_BYTES = 8


def write_shard(store: Path, batch: pa.RecordBatch) -> Shard:
    """Write a new file under shards/; hash the bytes to be written, not those read back.

    The name is random, so writers never collide; a shard that no manifest names is not data.
    """
    name = f"{secrets.token_hex(8)}.arrow"
    try:
        with files.atomic_file(store / "shards" / name) as draft:
            with pa.ipc.new_file(draft, batch.schema) as out:
                out.write_batch(batch)
            return Shard(name, len(batch), draft.bytes, draft.sha256())
    except FileNotFoundError as error:
        told = "removed before it was complete, as it was unchanged for an hour; run it again"
        raise StoreError(f"{error.filename}: {told}") from None


class ShardFile:
    """An open shard file; final. Opening it reads only its metadata."""

    def __init__(self, path: Path, dim: int, footer: bool = True) -> None:
        """Memory-map a file of one record batch with the columns of a store.

        A file can also be read without its footer, from its start.

        Raises:
            StoreError: The file is missing or damaged.
        """
        self.path, self.dim = path, dim
        self._columns: dict[str, pa.Array] = {}
        try:
            mapped = _mapped(path)
            self.bytes = mapped.size()
            self.batch = _only_batch(mapped, footer)
        except FileNotFoundError:
            raise self.refuse(
                "is missing (if the store was compacted since it was opened, open it again)"
            ) from None
        except (OSError, ValueError, pa.ArrowException) as error:
            raise self.refuse(f"cannot be read: {error}") from None
        if self.batch.schema != schema(dim):
            raise self.refuse("has the wrong columns or dimensions")

    def column(self, name: str) -> pa.Array:
        """Return a column; its first read checks every offset and every character."""
        if name not in self._columns:
            column = self.batch.column(name)
            try:
                column.validate(full=True)
            except (ValueError, pa.ArrowException) as error:
                raise self.refuse(f"column {name} cannot be read: {error}") from None
            if _has_nulls(column):
                raise self.refuse(f"column {name} has rows without a value")
            self._columns[name] = column
        return self._columns[name]

    def vectors(self, modality: str) -> Halves:
        """Return the vectors of a modality, one per row or per caption, zero-copy."""
        column = self.column(f"{modality}_embedding")
        if not pa.types.is_fixed_size_list(column.type):
            if not column.value_lengths().equals(self.column("captions").value_lengths()):
                raise self.refuse(f"does not have one {modality} vector per caption")
            column = column.flatten()
        flat: Halves = column.flatten().to_numpy(zero_copy_only=True)
        return flat.reshape(-1, self.dim)

    def ids(self, rows: Ints | None = None) -> list[str]:
        """Return the ids of some rows, or of all."""
        column = self.column("id")
        return (column if rows is None else column.take(pa.array(rows))).to_pylist()  # type: ignore[no-any-return]

    def refuse(self, what: str) -> StoreError:
        """Return the error for a file that cannot be used."""
        store = self.path.parents[1]
        remedy = f"run {shell_command('verify', store)}, then {shell_command('repair', store)}"
        return StoreError(f"{self.path}: shard {what}; {remedy}")


def open_shard(store: Path, shard: Shard, dim: int) -> ShardFile:
    """Open a shard.

    Raises:
        StoreError: The shard is missing, or does not match the manifest.
    """
    file = ShardFile(store / "shards" / shard.name, dim)
    rows = len(file.batch)
    if (file.bytes, rows) != (shard.bytes, shard.rows):
        written = f"{shard.bytes} bytes and {shard.rows} rows were written"
        raise file.refuse(f"has {file.bytes} bytes and {rows} rows, but {written}")
    return file


def _mapped(path: Path) -> pa.BufferReader:
    """Memory-map a file. The mapping outlives its handle: a thousand open shards need no handles.

    For reads through `source` itself, Arrow requests each page from the kernel: four times as slow
    if the pages are in memory, and otherwise it reads a whole shard from disk for one row.
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


def read_damaged_shard(path: Path, dim: int, columns: Sequence[str]) -> list[tuple[Any, ...]]:
    """Read columns of a damaged shard as rows; return an empty list if that fails."""
    for footer in (True, False):
        with contextlib.suppress(StoreError):
            file = ShardFile(path, dim, footer)
            return list(zip(*(file.column(name).to_pylist() for name in columns), strict=True))
    return []
