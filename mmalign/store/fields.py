"""Metadata as typed columns, beside the JSON: so that a filter need not parse it.

A field becomes a column of a shard if all its values there are numbers, truths or texts; a field
with other values, or with values of several types, is only in the JSON. N rows of a shard.
"""

import json
from collections.abc import Iterable, Sequence
from typing import Any

import pyarrow as pa

PREFIX = "meta."
ONLY_JSON = b"mmalign.only_json"
"""The key, in the metadata of the schema, of the names of fields that are not columns."""
MOST_FIELDS, MOST_NAME = 256, 128
INTEGER, REAL, TRUTH, TEXT = pa.int64(), pa.float64(), pa.bool_(), pa.string()


def field_columns(metas: Iterable[str]) -> tuple[dict[str, pa.Array], list[str]]:
    """Return a column for each field that can be one, and the names of the others.

    Args:
        metas: The metadata of each row, as JSON.
    """
    parsed = (json.loads(meta) for meta in metas)
    values = [value if isinstance(value, dict) else {} for value in parsed]
    names = dict.fromkeys(name for value in values for name in value)
    columns: dict[str, pa.Array] = {}
    only_json = []
    for name in names:
        column = _column([value.get(name) for value in values])
        if column is None or len(columns) == MOST_FIELDS or not 0 < len(name) <= MOST_NAME:
            only_json.append(name)
        else:
            columns[name] = column
    return columns, only_json


def _column(values: Sequence[Any]) -> pa.Array | None:
    kinds = {type(value) for value in values} - {type(None)}
    wanted = {
        frozenset({bool}): TRUTH,
        frozenset({int}): INTEGER,
        frozenset({float}): REAL,
        frozenset({int, float}): REAL,
        frozenset({str}): TEXT,
    }.get(frozenset(kinds))
    try:
        return None if wanted is None else pa.array(values, wanted)
    except (pa.ArrowException, OverflowError, UnicodeEncodeError):
        return None


def common_type(types: Iterable[pa.DataType]) -> pa.DataType | None:
    """Return the type that holds the values of a field in all shards; None if there is none."""
    found = set(types)
    if found == {INTEGER, REAL}:
        return REAL
    return found.pop() if len(found) == 1 else None


def kind_of(types: Iterable[pa.DataType | None]) -> str:
    """Return what a field holds: "number", "truth", "text", or "json" for whatever else.

    Args:
        types: Its types in the shards; None where it is only in the JSON.
    """
    known = list(types)
    kind = None if None in known else common_type(known)
    return {INTEGER: "number", REAL: "number", TRUTH: "truth", TEXT: "text"}.get(kind, "json")


def joined(shards: Sequence[tuple[pa.Array | None, int]]) -> pa.ChunkedArray | None:
    """Join a field's column of each shard; None if there is no type for all.

    Args:
        shards: The column, or None where no row has the field, and the number of rows.
    """
    kind = common_type(column.type for column, _ in shards if column is not None)
    if kind is None:
        return None
    chunks = [pa.nulls(rows, kind) if c is None else c.cast(kind) for c, rows in shards]
    return pa.chunked_array(chunks, kind)
