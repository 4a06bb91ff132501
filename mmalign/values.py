"""Convert values to JSON: one conversion for all data that a source gives for a sample.

Tables, sidecar files and imported metadata come as Python or Arrow values; a row of a store keeps
them as JSON, and `--where` compares them.
"""

import contextlib
import json
import math
from collections.abc import Mapping
from datetime import UTC, date, datetime, time, timedelta
from decimal import Decimal
from typing import Any

# A double holds every decimal of this many digits exactly.
EXACT_DIGITS = 15
MAX_DEPTH = 64


def json_value(value: Any, depth: int = 0) -> Any:
    r"""Convert a value to JSON-compatible types.

    Numbers stay numbers, NaN and infinity become null. Decimals are numbers if a double holds them
    exactly, else text. Dates and times are ISO 8601 with a space, in UTC if their zone is known, so
    that text order is time order; durations are seconds. Bytes are text if they are UTF-8, else
    hexadecimal. Characters that cannot be UTF-8 become a `\` escape.

    Raises:
        ValueError: It is nested more than 64 levels deep.

    >>> json_value([float("nan"), Decimal("1.50"), date(2020, 1, 2), b"\x00\xff"])
    [None, 1.5, '2020-01-02', '00ff']
    """
    if value is None or isinstance(value, bool | int):
        return value
    if isinstance(value, str):
        return _text(value)
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, bytes | bytearray | memoryview):
        return _bytes(bytes(value))
    if depth >= MAX_DEPTH:
        raise ValueError(f"nested more than {MAX_DEPTH} levels deep")
    if isinstance(value, Mapping):
        return {_text(str(k)): json_value(v, depth + 1) for k, v in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        if value and all(map(_is_entry, value)) and len(dict(value)) == len(value):
            return json_value(dict(value), depth)  # the entries of an Arrow map
        return [json_value(v, depth + 1) for v in value]
    return _scalar(value, depth)


def to_json(value: Any) -> str:
    """Serialise a value as JSON that every reader accepts: no NaN, no lone surrogates."""
    return json.dumps(json_value(value), ensure_ascii=False, allow_nan=False)


def _scalar(value: Any, depth: int) -> Any:
    if isinstance(value, Decimal):
        return _decimal(value)
    if isinstance(value, datetime):
        with contextlib.suppress(OverflowError):  # the first and last day that Python supports
            value = value.astimezone(UTC) if value.tzinfo else value
        return value.isoformat(sep=" ")
    if isinstance(value, date | time):
        return value.isoformat()
    if isinstance(value, timedelta):
        return value.total_seconds()
    if hasattr(value, "tolist"):  # NumPy
        return json_value(value.tolist(), depth + 1)
    return _text(str(value))


def _decimal(value: Decimal) -> float | int | str | None:
    if not value.is_finite():
        return None
    if value == value.to_integral_value():
        return int(value) if abs(value) < 1 << 63 else f"{value:f}"
    digits = len(value.normalize().as_tuple().digits)
    return float(value) if digits <= EXACT_DIGITS else str(value)


def _text(value: str) -> str:
    try:
        value.encode()
    except UnicodeEncodeError:
        return value.encode("utf-8", "backslashreplace").decode()
    return str(value)


def _bytes(value: bytes) -> str:
    try:
        text = value.decode()
    except UnicodeDecodeError:
        return value.hex()
    return text if all(c.isprintable() or c in "\t\n\r" for c in text) else value.hex()


def _is_entry(value: Any) -> bool:
    return type(value) is tuple and len(value) == 2 and isinstance(value[0], str)
