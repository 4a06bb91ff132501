"""Tables with an image column (a path, a URL, or the bytes) and caption columns.

Rows that name the same image are one sample with several captions, as in the csv files that come
with many caption sets.
"""

import contextlib
import csv
import functools
import io
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import PurePosixPath
from typing import Any

from mmalign.data import places
from mmalign.data.kinds import suffix
from mmalign.data.samples import (
    CAPTION_ALIASES,
    Found,
    Record,
    SampleProblem,
    Skip,
    captions_in,
    clean,
)
from mmalign.errors import DataError

# fmt: off
IMAGE_COLUMNS = (
    "image", "image_path", "img", "img_path", "filepath", "file_path", "path", "file", "filename",
    "file_name", "jpg", "jpeg", "png", "webp", "image_bytes", "bytes", "url", "image_url", "uri",
)
# fmt: on
ID_COLUMNS = ("id", "key", "__key__", "image_id")
Row = dict[str, Any]


def scan(path: str, caption_keys: Sequence[str]) -> Found:
    """Yield one record an image, in the order of rows."""
    name, folder = PurePosixPath(path).stem, os.path.dirname(path)
    problems: list[Skip] = []
    with _readable(path):
        columns, rows, binary = _open(path, problems)
    image_column = next((c for c in IMAGE_COLUMNS if c in columns), None)
    if image_column is None:
        raise DataError(
            f"{path}: no image column; it has {', '.join(columns)}; "
            f"looked for {', '.join(IMAGE_COLUMNS)}"
        )
    id_column = next((c for c in ID_COLUMNS if c in columns), None)
    found: dict[str, Record] = {}
    for number, row in _until_broken(path, rows):
        in_row = binary == image_column
        image = f"row {number}" if in_row else row.get(image_column)
        given = row.get(id_column) if id_column else None
        is_given = given not in (None, "")
        key = f"{name}/{given if is_given else image}"
        uri = f"{path}#row={number}"
        if not image:
            problems.append(Skip(key, uri, "no image path"))
            continue
        try:
            captions = captions_in(row, caption_keys)
        except SampleProblem as problem:
            captions = ()
            problems.append(Skip(key, uri, str(problem), lost="captions"))
        used = {image_column, id_column, *caption_keys, *CAPTION_ALIASES}
        meta = {k: v for k, v in row.items() if k not in used and _plain(v)}
        if in_row:
            record = Record(key, uri, path, row=number, column=image_column, captions=captions)
        else:
            place = _resolve(str(image), folder)
            record = Record(key, place, place, captions=captions)
        known = found.get(record.uri, replace(record, captions=(), meta=meta, given_id=is_given))
        found[record.uri] = replace(known, captions=clean([*known.captions, *captions]))
    yield from problems
    yield from found.values()


@contextlib.contextmanager
def _readable(path: str) -> Iterator[None]:
    """Turn whatever the reader of a broken table raises into one line."""
    try:
        yield
    except DataError:
        raise
    except Exception as error:
        raise DataError(f"{path}: cannot be read as {suffix(path)}: {error}") from None


def _until_broken(path: str, rows: Iterator[tuple[int, Row]]) -> Iterator[tuple[int, Row]]:
    with _readable(path):
        yield from rows


@functools.lru_cache(maxsize=4)
def _row_group(path: str, group: int, column: str) -> Any:
    with _parquet(path) as file:
        return file.read_row_group(group, columns=[column]).column(0)


@functools.lru_cache(maxsize=64)
def _group_ends(path: str) -> list[int]:
    with _parquet(path) as file:
        sizes = [file.metadata.row_group(g).num_rows for g in range(file.num_row_groups)]
    return [sum(sizes[: g + 1]) for g in range(len(sizes))]


def read_cell(path: str, row: int, column: str) -> bytes:
    """Read the image bytes of one parquet row; neighbouring rows come from a small cache."""
    ends = _group_ends(path)
    group = next(g for g, end in enumerate(ends) if row < end)
    value = _row_group(path, group, column)[row - (ends[group - 1] if group else 0)].as_py()
    content = value.get("bytes") if isinstance(value, dict) else value
    if not content:
        raise SampleProblem("no image bytes")
    return bytes(content)


def _open(
    path: str, problems: list[Skip]
) -> tuple[list[str], Iterator[tuple[int, Row]], str | None]:
    """Return the column names, the numbered rows, and the column that holds image bytes, if any."""
    if suffix(path) == ".parquet":
        return _open_parquet(path)
    if suffix(path) == ".jsonl":
        rows = list(_json_rows(path, problems))
        return list(dict.fromkeys(k for _, row in rows for k in row)), iter(rows), None
    with places.open_file(path) as file:
        # A caption that is not UTF-8 must cost one sample, not the file.
        content = file.read().decode("utf-8-sig", errors="surrogateescape")
    # Only these are ends of lines in a csv; strict, as an open quote would swallow the rows after.
    lines = io.StringIO(content, newline="")
    delimiter = "\t" if suffix(path) == ".tsv" else ","
    reader = csv.DictReader(lines, delimiter=delimiter, strict=True)
    return list(reader.fieldnames or ()), enumerate(_csv_rows(reader)), None


def _csv_rows(reader: "csv.DictReader[str]") -> Iterator[Row]:
    while True:
        first = reader.line_num + 1
        try:
            row = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            hint = "a quote not closed, or not doubled inside a field?"
            raise ValueError(f"row that starts in line {first}: {error} ({hint})") from None
        yield {k: _as_bytes(v) for k, v in row.items() if k}


def _parquet(path: str) -> Any:
    import fsspec
    import pyarrow.parquet as pq

    return pq.ParquetFile(fsspec.open(path, "rb").open() if places.is_url(path) else path)


def _open_parquet(path: str) -> tuple[list[str], Iterator[tuple[int, Row]], str | None]:
    import pyarrow as pa

    # The file may have been written anew since it was last scanned.
    _group_ends.cache_clear()
    _row_group.cache_clear()
    file = _parquet(path)
    schema = file.schema_arrow
    binary = next((c for c in IMAGE_COLUMNS if c in schema.names), None)
    if binary is not None:
        kind = schema.field(binary).type
        if not (pa.types.is_binary(kind) or pa.types.is_large_binary(kind)
                or pa.types.is_struct(kind)):  # fmt: skip
            binary = None
    light = [c for c in schema.names if c != binary]

    def rows() -> Iterator[tuple[int, Row]]:
        number = 0
        with file:
            for batch in file.iter_batches(columns=light):
                # With no column to read, a batch still knows how many rows it stands for.
                values = batch.to_pylist() if light else [{}] * batch.num_rows
                for row in values:
                    yield number, row
                    number += 1

    return schema.names, rows(), binary


def _json_rows(path: str, problems: list[Skip]) -> Iterator[tuple[int, Row]]:
    with places.open_file(path) as file:
        for number, line in enumerate(file):
            if not line.strip():
                continue
            uri = f"{path}#row={number}"
            try:
                row = json.loads(line)
            except (json.JSONDecodeError, UnicodeDecodeError) as error:
                problems.append(Skip(uri, uri, f"line is not valid JSON: {error}"))
                continue
            if isinstance(row, dict):
                yield number, row
            else:
                problems.append(Skip(uri, uri, "line holds no JSON object"))


def _resolve(image: str, folder: str) -> str:
    if places.is_url(image):
        return image
    path = places.local_path(image)
    return path if os.path.isabs(path) else os.path.join(folder, path)


def _as_bytes(value: Any) -> Any:
    """Give back the raw bytes of a cell that was not UTF-8, so that its caption is refused."""
    try:
        if isinstance(value, str):
            value.encode()
        return value
    except UnicodeEncodeError:
        return value.encode(errors="surrogateescape")


def _plain(value: Any) -> bool:
    return value is None or isinstance(value, str | int | float | bool | list | dict)
