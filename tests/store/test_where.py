"""Rows by SQL: what an expression may name, what it finds, and what it must not do."""

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small_store import fill, row

from mmalign.errors import UsageError
from mmalign.store import Store, delete, fields, open_store
from mmalign.store.where import where

pytest.importorskip("duckdb", reason="rows by SQL need DuckDB: pip install 'mmalign[sql]'")

COUNT = 25


def meta(number: int) -> dict[str, Any]:
    return {
        "label": ("dress", "shoe")[number % 2],
        "price": number * 0.5 if number % 3 else number,
        "depth": -number,
        "big": 2**64 - 1 - number,
        "ok": bool(number % 2),
        "mixed": number if number % 2 else "x",
        "nothing": None,
        "tags": ["a", f"t{number}"],
        "author": {"name": f"n{number % 4}"},
        "颜色": ("红", "蓝")[number % 2],
        "Blood type": "A",
        "it's": 1,
        "a/b~c": 2,
        'q"q': 3,
    }


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    path = tmp_path_factory.mktemp("where") / "s.store"
    return fill(path, (row(n, **meta(n)) for n in range(COUNT)))


@pytest.mark.parametrize(
    ("expression", "wanted"),
    [
        ("label = 'dress'", lambda n: n % 2 == 0),
        ("meta->>'label' = 'dress'", lambda n: n % 2 == 0),
        ("price < 3", lambda n: meta(n)["price"] < 3),
        ("depth between -12 and -9", lambda n: 9 <= n <= 12),
        ("big > 18446744073709551610", lambda n: n < 5),
        ("ok", lambda n: n % 2 == 1),
        ("not ok and id <> 'id4'", lambda n: n % 2 == 0 and n != 4),
        ("mixed = '11'", lambda n: n == 11),
        ("nothing is null", lambda n: True),
        ("nothing = 1", lambda n: False),
        ("tags->>1 = 't7'", lambda n: n == 7),
        ("author->>'name' = 'n3'", lambda n: n % 4 == 3),
        ("颜色 = '蓝'", lambda n: n % 2 == 1),
        ('"Blood type" = \'A\' and "it\'s" = 1 and "a/b~c" = 2', lambda n: True),
        ('"q""q" = 3 and ID = \'id9\'', lambda n: n == 9),
        ("uri like '/pictures/1%'", lambda n: str(n).startswith("1")),
        ("id in ('id3', 'id24', 'none')", lambda n: n in (3, 24)),
        ("len(captions) = 2", lambda n: n % 3 == 2),
        ("array_to_string(captions, ' ') ilike '%DOG, 8.1%'", lambda n: n == 8),
        ("len(list_filter(captions, lambda c: c like '%狗')) > 1", lambda n: n % 3 == 2),
        ("label = 'dress'\n  and price > 1 -- and no more", lambda n: n % 2 == 0 and n > 2),
        ("false", lambda n: False),
        ("LABEL = 'dress' and Price < 3", lambda n: n % 2 == 0 and meta(n)["price"] < 3),
        ("label = 'dress' or Label = 'shoe'", lambda n: True),
        ("try_cast(mixed as double) < 3", lambda n: n == 1),
        ("captions[1] like 'a dog, 8.%' and not captions @> ['x']", lambda n: n == 8),
        ("price > 1 and price % 2 = 0", lambda n: meta(n)["price"] in range(2, COUNT, 2)),
    ],
)
def test_finds_what_is_true(store: Store, expression: str, wanted: Callable[[int], bool]) -> None:
    found = where(store, expression)
    assert found.dtype == np.int64
    assert found.tolist() == [n for n in range(COUNT) if wanted(n)]


def test_a_field_of_few_rows_and_shards(tmp_path: Path) -> None:
    held = fill(tmp_path, (row(n, **({"rare": n} if n in (3, 23) else {})) for n in range(COUNT)))
    assert where(held, "rare > 0").tolist() == [3, 23]
    assert len(where(held, "rare is null")) == COUNT - 2


@pytest.mark.parametrize("name", ["#row", "#ROW", "Row", "row", "rowid", "stored", "visible"])
def test_a_field_of_any_name_hides_nothing(tmp_path: Path, name: str) -> None:
    held = fill(tmp_path, (row(n, **{name: 1, "n": n}) for n in range(5)))
    quoted = f'"{name}"'
    assert where(held, f"{quoted} = 1 and n > 2").tolist() == [3, 4]
    assert where(held, f"{quoted} = 0").tolist() == []


def test_fields_that_differ_only_in_case_are_told_apart_or_named(tmp_path: Path) -> None:
    held = fill(tmp_path, (row(n, price=n, Price=-n) for n in range(5)))
    assert where(held, "price = 3").tolist() == [3]
    assert where(held, "Price = -3").tolist() == [3]
    with pytest.raises(UsageError, match=r"differ only in case: \['Price', 'price'\]"):
        where(held, "PRICE = 3")
    with pytest.raises(UsageError, match="differ only in case"):
        where(held, "price = 3 or Price = 3")


def test_time_and_memory_have_limits(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    module = sys.modules[where.__module__]
    with monkeypatch.context() as patch:
        patch.setitem(module.CONFIG, "memory_limit", "100kB")
        with pytest.raises(UsageError, match="it needs more memory than the limit of 100kB"):
            where(store, "label = 'dress'")
    monkeypatch.setattr(module, "FUNCTIONS", module.FUNCTIONS | {"range"})
    monkeypatch.setattr(module, "SECONDS", 0.01)
    with pytest.raises(UsageError, match="it takes longer than the limit of 0 s"):
        where(store, "len(list_filter(range(1000000 + length(id)), lambda x: x % 7 = 1)) = 1")


def test_long_rows_are_evaluated_few_at_a_time(tmp_path: Path) -> None:
    """What an expression holds of all rows that are evaluated at once counts in no limit."""
    one = row(0, 0)
    rows = (
        replace(one, id=f"id{n}", meta=json.dumps({"n": n, "t": "x" * 9000})) for n in range(90)
    )
    held = fill(tmp_path, rows, rows_per_shard=40)
    shown = sys.modules[where.__module__]._table(held, "row", {})
    sizes = [batch.nbytes for batch in shown.to_batches()]
    assert 4 <= len(sizes) <= 10
    assert max(sizes) < 300_000
    assert where(held, "n % 7 = 3 and length(upper(t)) = 9000").tolist() == list(range(3, 90, 7))


def test_deleted_rows_are_not_found_and_do_not_move_others(tmp_path: Path) -> None:
    fill(tmp_path, (row(n, label="x") for n in range(COUNT)))
    delete(tmp_path, ["id0", "id11", "id24"])
    found = where(open_store(tmp_path), "label = 'x'")
    assert found.tolist() == [n for n in range(COUNT) if n not in (0, 11, 24)]


def test_an_empty_store_has_no_rows(tmp_path: Path) -> None:
    held = fill(tmp_path, [])
    assert where(held, "whatever = 1").tolist() == []
    with pytest.raises(UsageError, match="not a SQL expression"):
        where(held, "whatever =")


@pytest.mark.parametrize(
    ("expression", "said"),
    [
        ("labl = 'dress'", "no field of meta is called 'labl': did you mean 'label'?"),
        ('label = "dress"', "called 'dress'.*text is written in 'single quotes'"),
        ('"#row" = 1', "called '#row'"),
        ("stored.id = 'id1'", "called 'stored'"),
        ("label = ", "not a SQL expression: syntax error"),
        ("", "it is empty"),
        (" \n", "it is empty"),
        ("label = 'dress", "not a SQL expression: unterminated"),
        ("true /* and", "not a SQL expression: unterminated"),
        ("true) or (true", "not a SQL expression: syntax error"),
        ("true; select 1", "nothing after it"),
        ("true;", "syntax error"),
        ("true; drop table stored", "not a SQL expression"),
        ("true order by id", "nothing after it"),
        ("true limit 1", "nothing after it"),
        ("true group by id", "nothing after it"),
        ("true using sample 1", "nothing after it"),
        ("true union select 1", "nothing after it"),
        ("id in (select id from stored)", "a subquery is not allowed: compare columns"),
        ("exists(from read_text('/etc/hosts'))", "a subquery is not allowed: compare columns"),
        ("id = (from 'secret.csv')", "a subquery is not allowed: compare columns"),
        ("row_number() over () = 1", "a window is not allowed: compare columns"),
        ("columns(*) = 'x'", "a star is not allowed: compare columns"),
        ("#1 = 'x'", "a positional_reference is not allowed: compare columns"),
        ("id = $1", "nothing after it"),
        ("sum(price) > 1", r"sum\(\) is not an allowed function"),
        ("count(*) > 1", r"count_star\(\) is not an allowed function"),
        ("sleep_ms(1000) is null", r"sleep_ms\(\) is not an allowed function"),
        ("write_log('x') is null", r"write_log\(\) is not an allowed function"),
        ("current_setting('threads') = '1'", r"current_setting\(\) is not an allowed function"),
        ("len(range(20000000)) > 0", r"range\(\) is not an allowed function"),
        ("repeat(label, 1000000) = ''", r"repeat\(\) is not an allowed function"),
        ("random() < 0.5", r"random\(\) is not an allowed function"),
        ("main.lower(label) = 'x'", r"lower\(\) is not an allowed function"),
        ("lowr(label) = 'x'", r"lowr\(\) is not an allowed function.*did you mean 'lower'"),
        ("length(label) = (((((((((" + "(" * 990 + "1" + ")" * 999, "nest|depth|deep"),
        (f"id = '{'x' * 20_000}'", "it has 20007 characters; at most 20000 are allowed"),
        ("read_text('/etc/hosts') = ''", "read_text"),
        ("getenv('HOME') = ''", "getenv"),
        ("nope(id)", "nope"),
        ("label", "of type VARCHAR, not true or false"),
        ("price", "of type DOUBLE, not true or false"),
        ("1", "not true or false"),
        ("label::int = 1", "Could not convert string 'dress'"),
        (
            "len(list_filter(captions, lambda x: list_filter(captions, lambda y: x = y) = [])) = 0",
            "lambda is not allowed inside a lambda",
        ),
        (
            "list_transform(captions, lambda x: x || x) = []",
            r"\|\| is not allowed inside a lambda",
        ),
        (
            "captions = [x for x in captions if x = '']",
            "struct_pack is not allowed inside a lambda",
        ),
        (
            "array_to_string([array_to_string(captions, id)], id) = ''",
            "array_to_string is not allowed inside another array_to_string",
        ),
        (f"id = {'[' * 9}id{']::text' * 9}", "more than 4 nested casts"),
        (
            f"concat({'meta, ' * 500}meta) = id",
            "it names 502 columns and fields; at most 500 are allowed",
        ),
        (
            f"list_filter([{'1, ' * 200}1], lambda x: upper(meta) = id) = []",
            "it has 201 numbers and texts; with a lambda, at most 200 are allowed",
        ),
        ("replace(id, 'i', id) = ''", r"replace\(\) is not an allowed function"),
        ("mixed < 3", r"mixed is text here; write try_cast\(mixed as double\)"),
        ("mixed::double < 3", r"mixed is text here; write try_cast\(mixed as double\)"),
    ],
)
def test_what_is_no_expression_is_said_in_one_line(
    store: Store, expression: str, said: str
) -> None:
    with pytest.raises(UsageError, match=said) as caught:
        where(store, expression)
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith(f"where {expression!r}: "[:180])
    assert len(str(caught.value)) < 1500


def test_nothing_can_be_read_written_or_loaded(store: Store, tmp_path: Path) -> None:
    """Even were an expression to get past the checks, the engine has its doors shut."""
    import duckdb

    from mmalign.store.where import CONFIG

    secret = tmp_path / "secret.csv"
    secret.write_text("a\n1\n")
    with duckdb.connect(":memory:", config=CONFIG) as engine:
        engine.execute("SET lock_configuration = true")
        for attack in (
            f"SELECT * FROM read_csv('{secret}')",
            f"SELECT * FROM '{secret}'",
            f"COPY (SELECT 1) TO '{tmp_path / 'out.csv'}'",
            f"ATTACH '{tmp_path / 'other.db'}'",
            f"EXPORT DATABASE '{tmp_path / 'dump'}'",
            "INSTALL httpfs",
            "LOAD httpfs",
            "SELECT * FROM store",
            "SET enable_external_access = true",
            "SET threads = 1",
        ):
            with pytest.raises(duckdb.Error):
                engine.execute(attack)
    assert list(tmp_path.iterdir()) == [secret]


def test_without_duckdb_it_says_what_to_install(tmp_path: Path) -> None:
    fill(tmp_path, [row(1)])
    code = (
        "import sys; sys.modules['duckdb'] = None\n"
        "from mmalign.store import open_store\n"
        "from mmalign.store.where import where\n"
        "from mmalign.errors import InstallError\n"
        "try:\n    where(open_store(sys.argv[1]), 'true')\n"
        "except InstallError as error:\n    print(error)"
    )
    words = [sys.executable, "-c", code, str(tmp_path)]
    said = subprocess.run(words, capture_output=True, text=True, check=True).stdout
    assert said == "selecting rows by SQL needs DuckDB: pip install 'mmalign[sql]'\n"


def test_many_rows_are_found_in_order(tmp_path: Path) -> None:
    one, count = row(0, 0), 20_000
    many = (replace(one, id=f"id{n}", meta=json.dumps({"n": n})) for n in range(count))
    held = fill(tmp_path, many, rows_per_shard=1000)
    assert where(held, "n % 3 = 1").tolist() == list(range(1, count, 3))


def test_a_typed_column_and_the_json_give_the_same_rows(tmp_path: Path) -> None:
    """Fields of all kinds; those of a store in which every field is only in the JSON, too."""
    metas = [
        {"price": n, "share": n / 7, "sold": n % 3 == 0, "label": f"l{n % 5}", "tags": ["a", n]}
        | ({"size": n if n % 2 else n + 0.5} if n % 4 else {})
        | {"mixed": n if n % 2 else str(n), "large": 2**63 + n, "none": None}
        for n in range(60)
    ]
    typed = fill(tmp_path / "typed.store", [row(n, **meta) for n, meta in enumerate(metas)])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fields, "MOST_FIELDS", 0)
        plain = fill(tmp_path / "plain.store", [row(n, **m) for n, m in enumerate(metas)])
    assert [typed.field(n) is not None for n in ("price", "share", "sold", "label", "size")] == (
        [True] * 5
    )
    assert [typed.field(n) for n in ("mixed", "large", "none", "tags")] == [None] * 4
    assert plain.field("price") is None
    for expression in (
        "price between 10 and 20", "share > 3", "sold", "not sold", "label = 'l3'", "size > 20",
        "size is null", "mixed = '11'", "large > 9223372036854775817", "\"none\" is null",
        "price + size > 50 and label in ('l1', 'l2')", "PRICE = 7", "price / 2 = 3.5",
        "json_array_length(tags) = 2", "absent is null",
    ):  # fmt: skip
        outcomes = []
        for store in (typed, plain):
            try:
                outcomes.append(where(store, expression).tolist())
            except UsageError as error:
                outcomes.append(str(error))
        assert outcomes[0] == outcomes[1], expression


def test_fields_of_shards_with_other_types_are_joined(tmp_path: Path) -> None:
    kinds = [{"n": 1}, {"n": 1.5}, {}, {"n": 3}]
    rows = [row(10 * s + i, **meta) for s, meta in enumerate(kinds) for i in range(10)]
    store = fill(tmp_path / "s.store", rows)
    column = store.field("n")
    assert column is not None
    assert column.to_pylist() == [1.0] * 10 + [1.5] * 10 + [None] * 10 + [3.0] * 10
    assert where(store, "n > 1").tolist() == [*range(10, 20), *range(30, 40)]
    more = fill(tmp_path / "s.store", [row(n, n="text") for n in range(50, 60)])
    assert more.field("n") is None
    assert where(more, "n = 'text'").tolist() == list(range(40, 50))
