"""Write a store of format 2, as mmalign did before format 3."""

import base64
import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from mmalign.store import ModelCard, Row, Store
from mmalign.store import manifest as manifests
from mmalign.store.format2 import schema


def write_format2(
    path: Path, shards: Sequence[Sequence[Row]], card: ModelCard, deleted: Sequence[int] = ()
) -> None:
    """Write shards of rows; `deleted` are row numbers."""
    (path / "shards").mkdir(parents=True)
    entries, first = [], 0
    for number, rows in enumerate(shards):
        name = f"{number:016x}.arrow"
        with pa.OSFile(str(path / "shards" / name), "wb") as sink:
            batch = _batch(rows, card.dim)
            with pa.ipc.new_file(sink, batch.schema) as out:
                out.write_batch(batch)
        content = (path / "shards" / name).read_bytes()
        gone = np.isin(np.arange(first, first + len(rows)), deleted)
        bits = base64.b64encode(np.packbits(gone).tobytes()).decode() if gone.any() else ""
        entries.append(
            {
                "name": name,
                "rows": len(rows),
                "bytes": len(content),
                "sha256": hashlib.sha256(content).hexdigest(),
                "deleted_rows": int(gone.sum()),
                "deleted": bits,
            }
        )
        first += len(rows)
    model = {k: v for k, v in asdict(card).items() if k in ("identity", "source", "dim")}
    write_manifest(path, {"format": 2, "generation": 1, "model": model, "shards": entries})


def write_manifest(path: Path, values: dict[str, Any]) -> None:
    values = {"index": None, **values}
    values["sha256"] = hashlib.sha256(manifests.canonical(values)).hexdigest()
    manifests.path_of(path, values["generation"]).write_text(json.dumps(values, indent=1) + "\n")


def all_columns(store: Store) -> dict[str, list[Any]]:
    """All live rows, by column."""
    return {name: store.column(name) for name in store.columns}


def _batch(rows: Sequence[Row], dim: int) -> pa.RecordBatch:
    images = np.stack([row.vectors["image"][0] for row in rows]).astype(np.float16)
    texts = np.concatenate([row.vectors["text"] for row in rows]).astype(np.float16)
    offsets = np.cumsum([0, *(len(row.captions) for row in rows)])
    vectors = [
        pa.FixedSizeListArray.from_arrays(pa.array(v.reshape(-1)), dim) for v in (images, texts)
    ]
    columns = [
        pa.array([row.id for row in rows]),
        pa.array([row.uri for row in rows]),
        pa.array([list(row.captions) for row in rows], pa.list_(pa.string())),
        pa.array([row.meta for row in rows]),
        pa.array([row.thumbnail for row in rows], pa.binary()),
        pa.array([row.stamp for row in rows], pa.uint64()),
        pa.array([row.checksum for row in rows], pa.binary(32)),
        vectors[0],
        pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), vectors[1]),
    ]
    return pa.record_batch(columns, schema=schema(dim))
