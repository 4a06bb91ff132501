"""Rows of a store by SQL: `label = 'dress' and price < 20` -> row numbers. The door to DuckDB.

    expression -> parsed, checked -> the columns and meta fields it names -> DuckDB over the shards

The shards stay where they are, memory-mapped; DuckDB is shown the columns that hold no vectors. It
runs in memory, sees no file and no network, and cannot be told otherwise.
"""

import json
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from mmalign.errors import InstallError, UsageError, nearest
from mmalign.store.reader import Store

if TYPE_CHECKING:
    from duckdb import DuckDBPyConnection as Connection

Ints = NDArray[np.int64]

COLUMNS = ("id", "uri", "captions", "meta")
CONFIG: dict[str, str | bool | int | float | list[str]] = {
    "enable_external_access": False,
    "autoinstall_known_extensions": False,
    "autoload_known_extensions": False,
    "python_enable_replacements": False,
    "temp_directory": "",
}
QUERY = 'SELECT "#row" FROM visible WHERE '
# What an expression may be made of: no subquery, window, parameter or star.
PARTS = {
    "BETWEEN", "CASE", "CAST", "COLLATE", "COLUMN_REF", "COMPARISON", "CONJUNCTION", "CONSTANT",
    "FUNCTION", "LAMBDA", "OPERATOR", "TYPE",
}  # fmt: skip
# The SQL type of a meta field whose values all have these JSON types; any other mixture is text.
TYPES = [
    ({"BIGINT", "UBIGINT"}, "HUGEINT"),
    ({"BIGINT", "UBIGINT", "DOUBLE"}, "DOUBLE"),
    ({"BOOLEAN"}, "BOOLEAN"),
    ({"OBJECT", "ARRAY"}, "JSON"),
]


def where(store: Store, expression: str) -> Ints:
    """Return the physical numbers of the live rows for which a SQL expression is true, ascending.

    The expression sees the columns id, uri, captions (a list) and meta (JSON), and every field of
    meta under its own name: numbers, truth values, or text where a field holds several kinds.

    Raises:
        InstallError: DuckDB is not installed.
        UsageError: The expression cannot be parsed or evaluated, or names what no row has.
    """
    try:
        import duckdb
    except ImportError:
        raise InstallError("rows by SQL need DuckDB: pip install 'mmalign[sql]'") from None
    with duckdb.connect(":memory:", config=CONFIG) as connection:
        try:
            fields = _fields(_parse(connection, expression))
            if not store.manifest.physical_rows:
                return np.zeros(0, np.int64)
            connection.register("stored", _table(store))
            connection.execute(f"CREATE TEMP VIEW visible AS {_view(connection, fields)}")
            connection.execute("SET lock_configuration = true")
            # A number or a text would pass for true; who deletes by one has mistyped.
            _require_truth(connection, expression)
            # The same text that was parsed, so that it means what was checked.
            found = connection.execute(QUERY + expression).fetchnumpy()["#row"]
        except (duckdb.Error, UsageError) as error:
            # What follows a blank line are candidates and a drawing of the place.
            told = str(error).split("\n\n")[0].splitlines()
            reason = " ".join(line for line in told if not line.startswith("\t"))
            raise UsageError(f"where {expression!r}: {reason}") from None
    numbers = np.sort(np.asarray(found, np.int64))
    return numbers if store.live is None else numbers[store.live[numbers]]


def _parse(connection: "Connection", expression: str) -> dict[str, Any]:
    """Return the syntax tree of an expression, after checking that it is one and nothing else."""
    around, tree = _tree(connection, "true"), _tree(connection, expression)
    if tree["error"]:
        near = tree["error_message"] if expression.strip() else "it is empty"
        raise UsageError(f"not a SQL expression: {near} (text is written in 'single quotes')")
    clause: dict[str, Any] | None = tree["statements"][0]["node"].pop("where_clause", None)
    around["statements"][0]["node"].pop("where_clause")
    if clause is None or tree != around:
        raise UsageError("write one expression that is true or false, and nothing after it")
    for node in _nodes(clause):
        if node["class"] not in PARTS:
            part = node["class"].lower()
            raise UsageError(f"a {part} has no place here: compare columns and fields of meta")
    return clause


def _require_truth(connection: "Connection", expression: str) -> None:
    described = connection.execute(f"DESCRIBE SELECT ({expression}\n) FROM visible").fetchall()
    kind = described[0][1]
    if kind != "BOOLEAN":
        raise UsageError(f"it is of type {kind}, not true or false")


def _tree(connection: "Connection", expression: str) -> dict[str, Any]:
    # Without empty values, a tree holds no field for what was not written.
    call = "SELECT json_serialize_sql(?, skip_null := true, skip_empty := true)"
    ((answer,),) = connection.execute(call, [QUERY + expression]).fetchall()
    tree: dict[str, Any] = json.loads(answer)
    return tree


def _nodes(tree: Any) -> Iterator[dict[str, Any]]:
    """Yield every node of a syntax tree that has a class."""
    if isinstance(tree, dict):
        if "class" in tree:
            yield tree
        for inner in tree.values():
            yield from _nodes(inner)
    elif isinstance(tree, list):
        for inner in tree:
            yield from _nodes(inner)


def _fields(clause: dict[str, Any]) -> list[str]:
    """Return the fields of meta that an expression names."""
    used = {n["column_names"][0] for n in _nodes(clause) if n["class"] == "COLUMN_REF"}
    for node in _nodes(clause):
        # `lambda c: ...` names its own variables; `field -> 'name'` reads JSON.
        if node["class"] == "LAMBDA" and node.get("syntax_type") != "SINGLE_ARROW":
            used -= {n["column_names"][0] for n in _nodes(node["lhs"]) if "column_names" in n}
    fields = sorted(name for name in used if name.lower() not in COLUMNS)
    if len({name.lower() for name in fields}) < len(fields):
        raise UsageError(f"fields that differ only in case: {fields}: write meta->>'name'")
    return fields


def _table(store: Store) -> pa.Table:
    """Show the shards as one table, uncopied and without vectors, its rows numbered."""
    numbers = pa.array(np.arange(store.manifest.physical_rows, dtype=np.int64))
    return pa.Table.from_batches(store.batches(COLUMNS)).append_column("#row", numbers)


def _view(connection: "Connection", fields: list[str]) -> str:
    """Write the query that gives every named field of meta its column and its type."""
    columns = ['"#row"', "id", "uri", "captions", "meta::JSON AS meta"]
    if fields:
        kinds = ", ".join(f"list(DISTINCT json_type(meta, {_pointer(f)}))" for f in fields)
        (found,) = connection.execute(f"SELECT {kinds} FROM stored").fetchall()
        for field, types in zip(fields, found, strict=True):
            kind = _type({t for t in types or () if t})
            if kind is None:
                known = connection.execute("SELECT DISTINCT unnest(json_keys(meta)) FROM stored")
                names = [*COLUMNS, *(name for (name,) in known.fetchall())]
                hint = f"{nearest(field, names)} (text is written in 'single quotes')"
                raise UsageError(f"no column and no field of meta is called {field!r}: {hint}")
            value = f"json_extract_string(meta, {_pointer(field)})"
            columns.append(f'{value}::{kind} AS "{field.replace(chr(34), chr(34) * 2)}"')
    return f"SELECT {', '.join(columns)} FROM stored"


def _type(kinds: Iterable[str]) -> str | None:
    """Return the SQL type that holds values of these JSON types; None where there are none."""
    held = set(kinds)
    if not held:
        return None
    return next((sql for json_types, sql in TYPES if held - {"NULL"} <= json_types), "VARCHAR")


def _pointer(field: str) -> str:
    """Return the JSON pointer of a field, as a SQL text."""
    pointer = "/" + field.replace("~", "~0").replace("/", "~1")
    return "'" + pointer.replace("'", "''") + "'"
