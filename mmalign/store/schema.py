"""The columns of a shard, and what a row is.

D dimensions, V vectors of a row, P numbers of a position, N rows of a shard.
"""

import contextlib
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from mmalign.arrays import Floats, Hashes
from mmalign.errors import StoreError, VectorError
from mmalign.modality import IMAGE, TEXT
from mmalign.store.fields import ONLY_JSON, PREFIX, field_columns
from mmalign.values import to_json

UNIT_TOLERANCE = 1e-3
UNKNOWN = bytes(32)
ID_HASH, ID_ROW = "id_hash", "id_row"


@dataclass(frozen=True)
class Row:
    """One sample of a store."""

    id: str
    uri: str
    captions: tuple[str, ...]
    vectors: Mapping[str, Floats]
    """Unit vectors by modality, shape (V, D); a modality that is absent has none."""
    meta: str = "{}"
    """All other data of the sample from its source, as JSON."""
    thumbnail: bytes = field(default=b"", repr=False)
    """A small WebP image, or empty."""
    stamp: int = 0
    """64-bit hash of what is known of the source without reading the image; 0 if unknown."""
    checksum: bytes = UNKNOWN
    """SHA-256 of the encoded image; 32 zero bytes if unknown."""
    positions: Mapping[str, Floats] = field(default_factory=dict)
    """Where in their item the vectors are, by modality, shape (V, P); by default, vectors whose
    position is a number are counted from 0."""


def pair_vectors(image_D: Floats, texts_CD: Floats) -> dict[str, Floats]:
    """Return the vectors of a row with one image and any number of captions."""
    return {IMAGE.name: image_D[None], TEXT.name: texts_CD}


def meta_json(meta: dict[str, Any]) -> str:
    """Return the source data of a sample as the JSON of a row; see `values.json_value`."""
    return to_json(meta)


def meta_values(row_id: str, text: str) -> dict[str, Any]:
    """Return the source data of a row from its JSON.

    Raises:
        StoreError: It is not a JSON object; mmalign never writes that.
    """
    with contextlib.suppress(ValueError, RecursionError):
        values = json.loads(text)
        if isinstance(values, dict):
            return values
    raise StoreError(f"the metadata of row {row_id!r} is not a JSON object")


def id_hashes(ids: Sequence[str]) -> Hashes:
    """Hash ids, shape (N,); the same on every machine, so it can be stored."""
    digests = [
        hashlib.blake2b(i.encode("utf-8", "surrogatepass"), digest_size=8).digest() for i in ids
    ]
    return np.frombuffer(b"".join(digests), "<u8")


ROW_SCHEMA = pa.schema(
    [
        pa.field("id", pa.string(), nullable=False),
        pa.field("uri", pa.string(), nullable=False),
        pa.field("captions", pa.list_(pa.string()), nullable=False),
        pa.field("meta", pa.string(), nullable=False),
        pa.field("stamp", pa.uint64(), nullable=False),
        pa.field("checksum", pa.binary(32), nullable=False),
        # The hashes of all ids, ascending, and the row of each.
        pa.field(ID_HASH, pa.uint64(), nullable=False),
        pa.field(ID_ROW, pa.uint32(), nullable=False),
    ]
)
THUMBNAIL_SCHEMA = pa.schema([pa.field("thumbnail", pa.binary(), nullable=False)])
FIELDS = {
    field.name: field
    for field in (*list(ROW_SCHEMA)[:4], *THUMBNAIL_SCHEMA, *list(ROW_SCHEMA)[4:-2])
}
"""The columns of a row, without those of its vectors."""


@lru_cache
def vector_schema(dim: int, positions: tuple[tuple[str, int], ...]) -> pa.Schema:
    """Return the columns of the vectors: a list for each modality, and one of their positions.

    Args:
        dim: Dimensions.
        positions: The modalities, and how many numbers are a position.
    """
    fields = []
    for modality, size in positions:
        vectors = pa.list_(pa.list_(pa.float16(), dim))
        fields.append(pa.field(modality, vectors, nullable=False))
        if size:
            numbers = pa.list_(pa.list_(pa.float32(), size))
            fields.append(pa.field(position_column(modality), numbers, nullable=False))
    return pa.schema(fields)


def embedding_column(modality: str) -> str:
    """Return the name under which `Store.batches` gives the vectors of a modality."""
    return f"{modality}_embedding"


def position_column(modality: str) -> str:
    """Return the name of the column with the positions of the vectors of a modality."""
    return f"{modality}.position"


def row_batch(rows: Sequence[Row]) -> pa.RecordBatch:
    """Convert everything but vectors and thumbnails to Arrow columns."""
    columns: list[Any] = [
        pa.array([r.id for r in rows], pa.string()),
        pa.array([r.uri for r in rows], pa.string()),
        pa.array([list(r.captions) for r in rows], pa.list_(pa.string())),
        pa.array([r.meta for r in rows], pa.string()),
        pa.array([r.stamp for r in rows], pa.uint64()),
        pa.array([r.checksum for r in rows], pa.binary(32)),
        *id_columns([r.id for r in rows]),
    ]
    return with_fields(columns)


def with_fields(columns: Sequence[pa.Array]) -> pa.RecordBatch:
    """Return the columns of `ROW_SCHEMA` with those of the fields of the metadata."""
    found, only_json = field_columns(columns[ROW_SCHEMA.get_field_index("meta")].to_pylist())
    fields = [pa.field(PREFIX + name, column.type) for name, column in found.items()]
    schema = pa.schema([*ROW_SCHEMA, *fields], {ONLY_JSON: json.dumps(only_json)})
    return pa.record_batch([*columns, *found.values()], schema=schema)


def has_rows(schema: pa.Schema) -> bool:
    """Return whether a schema is one that `with_fields` writes."""
    first = len(ROW_SCHEMA)
    if not pa.schema(list(schema)[:first]).equals(ROW_SCHEMA):
        return False
    return all(field.name.startswith(PREFIX) for field in list(schema)[first:])


def id_columns(ids: Sequence[str]) -> tuple[pa.Array, pa.Array]:
    """Return the columns that find rows by id: sorted hashes, and the row of each."""
    hashes_N = id_hashes(ids)
    order_N = np.argsort(hashes_N, kind="stable")
    return pa.array(hashes_N[order_N]), pa.array(order_N.astype(np.uint32))


def thumbnail_batch(thumbnails: Sequence[bytes]) -> pa.RecordBatch | None:
    """Convert thumbnails to an Arrow column; None if there are none."""
    if not any(thumbnails):
        return None
    return pa.record_batch([pa.array(thumbnails, pa.binary())], schema=THUMBNAIL_SCHEMA)


def vector_batch(rows: Sequence[Row], dim: int, positions: Mapping[str, int]) -> pa.RecordBatch:
    """Convert the vectors to Arrow columns; they are checked and become float16.

    Raises:
        VectorError: A vector has another number of dimensions, or its norm is not 1; a modality
            is not one of the store; vectors and positions do not fit together.
    """
    for row in rows:
        for unknown in set(row.vectors) - set(positions):
            raise VectorError(f"{row.id}: the store has no vectors of {unknown!r}")
    columns: list[Any] = []
    none_VD = np.zeros((0, dim), np.float32)
    for modality, size in positions.items():
        parts = [row.vectors.get(modality, none_VD) for row in rows]
        vectors = _check(parts, modality, dim)
        counts = [len(part) for part in parts]
        offsets = pa.array(np.cumsum([0, *counts]), pa.int32())
        columns.append(pa.ListArray.from_arrays(offsets, fixed_lists(vectors)))
        if size:
            numbers = _all_positions(rows, modality, counts, size)
            columns.append(pa.ListArray.from_arrays(offsets, fixed_lists(numbers)))
    return pa.record_batch(columns, schema=vector_schema(dim, tuple(positions.items())))


def _all_positions(rows: Sequence[Row], modality: str, counts: Sequence[int], size: int) -> Floats:
    if size == 1 and not any(modality in row.positions for row in rows):
        counted = np.arange(sum(counts)) - np.repeat(np.cumsum([0, *counts])[:-1], counts)
        positions: Floats = counted.astype(np.float32)[:, None]
        return positions
    numbers = [_positions(r, modality, n, size) for r, n in zip(rows, counts, strict=True)]
    return np.concatenate([np.zeros((0, size), np.float32), *numbers])


def _positions(row: Row, modality: str, count: int, size: int) -> Floats:
    found = row.positions.get(modality)
    if found is None and not count:
        found = np.zeros((0, size), np.float32)
    if found is None and size == 1:
        found = np.arange(count, dtype=np.float32)[:, None]
    if found is None or found.shape != (count, size):
        shape = None if found is None else found.shape
        wanted = f"({count}, {size})"
        raise VectorError(f"{row.id}: positions of {modality} must be {wanted}, got {shape}")
    return found.astype(np.float32)


def _check(parts: Sequence[Floats], modality: str, dim: int) -> NDArray[np.float16]:
    for part in parts:
        if part.ndim != 2 or part.shape[1] != dim:
            raise VectorError(f"{modality}: vectors must have shape (V, {dim}), got {part.shape}")
    vectors = np.concatenate([np.zeros((0, dim), np.float32), *parts])
    norms = np.linalg.norm(vectors.astype(np.float32), axis=1)
    wrong = np.flatnonzero(~(np.abs(norms - 1) < UNIT_TOLERANCE))
    if len(wrong):
        raise VectorError(f"{modality}: vector {wrong[0]} has norm {norms[wrong[0]]}, not 1")
    return vectors.astype(np.float16)


def fixed_lists(matrix: NDArray[Any]) -> pa.FixedSizeListArray:
    """Return the rows of a matrix as an Arrow column."""
    return pa.FixedSizeListArray.from_arrays(pa.array(matrix.reshape(-1)), matrix.shape[1])
