"""Near-duplicates as one hit: the groups, pages, and the shell."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from topic_store import CARD, draw_queries, drawn, unit, write_takes

from mmalign import MultiSearcher, Query, Searcher
from mmalign.cli.main import main
from mmalign.errors import UsageError
from mmalign.search import duplicates
from mmalign.search.duplicates import Usual, are_duplicates, groups
from mmalign.search.searcher import Hits
from mmalign.store import Row, Writer, delete, pair_vectors

# Topic 0 has as many pictures as all others; each other topic has three.
MANY, TOPICS = 300, 100
TOPIC_OF = [0] * MANY + [n for n in range(1, TOPICS) for _ in range(3)]


def write(path: Path, topics: list[int]) -> Path:
    return write_takes(path, topics, lambda n, topic: f"{'zorvex ' * (n % 2)}topic {topic}")


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("duplicates") / "takes.store", TOPIC_OF)


@pytest.fixture(autouse=True)
def encoded(monkeypatch: pytest.MonkeyPatch) -> None:
    draw_queries(monkeypatch)


@pytest.fixture
def searcher(path: Path) -> Searcher:
    return Searcher.open(path)


def topics(hits: Hits) -> list[int]:
    return [TOPIC_OF[hit.row] for hit in hits]


# ---------------------------------------------------------------- groups


@pytest.mark.parametrize("block", [1, 7, 1024])
def test_a_row_joins_the_first_that_it_is_like(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(duplicates, "BLOCK", block)
    # On a circle, so that chains of near-duplicates are likely.
    angles = np.random.default_rng(0).uniform(0, 2 * np.pi, 60)
    vectors = np.stack([np.cos(angles), np.sin(angles)], 1).astype(np.float32)
    vectors[[5, 30]] = 0
    wanted: list[int] = []
    for i in range(60):
        firsts = [j for j in range(i) if wanted[j] == j]
        like = [j for j in firsts if float(vectors[i] @ vectors[j]) >= 0.96]
        wanted.append(like[0] if like else i)
    reach = np.full(60, 0.04, np.float32)
    assert groups(vectors, reach).tolist() == wanted
    assert 5 < len(set(wanted)) < 30
    assert groups(vectors, reach)[[5, 30]].tolist() == [5, 30]
    for count in (0, 1, 20):
        assert groups(vectors[:count], reach[:count]).tolist() == wanted[:count]
    # Each row has a reach of its own.
    reach[wanted[40:].index(max(wanted[40:])) + 40] = 0
    assert groups(vectors, reach).tolist() != wanted
    assert groups(vectors, np.zeros(60, np.float32)).tolist() == list(range(60))


def test_the_shorter_reach_of_two_rows_decides() -> None:
    cosines = np.float32([1, 0.971, 0.969, 0])
    vectors = np.stack([cosines, np.sqrt(1 - cosines**2)], 1)
    one, far, near = np.float32([[1, 0]]), np.float32([9] * 4), np.float32([0.03])
    assert are_duplicates(vectors, one, far, near)[:, 0].tolist() == [True, True, False, False]
    near_K = np.float32([0, 0.02, 0.04, 2])
    assert are_duplicates(vectors, one, near_K, far[:1])[:, 0].tolist() == [1, 0, 1, 1]


def test_the_reach_is_a_share_of_the_distance_to_the_near_ones() -> None:
    rows = unit(np.random.default_rng(0).normal(size=(600, 64)))
    usual = Usual(rows)
    distances = np.sort(1 - rows @ rows[: duplicates.SAMPLE].T, axis=1)
    wanted = duplicates.SHARE * distances[:, duplicates.NEAR]
    assert usual.reach(rows) == pytest.approx(wanted, abs=1e-6)
    # Half of the rows of a small store.
    assert Usual(rows[:8]).reach(rows[:8]) == pytest.approx(
        duplicates.SHARE * np.sort(1 - rows[:8] @ rows[:8].T, axis=1)[:, 4], abs=1e-6
    )


def test_the_reach_follows_the_model_and_the_kind_of_row() -> None:
    """As many near-duplicates are found where all rows are close, and none of those that differ."""
    rng = np.random.default_rng(0)
    spread = unit(rng.normal(size=(300, 64)))
    alike = unit(spread[:1] + 0.3 * unit(rng.normal(size=(300, 64))))
    for distinct in (np.concatenate([spread, alike]), unit(spread + 3 * spread[0])):
        noise = 0.15 * (1 - distinct @ distinct.T).mean(1, keepdims=True) ** 0.5
        copied = unit(distinct + noise * unit(rng.normal(size=distinct.shape)))
        usual = Usual(rng.permutation(distinct))
        assert len(set(groups(distinct, usual.reach(distinct)).tolist())) == len(distinct)
        both = np.concatenate([distinct[:200], copied[:200]])
        assert groups(both, usual.reach(both)).tolist() == [*range(200), *range(200)]
    reach = Usual(np.concatenate([spread, alike])).reach(np.concatenate([spread, alike]))
    assert reach[300:].max() < reach[1:300].min() / 2


def test_the_reach_is_not_that_of_a_large_group_of_near_duplicates() -> None:
    rng = np.random.default_rng(0)
    rows = unit(rng.normal(size=(300, 64)))
    same = unit(rows[:1] + 0.1 * unit(rng.normal(size=(100, 64))))
    every = np.concatenate([same, rows[1:]])
    assert len(set(groups(every, Usual(every).reach(every)).tolist())) == 300


def test_equal_rows_are_near_duplicates_whatever_is_usual() -> None:
    rows = unit(np.random.default_rng(0).normal(size=(9, 64)))
    for sample in (rows[:0], rows[:1], np.tile(rows[:1], (9, 1))):
        reach = Usual(sample).reach(rows)
        assert reach[0] == pytest.approx(duplicates.SHORTEST)
        assert len(set(groups(np.tile(rows[:1], (9, 1)), reach[:1].repeat(9)).tolist())) == 1
    assert not len(Usual(rows).reach(rows[:0]))


# ---------------------------------------------------------------- search


def test_k_different_hits_come_and_name_the_others(searcher: Searcher) -> None:
    plain, found = searcher.search("topic 0"), searcher.search("topic 0", group=True)
    assert set(topics(plain)) == {0}
    assert all(hit.like is None for hit in plain)
    # 256 rows are not enough: all of them are of topic 0.
    assert len(set(topics(found))) == 10
    assert (found[0].row, found[0].score) == (plain[0].row, plain[0].score)
    assert [hit.score for hit in found] == sorted((hit.score for hit in found), reverse=True)
    for hit in found:
        same = {f"id{n}" for n, topic in enumerate(TOPIC_OF) if topic == TOPIC_OF[hit.row]}
        assert {hit.id, *(hit.like or ())} == same
        assert len(hit.like or ()) == len(same) - 1
    assert len(searcher.search("topic 0", 1000, group=True)) == TOPICS


def test_the_first_of_a_group_is_the_best(searcher: Searcher) -> None:
    found = searcher.search("topic 7", group=True)
    every = {hit.id: hit.score for hit in searcher.search("topic 7", 1000)}
    for hit in found:
        assert all(every[other] <= hit.score for other in hit.like or ())


def test_offset_counts_groups(searcher: Searcher) -> None:
    whole = searcher.search("topic 0", 40, group=True)
    pages = [searcher.search("topic 0", 10, offset=i, group=True) for i in range(0, 40, 10)]
    assert [hit for page in pages for hit in page] == list(whole)
    assert [hit.rank for hit in whole] == list(range(1, 41))


def test_so_many_rows_are_looked_at_and_no_more(
    searcher: Searcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mmalign.search.answers.MOST", 300)
    (only,) = searcher.search("topic 0", group=True)
    assert len(only.like or ()) == MANY - 1


def test_groups_go_with_words_filters_captions_and_diversity(searcher: Searcher) -> None:
    words = searcher.search("zorvex topic 3", 20, lexical=True, group=True)
    assert len(set(topics(words))) == 20
    assert {hit.found_by for hit in words} <= {"both", "vectors", "words"}
    query = Query((("topic 3", 1.0),), phrases=("zorvex",), group=True)
    for hit in searcher.search(query):
        assert all(int(other[2:]) % 2 for other in (hit.id, *(hit.like or ())))
    captions = searcher.search("topic 3", to="text", group=True)
    assert len(set(topics(captions))) == 10
    diverse = searcher.search("topic 0", 20, diversity=0.5, group=True)
    assert len(set(topics(diverse))) == 20
    assert len(diverse[0].like or ()) == MANY - 1


def test_copies_are_one_hit_even_if_there_is_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "s.store"
    with Writer(path, CARD, 100) as writer:
        for n in range(5):
            vectors = pair_vectors(drawn(1, 2, -0.5), drawn(1, n, 0.5)[None])
            writer.add(Row(f"id{n}", f"{n}.jpg", ("a",), vectors))
    (only,) = Searcher.open(path).search("topic 1", group=True)
    assert len(only.like or ()) == 4


def test_deleted_rows_are_in_no_group(tmp_path: Path) -> None:
    path = write(tmp_path / "s.store", [1, 1, 1, 2])
    delete(path, ["id1"])
    found = Searcher.open(path).search("topic 1", group=True)
    assert [{hit.id, *(hit.like or ())} for hit in found] == [{"id0", "id2"}, {"id3"}]


def test_what_makes_no_sense_is_refused() -> None:
    with pytest.raises(UsageError, match="filters alone list every row"):
        Query((), phrases=("zorvex",), group=True)


@pytest.mark.parametrize("lexical", [False, True])
def test_groups_reach_over_stores(searcher: Searcher, tmp_path: Path, lexical: bool) -> None:
    """Rows of two stores form the groups that one store of all of them has."""
    halves = [write(tmp_path / f"{n}.store", TOPIC_OF) for n in "ab"]
    delete(halves[0], [f"id{n}" for n in range(0, len(TOPIC_OF), 2)])
    delete(halves[1], [f"id{n}" for n in range(1, len(TOPIC_OF), 2)])
    both = MultiSearcher.open(halves)
    whole = searcher.search("topic 0", 30, group=True, lexical=lexical)
    found = both.search("topic 0", 30, group=True, lexical=lexical)
    assert len(set(topics(found))) == 30
    if not lexical:  # what words are worth differs by store
        assert [(h.id, set(h.like or ())) for h in found] == [
            (h.id, set(h.like or ())) for h in whole
        ]
        assert len(found[0].like or ()) == MANY - 1
    pages = [both.search("topic 0", 10, offset=i, group=True, lexical=lexical) for i in (0, 10, 20)]
    assert [hit for page in pages for hit in page] == list(found)
    assert [hit.rank for hit in found] == list(range(1, 31))


# ---------------------------------------------------------------- shell


def run(*words: object) -> Any:
    return CliRunner().invoke(main, ["search", *map(str, words)])


def test_the_table_shows_groups_and_json_only_where_asked(path: Path) -> None:
    table = run(path, "topic 7", "-k", 3, "--table").stdout.splitlines()
    assert "  +2 alike  " in table[0]
    assert len(table) == 3
    every = run(path, "topic 7", "-k", 3, "--no-group", "--table").stdout
    assert len(every.splitlines()) == 3
    assert "alike" not in every
    plain = json.loads(run(path, "topic 7", "--json").stdout)["hits"]
    assert not any("like" in hit for hit in plain)
    grouped = json.loads(run(path, "topic 7", "--json", "--group").stdout)["hits"]
    assert {grouped[0]["id"], *grouped[0]["like"]} == {hit["id"] for hit in plain[:3]}
    assert len(grouped) == 10


def test_the_table_of_several_stores_shows_groups(path: Path, tmp_path: Path) -> None:
    other = write(tmp_path / "other.store", [7, 7])
    assert "  +4 alike  " in run(path, other, "topic 7", "--table").stdout.splitlines()[0]


def test_a_list_shows_every_row(tmp_path: Path) -> None:
    pytest.importorskip("duckdb")
    path = tmp_path / "s.store"
    with Writer(path, CARD, 100) as writer:
        for n in range(3):
            vectors = pair_vectors(drawn(1, 2, -0.5), drawn(1, n, 0.5)[None])
            writer.add(Row(f"id{n}", f"{n}.jpg", ("a",), vectors, meta='{"label": "dress"}'))
    assert len(run(path, "label:dress", "--table").stdout.splitlines()) == 3
    assert run(path, "label:dress", "--group").exit_code == 2
    assert len(run(path, "topic 1 label:dress", "--table").stdout.splitlines()) == 1
