"""Hits unlike each other: the order, pages, filters, and what is refused."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from topic_store import CARD, DIM, draw_queries, drawn, text_vector, unit, write_takes

from mmalign import MultiSearcher, Query, Searcher, open_store
from mmalign.cli.main import main
from mmalign.errors import UsageError
from mmalign.search.diversity import candidates, diverse_order
from mmalign.search.searcher import Hits
from mmalign.search.snapshot import Snapshot
from mmalign.store import Row, Writer, delete

# Four pictures of each topic, nearly the same.
ROWS, TAKES = 400, 4


def write(path: Path, rows: int = ROWS) -> Path:
    return write_takes(
        path, [n // TAKES for n in range(rows)], lambda n, topic: f"topic {topic} take {n % TAKES}"
    )


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("diversity") / "takes.store")


@pytest.fixture(autouse=True)
def encoded(monkeypatch: pytest.MonkeyPatch) -> None:
    draw_queries(monkeypatch)


@pytest.fixture
def searcher(path: Path) -> Searcher:
    return Searcher.open(path)


def topics(hits: Sequence[Any]) -> set[int]:
    return {hit.row // TAKES for hit in hits}


def slow_order(scores: np.ndarray, vectors: np.ndarray, diversity: float, count: int) -> list[int]:
    """The definition, word for word."""
    first = vectors[:256].astype(np.float64)
    cosines = first @ first.T
    mean = cosines[~np.eye(len(first), dtype=bool)].mean()
    low, high = scores[:256].min(), scores[:256].max()
    chosen: list[int] = []
    for place in range(1, count + 1):
        best, best_value = -1, -np.inf
        for i in range(min(len(scores), max(256, 5 * place))):
            similar = [(float(vectors[i] @ vectors[j]) - mean) / (1 - mean) for j in chosen]
            value = (1 - diversity) * (scores[i] - low) / (high - low)
            value -= diversity * max([0.0, *similar])
            if i not in chosen and value > best_value + 1e-9:
                best, best_value = i, value
        chosen.append(best)
    return chosen


@pytest.mark.parametrize("diversity", [0.1, 0.5, 0.9])
@pytest.mark.parametrize(("rows", "count"), [(30, 30), (600, 80)])
def test_the_order_is_that_of_the_definition(diversity: float, rows: int, count: int) -> None:
    rng = np.random.default_rng(rows)
    vectors = unit(rng.normal(size=(rows, 8)) + 1)
    scores = np.sort(vectors @ vectors[0])[::-1].copy()
    found = diverse_order(scores, vectors, diversity, count).tolist()
    assert found == slow_order(scores, vectors, diversity, count)
    assert len(set(found)) == count


def test_candidates_that_are_equal_or_few_keep_their_order() -> None:
    same = np.ones((3, 4), np.float32) / 2
    assert diverse_order(np.ones(3, np.float32), same, 0.5, 10).tolist() == [0, 1, 2]
    assert diverse_order(np.ones(1, np.float32), same[:1], 1.0, 10).tolist() == [0]
    assert diverse_order(np.zeros(0, np.float32), same[:0], 1.0, 10).tolist() == []
    assert [candidates(count) for count in (1, 51, 52, 1000)] == [256, 256, 260, 5000]


def test_pictures_of_one_thing_come_once(searcher: Searcher) -> None:
    plain, diverse = searcher.search("topic 5"), searcher.search("topic 5", diversity=0.5)
    assert len(topics(plain)) < 10 == len(topics(diverse))
    assert diverse[0] == plain[0]
    assert searcher.search("topic 5", diversity=0.0).hits == plain.hits
    for hit in diverse:
        vector = searcher.store.vectors_of("image", hit.row)[0]
        assert hit.score == pytest.approx(float(vector @ text_vector("topic 5")), abs=1e-5)
    captions = searcher.search("topic 5", to="text", diversity=0.5)
    assert len(topics(captions)) == 10
    assert all(hit.caption for hit in captions)


def test_pages_are_parts_of_one_order(searcher: Searcher) -> None:
    whole = searcher.search("topic 5", 120, diversity=0.3)
    pages = [searcher.search("topic 5", 20, offset=i, diversity=0.3) for i in range(0, 120, 20)]
    assert [hit for page in pages for hit in page] == list(whole)
    assert [hit.rank for hit in whole] == list(range(1, 121))
    assert len(searcher.search("topic 5", 1000, diversity=0.3)) == ROWS


def test_filters_hold(searcher: Searcher) -> None:
    query = Query((("topic 5", 1.0),), phrases=("take 2",), diversity=0.8)
    assert {hit.row % TAKES for hit in searcher.search(query, 30)} == {2}
    few = Query((("topic 5", 1.0),), phrases=("topic 7 take",), diversity=0.8)
    assert sorted(hit.row for hit in searcher.search(few)) == [28, 29, 30, 31]


def test_queries_with_and_without_are_answered_together(searcher: Searcher) -> None:
    queries = [Query((("topic 5", 1.0),), diversity=d) for d in (0.0, 0.5, 0.9)]
    alone: list[Hits] = [searcher.search(query) for query in queries]
    assert searcher.search_many(queries) == alone


def test_stores_are_searched_as_one(searcher: Searcher, path: Path, tmp_path: Path) -> None:
    """Rows of two stores come in the order in which one store of all of them gives them."""
    halves = [write(tmp_path / f"{n}.store") for n in "ab"]
    delete(halves[0], [f"id{n}" for n in range(0, ROWS, 2)])
    delete(halves[1], [f"id{n}" for n in range(1, ROWS, 2)])
    both = MultiSearcher.open(halves)
    whole = searcher.search("topic 5", 60, diversity=0.4)
    found = both.search("topic 5", 60, diversity=0.4)
    assert [(hit.id, hit.rank) for hit in found] == [(hit.id, hit.rank) for hit in whole]
    assert [hit.score for hit in found] == pytest.approx([hit.score for hit in whole], abs=1e-6)
    pages = [both.search("topic 5", 20, offset=i, diversity=0.4) for i in range(0, 60, 20)]
    assert [hit for page in pages for hit in page] == list(found)
    assert {Path(hit.store or "").stem for hit in found} == {"a", "b"}


def test_what_makes_no_sense_is_refused(searcher: Searcher) -> None:
    for diversity in (-0.1, 1.1, float("nan")):
        with pytest.raises(UsageError, match=f"diversity={diversity} must be from 0 to 1"):
            searcher.search("topic 5", diversity=diversity)
    with pytest.raises(UsageError, match="filters alone have none"):
        Query((), phrases=("topic",), diversity=0.5)
    with pytest.raises(UsageError, match="leave it out, or lexical"):
        searcher.search("topic 5", diversity=0.5, lexical=True)


def test_rows_are_compared_by_the_mean_of_their_images(tmp_path: Path) -> None:
    images = {n: np.stack([drawn(n, i, 0) for i in range(n)]) for n in (2, 1)}
    images[0] = np.zeros((0, DIM), np.float32)
    with Writer(tmp_path / "s.store", CARD, 100) as writer:
        for n, vectors in images.items():
            writer.add(Row(f"id{n}", f"{n}.jpg", (), {"image": vectors}))
    found = Snapshot(open_store(tmp_path / "s.store")).vectors_of(np.array([2, 1, 0]))
    wanted = [np.zeros(DIM), *(unit(images[n].mean(0)) for n in (1, 2))]
    assert np.allclose(found, wanted, atol=1e-3)
    assert len(Snapshot(open_store(tmp_path / "s.store")).vectors_of(np.zeros(0, np.int64))) == 0


def test_diversity_in_the_shell(path: Path) -> None:
    def run(*words: object) -> Any:
        return CliRunner().invoke(main, ["search", str(path), "topic 5", *map(str, words)])

    hits = json.loads(run("--diversity", 0.5, "--json").stdout)["hits"]
    assert len({int(hit["id"][2:]) // TAKES for hit in hits}) == 10
    refused = run("--diversity", 2)
    assert refused.exit_code == 2
    assert "diversity=2.0 must be from 0 to 1" in refused.output
