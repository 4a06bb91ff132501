"""More like these, less like those: the rule, the gate, what comes back, and what is refused."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from topic_store import DIM, GAP, KNOWN, WORLD, draw_queries, unit, write

from mmalign import MultiSearcher, Query, Searcher
from mmalign import Row as RowQuery
from mmalign.cli.main import main
from mmalign.errors import ItemError, StoreError, UsageError
from mmalign.search import feedback
from mmalign.search.feedback import turned
from mmalign.search.searcher import Hits
from mmalign.store import delete, delete_rows, open_store


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("feedback") / "s.store")


@pytest.fixture(autouse=True)
def encoded(monkeypatch: pytest.MonkeyPatch) -> None:
    draw_queries(monkeypatch)


@pytest.fixture
def searcher(path: Path) -> Searcher:
    return Searcher.open(path)


def topics(hits: Hits) -> list[int]:
    return [hit.row % KNOWN for hit in hits]


def rows(*numbers: int) -> list[RowQuery]:
    return [RowQuery(f"id{n}") for n in numbers]


# ---------------------------------------------------------------- the rule


RANDOM = unit(np.random.default_rng(3).normal(size=(4000, DIM)) / 4 + GAP)


def angle(one: np.ndarray, two: np.ndarray) -> float:
    """Between the scores of two vectors with random rows, in degrees."""
    cosine = np.corrcoef(RANDOM @ one, RANDOM @ two)[0, 1]
    return float(np.degrees(np.arccos(min(1, cosine))))


def test_without_a_gate_it_is_the_sum_of_vectors_of_one_length(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(feedback, "GATE", 180.0)
    query, more, less = unit(WORLD[0] - 2 * GAP), WORLD[1:3], WORLD[3:4]
    parts = [v / np.std(RANDOM @ v) for v in (query, more.mean(0), less.mean(0))]
    wanted = parts[0] + feedback.MORE * parts[1] - feedback.LESS * parts[2]
    assert np.allclose(unit(turned(query, more, less, RANDOM)), unit(wanted), atol=1e-4)


@pytest.mark.parametrize("gate", [5.0, 30.0, 60.0])
def test_the_query_turns_no_further_than_the_gate(
    gate: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(feedback, "GATE", gate)
    none = WORLD[:0]
    for more, less in ((WORLD[1:3], none), (none, WORLD[4:5]), (-WORLD[:1] + WORLD[1:2], none)):
        found = turned(WORLD[0], more, less, RANDOM)
        assert angle(found, WORLD[0]) == pytest.approx(gate, abs=0.1)
    assert angle(turned(WORLD[0], WORLD[:1], none, RANDOM), WORLD[0]) < 0.1


def test_rows_that_are_all_alike_turn_nothing() -> None:
    same = np.tile(WORLD[:1], (5, 1))
    for random in (same, same[:1]):
        found = turned(WORLD[1], WORLD[2:3], WORLD[:0], random)
        assert np.isfinite(found).all()
        assert found.any()


# ---------------------------------------------------------------- search


def test_examples_turn_a_query(searcher: Searcher) -> None:
    plain = searcher.search("topic 5", 12)
    assert set(topics(plain)[:4]) == {5}
    found = searcher.search("topic 5", 12, more=rows(7, 107))
    # What was asked for stays first, and the rest of what was named follows.
    assert set(topics(found)[:4]) == {5}
    assert topics(found).count(7) == 2 > topics(plain).count(7)
    away = searcher.search("topic 5", 12, less=rows(plain[4].row))
    assert topics(plain)[4] not in topics(away)[:8]


def test_rows_that_were_named_are_no_hits(searcher: Searcher) -> None:
    found = searcher.search("topic 5", 400, more=rows(5), less=rows(7, 8))
    assert len(found) == 397
    assert not {5, 7, 8} & {hit.row for hit in found}
    pages = [
        searcher.search("topic 5", 10, more=rows(5), less=rows(7, 8), offset=i) for i in (0, 10)
    ]
    assert [hit for page in pages for hit in page] == list(found[:20])
    picture = np.asarray(searcher.store.vectors_of("image", 5)[0], np.float32)
    assert 5 in {hit.row for hit in searcher.search("topic 5", 4, more=[picture])}


def test_examples_alone_are_a_query(searcher: Searcher) -> None:
    found = searcher.search(more=rows(3, 103))
    assert sorted(hit.row for hit in found[:2]) == [203, 303]
    assert found[0].relevance is found.nothing_found is None
    query = Query((), more=tuple(rows(3, 103)))
    assert searcher.search(query) == found
    vector = searcher.encode([query])[0]
    alone = [hit.row for hit in searcher.search(vector, 6) if hit.row not in (3, 103)]
    assert alone[:2] == [hit.row for hit in found[:2]]
    assert searcher.search(more=rows(3), less=rows(4), group=True, diversity=0.2)


def test_queries_with_and_without_examples_are_answered_together(searcher: Searcher) -> None:
    queries = [
        Query((("topic 5", 1.0),)),
        Query((("topic 5", 1.0),), more=tuple(rows(7))),
        Query((), more=tuple(rows(9)), less=tuple(rows(7))),
    ]
    assert searcher.search_many(queries) == [searcher.search(query) for query in queries]


def test_examples_in_an_empty_store_turn_nothing(tmp_path: Path) -> None:
    empty = write(tmp_path / "s.store")
    opened = open_store(empty)
    picture = np.asarray(opened.vectors_of("image", 5)[0], np.float32)
    delete_rows(opened, range(len(opened)))
    searcher = Searcher.open(empty)
    vectors_MD = searcher.encode(["topic 5", Query((("topic 5", 1.0),), more=(picture,))])
    assert np.isfinite(vectors_MD).all()
    assert np.array_equal(*vectors_MD)
    with pytest.raises(StoreError, match="no image vectors to search"):
        searcher.search("topic 5", more=[picture])


def test_what_is_excluded_stays_out_beside_examples(searcher: Searcher) -> None:
    query = Query((("topic 5", 1.0),), excluded=("topic 7",), more=tuple(rows(9)))
    found = searcher.search(query, 40)
    assert topics(found)[0] == 5
    assert 7 not in topics(found)
    assert 9 in topics(found)[:12]
    assert 7 in topics(searcher.search("topic 5", 400, more=rows(9)))


def test_examples_are_of_any_store(path: Path, tmp_path: Path) -> None:
    halves = [write(tmp_path / f"{n}.store") for n in "ab"]
    delete(halves[0], [f"id{n}" for n in range(200)])
    delete(halves[1], [f"id{n}" for n in range(200, 400)])
    both = MultiSearcher.open(halves)
    found = both.search("topic 5", 12, more=rows(7, 207))
    assert {Path(hit.store or "").stem for hit in found} == {"a", "b"}
    assert not {"id7", "id207"} & {hit.id for hit in found}
    assert topics(found).count(7) == 2


def test_what_makes_no_sense_is_refused(searcher: Searcher) -> None:
    with pytest.raises(UsageError, match="give a query, or rows as more"):
        searcher.search(less=rows(3))
    with pytest.raises(UsageError, match=r"s\.store: no row has the id 'id999'"):
        searcher.search("topic 5", more=rows(3, 999))
    with pytest.raises(UsageError, match=r"more and less take rows.*a row is Row\('id3'\)"):
        searcher.search("topic 5", less=["id3"])
    with pytest.raises(UsageError, match=r"more takes a list: more=\[Row\(id\)\]"):
        searcher.search("topic 5", more=RowQuery("id3"))  # type: ignore[arg-type]
    with pytest.raises(ItemError):
        searcher.search()


# ---------------------------------------------------------------- shell


def run(*words: object) -> Any:
    return CliRunner().invoke(main, ["search", *map(str, words)])


def test_examples_in_the_shell(path: Path, searcher: Searcher) -> None:
    said = run(path, "topic 5", "--more", "id7", "--more", "id107", "--less", "id8", "--json")
    wanted = searcher.search("topic 5", more=rows(7, 107), less=rows(8))
    assert [hit["id"] for hit in json.loads(said.stdout)["hits"]] == [hit.id for hit in wanted]
    alone = run(path, "--more", "id3", "-k", 3, "--tsv")
    assert alone.exit_code == 0
    assert {line.split("\t")[1] for line in alone.stdout.splitlines()[1:]} == {
        "id103", "id203", "id303",
    }  # fmt: skip
    for words, told in (
        (("--less", "id3"), "give a query, or rows as more"),
        (("topic 5", "--more", "nobody"), "no row has the id 'nobody'"),
    ):
        refused = run(path, *words)
        assert refused.exit_code == 2
        assert told in refused.output
