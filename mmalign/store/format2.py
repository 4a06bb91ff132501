"""Format 2, in which a generation lists its shards itself, and each shard is one file.

Such a store is read as it is; `upgrade.py` makes one of format 3 of it.
"""

import base64
from functools import lru_cache
from typing import Any

import pyarrow as pa

from mmalign.store.groups import Shard, StoredFile, compressed

FORMAT = 2
IMAGE, TEXT = "image_embedding", "text_embedding"


def shard(values: dict[str, Any]) -> Shard:
    """Read one shard of a manifest; all its roles are the same file.

    Raises:
        ValueError, KeyError, TypeError: The values are not those of a shard.
    """
    file = StoredFile(values["name"], values["bytes"], values["sha256"])
    bits = base64.b64decode(values.get("deleted", ""), validate=True)
    return Shard(
        file.name.removesuffix(".arrow"),
        values["rows"],
        file,
        file,
        file,
        deleted_rows=values.get("deleted_rows", 0),
        deleted=compressed(bits) if bits else "",
    )


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
            pa.field(IMAGE, vector, nullable=False),
            pa.field(TEXT, pa.list_(vector), nullable=False),
        ]
    )
