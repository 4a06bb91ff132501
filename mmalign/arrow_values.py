"""Convert rows of Arrow columns of any type to values that `values.json_value` accepts."""

from collections.abc import Callable
from typing import Any

from mmalign.values import EXACT_DIGITS

INT64_DIGITS = 18
# Types whose Python values carry more meaning than their storage.
KNOWN_EXTENSIONS = ("arrow.uuid", "arrow.bool8")


def python_rows(batch: Any) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """Return the rows of a record batch, and the type of each unreadable column.

    An unreadable column is omitted from the rows.
    """
    columns: dict[str, list[Any]] = {}
    unread: dict[str, str] = {}
    for name, array in zip(batch.schema.names, batch.columns, strict=True):
        values = _python(array)
        if values is None:
            unread[name] = str(array.type)
        else:
            columns[name] = values
    if not columns:
        # With no columns selected, a batch still has its number of rows.
        return [{} for _ in range(batch.num_rows)], unread
    lists = zip(*columns.values(), strict=True)
    return [dict(zip(columns, row, strict=True)) for row in lists], unread


def _python(array: Any) -> list[Any] | None:
    import pyarrow as pa

    for steps in ((_in_utc, _readable), (_as_text,)):
        try:
            values = array
            for step in steps:
                wanted = _mapped(values.type, step)
                values = values if wanted == values.type else values.cast(wanted, safe=False)
            found: list[Any] = values.to_pylist()
        # Arrow's errors, and Python's for dates after the year 9999 and bytes that are not UTF-8.
        except (pa.ArrowException, ValueError, OverflowError, TypeError, KeyError):
            continue
        return found
    return None


def _mapped(kind: Any, leaf: Callable[[Any], Any]) -> Any:
    """Return a type with each of its leaf types replaced.

    List views and run ends are left unchanged: Arrow's own casts of them fail or lose values.
    """
    import pyarrow as pa

    t = pa.types
    if isinstance(kind, pa.BaseExtensionType) and kind.extension_name not in KNOWN_EXTENSIONS:
        return _mapped(kind.storage_type, leaf)
    if t.is_dictionary(kind):
        return _mapped(kind.value_type, leaf)
    if t.is_struct(kind):
        return pa.struct([field.with_type(_mapped(field.type, leaf)) for field in kind])
    if t.is_map(kind):
        return pa.map_(_mapped(kind.key_type, leaf), _mapped(kind.item_type, leaf))
    if t.is_fixed_size_list(kind):
        return pa.list_(_mapped(kind.value_type, leaf), kind.list_size)
    if t.is_large_list(kind):
        return pa.large_list(_mapped(kind.value_type, leaf))
    if t.is_list(kind):
        return pa.list_(_mapped(kind.value_type, leaf))
    return leaf(kind)


def _in_utc(kind: Any) -> Any:
    import pyarrow as pa

    zoned = pa.types.is_timestamp(kind) and kind.tz
    return pa.timestamp(kind.unit, "UTC") if zoned else kind


def _readable(kind: Any) -> Any:
    """Return the type whose Python values keep everything; most types are unchanged.

    Python does not support nanoseconds; those of durations are dropped. A decimal is converted the
    same way in all rows: to a number if a double holds every value of the type, else to text.
    """
    import pyarrow as pa

    t = pa.types
    if (t.is_timestamp(kind) or t.is_time64(kind)) and kind.unit == "ns":
        return pa.string()
    if t.is_duration(kind) and kind.unit == "ns":
        return pa.duration("us")
    if t.is_decimal(kind):
        if kind.precision > (EXACT_DIGITS if kind.scale > 0 else INT64_DIGITS):
            return pa.string()
        return pa.float64() if kind.scale > 0 else pa.int64()
    return kind


def _as_text(kind: Any) -> Any:
    import pyarrow as pa

    return pa.string()
