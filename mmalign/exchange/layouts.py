"""Write rows of a store in the layouts of other programs: parquet, a Hugging Face dataset.

Rows are selected by number, ascending, and written shard by shard.
"""

import hashlib
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from mmalign import files
from mmalign.arrays import Ints
from mmalign.store.reader import Store

Tick = Callable[[int], object]


def write_parquet(
    store: Store, numbers: Ints, file: Path, tick: Tick, *, thumbnails: bool = False
) -> None:
    """Write all columns as one parquet file, one row group per shard; vectors stay float16."""
    names = [name for name in store.columns if thumbnails or name != "thumbnail"]
    metadata = {"mmalign.model": json.dumps(asdict(store.manifest.model))}
    with open_parquet(file, store.arrow_schema(names).with_metadata(metadata)) as out:
        for batch in store.batches(names, numbers):
            out.write_batch(batch)
            tick(len(batch))


@contextmanager
def open_parquet(file: Path, fields: pa.Schema) -> Iterator[Any]:
    """Yield a writer of a parquet file that appears only when it is complete."""
    with (
        files.atomic_file(file) as draft,
        pq.ParquetWriter(draft, fields, compression="zstd", use_dictionary=False) as out,
    ):
        yield out


def write_dataset(store: Store, numbers: Ints, folder: Path, tick: Tick) -> None:
    """Write the folder that `datasets.load_from_disk` opens; thumbnails become its images."""
    files.make_folder(folder)
    names = [name for name in store.columns if name not in ("stamp", "checksum")]
    thumbnails = (batch["thumbnail"] for batch in store.batches(["thumbnail"], numbers))
    if not any(pc.sum(pc.binary_length(column)).as_py() for column in thumbnails):
        names.remove("thumbnail")
    shards = sum(1 for _ in store.batches(["id"], numbers))
    file_names = [f"data-{shard:05d}-of-{shards:05d}.arrow" for shard in range(shards)]
    for name, stored in zip(file_names, store.batches(names, numbers), strict=True):
        batch = _with_images(stored) if "thumbnail" in names else stored
        with (
            files.atomic_file(folder / name) as draft,
            pa.ipc.new_stream(draft, batch.schema) as out,
        ):
            out.write_batch(batch)
        tick(len(batch))
    info = {
        "citation": "",
        "description": f"Embeddings of {store.manifest.model.identity}, exported by mmalign.",
        "features": {
            "image" if name == "thumbnail" else name: _feature(field.type, name)
            for name, field in zip(names, store.arrow_schema(names), strict=True)
        },
        "homepage": "",
        "license": "",
    }
    files.write_json(folder / "dataset_info.json", info)
    chosen = store.manifest.recorded_hash.encode() + numbers.tobytes()
    state: dict[str, Any] = {
        "_data_files": [{"filename": name} for name in file_names],
        "_fingerprint": hashlib.sha256(chosen).hexdigest()[:16],
        "_format_columns": None,
        "_format_kwargs": {},
        "_format_type": None,
        "_output_all_columns": False,
        "_split": None,
    }
    files.write_json(folder / "state.json", state)


def _with_images(batch: pa.RecordBatch) -> pa.RecordBatch:
    """Convert thumbnails to the image struct of `datasets`; null if there is no thumbnail."""
    column_index = batch.column_names.index("thumbnail")
    content = batch["thumbnail"]
    paths = pa.nulls(len(batch), pa.string())
    empty = pc.equal(pc.binary_length(content), 0)
    images = pa.StructArray.from_arrays([content, paths], ["bytes", "path"], mask=empty)
    return batch.set_column(column_index, "image", images)


def _feature(kind: pa.DataType, name: str) -> dict[str, Any]:
    """Describe a column as `datasets` does."""
    if name == "thumbnail":
        return {"_type": "Image"}
    if pa.types.is_fixed_size_list(kind):
        inner = _feature(kind.value_type, "")
        return {"feature": inner, "length": kind.list_size, "_type": "Sequence"}
    if pa.types.is_list(kind):
        return {"feature": _feature(kind.value_type, ""), "_type": "Sequence"}
    return {"dtype": {"halffloat": "float16"}.get(str(kind), str(kind)), "_type": "Value"}
