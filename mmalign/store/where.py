"""Select rows of a store by SQL: `label = 'dress' and price < 20` -> row numbers. Uses DuckDB.

    expression -> parsed, checked -> the columns and meta fields it names -> DuckDB over the shards

The shards stay in place, memory-mapped; DuckDB sees only the columns without vectors. It runs in
memory, without file or network access, and a query cannot change that. An expression may be
untrusted: it may use only the functions listed here, and its length, memory and time are limited.
"""

import json
import re
import secrets
import threading
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from mmalign.arrays import Ints
from mmalign.errors import InstallError, UsageError, nearest, reason_of
from mmalign.store.fields import INTEGER, REAL, TEXT, TRUTH
from mmalign.store.reader import Store

if TYPE_CHECKING:
    from duckdb import DuckDBPyConnection as Connection


COLUMNS = ("id", "uri", "captions", "meta")
MOST_LETTERS, MOST_SHOWN = 20_000, 200
SECONDS, SECONDS_PER_ROW = 10.0, 2e-5
"""A typical expression takes 3e-6 s per row, because the JSON of every row is parsed."""
CONFIG: dict[str, str | bool | int | float | list[str]] = {
    "enable_external_access": False,
    "autoinstall_known_extensions": False,
    "autoload_known_extensions": False,
    "python_enable_replacements": False,
    "temp_directory": "",
    "memory_limit": "1GB",
    "threads": 4,
}
# Node classes allowed in an expression: no subquery, window, parameter or star.
ALLOWED_NODES = {
    "BETWEEN", "CASE", "CAST", "COLLATE", "COLUMN_REF", "COMPARISON", "CONJUNCTION", "CONSTANT",
    "FUNCTION", "LAMBDA", "OPERATOR", "TYPE",
}  # fmt: skip
# None of these builds a large value from a small one, as `range` and `repeat` do: DuckDB does not
# count the values an expression holds as its memory, so the limit above would not stop it.
ALLOWED = """
+ - * / // % ** ^ & | ~ << >> @ abs ceil ceiling floor round trunc sign sqrt cbrt exp ln log log2
log10 pow power mod greatest least isnan isinf isfinite even fmod || ~~ !~~ ~~* !~~* ~~~ ^@
like_escape not_like_escape ilike_escape not_ilike_escape lower upper lcase ucase length len strlen
trim ltrim rtrim left right substr substring contains starts_with prefix suffix ends_with instr
strpos position translate reverse concat concat_ws split_part strip_accents nfc_normalize
levenshtein jaro_winkler_similarity jaccard regexp_matches regexp_full_match regexp_extract ascii
unicode list_value list_contains list_has array_contains array_has list_has_any list_has_all
array_has_any array_has_all && @> <@ array_length array_to_string list_extract list_element
array_extract list_position array_position list_indexof list_filter array_filter filter
list_transform array_transform list_apply array_apply apply list_max list_min list_sum list_avg
list_count list_any_value list_first list_last list_distinct list_unique list_sort list_slice
array_slice list_bool_and list_bool_or list_concat flatten struct_pack struct_extract row -> ->>
json_extract json_extract_string json_extract_path json_extract_path_text json_value json_exists
json_contains json_type json_array_length json_keys json_valid date_part datepart date_trunc
datetrunc date_diff datediff date_sub datesub year month day hour minute second week quarter decade
century dayofweek isodow dayofyear dayname monthname last_day epoch strftime strptime try_strptime
make_date make_timestamp to_timestamp age now today current_date get_current_timestamp to_years
to_months to_weeks to_days to_hours to_minutes to_seconds ifnull nullif coalesce if
"""
FUNCTIONS = frozenset(ALLOWED.split())
# Results of these would double with each lambda, so they are not allowed inside one.
GROWING_FUNCTIONS = {"||", "concat", "concat_ws", "list_concat", "list_value", "struct_pack", "row"}
MOST_CASTS = 4
# The memory for each row grows with the columns and numbers in an expression, and DuckDB evaluates
# a few thousand rows at a time: if rows are long, it gets smaller batches.
MOST_COLUMNS, MOST_BESIDE_LAMBDA, BYTES_AT_A_TIME = 500, 200, 2**18
# The SQL types of the typed columns of meta fields.
FIELD_TYPES = {INTEGER: "HUGEINT", REAL: "DOUBLE", TRUTH: "BOOLEAN", TEXT: "VARCHAR"}
# The SQL type of a meta field whose values all have these JSON types; other mixtures are text.
TYPES = [
    ({"BIGINT", "UBIGINT"}, "HUGEINT"),
    ({"BIGINT", "UBIGINT", "DOUBLE"}, "DOUBLE"),
    ({"BOOLEAN"}, "BOOLEAN"),
    ({"OBJECT", "ARRAY"}, "JSON"),
]


def where(store: Store, expression: str) -> Ints:
    """Return the physical numbers, ascending, of the live rows where a SQL expression is true.

    The expression sees the columns id, uri, captions (a list) and meta (JSON), and every field of
    meta under its own name: as numbers, booleans, or text if its values have mixed types.

    Raises:
        InstallError: DuckDB is not installed.
        UsageError: The expression cannot be parsed or evaluated, names a field that no row has or
            a function that is not allowed, or exceeds the time or memory limit.
    """
    try:
        import duckdb
    except ImportError:
        raise InstallError(
            "selecting rows by SQL needs DuckDB: pip install 'mmalign[sql]'"
        ) from None
    shown = " ".join(expression.split())
    shown = repr(expression) if len(expression) <= MOST_SHOWN else f"{shown[:MOST_SHOWN]!r}..."
    with _connect() as connection:
        search = _Search(connection)
        seconds = SECONDS + SECONDS_PER_ROW * store.manifest.physical_rows
        try:
            if len(expression) > MOST_LETTERS:
                told = f"it has {len(expression)} characters; at most {MOST_LETTERS} are allowed"
                raise UsageError(told)
            with _time_limit(connection, seconds):
                numbers = search.rows(store, expression)
        except duckdb.InterruptException:
            told = f"it takes longer than the limit of {seconds:.0f} s"
            raise UsageError(f"where {shown}: {told}") from None
        except duckdb.OutOfMemoryException:
            told = f"it needs more memory than the limit of {CONFIG['memory_limit']}"
            raise UsageError(f"where {shown}: {told}") from None
        except RecursionError:
            raise UsageError(f"where {shown}: it is nested too deeply") from None
        except (duckdb.Error, UsageError) as error:
            raise UsageError(f"where {shown}: {search.reason(error)}") from None
    numbers = np.sort(np.asarray(numbers, np.int64))
    return numbers if store.live is None else numbers[store.live[numbers]]


@contextmanager
def _time_limit(connection: "Connection", seconds: float) -> Iterator[None]:
    """Interrupt DuckDB when the time for the block is over, and any query started later."""
    done = threading.Event()

    def watch() -> None:
        is_done = done.wait(seconds)
        while not is_done:
            connection.interrupt()
            is_done = done.wait(0.02)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        done.set()
        watcher.join()


@dataclass
class _Search:
    """The evaluation of one expression; final."""

    connection: "Connection"
    # No meta field can have these names, so neither can hide the other.
    row: str = field(default_factory=lambda: f"row {secrets.token_hex(8)}")
    view: str = field(default_factory=lambda: f"visible {secrets.token_hex(8)}")
    texts: list[str] = field(default_factory=list)
    """Meta fields that the expression names and that are compared as text."""
    columns: dict[str, str] = field(default_factory=dict)
    """Meta fields that are columns of the store, and the names of the columns here."""
    column_types: dict[str, str] = field(default_factory=dict)

    @property
    def query(self) -> str:
        """The query up to the expression."""
        return f'SELECT "{self.row}" FROM "{self.view}" WHERE '

    def rows(self, store: Store, expression: str) -> Any:
        """Return the numbers of the rows for which an expression is true, in any order."""
        fields = _fields(_parse(self.connection, self.query, expression))
        if not store.manifest.physical_rows:
            return np.zeros(0, np.int64)
        typed = self._typed(store, [name for names in fields for name in names])
        self.connection.register("stored", _table(store, self.row, typed))
        view = self._view_query(fields)
        self.connection.execute(f'CREATE TEMP VIEW "{self.view}" AS {view}')
        self.connection.execute("SET lock_configuration = true")
        # A number or a text would count as true; deleting by one would be a typing error.
        _require_boolean(self.connection, self.view, expression)
        # Run the same text that was parsed, so that it means what was checked.
        return self.connection.execute(self.query + expression).fetchnumpy()[self.row]

    def reason(self, error: Exception) -> str:
        """Return one line that says what is wrong and how to correct it."""
        # After a blank line come candidates and a drawing of the position.
        lines = str(error).split("\n\n")[0].splitlines()
        reason = " ".join(line.strip() for line in lines if not line.startswith("\t"))
        reason = reason.replace(f'"{self.view}".', "")
        if self.texts and re.search("explicit cast|Could not convert|Cannot compare", reason):
            name = self.texts[0]
            quoted = name if name.isidentifier() else _quoted(name)
            reason += f": {quoted} is text here; write try_cast({quoted} as double) for a number"
        return reason

    def _view_query(self, fields: list[list[str]]) -> str:
        """Return the query that gives every named meta field a typed column."""
        columns = [f'"{self.row}"', "id", "uri", "captions", "meta::JSON AS meta"]
        sql_types = self._sql_types([name for names in fields for name in names])
        for names in fields:
            present = [name for name in names if sql_types[name]]
            if not present:
                present = [self._ignoring_case(names[0])]
                sql_types |= self._sql_types(present)
            if len(present) > 1:
                raise UsageError(f"fields that differ only in case: {present}: write meta->>'name'")
            sql_type = sql_types[present[0]]
            self.texts += [present[0]] if sql_type == "VARCHAR" else []
            value = f"json_extract_string(meta, {_pointer(present[0])})"
            if present[0] in self.columns:
                value = _quoted(self.columns[present[0]])
            columns.append(f"{value}::{sql_type} AS {_quoted(names[0])}")
        return f"SELECT {', '.join(columns)} FROM stored"

    def _sql_types(self, names: list[str]) -> dict[str, str | None]:
        """Return the SQL types of meta fields; None for a field that no row has."""
        if not names:
            return {}
        sql_types: dict[str, str | None] = dict(self.column_types)
        others = [name for name in names if name not in sql_types]
        if others:
            selections = ", ".join(
                f"list(DISTINCT json_type(meta, {_pointer(name)}))" for name in others
            )
            (found,) = self.connection.execute(f"SELECT {selections} FROM stored").fetchall()
            for name, types in zip(others, found, strict=True):
                sql_types[name] = _sql_type({t for t in types or () if t})
        return sql_types

    def _typed(self, store: Store, names: Sequence[str]) -> dict[str, pa.ChunkedArray]:
        """Return the fields that are columns of the store, under names that nothing else has."""
        typed = {}
        for number, name in enumerate(names):
            column = store.field(name)
            if column is not None:
                self.columns[name] = f"{self.row} {number}"
                self.column_types[name] = FIELD_TYPES[column.type]
                typed[self.columns[name]] = column
        return typed

    def _ignoring_case(self, asked: str) -> str:
        """Return the one meta field with this name, ignoring case."""
        all_keys = self.connection.execute("SELECT DISTINCT unnest(json_keys(meta)) FROM stored")
        known: list[str] = sorted(name for (name,) in all_keys.fetchall())
        same = [name for name in known if name.lower() == asked.lower()]
        if len(same) > 1:
            raise UsageError(f"fields that differ only in case: {same}: write one exactly as here")
        if same:
            return same[0]
        hint = f"{nearest(asked, [*COLUMNS, *known])} (text is written in 'single quotes')"
        raise UsageError(f"no column and no field of meta is called {asked!r}: {hint}")


def _connect() -> "Connection":
    import duckdb

    try:
        return duckdb.connect(":memory:", config=CONFIG)
    except duckdb.Error as error:
        raise InstallError(
            f"DuckDB {duckdb.__version__} does not start: {reason_of(error)}"
        ) from None


def _parse(connection: "Connection", query: str, expression: str) -> dict[str, Any]:
    """Return the syntax tree of a text after checking that it is exactly one allowed expression."""
    template, tree = _tree(connection, query + "true"), _tree(connection, query + expression)
    if tree["error"]:
        near = tree["error_message"] if expression.strip() else "it is empty"
        raise UsageError(f"not a SQL expression: {near} (text is written in 'single quotes')")
    clause: dict[str, Any] | None = tree["statements"][0]["node"].pop("where_clause", None)
    template["statements"][0]["node"].pop("where_clause")
    if clause is None or tree != template:
        raise UsageError("write one expression that is true or false, and nothing after it")
    for node in _nodes(clause):
        if node["class"] not in ALLOWED_NODES:
            part = node["class"].lower()
            raise UsageError(f"a {part} is not allowed: compare columns and fields of meta")
        name = node.get("function_name")
        if name is not None and (name not in FUNCTIONS or "schema" in node or "catalog" in node):
            words = [known for known in FUNCTIONS if known.isidentifier()]
            raise UsageError(f"{name}() is not an allowed function: {nearest(name, words)}")
    _require_cheap(clause, ())
    _require_few_nodes(clause)
    return clause


def _require_few_nodes(clause: dict[str, Any]) -> None:
    kinds = Counter(node["class"] for node in _nodes(clause))
    if kinds["COLUMN_REF"] > MOST_COLUMNS:
        told = f"it names {kinds['COLUMN_REF']} columns and fields"
        raise UsageError(f"{told}; at most {MOST_COLUMNS} are allowed")
    constants = kinds["CONSTANT"]
    if any(map(_is_lambda, _nodes(clause))) and constants > MOST_BESIDE_LAMBDA:
        most = f"with a lambda, at most {MOST_BESIDE_LAMBDA} are allowed"
        raise UsageError(f"it has {constants} numbers and texts; {most}")


def _require_cheap(tree: Any, above: tuple[str, ...]) -> None:
    """Reject nesting that can build a large value from a small one.

    DuckDB can be interrupted only once every few thousand rows, so each row must be cheap.
    """
    if isinstance(tree, list):
        for inner in tree:
            _require_cheap(inner, above)
    elif isinstance(tree, dict):
        name = tree.get("function_name", "")
        kind = "lambda" if "class" in tree and _is_lambda(tree) else name
        if tree.get("class") == "CAST":
            kind = "cast"
        if "lambda" in above and (
            kind == "lambda" or kind in GROWING_FUNCTIONS | {"array_to_string"}
        ):
            raise UsageError(f"{kind} is not allowed inside a lambda")
        if kind == "array_to_string" and kind in above:
            raise UsageError(f"{kind} is not allowed inside another {kind}")
        if kind == "cast" and above.count(kind) >= MOST_CASTS:
            raise UsageError(f"more than {MOST_CASTS} nested casts")
        for inner in tree.values():
            _require_cheap(inner, (*above, kind) if kind else above)


def _is_lambda(node: dict[str, Any]) -> bool:
    """Distinguish `lambda c: ...`, with variables, from `field -> 'name'`, which reads JSON."""
    return node["class"] == "LAMBDA" and node.get("syntax_type") != "SINGLE_ARROW"


def _require_boolean(connection: "Connection", view: str, expression: str) -> None:
    query = f'DESCRIBE SELECT ({expression}\n) FROM "{view}"'
    described = connection.execute(query).fetchall()
    kind = described[0][1]
    if kind != "BOOLEAN":
        raise UsageError(f"it is of type {kind}, not true or false")


def _tree(connection: "Connection", query: str) -> dict[str, Any]:
    # Empty values are skipped, so the tree has no fields for clauses that were not written.
    call = "SELECT json_serialize_sql(?, skip_null := true, skip_empty := true)"
    ((answer,),) = connection.execute(call, [query]).fetchall()
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


def _fields(clause: dict[str, Any]) -> list[list[str]]:
    """Return the meta fields that an expression names; SQL treats those in one list as equal."""
    used = {n["column_names"][0] for n in _nodes(clause) if n["class"] == "COLUMN_REF"}
    for node in _nodes(clause):
        if _is_lambda(node):
            used -= {n["column_names"][0] for n in _nodes(node["lhs"]) if "column_names" in n}
    fields = defaultdict(list)
    for name in sorted(used):
        if name.lower() not in COLUMNS:
            fields[name.lower()].append(name)
    return list(fields.values())


def _table(store: Store, row: str, typed: dict[str, pa.ChunkedArray]) -> pa.Table:
    """Return the shards as one table, zero-copy, without vectors and with numbered rows."""
    numbers = pa.array(np.arange(store.manifest.physical_rows, dtype=np.int64))
    small_batches = (part for batch in store.batches(COLUMNS) for part in _small_batches(batch))
    table = pa.Table.from_batches(small_batches).append_column(row, numbers)
    for name, column in typed.items():
        table = table.append_column(name, column)
    return table


def _small_batches(batch: pa.RecordBatch) -> Iterator[pa.RecordBatch]:
    rows = max(1, len(batch) * BYTES_AT_A_TIME // max(1, batch.nbytes))
    for first in range(0, len(batch), rows):
        yield batch.slice(first, rows)


def _quoted(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'


def _sql_type(json_kinds: Iterable[str]) -> str | None:
    """Return the SQL type that holds values of these JSON types; None if there are none."""
    present = set(json_kinds)
    if not present:
        return None
    return next((sql for json_types, sql in TYPES if present - {"NULL"} <= json_types), "VARCHAR")


def _pointer(field: str) -> str:
    """Return the JSON pointer of a field as a SQL string literal."""
    pointer = "/" + field.replace("~", "~0").replace("/", "~1")
    return "'" + pointer.replace("'", "''") + "'"
