"""The columns of a shard.

D dimensions. An image has one embedding; its captions have one each, so the text column is a list.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from mmalign.arrays import Floats
from mmalign.errors import VectorError
from mmalign.values import to_json

UNIT_TOLERANCE = 1e-3
UNKNOWN = bytes(32)


@dataclass(frozen=True)
class Row:
    """One sample of a store."""

    id: str
    uri: str
    captions: tuple[str, ...]
    image_embedding: Floats
    """Unit norm, shape (D,)."""
    text_embeddings: Floats
    """Unit norm, one row per caption, shape (captions, D)."""
    meta: str = "{}"
    """All other data of the sample from its source, as JSON."""
    thumbnail: bytes = field(default=b"", repr=False)
    """A small WebP image, or empty."""
    stamp: int = 0
    """64-bit hash of what is known of the source without reading the image; 0 if unknown."""
    checksum: bytes = UNKNOWN
    """SHA-256 of the encoded image; 32 zero bytes if unknown."""


def meta_json(meta: dict[str, Any]) -> str:
    """Return the source data of a sample as the JSON of a row; see `values.json_value`."""
    return to_json(meta)


@lru_cache
def schema(dim: int) -> pa.Schema:
    """Return the Arrow schema of a shard with embeddings of `dim` dimensions."""
    vector = pa.list_(pa.float16(), dim)
    return pa.schema(
        [
            pa.field("id", pa.string(), nullable=False),
            pa.field("uri", pa.string(), nullable=False),
            pa.field("captions", pa.list_(pa.string()), nullable=False),
            pa.field("meta", pa.string(), nullable=False),
            pa.field("thumbnail", pa.binary(), nullable=False),
            pa.field("stamp", pa.uint64(), nullable=False),
            pa.field("checksum", pa.binary(32), nullable=False),
            pa.field("image_embedding", vector, nullable=False),
            pa.field("text_embedding", pa.list_(vector), nullable=False),
        ]
    )


def to_batch(rows: Sequence[Row], dim: int) -> pa.RecordBatch:
    """Convert rows to Arrow columns; vectors are checked and become float16."""
    counts = [len(row.captions) for row in rows]
    images = _check(np.stack([r.image_embedding for r in rows]), "image_embedding", dim)
    texts = np.concatenate([r.text_embeddings.reshape(-1, dim) for r in rows])
    texts = _check(texts, "text_embedding", dim)
    if len(texts) != sum(counts):
        raise VectorError(f"{len(texts)} text embeddings for {sum(counts)} captions")
    columns: list[Any] = [
        pa.array([r.id for r in rows], pa.string()),
        pa.array([r.uri for r in rows], pa.string()),
        pa.array([list(r.captions) for r in rows], pa.list_(pa.string())),
        pa.array([r.meta for r in rows], pa.string()),
        pa.array([r.thumbnail for r in rows], pa.binary()),
        pa.array([r.stamp for r in rows], pa.uint64()),
        pa.array([r.checksum for r in rows], pa.binary(32)),
        _vectors(images, dim),
        pa.ListArray.from_arrays(
            pa.array(np.concatenate([[0], np.cumsum(counts)]), pa.int32()), _vectors(texts, dim)
        ),
    ]
    return pa.record_batch(columns, schema=schema(dim))


def _check(vectors: Floats, name: str, dim: int) -> NDArray[np.float16]:
    if vectors.ndim != 2 or vectors.shape[1] != dim:
        raise VectorError(f"{name} must have {dim} dimensions, got shape {vectors.shape}")
    norms = np.linalg.norm(vectors.astype(np.float32), axis=1)
    wrong = np.flatnonzero(~(np.abs(norms - 1) < UNIT_TOLERANCE))
    if len(wrong):
        raise VectorError(f"{name}: row {wrong[0]} has norm {norms[wrong[0]]}, not 1")
    return vectors.astype(np.float16)


def _vectors(vectors: NDArray[np.float16], dim: int) -> pa.FixedSizeListArray:
    return pa.FixedSizeListArray.from_arrays(pa.array(vectors.reshape(-1)), dim)
