"""Indexes: exact search is exact, IVF keeps its promise on held-out queries, new rows are found."""

from pathlib import Path

import numpy as np
import pytest

from mmalign.errors import StoreError
from mmalign.index import (
    Exact,
    Extended,
    Index,
    Spec,
    build_index,
    choose,
    ivf,
    open_index,
    write_description,
)
from mmalign.index.spec import neighbour_recall

DIM = 16


def vectors(count: int, seed: int = 0) -> np.ndarray:
    """Clustered unit vectors, as embeddings are."""
    rng = np.random.default_rng(seed)
    centres = np.random.default_rng(99).normal(size=(40, DIM))
    drawn = centres[rng.integers(40, size=count)] + 0.4 * rng.normal(size=(count, DIM))
    drawn /= np.linalg.norm(drawn, axis=1, keepdims=True)
    return drawn.astype(np.float16)


def test_the_choice_follows_the_rows() -> None:
    assert choose(49_999, 512).kind == "exact"
    assert choose(50_000, 512) == Spec("ivf", 50_000, 512, lists=1024, nprobe=1)


def test_exact_counts_on_from_shard_to_shard() -> None:
    whole = vectors(100)
    scores, rows = Exact([whole[:30], whole[30:]]).search(whole[[5, 60]].astype(np.float32), 3)
    truth = whole.astype(np.float64) @ whole[[5, 60]].astype(np.float64).T
    assert rows[:, 0].tolist() == [5, 60]
    assert np.array_equal(rows, np.argsort(-truth.T, axis=1)[:, :3])
    assert np.allclose(scores[:, 0], 1, atol=1e-3)


def test_many_queries_are_answered_from_codes(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same answers, before and after the vectors were coded; a bad row codes nothing."""
    monkeypatch.setattr("mmalign.index.exact.CODED_AFTER", 4)
    shards, queries = [vectors(300), vectors(200, seed=1)], vectors(5, seed=2).astype(np.float32)
    index = Exact(shards)
    first = index.search(queries[:3], 7)
    assert index.corpus is None
    index.search(queries, 7)
    assert index.corpus is not None
    again = index.search(queries[:3], 7)
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    shards[0][0] = 0
    index = Exact(shards)
    index.search(queries, 7)
    assert index.corpus is None


def test_fewer_rows_than_asked_for() -> None:
    assert Exact([vectors(3)]).search(vectors(1).astype(np.float32), 10)[1].shape == (1, 3)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, np.ndarray]:
    folder = tmp_path_factory.mktemp("index")
    stored = vectors(60_000)
    queries = vectors(400, seed=1).astype(np.float32)
    part = build_index(
        folder, "image", [stored[:25_000], stored[25_000:]], dim=DIM, queries_MD=queries, recall=0.9
    )
    write_description(folder, {"modalities": {"image": part}})
    assert part["spec"]["kind"] == "ivf"
    assert part["queries"] == 200
    assert part["recall"] >= 0.87
    return folder, stored


def test_ivf_finds_what_it_promised(built: tuple[Path, np.ndarray]) -> None:
    folder, stored = built
    index = open_index(folder, "image", [stored])
    queries = vectors(300, seed=2).astype(np.float32)
    true = Exact([stored]).search(queries, 10)[1]
    scores, found = index.search(queries, 10)
    assert neighbour_recall(found, true) >= 0.87
    assert (np.diff(scores, axis=1) <= 0).all()


def test_rows_added_after_the_build_are_found(built: tuple[Path, np.ndarray]) -> None:
    folder, stored = built
    later = vectors(50, seed=3)
    index = open_index(folder, "image", [stored, later])
    assert isinstance(index, Extended)
    assert index.rows == 60_050
    _, rows = index.search(later.astype(np.float32), 1)
    assert (rows[:, 0] == 60_000 + np.arange(50)).mean() > 0.9


@pytest.mark.parametrize("damage", ["cut", "missing"])
def test_a_damaged_index_is_named(
    built: tuple[Path, np.ndarray], tmp_path: Path, damage: str
) -> None:
    folder, stored = built
    description = (folder / "index.json").read_bytes()
    (tmp_path / "index.json").write_bytes(description)
    if damage == "cut":
        (tmp_path / "image.faiss").write_bytes((folder / "image.faiss").read_bytes()[:1000])
    with pytest.raises(StoreError, match=r"image\.faiss"):
        open_index(tmp_path, "image", [stored])


def test_an_index_of_other_vectors_is_refused(built: tuple[Path, np.ndarray]) -> None:
    folder, _ = built
    with pytest.raises(StoreError, match="60000 vectors where 5"):
        ivf.load(folder / "image.faiss", Spec("ivf", 5, DIM, 10, 1))


def test_an_index_without_queries_claims_nothing(tmp_path: Path) -> None:
    stored = vectors(50_000)
    none = np.zeros((0, DIM), np.float32)
    part = build_index(tmp_path, "image", [stored], dim=DIM, queries_MD=none, recall=0.9)
    assert part["recall"] is None
    assert part["spec"]["nprobe"] > 1


@pytest.mark.parametrize("kind", ["exact", "ivf", "extended"])
def test_rows_that_are_not_allowed_are_not_found(kind: str) -> None:
    whole = vectors(400)
    queries = whole[:5].astype(np.float32)
    allow = np.random.default_rng(0).random(400) < 0.3
    allow[:5] = False
    covered = whole[:300] if kind == "extended" else whole
    index: Index = Exact([whole])
    if kind != "exact":
        spec = Spec("ivf", len(covered), DIM, lists=4, nprobe=4)
        index = ivf.build([covered], spec)
    if kind == "extended":
        index = Extended(index, [whole])
    scores, rows = index.search(queries, 400, allow)
    found = rows >= 0
    assert (found.sum(axis=1) == allow.sum()).all()
    assert allow[rows[found]].all()
    truth = np.where(allow, queries.astype(np.float64) @ whole.astype(np.float64).T, -9)
    best = np.sort(truth, axis=1)[:, ::-1][:, : allow.sum()]
    assert np.allclose(scores[found].reshape(5, -1), best, atol=2e-3)


def test_nothing_allowed_is_nothing_found() -> None:
    index = Extended(ivf.build([vectors(100)], Spec("ivf", 100, DIM, 4, 4)), [vectors(120)])
    rows = index.search(vectors(2).astype(np.float32), 5, np.zeros(120, np.bool_))[1]
    assert (rows == -1).all()
