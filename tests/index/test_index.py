"""Indexes: exact search is exact, the planner keeps its promise, change is seen at once."""

import shutil
import subprocess
import sys
import threading
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from clouds import DIM, texts, vectors

from mmalign import kernels
from mmalign.errors import StoreError, VectorError
from mmalign.index import (
    Exact,
    Extended,
    Index,
    Queries,
    VectorReader,
    approximate,
    describe,
    open_index,
    table,
    write_description,
    write_index,
)
from mmalign.index.approximate import Approximate
from mmalign.index.measure import candidate_ranks, interval, neighbour_recall, tune
from mmalign.index.plan import SPECS
from mmalign.index.quantizer import CoarseQuantizer, query_metric_and_root
from mmalign.index.spec import IndexSpec, OperatingPoint

IVF = IndexSpec("ivf", "PQ/2x4fsr", lists_factor=1)
EVERY = (
    *SPECS,
    IndexSpec("ivf", "PQ/2x4fsr", lists_factor=1, metric="queries"),
    IndexSpec("ivf", "PQ/4x4fsr", lists_factor=1, metric="queries"),
    IndexSpec("hnsw", "SQfp16", links=32),
)


def truth(stored: np.ndarray, queries: np.ndarray, k: int, allow: Any = None) -> np.ndarray:
    """Row numbers of the k best, by sorting all."""
    scores = queries.astype(np.float64) @ stored.astype(np.float64).T
    if allow is not None:
        scores[:, ~allow] = -np.inf
    return np.argsort(-scores, axis=1, kind="stable")[:, :k]


def small_index(stored: np.ndarray, design: IndexSpec = IVF, live: Any = None) -> Approximate:
    """An index that looks at everything: what it misses is missed by the code alone."""
    rows = VectorReader([stored[:70], stored[70:]], live)
    lists = approximate.cluster(rows, design, texts(500)) if design.kind == "ivf" else None
    built = approximate.build(rows, design, lists)
    return Approximate(built, rows, {"text": [OperatingPoint(10, 10_000, 300)]}, rows.total)


def test_exact_counts_on_from_shard_to_shard() -> None:
    whole = vectors(100)
    queries = whole[[5, 60]].astype(np.float32)
    scores, rows = Exact([whole[:30], whole[30:]]).search(queries, 3)
    assert rows[:, 0].tolist() == [5, 60]
    assert np.array_equal(rows, truth(whole, queries, 3))
    assert np.allclose(scores[:, 0], 1, atol=1e-3)


@pytest.mark.parametrize(("most", "first_prepares"), [(1 << 30, True), (0, False)])
def test_norms_are_bounded_once(
    most: int, first_prepares: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first search looks at all norms, where they are many the second; answers are the same."""
    monkeypatch.setattr("mmalign.index.exact.PREPARED_BYTES", most)
    queries = vectors(2, seed=2).astype(np.float32)
    index = Exact([vectors(4000), vectors(200, seed=1)])
    first = index.search(queries, 7)
    assert (index.corpus is not None) == first_prepares
    second = index.search(queries, 7)
    corpus = index.corpus
    assert corpus is not None
    assert corpus.max_norm is not None
    assert corpus.codes is None
    for again in (second, index.search(queries, 7)):
        assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    assert index.corpus is corpus


def test_many_queries_are_answered_from_codes(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same answers while vectors are coded, and from codes; a bad row codes nothing."""
    monkeypatch.setattr("mmalign.index.exact.CODED_AFTER", 4)
    monkeypatch.setattr("mmalign.kernels.exact.FEW_ROWS", 0)
    shards, queries = [vectors(300), vectors(200, seed=1)], vectors(5, seed=2).astype(np.float32)
    wait, real = threading.Event(), kernels.add_codes

    def slowly(*arguments: Any) -> Any:
        wait.wait(10)
        return real(*arguments)

    monkeypatch.setattr(kernels, "add_codes", slowly)
    index = Exact(shards)
    first = index.search(queries[:3], 7)
    assert index.coding_thread is None
    index.search(queries, 7)
    meanwhile = index.search(queries[:3], 7)
    assert index.corpus is not None
    assert index.corpus.codes is None
    assert index.coding_thread is not None
    wait.set()
    index.coding_thread.join()
    assert index.corpus.codes is not None
    for again in (meanwhile, index.search(queries[:3], 7)):
        assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    shards[0][0] = 0
    index = Exact(shards)
    index.search(queries, 7)
    assert index.corpus is None
    assert index.coding_thread is None


@pytest.mark.parametrize("error", [MemoryError, RuntimeError])
def test_codes_that_cannot_be_made_fail_no_search(
    error: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise error("no memory")

    monkeypatch.setattr("mmalign.index.exact.CODED_AFTER", 0)
    monkeypatch.setattr(kernels, "add_codes", fail)
    index, queries = Exact([vectors(300)]), vectors(2, seed=2).astype(np.float32)
    first = index.search(queries, 7)
    assert index.coding_thread is not None
    index.coding_thread.join()
    again = index.search(queries, 7)
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))


def test_without_a_thread_for_codes_searches_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_thread(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr("mmalign.index.exact.CODED_AFTER", 0)
    monkeypatch.setattr(threading.Thread, "start", no_thread)
    whole, queries = vectors(300), vectors(2, seed=2).astype(np.float32)
    index = Exact([whole])
    for _ in range(2):
        assert np.array_equal(index.search(queries, 3)[1], truth(whole, queries, 3))


def test_codes_are_made_only_where_they_were_measured_to_pay(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("mmalign.index.exact.CODED_AFTER", 0)
    monkeypatch.setattr(kernels, "codes_are_faster", lambda _, queries: queries > 1)
    index, queries = Exact([vectors(300)]), vectors(2, seed=2).astype(np.float32)
    index.search(queries[:1], 7)
    assert index.coding_thread is None
    index.search(queries, 7)
    assert index.coding_thread is not None
    index.coding_thread.join()


CODING = """
import threading, time
import numpy as np
from mmalign.index import Exact
from mmalign.kernels import codes

def forever(shard, tick):
    while True:
        tick()
        time.sleep(0.01)

codes.quantize = forever
index = Exact([np.ones((300, 16), np.float16)])
index.search(np.ones((300, 16), np.float32), 1)
assert index.coding_thread.is_alive()
"""


@pytest.mark.slow
def test_coding_ends_with_the_process() -> None:
    done = subprocess.run(
        [sys.executable, "-c", CODING], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_fewer_rows_than_asked_for() -> None:
    rows = Exact([vectors(3)]).search(vectors(1).astype(np.float32), 10)[1]
    assert rows.shape == (1, 10)
    assert rows[0, 3:].tolist() == [-1] * 7


def test_rows_are_gathered_from_shards_anywhere() -> None:
    whole = vectors(1_000)
    # Copies lie apart, and one starts in the middle of a buffer.
    shards = [whole[:10].copy(), whole[:0], vectors(400)[7:].copy()[3:], whole[300:].copy()]
    joined = np.concatenate(shards)
    rows = VectorReader(shards)
    asked = np.random.default_rng(0).integers(len(joined), size=500)
    assert np.array_equal(rows.gather(asked), joined[asked])
    assert rows.gather(np.zeros(0, np.int64)).shape == (0, DIM)
    for bad in (-1, len(joined)):
        with pytest.raises(IndexError, match="rows 0 to"):
            rows.gather(np.array([bad]))


def test_dead_rows_are_passed_over() -> None:
    live = np.random.default_rng(0).random(400) < 0.5
    rows = VectorReader([vectors(150), vectors(250, seed=1)], live)
    numbers = np.concatenate([n for n, _ in rows.blocks()])
    assert np.array_equal(numbers, np.flatnonzero(live))
    assert live[rows.sample_rows(50, seed=1)].all()


@pytest.mark.parametrize("bad", [np.nan, np.inf, 0])
def test_a_bad_vector_is_named(bad: float) -> None:
    stored = vectors(300)
    stored[123] = bad
    with pytest.raises(VectorError, match="vector of row 123"):
        approximate.build(VectorReader([stored]), IndexSpec("hnsw", "SQ8", links=8))


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_full_disk_is_an_error_while_rows_are_filed(monkeypatch: pytest.MonkeyPatch) -> None:
    full = partial(open, "/dev/full", "r+b", 0)
    monkeypatch.setattr(approximate.files, "scratch_file", full)
    with pytest.raises(OSError, match="No space left"):
        small_index(vectors(2_000))


@pytest.mark.parametrize("design", EVERY, ids=lambda d: f"{d.code}-{d.metric}")
def test_every_design_finds_neighbours_with_exact_scores(design: IndexSpec) -> None:
    stored, queries = vectors(500), texts(20)
    scores, found = small_index(stored, design).search(queries, 10)
    true = truth(stored, queries, 10)
    assert neighbour_recall(found, true).mean() > 0.97
    exact = np.einsum("mkd,md->mk", stored[found].astype(np.float64), queries.astype(np.float64))
    assert np.array_equal(scores, exact.astype(np.float32))


@pytest.mark.parametrize("design", EVERY, ids=lambda d: f"{d.code}-{d.metric}")
def test_only_allowed_and_live_rows_are_found(design: IndexSpec) -> None:
    stored, queries = vectors(500), texts(20)
    rng = np.random.default_rng(0)
    live, allow = rng.random(500) < 0.8, rng.random(500) < 0.4
    index = small_index(stored, design, live)
    assert index.indexed == live.sum()
    for allowed in (live, live & allow):
        found = index.search(queries, 10, allowed)[1]
        assert allowed[found].all()
        assert neighbour_recall(found, truth(stored, queries, 10, allowed)).mean() > 0.95


def test_lists_by_queries_hold_each_row_once_under_its_nearest_centre() -> None:
    stored = vectors(800)
    rows = VectorReader([stored])
    lists = approximate.cluster(
        rows, IndexSpec("ivf", "PQ/2x4fsr", 1, metric="queries"), texts(900)
    )
    assert lists.metric_DD is not None
    gap = stored.astype(np.float64)[:, None] - lists.centroids_LD
    far = np.einsum("nld,de,nle->nl", gap, lists.metric_DD, gap)
    chosen = lists.assign(stored.astype(np.float32))
    best = far[np.arange(800), chosen]
    assert (best <= far.min(axis=1) + 1e-4).all()
    built = approximate.build(rows, IndexSpec("ivf", "PQ/2x4fsr", 1, metric="queries"), lists)
    found = Approximate(built, rows, {"text": [OperatingPoint(800, 10_000, 800)]}, 800).search(
        texts(1), 800
    )[1]
    assert sorted(found[0].tolist()) == list(range(800))


def test_the_metric_of_queries_weighs_their_directions() -> None:
    queries = np.random.default_rng(0).normal(size=(4_000, 3)) * [3, 1, 0]
    metric, root = query_metric_and_root(queries.astype(np.float32))
    assert metric[0, 0] > 2 * metric[1, 1] > 2 * metric[2, 2] > 0
    assert np.allclose(root @ root, metric, atol=1e-4)
    plain = CoarseQuantizer(np.eye(3, dtype=np.float32))
    assert plain.assign(np.array([[0.1, 0.9, 0.2]], np.float32)).tolist() == [1]


def test_what_is_measured_is_what_is_meant() -> None:
    found, true = np.array([[1, 2, 3], [4, 5, -1]]), np.array([[3, 9, 1], [5, -1, -1]])
    assert neighbour_recall(found, true).tolist() == [2 / 3, 1]
    assert candidate_ranks(np.array([[7, 3, 5, -1]]), np.array([[5, 8, 7]])).tolist() == [[2, 4, 0]]
    shares = np.array([0.0, 1.0] * 200)
    low, high = interval(shares)
    assert low == pytest.approx(0.5 - 1.96 * 0.5 / 20, abs=0.01)
    assert high == pytest.approx(0.5 + 1.96 * 0.5 / 20, abs=0.01)
    assert interval(np.ones(100)) == (pytest.approx(0.985), 1.0)


@pytest.mark.slow
def test_an_interval_knows_that_captions_of_an_image_are_alike() -> None:
    """Of 95 % intervals about nine in ten hold the truth, and not four in five."""
    rng, true, images, captions = np.random.default_rng(0), 0.9, 100, 5
    groups = np.repeat(np.arange(images), captions)
    covered = []
    for _ in range(40):
        of_image = np.repeat(rng.beta(9, 1, images), captions)
        shares = rng.binomial(10, of_image) / 10
        low, high = interval(shares, groups)
        covered.append(low <= true <= high)
        narrow, wide = interval(shares)
        assert high - low > 1.3 * (wide - narrow)
    assert np.mean(covered) >= 0.9


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, np.ndarray, dict[str, Any]]:
    """An index over many rows, chosen and tuned; a fifth of the rows is dead."""
    folder = tmp_path_factory.mktemp("index")
    stored = vectors(40_000)
    live = np.random.default_rng(5).random(len(stored)) < 0.8
    asked = {
        "text": Queries(texts(1_500), texts(500, seed=2)),
        "image": Queries(
            stored[:600].astype(np.float32), stored[600:1_400].astype(np.float32), True
        ),
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mmalign.index.plan.EXACT_ROWS", 1_000)
        patch.setattr("mmalign.index.plan.ROUND_ROWS", (2_000, 8_000))
        part = write_index(
            folder, "image", [stored[:15_000], stored[15_000:]],
            queries_by_modality=asked, recall=0.9, memory=4e6, live_N=live,
        )  # fmt: skip
    write_description(folder, {"modalities": {"image": part}})
    return folder, np.where(live[:, None], stored, np.float16(0)), part


@pytest.mark.slow
def test_the_planner_keeps_its_promise(built: tuple[Path, np.ndarray, dict[str, Any]]) -> None:
    folder, stored, part = built
    live = (stored != 0).any(axis=1)
    assert part["kind"] == "ivf"
    assert part["held"] == live.sum()
    assert sum(p.stat().st_size for p in folder.glob("image.*")) <= 4e6
    assert {(t["asked"], t["point"]["k"]) for t in part["measured"]} == {
        (asked, k) for asked in ("text", "image") for k in (10, 100)
    }
    for trial in part["measured"]:
        assert 0.9 <= trial["low"] <= trial["recall"] <= trial["high"] <= 1
        assert trial["high"] - trial["low"] < 0.05
    assert len({t["design"] for t in part["tried"]}) >= 4
    assert part["measured"][0]["design"] in table(part["measured"])
    index = open_index(folder, "image", [stored[:1], stored[1:]])
    for asked, queries in (("text", texts(300, seed=3)), ("image", vectors(300, seed=4))):
        wanted = queries.astype(np.float32)
        for k in (10, 60, 300):
            found = index.search(wanted, k, live, query_modality=asked)[1]
            assert neighbour_recall(found, truth(stored, wanted, k, live)).mean() >= 0.88


@pytest.mark.slow
def test_change_is_seen_at_once(built: tuple[Path, np.ndarray, dict[str, Any]]) -> None:
    """Rows that came later are found, rows that went are not, and recall holds."""
    folder, stored, _ = built
    later = vectors(8_000, seed=6)
    whole = np.concatenate([stored, later])
    live = (whole != 0).any(axis=1)
    live[np.random.default_rng(7).random(len(whole)) < 0.2] = False
    index = open_index(folder, "image", [stored, later])
    assert isinstance(index, Extended)
    assert index.rows == len(whole)
    queries = texts(200, seed=8)
    found = index.search(queries, 10, live)[1]
    assert live[found].all()
    assert (found >= len(stored)).any()
    assert neighbour_recall(found, truth(whole, queries, 10, live)).mean() >= 0.88


@pytest.fixture(scope="module")
def tuned() -> dict[str, Approximate]:
    """An IVF and a graph, each tuned to find nine in ten for texts and for images."""
    stored = vectors(6_000)
    rows = VectorReader([stored[:3_000], stored[3_000:]])
    indexes = {}
    for design in (IVF, IndexSpec("hnsw", "SQ8", links=32)):
        lists = approximate.cluster(rows, design, texts(500)) if design.kind == "ivf" else None
        index = Approximate(approximate.build(rows, design, lists, shown=False), rows, {}, 6_000)
        points = {}
        for asked, queries in (("text", texts(200)), ("image", images(200))):
            true = truth(stored, queries, 100)
            points[asked] = [tune(index, queries, true, k, RECALL)[0] for k in (10, 100)]
        index.points = points
        indexes[design.kind] = index
    return indexes


RECALL, HOLE = 0.91, 30


def images(count: int, seed: int = 1) -> np.ndarray:
    """Queries that lie where stored vectors do."""
    return vectors(count, seed).astype(np.float32)


def filters(scores: np.ndarray, share: float) -> dict[str, np.ndarray]:
    """What may be found: any rows, the rows farthest from a query, any but the nearest."""
    count, order = len(scores), np.argsort(scores)
    anywhere = np.random.default_rng(9).random(count) < share
    far, holed = np.zeros(count, np.bool_), anywhere.copy()
    far[order[: max(1, int(share * count))]] = True
    holed[order[-HOLE:]] = False
    return {"anywhere": anywhere, "far": far, "holed": holed}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ivf", "hnsw"])
@pytest.mark.parametrize("asked", ["text", "image"])
@pytest.mark.parametrize("share", [0.001, 0.01, 0.1, 0.33, 0.9])
def test_a_filter_keeps_the_recall_and_every_hit(
    tuned: dict[str, Approximate],
    kind: str,
    asked: str,
    share: float,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Wherever the rows lie that it leaves, and though none of these is few enough for itself."""
    monkeypatch.setattr(approximate, "EXACT_VALUES", 0)
    monkeypatch.setattr(approximate, "CANDIDATE_COST", 1)
    index, exactly = tuned[kind], []
    compare = index.exact.search
    monkeypatch.setattr(
        index.exact, "search", lambda q, *rest: exactly.append(len(q)) or compare(q, *rest)
    )
    stored = np.concatenate(index.vectors.shards)
    queries = (texts if asked == "text" else images)(40, seed=8)
    shares: dict[str, list[float]] = {"anywhere": [], "far": [], "holed": []}
    for query in queries:
        for name, allow in filters(stored.astype(np.float32) @ query, share).items():
            exactly.clear()
            found = index.search(query[None], 10, allow, query_modality=asked)[1]
            true = truth(stored, query[None], 10, allow)
            possible = min(10, allow.sum())
            assert (found[0, :possible] >= 0).all()
            assert allow[found[0, :possible]].all()
            assert (found[0, possible:] == -1).all()
            shares[name] += neighbour_recall(found, true[:, :possible]).tolist()
            if name == "far":
                # Where few of the nearest are missing, the index may still look beyond them.
                assert exactly or share == 0.9
            elif share >= 0.33:
                assert not exactly
    # Queries differ much, so what forty of them find says no more than its interval does.
    highest = {name: interval(np.array(found))[1] for name, found in shares.items()}
    assert min(highest.values()) >= RECALL, highest
    assert np.mean(shares["far"]) == 1 or share == 0.9


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ivf", "hnsw"])
@pytest.mark.parametrize("share", [0.01, 0.3, 0.95])
def test_deleted_rows_are_a_filter(
    tuned: dict[str, Approximate], kind: str, share: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those nearest to the queries go, as when a person deletes what was found."""
    monkeypatch.setattr(approximate, "EXACT_VALUES", 0)
    index, queries = tuned[kind], texts(40, seed=8)
    stored = np.concatenate(index.vectors.shards)
    live = np.ones(len(stored), np.bool_)
    live[truth(stored, queries, int(share * len(stored) / 40) + 1).ravel()] = False
    extended = Extended(index, VectorReader([stored, stored[:9]]))
    live = np.concatenate([live, np.ones(9, np.bool_)])
    found = extended.search(queries, 10, live)[1]
    assert live[found].all()
    true = truth(np.concatenate([stored, stored[:9]]), queries, 10, live)
    assert interval(neighbour_recall(found, true))[1] >= RECALL


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ivf", "hnsw"])
@pytest.mark.parametrize("k", [10, 300, 5_990, 6_000, 9_000])
def test_every_hit_is_given_without_a_filter(
    tuned: dict[str, Approximate], kind: str, k: int
) -> None:
    index = tuned[kind]
    found = index.search(texts(3), k)[1]
    assert found.shape == (3, k)
    assert ((found >= 0).sum(axis=1) == min(k, 6_000)).all()
    assert all(len(set(line[:6_000])) == min(k, 6_000) for line in found.tolist())


@pytest.mark.slow
@pytest.mark.parametrize("share", [0.5, 0.05, 0.005, 0])
def test_filters_keep_the_recall(
    built: tuple[Path, np.ndarray, dict[str, Any]], share: float
) -> None:
    folder, stored, _ = built
    live = (stored != 0).any(axis=1)
    allow = live & (np.random.default_rng(9).random(len(stored)) < share)
    queries = texts(100, seed=10)
    found = open_index(folder, "image", [stored]).search(queries, 10, allow)[1]
    assert found.shape == (100, 10)
    if not share:
        assert (found == -1).all()
        return
    assert allow[found].all()
    assert neighbour_recall(found, truth(stored, queries, 10, allow)).mean() >= 0.88


@pytest.mark.slow
@pytest.mark.parametrize("name", ["image.faiss", "image.lists"])
@pytest.mark.parametrize("damage", ["cut", "missing", "other", "flipped"])
def test_a_damaged_index_is_named(
    built: tuple[Path, np.ndarray, dict[str, Any]], tmp_path: Path, damage: str, name: str
) -> None:
    folder, stored, _ = built
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    content = (folder / name).read_bytes()
    (tmp_path / name).unlink()
    flipped = content[:77] + bytes([content[77] ^ 64]) + content[78:]
    damaged = {"cut": content[:1000], "other": bytes(len(content)), "flipped": flipped}
    if damage != "missing":
        (tmp_path / name).write_bytes(damaged[damage])
    if damage in {"other", "flipped"} and name == "image.lists":
        # Nothing but a hash can tell, and what is found is scored by the store's own vectors.
        found = open_index(tmp_path, "image", [stored]).search(texts(3), 5)[1]
        assert (found < len(stored)).all()
        return
    with pytest.raises(StoreError, match=r"image\."):
        open_index(tmp_path, "image", [stored])


@pytest.mark.slow
def test_a_flipped_bit_anywhere_in_the_file_that_faiss_reads_whole_is_found(
    built: tuple[Path, np.ndarray, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Centres of many lists take more than the head that is checked of a graph."""
    folder, stored, _ = built
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    monkeypatch.setattr("mmalign.index.folder.HEAD_BYTES", 64)
    write_description(tmp_path, describe(tmp_path))
    content = bytearray((tmp_path / "image.faiss").read_bytes())
    content[len(content) // 2] ^= 1
    (tmp_path / "image.faiss").write_bytes(content)
    with pytest.raises(StoreError, match=r"image\.faiss: damaged"):
        open_index(tmp_path, "image", [stored])


@pytest.mark.parametrize("design", EVERY, ids=lambda d: f"{d.code}-{d.metric}")
def test_an_index_is_the_same_after_it_was_written(design: IndexSpec, tmp_path: Path) -> None:
    index = small_index(vectors(500), design)
    before = index.search(texts(20), 10)
    approximate.save(index.faiss, tmp_path / "image.faiss")
    loaded = approximate.load(tmp_path / "image.faiss", 500, DIM)
    for again in (index, Approximate(loaded, index.vectors, index.points, 500)):
        assert all(
            np.array_equal(a, b) for a, b in zip(before, again.search(texts(20), 10), strict=True)
        )


@pytest.mark.slow
def test_an_index_of_other_vectors_is_refused(
    built: tuple[Path, np.ndarray, dict[str, Any]],
) -> None:
    folder, stored, _ = built
    with pytest.raises(StoreError, match="covers 40000 vectors, but the store has 5"):
        open_index(folder, "image", [stored[:5]])


@pytest.mark.parametrize("count", [0, 1])
def test_without_queries_every_row_is_compared(
    tmp_path: Path, count: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing could tell whether an index keeps its promise."""
    asked = {"text": Queries(texts(1)[:count], texts(1)[:0])}
    part = write_index(
        tmp_path, "image", [vectors(50_000)], queries_by_modality=asked, recall=0.9, memory=1e9
    )
    assert (part["kind"], part["recall"], part["measured"]) == ("exact", 1.0, [])
    assert capsys.readouterr().err.count("too few queries") == 1


def test_few_rows_are_compared_one_by_one(tmp_path: Path) -> None:
    part = write_index(
        tmp_path, "image", [vectors(900)], queries_by_modality={}, recall=0.9, memory=1e9
    )
    assert (part["kind"], part["recall"], part["held"]) == ("exact", 1.0, 900)


@pytest.mark.parametrize("shape", [(2, DIM - 1), (DIM,)])
def test_queries_of_another_shape_are_refused(shape: tuple[int, ...]) -> None:
    stored = vectors(100)
    queries = np.ones(shape, np.float32)
    for index in (Exact([stored]), small_index(stored)):
        with pytest.raises(VectorError):
            index.search(queries, 3)


@pytest.mark.slow
def test_an_index_of_another_format_is_refused(
    built: tuple[Path, np.ndarray, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, stored, _ = built
    monkeypatch.setattr("mmalign.index.folder.FORMAT", 9)
    with pytest.raises(
        StoreError,
        match="format 3, but this version of mmalign reads format 9: run `mmalign index ",
    ):
        open_index(folder, "image", [stored])


def test_nothing_allowed_is_nothing_found() -> None:
    index: Index = Extended(small_index(vectors(100)), VectorReader([vectors(120)]))
    rows = index.search(texts(2), 5, np.zeros(120, np.bool_))[1]
    assert (rows == -1).all()
