"""A store with an index: searched in all directions, changed, damaged, built again."""

import shutil
import tarfile
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small_store
import torch
from many_threads import together
from store_samples import encoder_of

from mmalign import Searcher, open_store
from mmalign.errors import StoreError, UsageError
from mmalign.index.plan import SPECS
from mmalign.search.build import build_index, memory_bytes
from mmalign.store import delete, pair_vectors, verify


@pytest.fixture(scope="module")
def built(store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the store with an index of FAISS, however few its rows."""
    copy = tmp_path_factory.mktemp("index") / "indexed.store"
    shutil.copytree(store, copy)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mmalign.index.plan.EXACT_ROWS", 10)
        # One with lists in a file; which is the fastest of so few rows is left to chance.
        patch.setattr("mmalign.index.plan.SPECS", SPECS[:1])
        parts = build_index(copy, recall=0.8, memory="10MB")["modalities"]
    assert parts["image"]["kind"] == "ivf"
    assert {t["asked"] for t in parts["image"]["measured"]} == {"text", "image"}
    assert {t["asked"] for t in parts["text"]["measured"]} == {"image"}
    return copy


@pytest.fixture
def indexed(built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """That store, for one test alone."""
    monkeypatch.setattr("mmalign.index.plan.EXACT_ROWS", 10)
    return Path(shutil.copytree(built, tmp_path / "indexed.store"))


def test_an_index_answers_with_exact_scores(indexed: Path, scenes: Path, tmp_path: Path) -> None:
    searcher = Searcher.open(indexed)
    image = tmp_path / "query.png"
    with tarfile.open(scenes) as tar:
        member = next(m for m in tar if m.name.endswith(".png"))
        image.write_bytes(tar.extractfile(member).read())  # type: ignore[union-attr]
    queries = ["a red circle", image, "two blue squares"]
    for to in ("image", "text"):
        found = searcher.search_many(queries, 5, to=to)
        true = searcher.search_many(queries, 96, to=to, exact=True)
        for hits, every in zip(found, true, strict=True):
            scores = {(h.row, h.caption): h.score for h in every}
            assert len(hits) == 5
            assert all(scores.get((h.row, h.caption), h.score) == h.score for h in hits)
        # The image itself, or its captions' owner among the nearest.
    assert searcher.search(image)[0].score > 0.999
    assert searcher.describe_index()["kind"] != "exact"


@pytest.mark.slow
def test_one_searcher_with_an_index_serves_many_threads_with_filters_and_without(
    indexed: Path, scenes: Path, tmp_path: Path
) -> None:
    image = tmp_path / "query.png"
    with tarfile.open(scenes) as tar:
        member = next(m for m in tar if m.name.endswith(".png"))
        image.write_bytes(tar.extractfile(member).read())  # type: ignore[union-attr]
    half = open_store(indexed).column("id")[::2]
    few = f"id in ({', '.join(map(repr, half))})"
    ways: list[tuple[Any, dict[str, Any]]] = [
        ("a red circle", {}),
        ("a red circle", {"where": few}),
        ("a red circle", {"exact": True}),
        ("two blue squares", {"to": "text"}),
        ("two blue squares", {"to": "text", "where": few}),
        (image, {}),
        (image, {"to": "text", "where": few}),
    ]
    wanted = [Searcher.open(indexed).search(query, 7, **way) for query, way in ways]
    assert {h.id for h in wanted[1]} <= set(half) < {h.id for h in wanted[0]} | set(half)
    searcher = Searcher.open(indexed)
    before = {k: v.clone() for k, v in searcher.encoder.towers.state_dict().items()}
    files = {f: f.read_bytes() for f in indexed.rglob("*") if f.is_file()}
    turn = count()

    def all_ways() -> list[Any]:
        # Each beginning with another one, so that filtered searches run beside others.
        first = next(turn) % len(ways)
        order = [*range(first, len(ways)), *range(first)]
        found = {i: searcher.search(ways[i][0], 7, **ways[i][1]) for i in order}
        return [found[i] for i in range(len(ways))]

    for found in together(all_ways, rounds=2):
        assert found == wanted
    after = searcher.encoder.towers.state_dict()
    assert all(torch.equal(after[key], value) for key, value in before.items())
    assert not any(module.training for module in searcher.encoder.towers.modules())
    assert {f: f.read_bytes() for f in indexed.rglob("*") if f.is_file()} == files


@pytest.mark.slow
def test_deleted_rows_leave_an_index_and_it_folds_them_in(indexed: Path) -> None:
    gone = [h.id for h in Searcher.open(indexed).search("a red circle", k=20)]
    delete(indexed, gone)
    assert not set(gone) & {h.id for h in Searcher.open(indexed).search("a red circle", k=96)}
    assert build_index(indexed, recall=0.8)["modalities"]["image"]["held"] == 76
    assert len(Searcher.open(indexed).search("a red circle", k=96)) == 76
    delete(indexed, open_store(indexed).column("id"))
    with pytest.raises(StoreError, match="no rows left"):
        build_index(indexed)
    assert open_store(indexed).manifest.index is not None


@pytest.mark.parametrize("damage", ["cut", "flipped", "gone", "gone.lists"])
def test_a_damaged_index_is_said_and_every_row_is_compared(
    indexed: Path, damage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = [h.id for h in Searcher.open(indexed).search("a red circle", exact=True)]
    name = "image.lists" if damage.endswith("lists") else "image.faiss"
    (file,) = indexed.glob(f"index/*/{name}")
    content = bytearray(file.read_bytes())
    if damage == "cut":
        file.write_bytes(content[:500])
    elif damage == "flipped":
        content[0] ^= 1
        file.write_bytes(content)
    else:
        file.unlink()
    capsys.readouterr()
    searcher = Searcher.open(indexed)
    assert [h.id for h in searcher.search("a red circle")] == expected
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert name in said
    assert "exact search is used instead; run `mmalign repair " in said
    searcher.search("a red circle")
    assert capsys.readouterr().err == ""
    assert any(name in line for line in verify(indexed))


def test_an_index_that_names_rows_beyond_is_not_believed(
    indexed: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As after a flipped bit among the ids, which opening does not notice."""
    searcher = Searcher.open(indexed)
    expected = [h.id for h in searcher.search("a red circle", exact=True)]
    assert searcher.search("a red circle", k=3)
    extended = searcher._current.snapshot._indexes["image", False]
    monkeypatch.setattr(extended.index, "rows", 3)  # type: ignore[attr-defined]
    assert [h.id for h in searcher.search("a red circle")] == expected
    assert "returns rows beyond the 3" in capsys.readouterr().err


def test_an_interrupted_build_leaves_the_old_index(
    indexed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = open_store(indexed).manifest.index

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("mmalign.index.plan.tune", stop)
    with pytest.raises(KeyboardInterrupt):
        build_index(indexed)
    assert open_store(indexed).manifest.index == before
    assert len(list((indexed / "index").iterdir())) == 1


@pytest.mark.parametrize("captions", [0, 2])
@pytest.mark.parametrize("count", [1, 2, 20, 200])
@pytest.mark.parametrize("alike", [False, True])
@pytest.mark.parametrize(("recall", "memory"), [(0.95, "1KB"), (1, "1PB")])
def test_small_stores_are_indexed_and_searched(
    count: int, captions: int, alike: bool, recall: float, memory: str, tmp_path: Path
) -> None:
    rows = [small_store.row(number, captions) for number in range(count)]
    if alike:
        one = rows[0].vectors["image"][0]
        texts = np.tile(one, (captions, 1))
        rows = [replace(r, vectors=pair_vectors(one, texts)) for r in rows]
    store = small_store.fill(tmp_path / "small.store", rows, rows_per_shard=100)
    parts = build_index(store.path, recall=recall, memory=memory)["modalities"]
    assert {name: part["kind"] for name, part in parts.items()} == (
        {"image": "exact", "text": "exact"} if captions else {"image": "exact"}
    )
    encoder = encoder_of(small_store.CARD)
    searcher = Searcher(open_store(store.path), encoder)
    vector = rows[0].vectors["image"][0]
    hits = searcher.search(vector, k=10)
    assert [h.row for h in hits] == sorted(h.row for h in hits) or not alike
    assert len(hits) == min(10, count)
    assert hits[0].row == 0
    if captions:
        found = [hit.row for hit in searcher.search(vector, k=10, to="text")]
        assert len(found) == len(set(found)) == min(10, count)
    else:
        with pytest.raises(StoreError, match="the store has no text vectors to search"):
            searcher.search(vector, to="text")


def test_an_empty_store_says_how_to_fill_it(tmp_path: Path) -> None:
    store = small_store.fill(tmp_path / "empty.store", [])
    with pytest.raises(
        StoreError, match="the store has no rows yet: add some with `mmalign embed "
    ):
        build_index(store.path)


@pytest.mark.parametrize("memory", ["1e999GB", "0", "-1GB", "1 XB", "1.2.3GB", ""])
def test_an_amount_of_memory_that_is_none_is_one_line(memory: str) -> None:
    with pytest.raises(UsageError, match="^--memory .*(write an amount such as|above 0)"):
        memory_bytes(memory)


def test_amounts_of_memory_are_read_as_they_are_written() -> None:
    written = ("1KB", "1 pb", "2TiB", "1PiB", "1e3", 5)
    assert [memory_bytes(x) for x in written] == [1e3, 1e15, 2.0**41, 2.0**50, 1e3, 5]
