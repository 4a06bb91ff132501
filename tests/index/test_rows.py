"""Rows with several vectors: k rows come back, and recall is measured by row."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from clouds import DIM, texts, vectors

from mmalign.errors import StoreError
from mmalign.index import (
    Exact,
    Owners,
    Queries,
    VectorReader,
    open_index,
    write_description,
    write_index,
)
from mmalign.index.approximate import Approximate
from mmalign.index.plan import SPECS


def several(rows: int, most: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Vectors of rows that have 1 to `most` each, near each other, and the row of each."""
    rng = np.random.default_rng(seed)
    owners = np.repeat(np.arange(rows), rng.integers(1, most + 1, size=rows))
    drawn = vectors(rows, seed).astype(np.float32)[owners]
    drawn += 0.1 * rng.normal(size=drawn.shape).astype(np.float32)
    drawn /= np.linalg.norm(drawn, axis=1, keepdims=True)
    return drawn.astype(np.float16), owners


def best_rows(
    stored: np.ndarray, owners: np.ndarray, queries: np.ndarray, k: int, allow: Any = None
) -> tuple[np.ndarray, np.ndarray]:
    """Compare each vector with each query; return scores and vectors of the k best rows."""
    every = (queries.astype(np.float64) @ stored.astype(np.float64).T).astype(np.float32)
    scores = np.full((len(queries), k), -np.inf, np.float32)
    found = np.full((len(queries), k), -1)
    for m, line in enumerate(every):
        seen: set[int] = set()
        for vector in np.argsort(-line, kind="stable"):
            if len(seen) == k:
                break
            if (allow is None or allow[vector]) and int(owners[vector]) not in seen:
                scores[m, len(seen)], found[m, len(seen)] = line[vector], vector
                seen.add(int(owners[vector]))
    return scores, found


@pytest.mark.parametrize("k", [1, 10, 119, 120, 400])
@pytest.mark.parametrize("share", [None, 0.5, 0.02])
def test_exact_search_finds_the_best_rows(k: int, share: float | None) -> None:
    stored, owners = several(120, 7)
    stored[owners == 70] = stored[np.flatnonzero(owners == 30)[0]]  # ties of rows and in a row
    queries = np.concatenate([texts(20), stored[owners == 30][:1].astype(np.float32)])
    allow = None if share is None else (np.random.default_rng(3).random(120) < share)[owners]
    half = len(stored) // 2
    index = Exact([stored[:half], stored[half:]], owners=Owners.of(owners))
    scores, found = index.search(queries, k, allow)
    true_scores, true = best_rows(stored, owners, queries, k, allow)
    assert np.array_equal(found, true)
    assert np.array_equal(scores, true_scores)


def test_a_row_that_takes_the_first_places_makes_room_for_others() -> None:
    """A row of 500 vectors: the search goes on until there are k rows."""
    owners = np.sort(np.concatenate([np.zeros(500, np.int64), np.arange(300)]))
    stored = vectors(800)
    stored[owners == 0] = stored[0]
    query = stored[:1].astype(np.float32)
    found = Exact([stored], owners=Owners.of(owners)).search(query, 10)[1]
    assert np.array_equal(found, best_rows(stored, owners, query, 10)[1])
    assert (found[0] == 0).sum() == 1


def test_where_no_row_has_several_vectors_there_are_no_owners() -> None:
    assert Owners.of(None) is None
    assert Owners.of(np.arange(5)) is None
    assert Owners.of(np.array([0, 2, 5])) is None
    some = np.array([0, 0, 2])
    owners = Owners.of(some)
    assert owners is not None
    assert owners.rows_V is some
    assert owners.mean == 1.5
    stored = vectors(300)
    one = Exact([stored]).search(texts(5), 10)
    gaps = Exact([stored], owners=Owners.of(2 * np.arange(300))).search(texts(5), 10)
    assert all(np.array_equal(a, b) for a, b in zip(one, gaps, strict=True))


def test_a_sample_has_whole_rows() -> None:
    stored, owners = several(500, 7)
    live = (np.random.default_rng(1).random(500) < 0.7)[owners]
    sample = VectorReader([stored[:400], stored[400:]], live, owners).sample(600, seed=0)
    assert sample.owners is not None
    own = {s.tobytes(): int(row) for s, row in zip(stored, owners, strict=True)}
    rows = [own[s.tobytes()] for s in np.concatenate(sample.shards)]
    drawn, counts = np.unique(rows, return_counts=True)
    assert np.array_equal(counts, np.bincount(owners)[drawn])
    assert np.array_equal(np.unique(rows, return_inverse=True)[1], sample.owners.rows_V)
    assert live[np.isin(owners, drawn)].all()
    assert 400 < sample.total < 800
    alone = VectorReader([stored], live)
    numbers = alone.sample_rows(600, seed=0)
    assert np.array_equal(alone.sample(600, seed=0).shards[0], stored[numbers])


def recall_by_row(found: np.ndarray, true: np.ndarray, owners: np.ndarray) -> float:
    """The share of the true rows that were found; each may come once only."""
    shares = []
    for few, all_of_them in zip(found, true, strict=True):
        rows = owners[few[few >= 0]].tolist()
        assert len(rows) == len(set(rows))
        wanted = set(owners[all_of_them[all_of_them >= 0]].tolist())
        shares.append(len(wanted & set(rows)) / len(wanted))
    return float(np.mean(shares))


@pytest.mark.parametrize(
    ("rows", "spec"),
    [
        (1_000, 0),
        pytest.param(20_000, 0, marks=pytest.mark.slow),
        pytest.param(20_000, 4, marks=pytest.mark.slow),
    ],
)
def test_an_index_keeps_its_promise_by_row(
    rows: int, spec: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mmalign.index.plan.EXACT_ROWS", 1_000)
    monkeypatch.setattr("mmalign.index.plan.ROUND_ROWS", (1_000,))
    monkeypatch.setattr("mmalign.index.plan.SPECS", SPECS[spec : spec + 1])
    monkeypatch.setattr("mmalign.index.approximate.EXACT_VALUES", 1_000 * DIM)
    stored, owners = several(rows, 9, seed=2)
    live = (np.random.default_rng(5).random(rows) < 0.9)[owners]
    drawn = np.random.default_rng(6).permutation(np.flatnonzero(live))[:500]
    queries = {
        "text": Queries(texts(300), texts(400, seed=2)),
        "image": Queries(*np.split(stored[drawn].astype(np.float32), [100]), stored=True),
    }
    covered = len(stored) * 9 // 10
    covered = int(np.searchsorted(owners, owners[covered]))
    part = write_index(
        tmp_path, "image", [stored[:covered]], queries_by_modality=queries, recall=0.9,
        memory=1e9, live_N=live[:covered], owners=owners[:covered],
    )  # fmt: skip
    assert part["kind"] != "exact"
    assert part["vectors_per_row"] == pytest.approx(5, rel=0.1)
    assert all(t["low"] >= 0.9 for t in part["measured"] if t["asked"] == "text")
    write_description(tmp_path, {"modalities": {"image": part}})
    index = open_index(tmp_path, "image", [stored[:covered], stored[covered:]], owners)
    fresh = texts(100, seed=9)
    half = (np.random.default_rng(8).random(rows) < 0.5)[owners]
    for k in (10, 100):
        for allow in (live, live & half):
            found = index.search(fresh, k, allow)[1]
            assert (found >= 0).all()
            assert allow[found].all()
            true = best_rows(stored, owners, fresh, k, allow)[1]
            assert recall_by_row(found, true, owners) >= 0.88
    old = {key: value for key, value in part.items() if key != "vectors_per_row"}
    write_description(tmp_path, {"modalities": {"image": old}})
    with pytest.raises(StoreError, match="measured by vector, not by row: run `mmalign index"):
        open_index(tmp_path, "image", [stored], owners)
    open_index(tmp_path, "image", [stored], None)


def test_candidates_of_few_rows_are_followed_by_more(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a filter, an index that is asked for too few candidates still gives k rows."""
    from mmalign.index import approximate
    from mmalign.index.spec import IndexSpec, OperatingPoint

    stored, owners = several(400, 9, seed=4)
    reader = VectorReader([stored], owners=owners)
    built = approximate.build(reader, IndexSpec("hnsw", "SQfp16", links=16), shown=False)
    points = {"text": [OperatingPoint(10, 60, 12)]}
    index = Approximate(built, reader, points, reader.total)
    asked: list[int] = []
    candidates = index.candidates
    monkeypatch.setattr(
        index, "candidates", lambda q, point: asked.append(point.candidates) or candidates(q, point)
    )
    found = index.search(texts(30), 10)[1]
    assert asked[:3] == [12, 24, 48]
    assert (found >= 0).all()
    assert recall_by_row(found, best_rows(stored, owners, texts(30), 10)[1], owners) > 0.6
