"""Shards: written once, memory-mapped, with each column checked before its first read.

A file may be damaged, and Arrow follows the offsets that it reads. So no column is used before
Arrow has checked its bounds; the error for a file that fails names it.

V vectors of a shard, D dimensions.
"""

import contextlib
import json
import os
import secrets
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

import mmalign
from mmalign import files
from mmalign.arrays import Floats, Halves, Hashes, Ints
from mmalign.errors import StoreError, shell_command
from mmalign.modality import IMAGE, TEXT
from mmalign.store import format2
from mmalign.store.fields import ONLY_JSON, PREFIX
from mmalign.store.groups import DELETED, DELETED_SCHEMA, NextVectors, Shard, StoredFile
from mmalign.store.model_card import ModelCard
from mmalign.store.schema import (
    ID_HASH,
    ID_ROW,
    ROW_SCHEMA,
    THUMBNAIL_SCHEMA,
    fixed_lists,
    has_rows,
    id_columns,
    id_hashes,
    position_column,
    vector_schema,
    with_fields,
)

MAGIC_BYTES = 8
# Deletions of more characters have files of their own, so that groups stay small.
MOST_INLINE = 1024
ROW_COLUMNS = ROW_SCHEMA.names[:-2]


def write_shard(
    store: Path,
    rows: pa.RecordBatch,
    vectors: pa.RecordBatch,
    thumbnails: pa.RecordBatch | None,
    *,
    precision: str = "",
    space: str = "",
) -> Shard:
    """Write the files of a new shard; hash the bytes to be written, not those read back.

    The name is random, so writers never collide; a file that no manifest names is not data.
    """
    name = secrets.token_hex(8)
    return Shard(
        name,
        len(rows),
        write_file(store, f"{name}-rows", rows),
        write_file(store, f"{name}-vectors", vectors),
        write_file(store, f"{name}-thumbnails", thumbnails) if thumbnails else None,
        precision=precision,
        version=mmalign.__version__,
        space=space,
    )


def write_next(
    store: Path, name: str, vectors: pa.RecordBatch, precision: str, space: str
) -> NextVectors:
    """Write the vectors of a shard in the space that is being built."""
    file = write_file(store, f"{name}-vectors-{secrets.token_hex(4)}", vectors)
    return NextVectors(file, space, precision, mmalign.__version__)


def with_deleted_files(store: Path, shard: Shard) -> Shard:
    """Write the deletions of a shard to files of their own if they are large; else change nothing.

    Written twice, as nothing else says which rows are deleted.
    """
    if len(shard.deleted) <= MOST_INLINE:
        return shard
    batch = pa.record_batch([pa.array(~shard.live)], schema=DELETED_SCHEMA)
    token = secrets.token_hex(4)
    written = tuple(write_file(store, f"{shard.name}-{role}-{token}", batch) for role in DELETED)
    return replace(shard, deleted="", deleted_files=written, store=store)


def write_tables(
    store: Path,
    rows: pa.Table,
    vectors: pa.Table,
    thumbnails: pa.Table,
    *,
    name: str = "",
    precision: str = "",
    version: str = "",
    space: str = "",
) -> Shard:
    """Write rows as `ShardReader.tables` returns them as a new shard.

    Args:
        store: The store.
        rows: Everything but vectors and thumbnails.
        vectors: The vectors of the same rows.
        thumbnails: Their thumbnails.
        name: Of the shard, if it takes the place of one that has the same rows.
        precision: The arithmetic that the vectors were computed in.
        version: The version of mmalign that wrote them.
        space: The identity of their model.
    """
    name = name or secrets.token_hex(8)
    token = secrets.token_hex(4)
    ids = id_columns(rows.column("id").to_pylist())
    columns = [*(_one_chunk(column) for column in rows.columns), *ids]
    pictures = _one_chunk(thumbnails.column(0))
    some = pc.sum(pc.binary_length(pictures)).as_py()
    batches = {
        "rows": with_fields(columns),
        "vectors": pa.record_batch([_one_chunk(c) for c in vectors.columns], schema=vectors.schema),
    }
    if some:
        batches["thumbnails"] = pa.record_batch([pictures], schema=THUMBNAIL_SCHEMA)
    written = {r: write_file(store, f"{name}-{r}-{token}", b) for r, b in batches.items()}
    return Shard(
        name, len(rows), written["rows"], written["vectors"], written.get("thumbnails"),
        precision=precision, version=version, space=space,
    )  # fmt: skip


def write_rows_with(reader: "ShardReader", name: str, column: pa.Array) -> StoredFile:
    """Write the file of the rows of a shard anew, with other values in one of its columns.

    Raises:
        StoreError: The present file is damaged: copied damage would get a matching hash.
    """
    file, shard = reader.file("rows"), reader.shard
    if files.sha256(file.path) != shard.row_file.sha256:
        raise file.refuse("damaged")
    columns = [file.column(each) for each in ROW_SCHEMA.names]
    columns[ROW_SCHEMA.names.index(name)] = column
    stem = f"{shard.name}-rows-{secrets.token_hex(4)}"
    return write_file(reader.store, stem, with_fields(columns))


def _one_chunk(column: pa.ChunkedArray) -> pa.Array:
    joined = column.combine_chunks()
    return joined.chunk(0) if isinstance(joined, pa.ChunkedArray) else joined


def write_file(store: Path, stem: str, batch: pa.RecordBatch) -> StoredFile:
    """Write one immutable file under shards/."""
    name = f"{stem}.arrow"
    try:
        with files.atomic_file(store / "shards" / name) as draft:
            with pa.ipc.new_file(draft, batch.schema) as out:
                out.write_batch(batch)
            return StoredFile(name, draft.bytes, draft.sha256())
    except FileNotFoundError as error:
        reason = "removed before it was complete, because nothing was written to it for so long"
        raise StoreError(f"{error.filename}: {reason}; run it again") from None


class ArrowFile:
    """An open Arrow file of one record batch. Opening it reads only its metadata."""

    def __init__(self, path: Path, footer: bool = True) -> None:
        """Memory-map a file; without its footer it is read from its start.

        Raises:
            StoreError: The file is missing or damaged.
        """
        self.path = path
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

    def column(self, name: str) -> pa.Array:
        """Return a column; its first read checks every offset and every character."""
        if name not in self._columns:
            column = self.batch.column(name)
            try:
                column.validate(full=True)
            except (ValueError, pa.ArrowException) as error:
                raise self.refuse(f"column {name} cannot be read: {error}") from None
            if _has_nulls(column) and not name.startswith(PREFIX):
                raise self.refuse(f"column {name} has rows without a value")
            self._columns[name] = column
        return self._columns[name]

    def refuse(self, what: str) -> StoreError:
        """Return the error for a file that cannot be used."""
        store = self.path.parents[1]
        remedy = f"run {shell_command('verify', store)}, then {shell_command('repair', store)}"
        return StoreError(f"{self.path}: shard {what}; {remedy}")


class ShardReader:
    """An open shard. Its files are opened when a column of them is first needed."""

    def __init__(self, store: Path, shard: Shard, model: ModelCard) -> None:
        """Open the file of the rows.

        Raises:
            StoreError: It is missing, or does not match the manifest.
        """
        self.store, self.shard, self.model = store, shard, model
        self._files: dict[str, ArrowFile] = {}
        _ = self.file("rows")

    def file(self, role: str) -> ArrowFile:
        """Open the file of a role, unless it is open.

        Raises:
            StoreError: It is missing, or does not match the manifest.
        """
        if role not in self._files:
            stored = self.shard.current_files[role]
            file = ArrowFile(self.store / "shards" / stored.name)
            rows = len(file.batch)
            if (file.bytes, rows) != (stored.bytes, self.shard.rows):
                written = f"{stored.bytes} bytes and {self.shard.rows} rows were written"
                raise file.refuse(f"has {file.bytes} bytes and {rows} rows, but {written}")
            if not self._fits(role, file.batch.schema):
                raise file.refuse("has the wrong columns or dimensions")
            self._files[role] = file
        return self._files[role]

    def _fits(self, role: str, schema: pa.Schema) -> bool:
        if schema == format2.schema(self.model.dim):
            return True
        if role == "rows":
            return has_rows(schema)
        if role == "thumbnails":
            return bool(schema == THUMBNAIL_SCHEMA)
        # A modality that came to the store later is missing in earlier shards.
        every = self.model.positions.items()
        held = {m: size for m, size in every if schema.get_field_index(m) >= 0}
        return bool(schema == vector_schema(self.model.dim, tuple(held.items())))

    def open_all(self) -> None:
        """Open all files that are read, so that they stay readable when they are removed."""
        for role in self.shard.current_files:
            self.file(role)

    @property
    def _vector_schema(self) -> pa.Schema:
        return vector_schema(self.model.dim, tuple(self.model.positions.items()))

    @property
    def is_format2(self) -> bool:
        """Whether all columns are in one file, as in format 2."""
        return bool(self.file("rows").batch.schema == format2.schema(self.model.dim))

    def column(self, name: str) -> pa.Array:
        """Return a column of the rows, or their thumbnails; rows without one have empty bytes."""
        if name != "thumbnail":
            return self.file("rows").column(name)
        if self.shard.thumbnail_file:
            return self.file("thumbnails").column(name)
        return pa.repeat(pa.scalar(b"", pa.binary()), self.shard.rows)

    def field(self, name: str) -> tuple[pa.Array | None, bool]:
        """Return the column of a field of the metadata, None if no row has it.

        The second value says whether that is so: if not, the field is only in the JSON.
        """
        if name in self.field_types:
            return self.file("rows").column(PREFIX + name), True
        return None, self.json_fields is not None and name not in self.json_fields

    @cached_property
    def field_types(self) -> dict[str, pa.DataType]:
        """The fields of the metadata that are columns, and their types."""
        fields = [f for f in self.file("rows").batch.schema if f.name.startswith(PREFIX)]
        return {field.name.removeprefix(PREFIX): field.type for field in fields}

    @cached_property
    def json_fields(self) -> list[str] | None:
        """The fields of the metadata that are only in the JSON; None if that was not noted."""
        noted = (self.file("rows").batch.schema.metadata or {}).get(ONLY_JSON)
        try:
            return None if noted is None else list(json.loads(noted))
        except ValueError:
            return None

    def vectors(self, modality: str) -> Halves:
        """Return the vectors of a modality (V, D), in the order of their rows, zero-copy."""
        column = self._stored_column(modality)
        column = column.flatten() if pa.types.is_list(column.type) else column
        flat: Halves = column.flatten().to_numpy(zero_copy_only=True)
        return flat.reshape(-1, self.model.dim)

    def offsets(self, modality: str) -> Ints:
        """Return where the vectors of each row begin, and where those of the last one end."""
        column = self._stored_column(modality)
        if not pa.types.is_list(column.type):
            return np.arange(self.shard.rows + 1)
        offsets: Ints = column.offsets.to_numpy().astype(np.int64)
        first: np.int64 = offsets[0]
        return np.subtract(offsets, first)

    def positions(self, modality: str) -> Floats:
        """Return the positions of the vectors of a modality, (V, numbers of a position)."""
        size = self.model.positions[modality]
        if not size or self.is_format2:
            offsets = self.offsets(modality)
            counted = np.arange(offsets[-1]) - np.repeat(offsets[:-1], np.diff(offsets))
            return np.repeat(counted[:, None].astype(np.float32), size, axis=1)
        if not self._holds(modality):
            return np.zeros((0, size), np.float32)
        file = self.file("vectors")
        column = file.column(position_column(modality))
        if not column.offsets.equals(file.column(modality).offsets):
            raise file.refuse(f"does not have one position per {modality} vector")
        flat: Floats = column.flatten().flatten().to_numpy(zero_copy_only=True)
        return flat.reshape(-1, size)

    def is_single(self, modality: str) -> bool:
        """Whether each row has exactly one vector of a modality."""
        return bool((np.diff(self.offsets(modality)) == 1).all())

    def list_column(self, modality: str) -> pa.Array:
        """Return the vectors of each row as a list."""
        column = self._stored_column(modality)
        if pa.types.is_list(column.type):
            return column
        return pa.ListArray.from_arrays(pa.array(np.arange(len(column) + 1), pa.int32()), column)

    def _stored_column(self, modality: str) -> pa.Array:
        file = self.file("vectors")
        if not self.is_format2:
            return file.column(modality) if self._holds(modality) else self._none(self.model.dim)
        if modality not in (IMAGE.name, TEXT.name):
            return self._none(self.model.dim)
        column = file.column({IMAGE.name: format2.IMAGE, TEXT.name: format2.TEXT}[modality])
        is_text = modality == TEXT.name
        if is_text and not column.value_lengths().equals(self.column("captions").value_lengths()):
            raise file.refuse(f"does not have one {modality} vector per caption")
        return column

    def _holds(self, modality: str) -> bool:
        return bool(self.file("vectors").batch.schema.get_field_index(modality) >= 0)

    def _none(self, dim: int) -> pa.Array:
        """Return a column in which no row has a vector."""
        offsets = pa.array(np.zeros(self.shard.rows + 1), pa.int32())
        return pa.ListArray.from_arrays(offsets, fixed_lists(np.zeros((0, dim), np.float16)))

    @cached_property
    def id_hashes(self) -> tuple[Hashes, Ints]:
        """Return the hashes of all ids, ascending, and the row of each."""
        if not self.is_format2:
            file = self.file("rows")
            return file.column(ID_HASH).to_numpy(), file.column(ID_ROW).to_numpy()
        hashes_N = id_hashes(self.ids())
        order_N = np.argsort(hashes_N, kind="stable")
        return hashes_N[order_N], order_N

    def tables(self) -> tuple[pa.Table, pa.Table, pa.Table]:
        """Return all rows, vectors and thumbnails in the columns of format 3.

        The columns of ids are left out: they are made anew with each file.
        """
        rows = [self.column(name) for name in ROW_COLUMNS]
        vectors: list[pa.Array] = []
        for modality, size in self.model.positions.items():
            column = self.list_column(modality)
            vectors.append(column)
            if size:
                numbers = fixed_lists(self.positions(modality))
                vectors.append(pa.ListArray.from_arrays(column.offsets, numbers))
        return (
            pa.Table.from_arrays(rows, list(ROW_COLUMNS)),
            pa.Table.from_arrays(vectors, schema=self._vector_schema),
            pa.Table.from_arrays([self.column("thumbnail")], schema=THUMBNAIL_SCHEMA),
        )

    def ids(self, rows: Ints | None = None) -> list[str]:
        """Return the ids of some rows, or of all."""
        column = self.column("id")
        return (column if rows is None else column.take(pa.array(rows))).to_pylist()  # type: ignore[no-any-return]


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


def read_damaged(path: Path, columns: Sequence[str]) -> list[tuple[Any, ...]]:
    """Read columns of a damaged file as rows; return an empty list if that fails."""
    for footer in (True, False):
        with contextlib.suppress(StoreError, KeyError):
            file = ArrowFile(path, footer)
            return list(zip(*(file.column(name).to_pylist() for name in columns), strict=True))
    return []
