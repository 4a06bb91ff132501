"""A store whose rows have several vectors: each row is found once, by its best vector."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small_store
from store_samples import encoder_of

from mmalign import Searcher, open_store
from mmalign.index.plan import SPECS
from mmalign.search.build import build_index
from mmalign.store import Row, Store, delete


def unit(count: int, seed: int) -> np.ndarray:
    drawn = np.random.default_rng(seed).normal(size=(count, small_store.DIM))
    return (drawn / np.linalg.norm(drawn, axis=1, keepdims=True)).astype(np.float32)


def rows_of(count: int, most: int = 7) -> list[Row]:
    """Rows of 1 to `most` vectors of both modalities; some rows are equal."""
    counts = np.random.default_rng(0).integers(1, most + 1, size=(count, 2))
    made = []
    for number, (images, captions) in enumerate(counts.tolist()):
        seed = number if number % 10 else 10_000  # every tenth starts with the same vectors
        made.append(
            Row(
                f"id{number}",
                f"{number}.jpg",
                tuple(f"caption {number}.{c}" for c in range(captions)),
                {"image": unit(images, seed), "text": unit(captions, seed + 5_000)},
                meta=f'{{"n": {number}}}',
            )
        )
    return made


def expected(
    store: Store, to: str, query: np.ndarray, allowed: set[int]
) -> list[tuple[int, float, int]]:
    """Row, score and number within the row of the best vector of each allowed row, best first."""
    found = []
    for row in sorted(allowed):
        scores = store.vectors_of(to, row).astype(np.float64) @ query.astype(np.float64)
        best = int(np.argmax(scores.astype(np.float32)))
        found.append((row, float(np.float32(scores[best])), best))
    return sorted(found, key=lambda hit: -hit[1])


@pytest.fixture(scope="module")
def several(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("several") / "s.store"
    store = small_store.fill(path, rows_of(90))
    delete(path, [f"id{n}" for n in (3, 10, 44, 89)])
    assert not store.is_single("image")
    return path


@pytest.mark.parametrize("to", ["image", "text"])
@pytest.mark.parametrize("where", [None, "n % 3 = 1"])
@pytest.mark.parametrize(("k", "offset"), [(1, 0), (10, 0), (10, 7), (84, 0), (86, 3), (500, 0)])
def test_rows_come_once_by_their_best_vector(
    several: Path, to: Any, where: str | None, k: int, offset: int
) -> None:
    store = open_store(several)
    searcher = Searcher(store, encoder_of(small_store.CARD))
    live = {n for n in range(90) if n not in (3, 10, 44, 89)}
    allowed = {n for n in live if where is None or n % 3 == 1}
    queries = [*unit(5, 77), unit(1, 10_000)[0], unit(1, 15_000)[0]]
    options: dict[str, Any] = {"to": to, "where": where, "offset": offset}
    for query, hits in zip(queries, searcher.search_many(queries, k, **options), strict=True):
        wanted = expected(store, to, query, allowed)[offset : offset + k]
        assert [(h.row, h.score) for h in hits] == [(row, score) for row, score, _ in wanted]
        assert [h.rank for h in hits] == list(range(offset + 1, offset + 1 + len(wanted)))
        if to == "text":
            assert [h.position for h in hits] == [(best,) for _, _, best in wanted]
            assert [h.caption for h in hits] == [f"caption {r}.{best}" for r, _, best in wanted]
        else:
            assert {(h.position, h.caption) for h in hits} <= {(None, None)}


def test_an_index_finds_rows_of_several_vectors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mmalign.index.plan.EXACT_ROWS", 100)
    monkeypatch.setattr("mmalign.index.plan.ROUND_ROWS", (500,))
    monkeypatch.setattr("mmalign.search.build.TUNING", 200)
    monkeypatch.setattr("mmalign.search.build.HELD_OUT", 200)
    monkeypatch.setattr("mmalign.index.plan.SPECS", SPECS[4:])
    monkeypatch.setattr("mmalign.index.approximate.EXACT_VALUES", 100)
    path = tmp_path / "s.store"
    store = small_store.fill(path, rows_of(300), rows_per_shard=100)
    parts = build_index(path, recall=0.9, memory="10MB")["modalities"]
    assert {name: part["kind"] for name, part in parts.items()} == {"image": "hnsw", "text": "hnsw"}
    assert all(3 < part["vectors_per_row"] < 5 for part in parts.values())
    searcher = Searcher(store := open_store(path), encoder_of(small_store.CARD))
    everything = set(range(len(store)))
    for to in ("image", "text"):
        shares = []
        for query in unit(50, 78):
            hits = searcher.search(query, 10, to=to)  # type: ignore[arg-type]
            true = {row for row, _, _ in expected(store, to, query, everything)[:10]}
            assert len({h.row for h in hits}) == len(hits) == 10
            shares.append(len(true & {h.row for h in hits}) / 10)
        assert np.mean(shares) >= 0.88


def test_rows_of_one_vector_need_no_owners(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their hits are those of the nearest vectors, and the row of each vector is not looked up."""
    path = tmp_path / "s.store"
    store = small_store.fill(path, rows_of(50, most=1))
    delete(path, ["id7"])
    monkeypatch.setattr(Store, "owners", lambda *_: pytest.fail("owners were made"))
    searcher = Searcher(open_store(path), encoder_of(small_store.CARD))
    for to in ("image", "text"):
        stored = np.concatenate(store.vectors(to)).astype(np.float64)
        for query in unit(5, 3):
            scores = (stored @ query.astype(np.float64)).astype(np.float32)
            order = [n for n in np.argsort(-scores, kind="stable").tolist() if n != 7]
            for hits in (searcher.search(query, 60, to=to), searcher.search(query, 9, to=to)):  # type: ignore[arg-type]
                assert [h.row for h in hits] == order[: len(hits)]
                assert [h.score for h in hits] == scores[order[: len(hits)]].tolist()
    build_index(path)
