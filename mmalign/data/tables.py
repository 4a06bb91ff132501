"""Read tables with an image column (a path, a URL, or the bytes) and caption columns.

Rows that name the same image form one sample with several captions, as in the csv files of many
caption data sets. Such rows may be anywhere in the table, so they are sorted on disk: memory use
does not grow with the table.
"""

import hashlib
import json
import math
import os
import pickle
import sqlite3
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from itertools import groupby, islice
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar
from urllib.parse import unquote

from mmalign.arrow_values import python_rows
from mmalign.data import delimited, json_rows, places, row_images
from mmalign.data.arrow_tables import ROWS_AT_A_TIME, ImageKind, Table, image_kind, open_table
from mmalign.data.columns import (
    Columns,
    ReadOptions,
    escaped,
    find_columns,
    missing_keys,
    no_image_column,
    shown,
)
from mmalign.data.kinds import suffix
from mmalign.data.samples import Record, SampleProblem, ScanResults, Skip, clean_captions
from mmalign.errors import DataError
from mmalign.progress import say
from mmalign.values import json_value

TEXT_SUFFIXES = {".csv": ",", ".tsv": "\t"}
JSON_SUFFIXES = (".jsonl", ".ndjson", ".json")
ARROW_SUFFIXES = (".parquet", ".arrow", ".feather")
SUFFIXES = (*ARROW_SUFFIXES, *TEXT_SUFFIXES, *JSON_SUFFIXES)
COMPRESSED = (".gz", ".bz2", ".xz", ".zst")
# A longer value is not metadata: it is another image, a document or an attack.
MAX_BYTES, MAX_JSON = 4096, 1 << 20
# No file system allows longer paths; a longer text is an encoded image.
MAX_PATH = 4096
MAX_NAME, MAX_REASON = 1024, 300
# The maximum number of column names of a JSON table before the rest is not listed.
MAX_NAMES = 1000
T = TypeVar("T")
Row = dict[str, Any]
Convert = Callable[[str, Any], Any]


def table_suffix(path: str) -> str | None:
    """Return the extension that gives the table format, without the compression suffix."""
    end = suffix(path)
    if end in COMPRESSED:
        end = suffix(path[: -len(end)])
        return end if end not in ARROW_SUFFIXES and end in SUFFIXES else None
    return end if end in SUFFIXES else None


def is_table(path: str) -> bool:
    """Return whether a path or URL is a table by its extension."""
    return table_suffix(path) is not None


def tables_in(folder: str) -> list[str]:
    """List the tables of a folder that represents one table; empty for a folder of images.

    These are folders named like tables, as Spark writes them, and data sets saved by Hugging Face.
    """
    end = table_suffix(folder.rstrip("/"))
    if os.path.isfile(os.path.join(folder, "dataset_info.json")):
        end = ".arrow"
    if end is None:
        return []
    # Spark uses names with these prefixes for its own files.
    paths = (str(p) for p in sorted(Path(folder).rglob(f"*{end}")) if p.name[0] not in "._")
    return [path for path in paths if os.path.isfile(path)]


def scan_folder(folder: str, paths: Sequence[str], options: ReadOptions) -> ScanResults:
    """Yield the records of all tables of a folder; `year=2020` in a path becomes a column.

    Raises:
        DataError: One of them cannot be read.
    """
    numbers = delimited.NumberColumns()
    partitions = [_partition(os.path.relpath(path, folder)) for path in paths]
    for values in partitions:
        numbers.see(values)
    for path, values in zip(paths, partitions, strict=True):
        columns = {name: numbers.value(name, value) for name, value in values.items()}
        for found in scan(path, options):
            if isinstance(found, Record) and columns:
                yield replace(found, meta={**columns, **found.meta})
            else:
                yield found


def _partition(path: str) -> dict[str, str]:
    """Return the values encoded in a path: `a=1/b=x/part.parquet` gives {a: 1, b: x}."""
    pairs = (part.partition("=") for part in Path(path).parts[:-1])
    # Hive's name for a missing value.
    known = {name: unquote(value) for name, equal, value in pairs if name and equal}
    return {name: value for name, value in known.items() if value != "__HIVE_DEFAULT_PARTITION__"}


def scan(path: str, options: ReadOptions) -> ScanResults:
    """Yield one record per image, in row order.

    Raises:
        DataError: The file cannot be read as its format, or has no image column.
    """
    if table_suffix(path) in ARROW_SUFFIXES:
        yield from _scan_arrow(path, options)
    elif table_suffix(path) in TEXT_SUFFIXES:
        yield from _scan_text(path, options)
    else:
        yield from _scan_json(path, options)


def read_cell(path: str, row: int, column: str) -> bytes:
    """Read the image of one row of a table.

    Raises:
        SampleProblem: The row has no image.
        OSError: The row names a file that cannot be read.
    """
    image = row_images.read_row_image(path, row, column)
    if isinstance(image, bytes):
        return image
    return places.read(_resolve(image, os.path.dirname(path)))


def column_names(path: str, options: ReadOptions) -> list[str]:
    """Return a table's column names for a message; for JSON, those of its first rows.

    Raises:
        DataError: It cannot be read.
    """
    kind = table_suffix(path)
    with ExitStack() as opened:
        with _read_errors(path):
            if kind in ARROW_SUFFIXES:
                return list(opened.enter_context(open_table(path)).schema.names)
            if kind in TEXT_SUFFIXES:
                return list(delimited.find_layout(path, TEXT_SUFFIXES[str(kind)], options).names)
        rows = (row for _, row in _with_read_errors(path, json_rows.rows(path)))
        first = (row for row in islice(rows, 100) if isinstance(row, dict))
        return list(dict.fromkeys(name for row in first for name in row))


@dataclass
class _ReadState:
    """The state of reading one table."""

    path: str
    options: ReadOptions
    left_out: Counter[str] = field(default_factory=Counter)
    """The reason why values were left out of the metadata, by column."""

    @cached_property
    def name(self) -> str:
        """The first part of the ids of its rows."""
        file = PurePosixPath(self.path)
        return PurePosixPath(file.stem).stem if file.suffix.lower() in COMPRESSED else file.stem

    def uri(self, number: int) -> str:
        """Return the uri of a row."""
        return f"{self.path}#row={number}"

    def skip(self, number: int, reason: str) -> Skip:
        """Return the skip for an unusable row."""
        return Skip(f"{self.name}/row {number}", self.uri(number), reason)

    def id_of(self, row: Row, columns: Columns, other: str) -> tuple[str, bool]:
        """Return the id of a row, and whether it comes from the table."""
        source_id = json_value(row.get(columns.id)) if columns.id else None
        has_source_id = isinstance(source_id, str | int | float) and source_id != ""
        return (
            f"{self.name}/{_shortened(str(source_id) if has_source_id else other)}",
            has_source_id,
        )

    def captions(
        self, row: Row, columns: Columns, id: str, uri: str
    ) -> tuple[tuple[str, ...], list[Skip]]:
        """Return the captions of a row, or the reasons why it has none."""
        try:
            return columns.captions_of(row, self.options), []
        except SampleProblem as problem:
            hint = ": save the table as UTF-8" if "not UTF-8" in str(problem) else ""
            return (), [Skip(id, uri, f"{problem}{hint}", affects="captions")]

    def meta(self, row: Row, cell: Convert = lambda name, value: value) -> Row:
        """Return metadata as JSON; values that are too large are counted."""
        meta = {}
        for name, value in row.items():
            try:
                meta[str(json_value(name))] = _bounded_json(cell(name, value))
            except ValueError as error:
                self.left_out[f"column {shown(name)!r}: {error}"] += 1
        return meta

    def say_left_out(self) -> None:
        """Report the values that were too large."""
        for reason, count in self.left_out.most_common(20):
            say(f"{self.path}: {reason}: left out of the metadata {count} times")


def _scan_arrow(path: str, options: ReadOptions) -> ScanResults:
    row_images.forget(path)
    reading = _ReadState(path, options)
    with ExitStack() as opened:
        with _read_errors(path):
            table = opened.enter_context(open_table(path))
            image, kind = _image_column(path, table, options)
            holds_paths = kind == "path" or (kind == "struct" and table.is_empty(image, "bytes"))
        names = list(table.schema.names)
        columns = find_columns(names, replace(options, image_column=image))
        _say_missing(path, names, options)
        if holds_paths:
            where = f"{image}.path" if kind == "struct" else image
            wanted = [name for name in names if name != image] + [where]
            yield from _group_by_path(reading, _arrow_rows(reading, table, columns, wanted))
        else:
            wanted = [name for name in names if name != image]
            for number, row, _ in _arrow_rows(reading, table, columns, wanted):
                yield from _embedded_record(reading, number, row, columns)
    reading.say_left_out()


def _embedded_record(reading: _ReadState, number: int, row: Row, columns: Columns) -> ScanResults:
    """Yield the record of a row that contains its image."""
    uri = reading.uri(number)
    id, has_source_id = reading.id_of(row, columns, f"row {number}")
    captions, problems = reading.captions(row, columns, id, uri)
    meta = reading.meta({k: v for k, v in row.items() if k not in columns.not_metadata})
    yield from problems
    yield Record(
        id, uri, reading.path, row=number, column=str(columns.image), captions=captions,
        meta=meta, id_from_source=has_source_id,
    )  # fmt: skip


def _image_column(path: str, table: Table, options: ReadOptions) -> tuple[str, ImageKind]:
    """Choose the image column of a table with typed columns."""
    names = list(table.schema.names)
    for name in names:
        if names.count(name) > 1:
            raise DataError(f"{path}: two columns are called {shown(name)!r}: rename one")
    kinds = {name: image_kind(table.schema.field(name).type) for name in names}
    image = find_columns(names, options, lambda name: kinds[name] is not None).image
    image = image or find_columns(names, options).image
    if image is None:
        raise no_image_column(path, names, options)
    kind = kinds[image]
    if kind is None:
        held = shown(str(table.schema.field(image).type))
        raise DataError(
            f"{path}: column {shown(image)!r} has type {held}, "
            "which holds neither images nor their paths"
        )
    return image, kind


def _arrow_rows(
    reading: _ReadState, table: Table, columns: Columns, wanted: list[str]
) -> Iterator[tuple[int, Row, Columns]]:
    number = 0
    for batch in _with_read_errors(reading.path, table.batches(wanted)):
        rows, unread = python_rows(batch)
        for name, kind in unread.items():
            text = f"column {shown(name)!r} is left out: type {shown(kind)} is not supported"
            reading.options.say_once(reading.path, text)
        for row in rows:
            yield number, row, columns
            number += 1


def _scan_text(path: str, options: ReadOptions) -> ScanResults:
    with _read_errors(path):
        layout = delimited.find_layout(path, TEXT_SUFFIXES[str(table_suffix(path))], options)
        layout = delimited.with_detected_quoting(layout)
    if layout.guessed_header:
        options.say_once(path, layout.guessed_header)
    columns = find_columns(layout.names, options)
    _say_missing(path, layout.names, options)
    reading, numbers = _ReadState(path, options), delimited.NumberColumns(columns.not_metadata)

    def rows() -> Iterator[tuple[int, Row | SampleProblem, Columns]]:
        for number, row in _with_read_errors(path, delimited.rows(layout)):
            if isinstance(row, dict):
                numbers.see(row)
            yield number, row, columns

    yield from _group_by_path(reading, rows(), numbers.value)
    reading.say_left_out()


def _scan_json(path: str, options: ReadOptions) -> ScanResults:
    reading = _ReadState(path, options)
    names: dict[str, None] = {}

    @lru_cache(maxsize=256)
    def columns_of(keys: tuple[str, ...]) -> Columns:
        if len(names) < MAX_NAMES:
            names.update(dict.fromkeys(keys))
        return find_columns(keys, options)

    def rows() -> Iterator[tuple[int, Row | SampleProblem, Columns]]:
        has_image = False
        for number, row in _with_read_errors(path, json_rows.rows(path)):
            columns = columns_of(tuple(row) if isinstance(row, dict) else ())
            has_image = has_image or columns.image is not None
            yield number, row, columns
        if not has_image:
            raise no_image_column(path, list(names), options)
        _say_missing(path, list(names), options)

    yield from _group_by_path(reading, rows())
    reading.say_left_out()


def _group_by_path(
    reading: _ReadState,
    rows: Iterator[tuple[int, Row | SampleProblem, Columns]],
    cell: Convert = lambda name, value: value,
) -> ScanResults:
    """Yield one record for all rows that name the same image, and the problems of rows.

    Nothing is yielded until all rows are read.
    """
    with closing(_RowsByImage()) as rows_by_image:
        for number, row, columns in rows:
            try:
                if isinstance(row, SampleProblem):
                    raise row
                image = _image_path(row.get(columns.image) if columns.image else None)
            except SampleProblem as problem:
                skip = reading.skip(number, str(problem))
                rows_by_image.add(skip.uri, number, skip)
                continue
            location = _resolve(image, os.path.dirname(reading.path))
            id, has_source_id = reading.id_of(row, columns, image)
            captions, problems = reading.captions(row, columns, id, location)
            rest = {k: v for k, v in row.items() if k not in columns.not_metadata}
            rows_by_image.add(
                location, number, (id, has_source_id, location, rest, captions, problems)
            )
        for found in rows_by_image:
            if isinstance(found[0], Skip):
                yield found[0]
                continue
            for _, _, _, _, _, problems in found:
                yield from problems
            id, has_source_id, location, first, _, _ = found[0]
            captions = clean_captions(c for entry in found for c in entry[4])
            meta = reading.meta(first, cell)
            yield Record(
                id, location, location, captions=captions, meta=meta, id_from_source=has_source_id
            )


class _RowsByImage:
    """Values grouped by image, in the order of each image's first row.

    SQLite stores and sorts them in its own temporary file, which disappears with the process.
    """

    def __init__(self) -> None:
        self._db = sqlite3.connect("")
        self._db.execute("CREATE TABLE thing (image BLOB, number INTEGER, content BLOB)")
        self._new: list[tuple[bytes, int, bytes]] = []

    def add(self, image: str, number: int, value: Any) -> None:
        """Add a row's value for an image."""
        self._new.append((image.encode("utf-8", "surrogatepass"), number, pickle.dumps(value)))
        if len(self._new) == ROWS_AT_A_TIME:
            self._flush()

    def __iter__(self) -> Iterator[list[Any]]:
        """Yield the values of each image."""
        self._flush()
        first = "SELECT *, min(number) OVER (PARTITION BY image) AS first FROM thing"
        ordered = f"SELECT first, content FROM ({first}) ORDER BY first, number"
        with _disk_errors():
            for _, same in groupby(self._db.execute(ordered), key=lambda row: row[0]):
                # This process has just written it to an unnamed file.
                yield [pickle.loads(content) for _, content in same]

    def close(self) -> None:
        """Release the disk space."""
        self._db.close()

    def _flush(self) -> None:
        with _disk_errors():
            self._db.executemany("INSERT INTO thing VALUES (?, ?, ?)", self._new)
        self._new.clear()


@contextmanager
def _disk_errors() -> Iterator[None]:
    try:
        yield
    except sqlite3.Error as error:
        raise DataError(
            f"temporary files of the scan cannot be written: {error} "
            "(set SQLITE_TMPDIR to another folder)"
        ) from None


def _say_missing(path: str, names: Sequence[str], options: ReadOptions) -> None:
    for text in missing_keys(names, options):
        options.say_once(path, text)


@contextmanager
def _read_errors(path: str) -> Iterator[None]:
    """Convert any error from the reader of a broken table to a one-line error."""
    try:
        yield
    except DataError:
        raise
    except Exception as error:
        reason = escaped(" ".join(str(error).split()))[:MAX_REASON]
        kind = table_suffix(path)
        raise DataError(f"{path}: cannot be read as {kind}: {reason}") from None


def _with_read_errors(path: str, items: Iterator[T]) -> Iterator[T]:
    with _read_errors(path):
        yield from items


def _image_path(value: Any) -> str:
    """Return the path of an image from the value of its cell."""
    if isinstance(value, dict):
        value = value.get("path")
    if isinstance(value, bytes):
        value = os.fsdecode(value)
    if value in (None, "") or (isinstance(value, float) and math.isnan(value)):
        raise SampleProblem("no image path")
    if isinstance(value, list | dict):
        raise SampleProblem(f"image path is not text: a {type(value).__name__}")
    path = str(value)
    if len(path) > MAX_PATH:
        raise SampleProblem(
            f"image path is too long ({len(path):,} characters): base64 images are not supported"
        )
    if "\0" in path:
        raise SampleProblem("image path contains a NUL byte")
    return path


def _resolve(image: str, folder: str) -> str:
    if places.is_url(image):
        return image
    path = places.local_path(image)
    if not os.path.isabs(path):
        path = os.path.join(folder, path)
    if "\\" in image and os.sep == "/" and not os.path.lexists(path):
        # Written on Windows.
        path = os.path.join(folder, image.replace("\\", "/"))
    return path


def _bounded_json(value: Any) -> Any:
    """Convert a value to JSON, unless it is too large for metadata."""
    if isinstance(value, bytes) and len(value) > MAX_BYTES:
        raise ValueError(f"more than {MAX_BYTES:,} bytes")
    converted = json_value(value)
    is_long = isinstance(converted, str) and len(converted) > MAX_JSON
    if is_long or (isinstance(converted, list | dict) and len(json.dumps(converted)) > MAX_JSON):
        raise ValueError(f"more than {MAX_JSON:,} characters")
    return converted


def _shortened(name: str) -> str:
    """Return a name usable in an id: control characters escaped, a long name's end hashed."""
    name = escaped(name)
    if len(name) <= MAX_NAME:
        return name
    digest = hashlib.blake2b(name.encode("utf-8", "backslashreplace"), digest_size=16)
    return f"{name[: MAX_NAME - 40]}...{digest.hexdigest()}"
