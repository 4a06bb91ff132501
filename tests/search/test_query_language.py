"""What queries in the query language find, in Python and in the shell."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small_store
from click.testing import CliRunner, Result
from conftest import jpeg
from store_samples import encoder_of

from mmalign import Query, Row, Searcher, open_store
from mmalign.cli.main import main
from mmalign.errors import UsageError
from mmalign.search.exclusion import ABOVE, SUBTRACTED
from mmalign.search.filters import as_sql
from mmalign.search.grammar import Condition
from mmalign.search.searcher import Hits
from mmalign.store import delete, update_rows

pytest.importorskip("duckdb", reason="filters need DuckDB: pip install 'mmalign[sql]'")

COUNT, GONE = 40, (3, 10, 21)
CAPTIONS = ("a RED dress", "Ｗｉｄｅ ﬁne cafe\u0301", "一条红裙子", "100% wool_(new)")


def meta(number: int) -> dict[str, Any]:
    fields = {
        "label": ("Dress", "shoe", "evening dress", "it's")[number % 4],
        "price": number / 2 if number % 2 else number,
        "count": number,
        "date": f"{2022 + number % 5}-12-31",
        "size": str(number),
        "ok": number % 2 == 1,
        "tags": ["Summer", f"t{number}", number],
        "mixed": number if number % 2 else f"x{number}",
        "id": -number,
        "author": {"name": "n"},
        "颜色": ("红", "蓝")[number % 2],
        "Case": 1,
        "case": number,
    }
    return fields if number % 10 != 9 else {"price": number / 2, "count": number}


@pytest.fixture(scope="module")
def listed(tmp_path_factory: pytest.TempPathFactory) -> Searcher:
    """A store of rows with metadata, three of them deleted; nothing is encoded."""
    path = tmp_path_factory.mktemp("listed") / "s.store"
    rows = (
        replace(small_store.row(n, 2, **meta(n)), captions=(f"number {n}", CAPTIONS[n % 4]))
        for n in range(COUNT)
    )
    small_store.fill(path, rows)
    delete(path, [f"id{n}" for n in GONE])
    return Searcher(open_store(path), encoder_of(small_store.CARD))


def numbers(hits: Hits) -> list[int]:
    return [hit.row for hit in hits]


def find(searcher: Searcher, text: str, k: int = 100, **options: Any) -> Hits:
    return searcher.search(Query.parse(text, fields=searcher.fields), k, **options)


def has(number: int, field: str) -> Any:
    return meta(number).get(field)


# ---------------------------------------------------------------- filters


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("label:dress", lambda n: has(n, "label") == "Dress"),
        ("LABEL:EVENING\u3000", lambda n: False),
        ('label:"Evening Dress"', lambda n: has(n, "label") == "evening dress"),
        ("label:it's", lambda n: has(n, "label") == "it's"),
        ("label:<e", lambda n: has(n, "label") == "Dress"),
        ("颜色:红", lambda n: has(n, "颜色") == "红"),
        ("price:>9", lambda n: meta(n)["price"] > 9),
        ("price:>=18", lambda n: meta(n)["price"] >= 18),
        ("price:4.5", lambda n: n == 9),
        ("price:=1e1", lambda n: meta(n)["price"] == 10),
        ("price:-3..2", lambda n: meta(n)["price"] <= 2),
        ("count:9..12", lambda n: 9 <= n <= 12),
        ("count:..12 count:>=9", lambda n: 9 <= n <= 12),
        ("date:2024..2025", lambda n: n % 10 != 9 and n % 5 in (2, 3)),
        ("date:2024", lambda n: False),
        ("date:>2024", lambda n: n % 10 != 9 and n % 5 > 2),
        ("date:<=2023-12", lambda n: n % 5 < 2),
        ("size:<9", lambda n: n < 9),
        ("size:9..11", lambda n: 10 <= n <= 11),
        ("ok:yes", lambda n: has(n, "ok") is True),
        ("ok:False", lambda n: has(n, "ok") is False),
        ("tags:summer", lambda n: n % 10 != 9),
        ("tags:T7", lambda n: n == 7),
        ("tags:>35", lambda n: n > 35 and n % 10 != 9),
        ("tags:6..7", lambda n: n in (6, 7)),
        ("mixed:X8", lambda n: n == 8),
        ("mixed:>30", lambda n: n > 30 and n % 2 and n % 10 != 9),
        ("id:-7", lambda n: n == 7),
        ("case:7", lambda n: n == 7),
        ("Case:1", lambda n: n % 10 != 9),
        ("! label:dress", lambda n: has(n, "label") != "Dress"),
        ("- count:5..100", lambda n: n < 5),
        ("ok:yes ! label:shoe", lambda n: has(n, "ok") and has(n, "label") != "shoe"),
    ],
)
def test_filters(listed: Searcher, text: str, wanted: Callable[[int], Any]) -> None:
    expected = [n for n in range(COUNT) if n not in GONE and wanted(n)]
    assert numbers(find(listed, text)) == expected


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ('"red dress"', lambda n: n % 4 == 0),
        ('"number 7"', lambda n: n == 7),
        ('"WIDE"', lambda n: n % 4 == 1),
        ('"fine  café"', lambda n: n % 4 == 1),
        ("“红裙”", lambda n: n % 4 == 2),
        ('"100％ wool_("', lambda n: n % 4 == 3),
        ('"number" "red dress"', lambda n: n % 4 == 0),
        ('"% wool" count:>20', lambda n: n % 4 == 3 and n > 20),
        ('"_ool"', lambda n: False),
    ],
)
def test_phrases(listed: Searcher, text: str, wanted: Callable[[int], Any]) -> None:
    query = replace(Query.parse(text, fields=listed.fields), items=())
    expected = [n for n in range(COUNT) if n not in GONE and wanted(n)]
    assert numbers(listed.search(query, 100)) == expected


def test_without_items_rows_come_in_order_and_have_no_score(listed: Searcher) -> None:
    whole = find(listed, "count:>=5", meta=True)
    assert {hit.score for hit in whole} == {0.0}
    assert [hit.rank for hit in whole] == list(range(1, len(whole) + 1))
    assert [hit.meta and hit.meta["count"] for hit in whole] == numbers(whole)
    pages = [find(listed, "count:>=5", 7, offset=first, meta=True) for first in range(0, 42, 7)]
    assert [hit for page in pages for hit in page] == list(whole)
    assert numbers(listed.search(Query((), where="count < 5"))) == [0, 1, 2, 4]
    assert numbers(find(listed, "count:<9", where="ok")) == [1, 5, 7]


def test_a_filter_narrows_what_a_vector_finds(listed: Searcher) -> None:
    vector = np.random.default_rng(5).normal(size=small_store.DIM)
    query = replace(Query.parse("ok:yes", fields=listed.fields), items=((vector, 1.0),))
    everything = listed.search(vector, 100)
    for to in ("image", "text"):
        everything = listed.search(vector, 100, to=to)
        wanted = [n for n in numbers(everything) if has(n, "ok")]
        assert numbers(listed.search(query, 100, to=to)) == wanted
        assert numbers(listed.search(query, 5, to=to, offset=3)) == wanted[3:8]


def test_queries_with_and_without_items_are_answered_in_their_order(listed: Searcher) -> None:
    queries = [
        replace(Query.parse(text, fields=listed.fields), items=items)
        for text in ("ok:yes", "count:<9", "ok:yes ! row:id8")
        for items in ((), ((Row("id4"), 1.0),), ((Row("id5"), 1.0), (Row("id6"), -0.5)))
        if items or "!" not in text
    ]
    together = listed.search_many(queries)
    assert [hits.query for hits in together] == queries
    assert [numbers(hits) for hits in together] == [numbers(listed.search(q)) for q in queries]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("price:cheap", "the filter price:cheap: price is a number"),
        ("price:2..x", "the filter price:2..x: price is a number"),
        ("ok:3", "the filter ok:3: ok is true or false"),
        ("ok:>true", "the filter ok:>true: ok is true or false"),
        ("label:a\0", "leave out the null character"),
        ("label:\udcff", "a text is not UTF-8"),
        ("row:none", "no row has the id 'none'"),
    ],
)
def test_mistakes(listed: Searcher, text: str, said: str) -> None:
    with pytest.raises(UsageError, match=said) as caught:
        find(listed, text)
    assert "\n" not in str(caught.value)


def test_a_field_that_is_gone_is_named(listed: Searcher) -> None:
    query = Query((), conditions=(Condition("prise", "=", "3"),))
    with pytest.raises(UsageError, match="no row has a field 'prise': did you mean 'price'"):
        listed.search(query)


def test_as_many_filters_as_are_allowed_can_be_answered(listed: Searcher) -> None:
    texts = [f"mixed:{n}.5..{n + 20}.5" for n in range(9)]
    assert numbers(find(listed, " ".join(texts[:8]))) == [11, 13, 15, 17]
    assert 0 not in numbers(find(listed, " ".join(f"! mixed:x{n}" for n in range(0, 16, 2))))
    with pytest.raises(UsageError, match="has 9 filters and phrases; at most 8 are allowed"):
        find(listed, " ".join(texts))


@pytest.mark.parametrize("value", ["'", "''", "' or true --", "\\", "%", '"', "$$", "/*", ";"])
@pytest.mark.parametrize("field", ["label", "tags"])
def test_values_are_only_values(listed: Searcher, field: str, value: str) -> None:
    for sign in ("=", ">", ".."):
        condition = Condition(field, sign, value, value)  # type: ignore[arg-type]
        assert len(listed.search(Query((), conditions=(condition,)), 100)) < COUNT - len(GONE)
    inside = as_sql([Condition('a"b', "=", value)], {'a"b': "text"})
    assert inside.startswith('(lower(nfc_normalize("a""b")) = ')


def test_the_fields_of_a_store_are_found_without_its_rows(listed: Searcher) -> None:
    kinds = {"price": "number", "count": "number", "ok": "truth", "date": "text", "label": "text"}
    kinds |= {"size": "text", "颜色": "text", "Case": "number", "case": "number", "id": "number"}
    kinds |= {"tags": "json", "mixed": "json", "author": "json"}
    assert listed.store.fields == kinds
    assert set(listed.fields) == set(kinds)


def test_a_field_of_two_types_in_two_shards_is_compared_in_both(tmp_path: Path) -> None:
    rows = [small_store.row(n, v=n if n < 10 else f"{n}") for n in range(20)]
    store = small_store.fill(tmp_path / "s.store", rows, rows_per_shard=10)
    assert store.fields == {"v": "json"}
    searcher = Searcher(store, encoder_of(small_store.CARD))
    assert numbers(find(searcher, "v:8..11")) == [8, 9, 10, 11]


# ---------------------------------------------------------------- exclusion


@pytest.mark.parametrize("to", ["image", "text"])
def test_rows_with_a_high_score_are_left_out_and_the_rest_is_ranked_by_less_of_it(
    listed: Searcher, to: str
) -> None:
    rng = np.random.default_rng(6)
    asked, first, second = rng.normal(size=(3, small_store.DIM))
    for excluded in ((first,), (first, second)):
        items = ((asked, 1.0), *((item, -SUBTRACTED) for item in excluded))
        wanted = numbers(listed.search(Query(items, k=100, to=to)))
        out: set[int] = set()
        for item in excluded:
            hits = listed.search(item, 100, to=to)
            scores = np.array([hit.score for hit in hits])
            out |= {hit.row for hit in hits if hit.score > scores.mean() + ABOVE * scores.std()}
        assert 0 < len(out) < len(wanted)
        query = Query(((asked, 1.0),), excluded=excluded)
        assert numbers(listed.search(query, 100, to=to)) == [n for n in wanted if n not in out]


def test_a_query_that_only_excludes_lists_the_other_rows(listed: Searcher) -> None:
    rest = numbers(find(listed, "! row:id1"))
    assert rest == sorted(rest)
    assert 1 not in rest
    assert COUNT - len(GONE) > len(rest) >= (COUNT - len(GONE)) / 2
    assert numbers(find(listed, "count:<9 ! row:id1")) == [n for n in rest if n < 9]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("count:1 ! row:id1", "what follows ! leaves out the only row that the query selects"),
        (
            "row:id2 count:..2 ! row:id0 ! row:id1 ! row:id2",
            "what follows ! leaves out all 3 rows that the query selects",
        ),
        ("count:1 ! row:id4", None),
        ("count:999 ! row:id1", None),
    ],
)
def test_an_exclusion_that_leaves_nothing_is_said(
    listed: Searcher, caplog: pytest.LogCaptureFixture, text: str, said: str | None
) -> None:
    hits = find(listed, text)
    if said is None:
        assert not caplog.messages
        return
    (message,) = caplog.messages
    assert said in message
    assert (len(hits), hits.nothing_found) == (0, True)


# ---------------------------------------------------------------- words


@pytest.fixture(scope="module")
def scenes_store(store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The drawn scenes with a field of metadata."""
    path = shutil.copytree(store, tmp_path_factory.mktemp("language") / "s.store")
    for half, label in enumerate(("first", "second")):
        update_rows(open_store(path), range(48 * half, 48 * half + 48), {"half": label})
    return path


@pytest.fixture(scope="module")
def searcher(scenes_store: Path) -> Searcher:
    return Searcher.open(scenes_store)


def test_weights_and_minus_are_those_of_the_sum_of_vectors(searcher: Searcher) -> None:
    red, stars, blue = searcher.encoder.encode(["red circles", "星星", "blue"])
    wanted = 2 * red + stars - 0.5 * blue
    query = Query.parse("2:red circles ＋ 星星 - 0.5:blue")
    unit = wanted / np.linalg.norm(wanted)
    assert np.allclose(searcher.encode([query])[0], unit, atol=1e-6)
    assert numbers(searcher.search(query)) == numbers(searcher.search(wanted))


def test_words_and_a_row_have_an_equal_say(searcher: Searcher) -> None:
    vectors = np.concatenate(searcher.store.vectors("image")).astype(np.float32)
    row = searcher.search("red circles", 1)[0].id
    mixed, alone, words = searcher.encode([Query.parse(f"row:{row} + blue"), Row(row), "blue"])
    scores = np.corrcoef(np.stack([mixed, alone, words]) @ vectors.T)
    assert scores[0, 1] == pytest.approx(scores[0, 2], abs=1e-3)


def test_a_text_with_operators_stays_one_text(searcher: Searcher) -> None:
    as_text, as_query = "red - blue", Query.parse("red - blue")
    alone = searcher.encoder.encode_texts([as_text])
    assert np.array_equal(searcher.encode([as_text]), alone)
    assert not np.allclose(searcher.encode([as_query]), alone)


def test_a_phrase_narrows_and_is_also_searched_by(searcher: Searcher) -> None:
    hits = find(searcher, '"red" circles')
    assert hits
    assert all(any("red" in c for c in hit.captions) for hit in hits)
    everything = searcher.search("red circles", 96)
    wanted = [hit.row for hit in everything if any("red" in c for c in hit.captions)]
    assert numbers(hits) == wanted
    chinese = find(searcher, '"红色"')
    assert sorted(numbers(chinese)) == [
        hit.row
        for hit in sorted(everything, key=lambda h: h.row)
        if "红色" in "".join(hit.captions)
    ]


def test_more_like_one_row_and_less_like_another(searcher: Searcher) -> None:
    one, two = (searcher.store.rows([n], ("id",))[0]["id"] for n in (5, 70))
    found = find(searcher, f"row:{one} - 0.5:row:{two} half:second", 96)
    assert sorted(numbers(found)) == list(range(48, 96))
    same = searcher.search(Query(((Row(one), 1.0), (Row(two), -0.5))), 96)
    assert numbers(found) == [n for n in numbers(same) if n >= 48]


# ---------------------------------------------------------------- the shell


def shell(store: Path, *words: str) -> Result:
    result = CliRunner().invoke(main, ["search", str(store), *words])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def test_the_shell_says_how_a_query_was_read(scenes_store: Path) -> None:
    result = shell(scenes_store, "red ＋ 2:stars half:FIRST", "-k", "3", "--table")
    assert (result.exit_code, result.stderr) == (0, "read as: half:FIRST red + 2:stars\n")
    assert len(result.stdout.splitlines()) == 3
    assert shell(scenes_store, "red stars").stderr == ""


def test_json_has_the_reading_and_pages_go_on(scenes_store: Path, searcher: Searcher) -> None:
    text = "red - 0.5:stars half:second"
    pages = [
        json.loads(shell(scenes_store, text, "--json", "-k", "4", "--offset", first).stdout)
        for first in ("0", "4")
    ]
    assert pages[0]["read_as"] == Query.parse(text, fields=["half"]).read_as
    found = [(hit["rank"], hit["id"]) for page in pages for hit in page["hits"]]
    assert found == [(hit.rank, hit.id) for hit in find(searcher, text, 8)]


def test_the_shell_lists_rows_without_a_score(scenes_store: Path) -> None:
    result = shell(scenes_store, "half:second", "-k", "2", "--table")
    assert [line.split()[:2] for line in result.stdout.splitlines()] == [["1", "-"], ["2", "-"]]
    nothing = shell(scenes_store, 'red half:"a\x1b[2J\nb"')
    assert nothing.stderr.splitlines() == [
        'read as: half:"a\\x1b[2J\\nb" red',
        "nothing found: no row matches the filters",
    ]


def test_files_of_terms_are_opened_in_the_shell(
    scenes_store: Path, searcher: Searcher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("cat 1.jpg").write_bytes(jpeg())
    text = '@"cat 1.jpg" - 0.5:stars'
    answer = json.loads(shell(scenes_store, text, "--json").stdout)
    same = searcher.search(Query(((Path("cat 1.jpg"), 1.0), ("stars", -0.5))))
    assert [hit["id"] for hit in answer["hits"]] == [hit.id for hit in same]
    assert answer["read_as"]["text"] == text
    assert json.loads(shell(scenes_store, "cat 1.jpg", "--json").stdout)["read_as"] == {
        "text": '@"cat 1.jpg"',
        "parts": [{"kind": "file", "content": "cat 1.jpg", "weight": 1.0, "excluded": False}],
    }


@pytest.mark.parametrize(
    ("text", "code", "said"),
    [
        ("red - @gone.jpg", 2, "gone.jpg: no such image file; to search for text"),
        ("red + @words.jpg", 1, "words.jpg: cannot be used as an image"),
        ("half:a\0", 2, "the filter half:a\\x00: leave out the null character"),
        ("red - red", 1, "the items of the query cancel out: give them other weights"),
    ],
)
def test_mistakes_are_one_line(
    scenes_store: Path, tmp_path: Path, text: str, code: int, said: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    Path("words.jpg").write_text("words")
    result = shell(scenes_store, text)
    assert (result.exit_code, result.stdout) == (code, "")
    assert said in result.stderr
    assert result.stderr.count("\n") == 1


def test_a_query_of_python_opens_no_file(tmp_path: Path) -> None:
    (tmp_path / "cat.jpg").write_bytes(jpeg())
    for text in (f"@{tmp_path}/cat.jpg", f"{tmp_path}/cat.jpg", f"row:{tmp_path}/cat.jpg"):
        assert not any(isinstance(item, Path) for item, _ in Query.parse(text).items)
