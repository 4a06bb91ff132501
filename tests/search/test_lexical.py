"""Words of captions: how they are told apart, kept, scored and fused with vectors."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from store_samples import flip
from topic_store import CARD, DIM, Drawn, drawn, text_vector

from mmalign import Query, Searcher, open_store
from mmalign.errors import StoreError, UsageError
from mmalign.search import fusion, lexical
from mmalign.search.build import build_index
from mmalign.search.words import asked_words, indexed_words
from mmalign.store import Row, Writer, delete, pair_vectors, verify

ROWS = 120
NAMES = {7: "Zorvex on a sofa", 30: "我家的翡鸢鹏", 31: "鼬", 44: "ZORVEX, asleep; zorvex"}


def caption(number: int) -> str:
    return NAMES.get(number, f"a thing {number} 东西")


def write(path: Path, numbers: range) -> Path:
    with Writer(path, CARD, 50) as writer:
        for n in numbers:
            texts = np.array([drawn(n, 1, 0.5)] * 2).reshape(-1, DIM)
            vectors = pair_vectors(drawn(n, 2, -0.5), texts)
            writer.add(Row(f"id{n}", f"{n}.jpg", (caption(n), "picture"), vectors))
    return path


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = write(tmp_path_factory.mktemp("lexical") / "words.store", range(ROWS))
    build_index(path)
    return path


@pytest.fixture
def copy(built: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(built, tmp_path / "words.store"))


@pytest.fixture(autouse=True)
def encoded(monkeypatch: pytest.MonkeyPatch) -> None:
    def encode(encoder: Any, items: list[Any]) -> list[np.ndarray]:
        return [text_vector(i) if isinstance(i, str) else np.asarray(i) for i in items]

    monkeypatch.setattr("mmalign.search.searcher.encode_items", encode)


def searcher_of(path: Path) -> Searcher:
    encoder: Any = Drawn()
    return Searcher(open_store(path), encoder)


def by_words(searcher: Searcher, text: str) -> list[int]:
    hits = searcher.search(text, 300, lexical=True)
    return sorted(hit.row for hit in hits if hit.words)


# ---------------------------------------------------------------- words


@pytest.mark.parametrize(
    ("caption", "query"),
    [
        ("a Red dress", "RED"),
        ("Ｗｉｄｅ letters", "wide"),
        ("cafe\u0301 de Paris", "café"),
        ("Straße", "STRASSE"),
        ("一条红裙子", "裙子"),
        ("一条红裙子", "裙"),
        ("一条红裙子red", "红裙子 RED"),
        ("ひらがなカタカナ", "カタカナ"),
        ("file_name 24-70mm", "name 70mm"),
    ],
)
def test_a_query_and_a_caption_are_read_alike(caption: str, query: str) -> None:
    assert asked_words(query)
    assert set(asked_words(query)) <= set(indexed_words(caption))


def test_words_are_not_found_within_words() -> None:
    assert not set(asked_words("art 红子")) & set(indexed_words("a party 红裙子"))
    assert asked_words("?!, -- 。") == []


def test_scores_are_those_of_bm25() -> None:
    rows = [["a dog", "a dog runs"], ["a cat"], [], ["dog"]]
    found = lexical.Lexical([lexical.postings(iter(rows[:2])), lexical.postings(iter(rows[2:]))])
    lengths, counts = np.array([5, 2, 0, 1]), np.array([2, 0, 0, 1])
    rarity = np.log(1 + (4 - 2 + 0.5) / 2.5)
    wanted = rarity * 2.2 * counts / (counts + 1.2 * (0.25 + 0.75 * lengths / 2))
    matches = found.match("Dog")
    assert np.allclose(matches.scores_N, wanted)
    assert matches.complete_N.tolist() == [True, False, False, True]
    assert found.match("a dog").complete_N.tolist() == [True, False, False, False]
    assert not found.match("").complete_N.any()


# ---------------------------------------------------------------- search


@pytest.mark.parametrize(
    ("text", "wanted"),
    [("zorvex", [7, 44]), ("翡鸢鹏", [30]), ("鼬", [31]), ("鸢", [30]), ("nobody", [])],
)
def test_names_that_the_model_does_not_know_are_found(
    built: Path, text: str, wanted: list[int]
) -> None:
    searcher = searcher_of(built)
    plain, fused = searcher.search(text), searcher.search(text, lexical=True)
    assert by_words(searcher, text) == wanted
    assert set(wanted) <= {hit.row for hit in fused}
    assert all(hit.words is None and hit.found_by is None for hit in plain)
    assert fused.nothing_found == (not wanted)
    query_D = text_vector(text)
    for hit in fused:
        vector = searcher.store.vectors_of("image", hit.row)[0]
        assert hit.score == pytest.approx(float(vector @ query_D), abs=1e-5)
        assert (hit.relevance is None) == (plain[0].relevance is None)
        assert hit.found_by in {True: ("words", "both"), False: ("vectors",)}[bool(hit.words)]
    assert [hit.rank for hit in fused] == list(range(1, 11))


def test_the_index_and_reading_the_captions_find_the_same(built: Path, tmp_path: Path) -> None:
    other = searcher_of(write(tmp_path / "plain.store", range(ROWS)))
    searcher = searcher_of(built)
    for text in ("zorvex", "a thing", "东西 7", "鸢"):
        one, two = (s.search(text, 50, lexical=True) for s in (searcher, other))
        assert [(h.row, h.words, h.found_by) for h in one] == [
            (h.row, h.words, h.found_by) for h in two
        ]


def test_pages_are_parts_of_one_order(built: Path) -> None:
    searcher = searcher_of(built)
    whole = searcher.search("a thing", 40, lexical=True)
    pages = [searcher.search("a thing", 10, offset=i, lexical=True) for i in range(0, 40, 10)]
    assert [hit for page in pages for hit in page] == list(whole)


def test_filters_hold_for_words_too(built: Path) -> None:
    searcher = searcher_of(built)
    query = Query((("zorvex", 1.0),), phrases=("sofa",), lexical=True)
    assert [hit.row for hit in searcher.search(query)] == [7]
    captions = searcher.search("zorvex", to="text", lexical=True)
    assert {7, 44} <= {hit.row for hit in captions}
    assert all(hit.caption for hit in captions)


def test_later_rows_are_found_and_deleted_ones_are_not(copy: Path) -> None:
    delete(copy, ["id7"])
    with Writer(copy, CARD, 50) as writer:
        vectors = pair_vectors(drawn(3, 2, -0.5), np.array([drawn(3, 1, 0.5)]))
        writer.add(Row("new", "new.jpg", ("zorvex again",), vectors))
    assert by_words(searcher_of(copy), "zorvex") == [44, ROWS]


def test_a_query_without_words_is_refused() -> None:
    for items in (((np.ones(DIM), 1.0),), (("red", -1.0), (np.ones(DIM), 1.0))):
        with pytest.raises(UsageError, match="lexical matches words with captions: the query has"):
            Query(items, lexical=True)


def test_a_store_without_captions_is_searched_by_vectors(tmp_path: Path) -> None:
    with Writer(tmp_path / "s.store", CARD, 50) as writer:
        for n in range(5):
            vectors = pair_vectors(drawn(n, 2, -0.5), np.zeros((0, DIM)))
            writer.add(Row(f"id{n}", f"{n}.jpg", (), vectors))
    build_index(tmp_path / "s.store")
    hits = searcher_of(tmp_path / "s.store").search("red", lexical=True)
    assert {hit.found_by for hit in hits} == {"vectors"}


# ---------------------------------------------------------------- files


def test_index_json_tells_of_the_words_and_verify_reads_them(copy: Path) -> None:
    folder = open_store(copy).index_folder
    assert folder is not None
    said = json.loads((folder / "index.json").read_text())["lexical"]
    assert said["rows"] == ROWS
    assert said["words"] == len({w for n in range(ROWS) for w in indexed_words(caption(n))}) + 1
    flip(folder / "lexical.rows.npy")
    assert any("lexical.rows.npy" in line for line in verify(copy))


@pytest.mark.parametrize("name", list(lexical.TYPES))
@pytest.mark.parametrize("how", ["cut", "pickle", "large", "type"])
def test_files_that_are_damaged_or_made_up_are_reported_and_not_used(
    copy: Path, name: str, how: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = open_store(copy).index_folder
    assert folder is not None
    file = folder / f"lexical.{name}.npy"
    array, size = np.load(file), file.stat().st_size
    if how == "cut":
        file.write_bytes(file.read_bytes()[:-1])
    elif how == "pickle":
        np.save(file, np.array([{}] * len(array), object))
        file.write_bytes(file.read_bytes()[:size].ljust(size, b"\0"))
    elif how == "type":
        np.save(file, array.view(np.uint8 if array.itemsize > 1 else np.int8))
    elif name == "rows":
        np.save(file, array + 1000)
    elif name == "ends":
        np.save(file, array[::-1].copy())
    else:
        np.save(file, array[:-1])
    assert by_words(searcher_of(copy), "zorvex") == [7, 44]
    if how != "large" or name != "lengths":
        assert capsys.readouterr().err.count("the captions are read instead; run `mmalign") == 1


def test_an_index_with_more_rows_than_the_store_is_refused(built: Path) -> None:
    store = open_store(built)
    more = lexical.postings(iter([["a"]] * (ROWS + 1)))
    with pytest.raises(StoreError, match="more rows than the store"):
        lexical.open_lexical(store, more)


# ---------------------------------------------------------------- fusion


def test_ranks_are_fused_and_of_equals_the_nearest_is_first() -> None:
    scores = np.array([0.9, 0.8, 0.1, 0.2], np.float32)
    words = np.array([0, 3, 5, 0], np.float32)
    order = fusion.fused_order(scores, words, np.array([True, True, False, True]))
    # 1/61; 1/62 + 1/62; 1/61; 1/63
    assert order.tolist() == [1, 0, 2, 3]


def test_the_best_rows_are_those_of_a_sort() -> None:
    scores = np.random.default_rng(0).integers(0, 5, 200).astype(np.float32)
    allowed = np.arange(200) % 3 > 0
    matches = lexical.Matches(scores, scores > 9)
    wanted = [i for i in np.argsort(-scores, kind="stable") if allowed[i] and scores[i]]
    for count in (1, 20, 90, 500):
        assert sorted(fusion.best_rows(matches, allowed, count)) == sorted(wanted[:count])
    assert [fusion.depth(n) for n in (1, 256, 257, 5000)] == [256, 256, 1024, 16384]


def test_how_much_of_a_text_is_in_no_caption() -> None:
    rows = [["a red dog"], ["a dog", "红色的狗"], ["the dog"]]
    words = lexical.Lexical([lexical.postings(iter(rows[:2])), lexical.postings(iter(rows[2:]))])
    assert words.unknown("RED dog") == words.unknown("") == words.unknown("!?") == 0
    assert words.unknown("pangolin") == 1
    assert 0.3 < words.unknown("a dog, a pangolin") < 1
    # Without the only row that has it.
    assert words.unknown("red", np.array([0])) == 1
    assert words.unknown("dog", np.array([0, 1])) == 0
    assert words.unknown("the", np.array([2])) == 1
    # A Chinese character counts as part of a pair.
    assert words.unknown("红色") == 0
    assert words.unknown("色红") == 1
    assert 0 < words.unknown("红色的猫") < 1
