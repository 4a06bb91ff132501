"""The layout of clip-retrieval: numbered parts, each a few files aligned row by row.

    img_emb/img_emb_0.npy  text_emb/text_emb_0.npy  metadata/metadata_0.parquet

Shapes: N rows, P captions, D dimensions.
"""

import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from mmalign import files
from mmalign.arrays import Halves, Ints
from mmalign.arrow_values import python_rows
from mmalign.errors import DataError
from mmalign.exchange.layouts import Tick, open_parquet
from mmalign.progress import say
from mmalign.store.reader import Store

KINDS = ("img_emb", "metadata", "text_emb")
ROWS_PER_PART = 1_000_000
ROWS_AT_A_TIME = 8192
PART_FIELDS = pa.schema(
    [
        pa.field("image_path", pa.string()),
        pa.field("caption", pa.string()),
        pa.field("key", pa.string()),
        pa.field("captions", pa.list_(pa.string())),
        pa.field("meta", pa.string()),
    ]
)


def write_parts(
    store: Store, numbers: Ints, folder: Path, tick: Tick, rows_per_part: int = ROWS_PER_PART
) -> None:
    """Write numbered parts as clip-retrieval does: image vectors, text vectors, metadata.

    Row i of each file of a part is the same image, so only the first caption has a vector; an image
    without captions has a zero text vector. Without any captions, no text files are written.
    """
    starts = range(0, len(numbers), rows_per_part)
    captions = (batch["captions"] for batch in store.batches(["captions"], numbers))
    texts = any(_lengths(column).any() for column in captions)
    kinds = KINDS if texts else KINDS[:2]
    for kind in kinds:
        files.make_folder(folder / kind)
    for part, start in enumerate(starts):
        number = str(part).zfill(len(str(len(starts) - 1)))
        chosen = numbers[start : start + rows_per_part]
        paths = {kind: folder / kind / f"{kind}_{number}" for kind in kinds}
        _write_part(store, chosen, paths, tick)


def _write_part(store: Store, numbers: Ints, paths: dict[str, Path], tick: Tick) -> None:
    dim = store.manifest.model.dim
    shape = (len(numbers), dim)
    metadata = paths["metadata"].with_suffix(".parquet")
    with _npy(paths["img_emb"], shape) as write, open_parquet(metadata, PART_FIELDS) as rows:
        for batch in store.batches(["id", "uri", "captions", "meta", "image_embedding"], numbers):
            write(_first(batch["image_embedding"], dim))
            rows.write_batch(_metadata_batch(batch))
            tick(len(batch))
    if "text_emb" in paths:
        with _npy(paths["text_emb"], shape) as write:
            for batch in store.batches(["text_embedding"], numbers):
                write(_first(batch["text_embedding"], dim))


@contextmanager
def _npy(path: Path, shape: tuple[int, int]) -> Iterator[Callable[[Halves], object]]:
    """Yield a function that appends vectors to a float16 .npy file of a known shape."""
    header = {"descr": "<f2", "fortran_order": False, "shape": shape}
    with files.atomic_file(path.with_suffix(".npy")) as draft:
        np.lib.format.write_array_header_1_0(draft, header)
        yield lambda vectors_ND: draft.write(np.ascontiguousarray(vectors_ND).data)


def _flat(column: pa.Array, dim: int) -> Halves:
    flat: Halves = column.flatten().to_numpy(zero_copy_only=True)
    return flat.reshape(-1, dim)


def _lengths(column: pa.Array) -> NDArray[np.int32]:
    lengths: NDArray[np.int32] = column.value_lengths().to_numpy()
    return lengths


def _first(column: pa.Array, dim: int) -> Halves:
    """Return the first vector of each row, or zeros, shape (N, D)."""
    if not pa.types.is_list(column.type):
        return _flat(column, dim)
    lengths_N = _lengths(column)
    flat_VD = _flat(column.flatten(), dim)
    firsts_N = np.cumsum(lengths_N) - lengths_N
    vectors_ND = np.zeros((len(column), dim), np.float16)
    vectors_ND[lengths_N > 0] = flat_VD[firsts_N[lengths_N > 0]]
    return vectors_ND


def _metadata_batch(batch: pa.RecordBatch) -> pa.RecordBatch:
    captions = batch["captions"]
    lengths_N = _lengths(batch["captions"])
    firsts_N = pa.array(np.cumsum(lengths_N) - lengths_N, mask=lengths_N == 0)
    columns = [batch["uri"], captions.flatten().take(firsts_N), batch["id"], captions]
    return pa.record_batch([*columns, batch["meta"]], schema=PART_FIELDS)


@dataclass(frozen=True)
class Part:
    """One numbered part of a clip-retrieval folder: files aligned row by row."""

    number: int
    rows: int
    dim: int
    images: Path
    metadata: Path
    texts: Path | None


def find_parts(folder: Path) -> list[Part]:
    """Return the parts of a folder, sorted by number; only shapes and row counts are read.

    Raises:
        DataError: There are no parts, a file is missing or unreadable, or shapes do not match.
    """
    found = {kind: _files_by_number(folder / kind) for kind in KINDS}
    if not any(found.values()):
        raise DataError(f"{folder}: no img_emb/img_emb_0.npy: not a folder of clip-retrieval")
    kinds = [kind for kind in found if found[kind] or kind != "text_emb"]
    parts = []
    for number in sorted({n for by_number in found.values() for n in by_number}):
        for kind in kinds:
            if number not in found[kind]:
                other = next(
                    by_number[number] for by_number in found.values() if number in by_number
                )
                raise DataError(f"{folder / kind}: part {number} is missing, but {other} exists")
        parts.append(_part(number, *(found[kind][number] for kind in kinds)))
    for part in parts:
        if part.dim != parts[0].dim:
            a, b = parts[0], part
            raise DataError(f"{b.images}: {b.dim} dimensions, but {a.images} has {a.dim}")
    return parts


def _files_by_number(folder: Path) -> dict[int, Path]:
    """Return the files of a folder, keyed by the number at the end of their names."""
    found: dict[int, Path] = {}
    for file in sorted(folder.glob("*.parquet" if folder.name == "metadata" else "*.npy")):
        digits = re.search(r"(\d+)$", file.stem)
        if not digits:
            raise DataError(f"{file}: its name does not end with a part number")
        if int(digits[1]) in found:
            raise DataError(f"{file}: the same part number as {found[int(digits[1])].name}")
        found[int(digits[1])] = file
    return found


def _part(number: int, images: Path, metadata: Path, texts: Path | None = None) -> Part:
    image_ND = _vectors(images)
    try:
        with pa.memory_map(os.fsencode(metadata)) as file:
            rows = {metadata: pq.read_metadata(file).num_rows}
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{metadata}: cannot be read: {error}") from None
    if texts:
        text_ND = _vectors(texts)
        rows[texts] = len(text_ND)
        if text_ND.shape[1] != image_ND.shape[1]:
            dims = f"{text_ND.shape[1]} dimensions, but {images} has {image_ND.shape[1]}"
            raise DataError(f"{texts}: {dims}")
    for file, count in rows.items():
        if count != len(image_ND):
            raise DataError(f"{file}: {count} rows, but {images} has {len(image_ND)}")
    return Part(number, len(image_ND), image_ND.shape[1], images, metadata, texts)


def _vectors(file: Path) -> NDArray[Any]:
    """Memory-map a .npy file of vectors."""
    try:
        vectors_ND: NDArray[Any] = np.load(file, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError) as error:
        raise DataError(f"{file}: cannot be read: {error}") from None
    if vectors_ND.ndim != 2 or vectors_ND.dtype not in (np.float16, np.float32):
        kind = f"{vectors_ND.dtype} of shape {vectors_ND.shape}"
        raise DataError(
            f"{file}: {kind}, but must be float16 or float32 of shape (rows, dimensions)"
        )
    return vectors_ND


def read_records(
    part: Part, columns: Sequence[str] | None = None
) -> Iterator[list[dict[str, Any]]]:
    """Yield the metadata of the rows of a part in batches.

    Args:
        part: The part.
        columns: Names of columns, all by default; absent ones are left out.
    """
    with pa.memory_map(os.fsencode(part.metadata)) as source, pq.ParquetFile(source) as file:
        column_names = [
            name for name in file.schema_arrow.names if not name.startswith("__index_level_")
        ]
        wanted = [name for name in column_names if columns is None or name in columns]
        batches = file.iter_batches(ROWS_AT_A_TIME, columns=wanted)
        reported: set[str] = set()
        while True:
            try:
                batch = next(batches, None)
            except (OSError, pa.ArrowException) as error:
                raise DataError(f"{part.metadata}: cannot be read: {error}") from None
            if batch is None:
                return
            rows, unread = python_rows(batch)
            for name in sorted(unread.keys() - reported):
                kind = f"type {unread[name]} is not supported"
                say(f"{part.metadata}: column {name!r} is left out: {kind}")
            reported |= unread.keys()
            yield rows


def read_part(
    part: Part,
) -> Iterator[tuple[list[dict[str, Any]], NDArray[np.float32], NDArray[np.float32] | None]]:
    """Yield metadata records, image vectors (N, D) and text vectors (N, D), if there are any."""
    images_ND = _vectors(part.images)
    texts_ND = _vectors(part.texts) if part.texts else None
    first = 0
    for records in read_records(part):
        rows = slice(first, first + len(records))
        first += len(records)
        texts = None if texts_ND is None else texts_ND[rows].astype(np.float32)
        yield records, images_ND[rows].astype(np.float32), texts
