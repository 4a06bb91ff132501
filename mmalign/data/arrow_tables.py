"""Read Arrow tables: .parquet, and .arrow or .feather files; sources use pyarrow through here.

A table consists of groups of rows: parquet's row groups, or Arrow's record batches. Rows are read
without their images; the images of a group are read as one stream.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate
from typing import Any, Literal, Protocol

from mmalign.data.places import is_url, open_file

# A parquet column is read in chunks of this size: reading it at once would need a whole group's
# memory.
BUFFER_BYTES = 1 << 20
# The number of images decompressed at once.
CHUNK_BYTES = 4 << 20
ROWS_AT_A_TIME = 256
ImageKind = Literal["path", "bytes", "struct"]


class Table(Protocol):
    """A file of rows."""

    schema: Any
    metadata: Any
    """Metadata that `open_table` need not read again."""
    ends: list[int]
    """The number of the row after each group."""

    def batches(self, columns: Sequence[str]) -> Iterator[Any]:
        """Yield record batches of some columns, in order; a struct's field is `a.b`."""

    def chunks(self, group: int, column: str) -> Iterator[Any]:
        """Yield arrays of one column of a group, in order."""

    def is_empty(self, column: str, field: str) -> bool:
        """Return whether a struct's field is null in every row, by a quick check only."""


@contextmanager
def open_table(path: str, metadata: Any = None) -> Iterator[Table]:
    """Open a table by its extension, remote ones through fsspec.

    Args:
        path: The file.
        metadata: The metadata of an open table of the same file, which is then not read again.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    with open_file(path) as file:
        if path.lower().endswith(".parquet"):
            options = {"buffer_size": BUFFER_BYTES, "pre_buffer": False}
            with pq.ParquetFile(file, metadata=metadata, **options) as parquet:
                yield ParquetTable(parquet)
        else:
            with (
                pa.PythonFile(file) if is_url(path) else pa.memory_map(os.fsencode(path)) as source
            ):
                yield IpcTable(source, metadata)


class ParquetTable:
    """A parquet file whose columns are read as streams."""

    def __init__(self, file: Any) -> None:
        self.file, self.schema, self.metadata = file, file.schema_arrow, file.metadata
        groups = range(file.num_row_groups)
        self.ends = list(accumulate(self.metadata.row_group(g).num_rows for g in groups))

    def batches(self, columns: Sequence[str]) -> Iterator[Any]:
        """Yield record batches of some columns, in order; a struct's field is `a.b`."""
        yield from self.file.iter_batches(ROWS_AT_A_TIME, columns=list(columns))

    def chunks(self, group: int, column: str) -> Iterator[Any]:
        """Yield arrays of one column of a group, in order."""
        sizes = [c.total_uncompressed_size for c in self._leaves(group, column)]
        rows = self.metadata.row_group(group).num_rows
        count = max(1, min(ROWS_AT_A_TIME, CHUNK_BYTES * rows // max(1, sum(sizes))))
        for batch in self.file.iter_batches(count, row_groups=[group], columns=[column]):
            yield batch.column(0)

    def is_empty(self, column: str, field: str) -> bool:
        """Return whether a struct's field is null in every row, as far as statistics tell."""
        leaves = [
            leaf
            for group in range(len(self.ends))
            for leaf in self._leaves(group, f"{column}.{field}")
        ]
        return _is_null(self.schema, column, field) or all(
            leaf.is_stats_set
            and leaf.statistics.has_null_count
            and leaf.statistics.null_count == leaf.num_values
            for leaf in leaves
        )

    def _leaves(self, group: int, column: str) -> list[Any]:
        row_group = self.metadata.row_group(group)
        leaves = [row_group.column(c) for c in range(row_group.num_columns)]
        return [c for c in leaves if f"{c.path_in_schema}.".startswith(f"{column}.")]


class IpcTable:
    """An Arrow file or stream."""

    def __init__(self, source: Any, ends: list[int] | None) -> None:
        import pyarrow as pa

        self.source, self.streamed = source, []
        try:
            file = pa.ipc.open_file(source)
            count, self.schema = file.num_record_batches, file.schema
        except pa.ArrowInvalid:  # a stream, as Hugging Face writes them
            source.seek(0)
            stream = pa.ipc.open_stream(source)
            # Memory-mapped, not copied, unless they are compressed.
            self.streamed = list(stream)
            count, self.schema = len(self.streamed), stream.schema
        if ends is None:
            sizes = {field.name: _width(field.type) for field in self.schema}
            smallest = sorted(sizes, key=lambda name: sizes[name])[:1]
            ends = list(accumulate(self._read(g, smallest).num_rows for g in range(count)))
        self.metadata = self.ends = ends

    def batches(self, columns: Sequence[str]) -> Iterator[Any]:
        """Yield record batches of some columns, in order; a struct's field is `a.b`."""
        names = self.schema.names
        whole = [name if name in names else name.partition(".")[0] for name in columns]
        for group in range(len(self.ends)):
            batch = self._read(group, whole)
            for start in range(0, batch.num_rows, ROWS_AT_A_TIME):
                yield batch.slice(start, ROWS_AT_A_TIME)

    def chunks(self, group: int, column: str) -> Iterator[Any]:
        """Yield arrays of one column of a group, in order."""
        yield self._read(group, [column]).column(0)

    def is_empty(self, column: str, field: str) -> bool:
        """Return whether a struct's field is null in every row."""
        import pyarrow.compute as pc

        if _is_null(self.schema, column, field):
            return True
        batches = (self._read(group, [column]) for group in range(len(self.ends)))
        return all(pc.struct_field(b.column(0), field).null_count == len(b) for b in batches)

    def _read(self, group: int, columns: Sequence[str]) -> Any:
        """Read some columns of a batch; other compressed columns are not decompressed."""
        import pyarrow as pa

        if self.streamed or not columns:
            # With no columns selected, a batch still has its number of rows.
            batches = self.streamed or [self._read(group, self.schema.names[:1])]
            return batches[group if self.streamed else 0].select(list(columns))
        fields = [self.schema.get_field_index(name) for name in columns]
        options = pa.ipc.IpcReadOptions(included_fields=fields)
        return pa.ipc.open_file(self.source, options=options).get_batch(group)


def image_kind(kind: Any) -> ImageKind | None:
    """Return whether a column type holds paths, bytes or structs of both; None if no images."""
    import pyarrow as pa

    t = pa.types
    if isinstance(kind, pa.BaseExtensionType):
        return image_kind(kind.storage_type)
    if t.is_dictionary(kind):
        return image_kind(kind.value_type)
    if t.is_string(kind) or t.is_large_string(kind) or t.is_string_view(kind):
        return "path"
    if t.is_binary(kind) or t.is_large_binary(kind) or t.is_binary_view(kind):
        return "bytes"
    if t.is_fixed_size_binary(kind) or (_is_list(kind) and _is_byte(kind.value_type)):
        return "bytes"
    if t.is_struct(kind):
        field_kinds = {field.name: image_kind(field.type) for field in kind}
        if field_kinds.get("bytes") == "bytes" or field_kinds.get("path") == "path":
            return "struct"
    return None


def images_of(array: Any) -> Iterator[bytes | str | None]:
    """Yield each row's encoded image, its path, or None."""
    import pyarrow as pa
    import pyarrow.compute as pc

    t = pa.types
    if isinstance(array.type, pa.BaseExtensionType):
        yield from images_of(array.storage)
    elif t.is_dictionary(array.type):
        yield from images_of(array.dictionary_decode())
    elif t.is_struct(array.type):
        names = [field.name for field in array.type]
        fields = [images_of(pc.struct_field(array, n)) for n in ("bytes", "path") if n in names]
        for values in zip(*fields, strict=True):
            yield next(filter(None, values), None)
    elif _is_list(array.type):
        for row in array:
            yield row.values.to_numpy(zero_copy_only=False).tobytes() if row.is_valid else None
    else:
        for row in array:
            yield row.as_py()


def _width(kind: Any) -> int:
    """Estimate how many bytes of a column are read with one of its values."""
    try:
        return int(kind.bit_width)
    except ValueError:  # text, lists
        return 1 << 20


def _is_null(schema: Any, column: str, field: str) -> bool:
    import pyarrow as pa

    kind = schema.field(column).type
    index = kind.get_field_index(field)
    return index < 0 or bool(pa.types.is_null(kind.field(index).type))


def _is_list(kind: Any) -> bool:
    import pyarrow as pa

    t = pa.types
    checks = (
        t.is_list,
        t.is_large_list,
        t.is_fixed_size_list,
        t.is_list_view,
        t.is_large_list_view,
    )
    return any(check(kind) for check in checks)


def _is_byte(kind: Any) -> bool:
    import pyarrow as pa

    return any(check(kind) for check in (pa.types.is_uint8, pa.types.is_int8))
