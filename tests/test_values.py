"""Values of any origin and type as JSON: one conversion, and nothing that JSON cannot hold."""

import json
from datetime import UTC, date, datetime, time, timedelta, timezone
from decimal import Decimal
from typing import Any
from uuid import UUID

import numpy as np
import pyarrow as pa
import pytest

from mmalign.arrow_values import python_rows
from mmalign.store import meta_json
from mmalign.values import json_value, to_json

# 2020-01-02, one nanosecond after midnight.
NS = 1_577_923_200_000_000_001
NOT_READ = object()


def timestamps(unit: str, zone: str | None = None) -> pa.Array:
    return pa.array([NS // 1000 ** ["ns", "us", "ms", "s"].index(unit)], pa.timestamp(unit, zone))


def extension(kind: Any, storage: pa.Array) -> pa.Array:
    return pa.ExtensionArray.from_storage(kind, storage)


ARROW: list[tuple[pa.Array, Any]] = [
    (pa.array([None]), None),
    (pa.array([True]), True),
    *((pa.array([3], kind()), 3) for kind in (pa.int8, pa.int16, pa.int32, pa.int64)),
    *((pa.array([3], kind()), 3) for kind in (pa.uint8, pa.uint16, pa.uint32)),
    (pa.array([2**64 - 1], pa.uint64()), 2**64 - 1),
    (pa.array([np.float16(0.5)], pa.float16()), 0.5),
    *((pa.array([0.5], kind()), 0.5) for kind in (pa.float32, pa.float64)),
    *((pa.array([x]), None) for x in (float("nan"), float("inf"), float("-inf"))),
    *((pa.array(["é"], k()), "é") for k in (pa.string, pa.large_string, pa.string_view)),
    *((pa.array([b"ab"], k()), "ab") for k in (pa.binary, pa.large_binary, pa.binary_view)),
    (pa.array([b"ab"], pa.binary(2)), "ab"),
    (pa.array([b"\xff\x00"]), "ff00"),
    (pa.array([date(2020, 1, 2)], pa.date32()), "2020-01-02"),
    (pa.array([date(2020, 1, 2)], pa.date64()), "2020-01-02"),
    *((timestamps(unit), "2020-01-02 00:00:00") for unit in ("s", "ms", "us")),
    (timestamps("ns"), "2020-01-02 00:00:00.000000001"),
    (timestamps("s", "Europe/Berlin"), "2020-01-02 00:00:00+00:00"),
    (timestamps("ns", "Europe/Berlin"), "2020-01-02 00:00:00.000000001Z"),
    (pa.array([10**7], pa.date32()), "29349-01-26"),
    *((pa.array([1], pa.time32(u)), t) for u, t in (("s", "00:00:01"), ("ms", "00:00:00.001000"))),
    (pa.array([1], pa.time64("us")), "00:00:00.000001"),
    (pa.array([1], pa.time64("ns")), "00:00:00.000000001"),
    *((pa.array([1500], pa.duration(u)), s) for u, s in (("s", 1500.0), ("ms", 1.5))),
    *((pa.array([1500], pa.duration(u)), s) for u, s in (("us", 0.0015), ("ns", 1e-06))),
    (pa.array([Decimal("1.10")], pa.decimal128(10, 2)), 1.1),
    (pa.array([Decimal("7")], pa.decimal128(5, 0)), 7),
    (pa.array([Decimal("700")], pa.decimal128(5, -2)), 700),
    (pa.array([Decimal("1.10")], pa.decimal128(38, 18)), "1.100000000000000000"),
    (pa.array([Decimal("7.5")], pa.decimal256(50, 1)), "7.5"),
    *((pa.array([Decimal("7.5")], k(5, 1)), 7.5) for k in (pa.decimal32, pa.decimal64)),
    (pa.array(["a"]).dictionary_encode(), "a"),
    (timestamps("ns").dictionary_encode(), "2020-01-02 00:00:00.000000001"),
    (pa.RunEndEncodedArray.from_arrays([1], ["a"]), "a"),
    (pa.array([[1, None]]), [1, None]),
    (pa.array([[float("nan")]]), [None]),
    (pa.array([[1, 2]], pa.large_list(pa.int8())), [1, 2]),
    (pa.array([[1, 2]], pa.list_(pa.int8(), 2)), [1, 2]),
    (pa.array([[1, 2]], pa.list_view(pa.int8())), [1, 2]),
    (pa.array([[1, 2]], pa.large_list_view(pa.int8())), [1, 2]),
    (pa.array([[NS]], pa.list_(pa.timestamp("ns"))), ["2020-01-02 00:00:00.000000001"]),
    (pa.array([[NS]], pa.list_view(pa.timestamp("ns"))), NOT_READ),
    (
        pa.array(
            [{"a": NS, "b": Decimal("1.5"), "c": b"\xff"}],
            pa.struct([("a", pa.timestamp("ns")), ("b", pa.decimal128(5, 1)), ("c", pa.binary())]),
        ),
        {"a": "2020-01-02 00:00:00.000000001", "b": 1.5, "c": "ff"},
    ),
    (pa.array([[("k", 1.5)]], pa.map_(pa.string(), pa.float64())), {"k": 1.5}),
    (pa.array([[(1, 2)]], pa.map_(pa.int8(), pa.int8())), [[1, 2]]),
    (pa.array([(1, 2, 3)], pa.month_day_nano_interval()), [1, 2, 3]),
    (
        pa.UnionArray.from_dense(
            pa.array([0], pa.int8()), pa.array([0], pa.int32()), [pa.array([5])]
        ),
        5,
    ),
    (extension(pa.uuid(), pa.array([bytes(15) + b"\5"], pa.binary(16))), str(UUID(int=5))),
    (extension(pa.bool8(), pa.array([1], pa.int8())), True),
    (extension(pa.json_(), pa.array(['{"a":1}'])), '{"a":1}'),
    (
        extension(
            pa.fixed_shape_tensor(pa.int8(), [2]), pa.array([[1, 2]], pa.list_(pa.int8(), 2))
        ),
        [1, 2],
    ),
]


@pytest.mark.parametrize(("array", "expected"), ARROW, ids=[f"{a.type}" for a, _ in ARROW])
def test_every_arrow_type_is_read_or_named(array: pa.Array, expected: Any) -> None:
    rows, unread = python_rows(pa.record_batch({"x": array, "y": pa.array([1])}))
    if expected is NOT_READ:
        assert (rows, unread) == ([{"y": 1}], {"x": str(array.type)})
    else:
        found = json_value(rows[0]["x"])
        assert (found, type(found), unread) == (expected, type(expected), {})
    nothing, _ = python_rows(pa.record_batch({"x": pa.nulls(2, array.type)}))
    assert expected is NOT_READ or nothing == [{"x": None}] * 2


def test_no_type_of_arrow_is_forgotten_here() -> None:
    names = [n for n in dir(pa.types) if n.startswith("is_") and not n.endswith("_value")]
    checks = {name: getattr(pa.types, name) for name in names}
    unmet = {n for n, check in checks.items() if not any(check(array.type) for array, _ in ARROW)}
    assert unmet == set()


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (float("nan"), None),
        ({"a": [float("inf"), {"b": float("-inf")}]}, {"a": [None, {"b": None}]}),
        (Decimal("NaN"), None),
        (Decimal("0.1234567890123456789"), "0.1234567890123456789"),
        (Decimal(10) ** 30, "1" + "0" * 30),
        (datetime(2020, 1, 2, 3, tzinfo=timezone(timedelta(hours=1))), "2020-01-02 02:00:00+00:00"),
        (datetime(1, 1, 1, tzinfo=timezone(timedelta(hours=1))), "0001-01-01 00:00:00+01:00"),
        (datetime(2020, 1, 2, tzinfo=UTC), "2020-01-02 00:00:00+00:00"),
        (time(1, 2), "01:02:00"),
        (b"text\n", "text\n"),
        (b"\x1b[0m", "1b5b306d"),
        ("half \ud83d", "half \\ud83d"),
        ({1: "a", "\udcff": 2}, {"1": "a", "\\udcff": 2}),
        (np.float32("nan"), None),
        (np.arange(2), [0, 1]),
        ((1, {2}), [1, [2]]),
        ([("k", 1), ("k", 2)], [["k", 1], ["k", 2]]),
    ],
)
def test_python_values_become_json(value: Any, expected: Any) -> None:
    assert json_value(value) == expected
    assert json.loads(to_json(value), parse_constant=pytest.fail) == expected


def test_meta_is_json_whatever_is_in_it() -> None:
    text = meta_json({"price": float("nan"), "when": date(2020, 1, 2), "half": "\ud83d"})
    assert json.loads(text, parse_constant=pytest.fail) == {
        "price": None,
        "when": "2020-01-02",
        "half": "\\ud83d",
    }


def test_what_is_nested_too_deeply_is_refused() -> None:
    deep: Any = 0
    for _ in range(100):
        deep = [deep]
    with pytest.raises(ValueError, match="nested more than 64 levels deep"):
        json_value(deep)
