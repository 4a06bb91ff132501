"""The Python API of search: what an item is, weighted queries, pages, and later generations."""

import shutil
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import mmalign
from mmalign import Query, Row, Searcher, open_store
from mmalign.errors import ItemError, UsageError
from mmalign.search.searcher import Hits
from mmalign.store import compact, delete


@pytest.fixture(scope="module")
def searcher(store: Path) -> Searcher:
    return Searcher.open(store)


@pytest.fixture
def copy(store: Path, tmp_path: Path) -> Path:
    return shutil.copytree(store, tmp_path / "copy.store")


@pytest.fixture
def picture(searcher: Searcher, tmp_path: Path) -> Image.Image:
    pixels = np.zeros((64, 64, 3), np.uint8)
    pixels[16:48, 16:48] = (200, 30, 30)
    return Image.fromarray(pixels)


def ids(hits: Hits) -> list[str]:
    return [hit.id for hit in hits]


# ---------------------------------------------------------------- items


def test_a_picture_is_one_in_every_form(
    searcher: Searcher, picture: Image.Image, tmp_path: Path
) -> None:
    file = tmp_path / "picture"
    picture.save(file, "PNG")
    forms: list[Any] = [picture, np.asarray(picture), file, file.read_bytes()]
    vectors = searcher.encoder.encode(forms)
    assert np.array_equal(vectors, np.tile(vectors[0], (4, 1)))
    assert len({tuple(ids(hits)) for hits in searcher.search_many(forms, 5)}) == 1


def test_a_picture_is_turned_as_its_camera_says(
    searcher: Searcher, picture: Image.Image, tmp_path: Path
) -> None:
    wide = picture.resize((64, 32))
    wide.paste((0, 200, 0), (0, 0, 16, 16))
    exif = Image.Exif()
    exif[0x0112] = 6
    wide.save(tmp_path / "turned.jpg", exif=exif)
    with Image.open(tmp_path / "turned.jpg") as opened:
        by_picture, by_file = searcher.encoder.encode([opened, tmp_path / "turned.jpg"])
    assert float(by_picture @ by_file) > 0.9999


def test_items_are_encoded_in_their_order(searcher: Searcher, picture: Image.Image) -> None:
    encoder = searcher.encoder
    vector = np.arange(1, encoder.dim + 1, dtype=np.float64)
    mixed: list[Any] = ["a red circle", picture, vector, "", "一个红色圆形", picture]
    found = encoder.encode(mixed, batch_size=1)
    assert found.dtype == np.float32
    assert np.allclose(np.linalg.norm(found, axis=1), 1, atol=1e-5)
    texts = encoder.encode_texts(["a red circle", "", "一个红色圆形"])
    assert np.allclose(found[[0, 3, 4]], texts, atol=1e-6)
    assert np.array_equal(found[1], found[5])
    assert np.allclose(found[2], vector / np.linalg.norm(vector))


def test_encoding_is_quiet_unless_asked(
    searcher: Searcher, capsys: pytest.CaptureFixture[str]
) -> None:
    searcher.encoder.encode(["a red circle"] * 3)
    assert capsys.readouterr().err == ""
    searcher.encoder.encode(["a red circle"] * 3, progress=True)
    assert "3/3" in capsys.readouterr().err


@pytest.mark.parametrize("item", [3, None, ["a"], np.ones((3, 3)), np.ones(4, int), object()])
def test_what_is_no_item_is_a_type_error_that_names_it(searcher: Searcher, item: Any) -> None:
    for call in (searcher.search, lambda item: searcher.encoder.encode([item])):
        with pytest.raises(TypeError, match="not (int|NoneType|list|an array of|object)") as caught:
            call(item)
        assert isinstance(caught.value, ItemError)


def test_no_items_give_no_vectors(searcher: Searcher) -> None:
    assert searcher.encoder.encode([]).shape == (0, searcher.encoder.dim)
    assert searcher.search_many([]) == []


def test_a_list_is_wanted_where_one_item_was_given(searcher: Searcher) -> None:
    for call in (searcher.encode, searcher.encoder.encode, searcher.search_many):
        with pytest.raises(UsageError, match="takes a list"):
            call("red")
    with pytest.raises(UsageError, match="can be searched for, but not encoded"):
        searcher.encoder.encode([Row("1")])


# ---------------------------------------------------------------- queries


def test_a_row_is_found_by_itself(searcher: Searcher) -> None:
    wanted = searcher.store.rows([17], ("id",))[0]["id"]
    hit = searcher.search(Row(wanted), 1)[0]
    assert hit.id == wanted
    assert hit.score == pytest.approx(1, abs=1e-3)


def test_a_vector_is_searched_by_its_direction(searcher: Searcher) -> None:
    vector = searcher.encoder.encode(["a red circle"])[0]
    assert ids(searcher.search(7 * vector)) == ids(searcher.search("a red circle"))


def test_weighted_items_are_added_up(searcher: Searcher) -> None:
    red, circle = searcher.encoder.encode(["red", "circle"])
    query = Query((("red", 2.0), ("circle", -0.5)))
    wanted = 2 * red - 0.5 * circle
    assert np.allclose(searcher.encode([query])[0], wanted / np.linalg.norm(wanted), atol=1e-6)
    assert ids(searcher.search(query)) == ids(searcher.search(wanted))


def test_items_that_cancel_out_are_refused(searcher: Searcher) -> None:
    with pytest.raises(ValueError, match="the items of the query cancel out: give them other"):
        searcher.search(Query((("red", 1.0), ("red", -1.0))))


def test_pages_go_on_where_the_one_before_ended(searcher: Searcher) -> None:
    whole = searcher.search("a red circle", 12)
    pages = [searcher.search("a red circle", 4, offset=first) for first in (0, 4, 8)]
    assert [hit for page in pages for hit in page] == list(whole)
    assert [hit.rank for hit in pages[2]] == [9, 10, 11, 12]
    assert not searcher.search("a red circle", 4, offset=10_000)


def test_options_beside_a_query_take_the_place_of_its_own(searcher: Searcher) -> None:
    query = Query((("a red circle", 1.0),), k=3, to="text")
    assert len(searcher.search(query)) == 3
    assert len(searcher.search(query, 5)) == 5
    assert searcher.search(query)[0].caption
    assert searcher.search(query, to="image")[0].caption is None


def test_queries_of_different_options_are_answered_in_their_order(searcher: Searcher) -> None:
    first = Query((("a red circle", 1.0),), k=2)
    queries = [first, replace(first, to="text"), replace(first, k=4), replace(first, exact=True)]
    together = searcher.search_many(queries)
    assert [hits.query for hits in together] == queries
    for hits in together:
        alone = searcher.search(hits.query)
        assert ids(hits) == ids(alone)
        assert [h.score for h in hits] == pytest.approx([h.score for h in alone], abs=1e-5)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"items": ()}, "no item"),
        ({"items": (("red", float("nan")),)}, "weight nan"),
        ({"k": 0}, "k=0 must be at least 1"),
        ({"offset": -1}, "offset=-1 must be at least 0"),
    ],
)
def test_queries_that_are_off(change: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        replace(Query((("red", 1.0),)), **change)


def test_hits_bring_metadata_and_thumbnails_on_request(searcher: Searcher) -> None:
    plain = searcher.search("a red circle", 2)[0]
    assert (plain.meta, plain.thumbnail) == (None, None)
    rich = searcher.search("a red circle", 2, meta=True, thumbnails=True)[0]
    assert isinstance(rich.meta, dict)
    assert rich.thumbnail is not None
    assert rich.thumbnail[8:12] == b"WEBP"


# ---------------------------------------------------------------- generations


def test_a_searcher_answers_from_its_generation_until_it_is_refreshed(copy: Path) -> None:
    searcher = Searcher.open(copy)
    before = searcher.search("a red circle", 96)
    gone = ids(before)[:10]
    delete(copy, gone)
    compact(copy, now=True)  # the files of the generation that is searched are removed
    assert searcher.search("a red circle", 96) == before
    assert searcher.search("a red circle", 96, meta=True, thumbnails=True)[0].thumbnail
    assert searcher.search("a red circle", 5, to="text")
    assert searcher.refresh()
    assert not set(gone) & set(ids(searcher.search("a red circle", 96)))
    assert not searcher.refresh()


def test_answers_are_of_one_generation_while_another_is_taken(copy: Path) -> None:
    """Searches that run while the store changes see all of a generation, or all of the next."""
    searcher = Searcher.open(copy)
    allowed = [tuple(ids(searcher.search("a red circle", 96)))]
    stop = threading.Event()
    seen: list[tuple[str, ...]] = []
    errors: list[BaseException] = []

    def search() -> None:
        try:
            while not stop.is_set():
                seen.append(tuple(ids(searcher.search("a red circle", 96))))
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=search) for _ in range(4)]
    for thread in threads:
        thread.start()
    for _ in range(4):
        delete(copy, list(allowed[-1][:3]))
        compact(copy, now=True)
        assert searcher.refresh()
        allowed.append(
            tuple(ids(Searcher(open_store(copy), searcher.encoder).search("a red circle", 96)))
        )
    stop.set()
    for thread in threads:
        thread.join()
    assert not errors
    assert set(seen) <= set(allowed)


def test_the_package_has_the_verbs() -> None:
    for name in mmalign.__all__:
        assert getattr(mmalign, name) is not None
    assert callable(mmalign.train)
    assert callable(mmalign.embed)
    with pytest.raises(AttributeError, match="no attribute 'serch'"):
        mmalign.serch  # noqa: B018


def test_a_filter_is_evaluated_once_for_many_queries(
    searcher: Searcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mmalign.search import snapshot

    evaluated: list[str] = []
    real = snapshot.rows_where

    def count(store: Any, expression: str) -> Any:
        evaluated.append(expression)
        return real(store, expression)

    monkeypatch.setattr(snapshot, "rows_where", count)
    mixed = ["a red circle", Row(searcher.store.rows([3], ("id",))[0]["id"])]
    for k in (2, 3):
        queries = [replace(Query(((item, 1.0),)), k=n) for item in mixed for n in (k, k + 1)]
        assert len(searcher.search_many(queries, where="len(captions) > 1")) == 4
    assert len(evaluated) == 2
