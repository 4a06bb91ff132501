"""Several stores of one space, searched as one."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from store_samples import encoder_of
from topic_store import CARD, DIM, Drawn, drawn, text_vector

from mmalign import MultiSearcher, Query, Searcher, open_store
from mmalign import Row as RowQuery
from mmalign.cli.main import main
from mmalign.errors import IdentityError, UsageError
from mmalign.search.build import build_index
from mmalign.search.searcher import Hits
from mmalign.store import ModelCard, Row, Writer, delete, pair_vectors

TOPICS = {"a": range(120), "b": range(60, 180)}
META = {"a": {"label": "A", "price": 3}, "b": {"colour": "red"}}


def write(path: Path, numbers: range, card: ModelCard = CARD, **meta: Any) -> Path:
    with Writer(path, card, 50) as writer:
        for n in numbers:
            # The same id in two stores is another picture of the same thing.
            seed = 2 if path.stem == "a" else 3
            vectors = pair_vectors(drawn(n, seed, -0.5), np.array([drawn(n, 1, 0.5)]))
            caption = f"zorvex {path.stem}" if n == 100 else f"topic {n}"
            row = Row(f"id{n}", f"{n}.jpg", (caption,), vectors, meta=json.dumps(meta))
            writer.add(row)
    return path


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("several")
    paths = [write(folder / f"{s}.store", TOPICS[s], **META[s]) for s in TOPICS]
    build_index(paths[0])
    return paths


CALLS: list[list[Any]] = []


@pytest.fixture(autouse=True)
def encoded(monkeypatch: pytest.MonkeyPatch) -> None:
    CALLS.clear()

    def encode(encoder: Any, items: list[Any]) -> list[np.ndarray]:
        CALLS.append(items)
        return [text_vector(i) if isinstance(i, str) else np.asarray(i) for i in items]

    monkeypatch.setattr("mmalign.search.searcher.encode_items", encode)
    drawing: Any = Drawn()
    for place in ("mmalign.search.model.find_model", "mmalign.search.model.load_model"):
        monkeypatch.setattr(place, lambda *args, **words: drawing)


def places(hits: Hits) -> list[tuple[str, str]]:
    return [(Path(hit.store or "").stem, hit.id) for hit in hits]


def test_hits_are_those_of_all_stores_by_score(built: list[Path]) -> None:
    both = MultiSearcher.open(built)
    found = both.search("topic 70", 20)
    assert CALLS == [["topic 70"]]  # encoded once
    alone = [h for p in built for h in Searcher.open(p).search("topic 70", 20)]
    wanted = sorted((hit.score for hit in alone), reverse=True)[:20]
    assert [hit.score for hit in found] == wanted
    assert set(places(found)[:2]) == {("a", "id70"), ("b", "id70")}
    assert [hit.rank for hit in found] == list(range(1, 21))
    # Only the first store was calibrated.
    assert all((h.relevance is None) == (Path(h.store or "").stem == "b") for h in found)
    assert found.nothing_found is False
    pages = [both.search("topic 70", 5, offset=i) for i in range(0, 20, 5)]
    assert [hit for page in pages for hit in page] == list(found)


def test_nothing_is_found_only_if_all_stores_say_so(built: list[Path]) -> None:
    assert Searcher.open(built[0]).search("who knows").nothing_found is True
    assert MultiSearcher.open(built).search("who knows").nothing_found is None
    assert MultiSearcher.open(built[:1]).search("who knows").nothing_found is True


def test_filters_on_a_field_of_one_store_hold_for_no_row_of_the_other(built: list[Path]) -> None:
    pytest.importorskip("duckdb")
    both = MultiSearcher.open(built)
    assert set(both.fields) == {"label", "price", "colour"}

    def stores(text: str) -> set[str]:
        hits = both.search(Query.parse(text, fields=both.fields), 300)
        return {store for store, _ in places(hits)}

    assert stores("topic 70 colour:red") == {"b"}
    assert stores("topic 70 price:<4") == {"a"}
    assert stores("topic 70 ! label:A") == {"b"}
    assert stores("topic 70 ! label:B") == {"a", "b"}
    assert stores("colour:red") == {"b"}
    assert stores("topic 70 label:A colour:red") == set()
    with pytest.raises(UsageError, match="no row has a field 'size'"):
        both.search(Query.parse("size:2", fields=["size"]))
    with pytest.raises(UsageError, match="price"):
        both.search("topic 70", where="price < 4")


def test_rows_listed_come_store_after_store(built: list[Path]) -> None:
    both = MultiSearcher.open(built)
    listed = both.search(Query((), phrases=("zorvex",)))
    assert places(listed) == [("a", "id100"), ("b", "id100")]
    assert places(both.search(Query((), phrases=("zorvex",), offset=1))) == [("b", "id100")]


def test_rows_of_any_store_are_items(built: list[Path]) -> None:
    both = MultiSearcher.open(built)
    assert places(both.search(RowQuery("id10"), 1)) == [("a", "id10")]
    assert places(both.search(RowQuery("id170"), 1)) == [("b", "id170")]
    with pytest.raises(UsageError, match=r"a\.store, .*b\.store: no row has the id 'nobody'"):
        both.search(RowQuery("nobody"))


def test_words_of_all_stores_are_fused(built: list[Path]) -> None:
    both = MultiSearcher.open(built)
    found = both.search("zorvex", 4, lexical=True)
    assert {p for p, h in zip(places(found), found, strict=True) if h.words} == {
        ("a", "id100"), ("b", "id100"),
    }  # fmt: skip
    alone = MultiSearcher.open(built[:1]).search("zorvex", 30, lexical=True)
    one = Searcher.open(built[0]).search("zorvex", 30, lexical=True)
    assert [(h.id, h.score, h.words) for h in alone] == [(h.id, h.score, h.words) for h in one]


def test_each_store_is_refreshed(tmp_path: Path) -> None:
    paths = [write(tmp_path / f"{s}.store", range(10)) for s in "ab"]
    both = MultiSearcher.open(paths)
    assert not both.refresh()
    delete(paths[1], ["id3"])
    assert ("b", "id3") in places(both.search("topic 3", 50))
    assert both.refresh()
    assert ("b", "id3") not in places(both.search("topic 3", 50))
    assert ("a", "id3") in places(both.search("topic 3", 50))


def test_stores_that_do_not_belong_together_are_refused(built: list[Path], tmp_path: Path) -> None:
    other = write(tmp_path / "other.store", range(5), ModelCard("alien", "alien", DIM))
    with pytest.raises(IdentityError, match=r"other\.store holds embeddings of alien, .* drawn: s"):
        MultiSearcher.open([*built, other])
    with pytest.raises(IdentityError):
        MultiSearcher([open_store(other)], encoder_of(CARD))
    with pytest.raises(UsageError, match="is given twice"):
        MultiSearcher.open([built[0], built[0]])
    with pytest.raises(UsageError, match="no store"):
        MultiSearcher.open([])
    with pytest.raises(UsageError, match="takes a list of stores"):
        MultiSearcher.open(str(built[0]))


# ---------------------------------------------------------------- shell


def run(*words: object) -> Any:
    return CliRunner().invoke(main, ["search", *map(str, words)])


def test_the_last_argument_of_the_shell_is_the_query(built: list[Path]) -> None:
    said = run(*built, "topic 70", "--json", "-k", 2)
    hits = json.loads(said.stdout)["hits"]
    assert {Path(hit["store"]).stem for hit in hits} == {"a", "b"}
    assert [hit["id"] for hit in hits] == ["id70", "id70"]
    alone = json.loads(run(built[0], "topic 70", "--json").stdout)
    assert "store" not in alone["hits"][0]
    assert "index" in alone


def test_words_without_quotes_are_no_stores(built: list[Path]) -> None:
    said = run(built[0], "a", "red", "dress")
    assert said.exit_code == 2
    assert "put its words in quotes: 'a red dress'" in said.output


def test_lexical_in_the_shell(built: list[Path]) -> None:
    said = run(*built, "zorvex", "--lexical", "--json", "-k", 4)
    found = {hit["store"]: hit for hit in json.loads(said.stdout)["hits"] if hit["words"]}
    assert len(found) == 2
    assert all(hit["found_by"] in ("words", "both") for hit in found.values())
    shown = run(built[0], "zorvex", "--lexical").stdout.splitlines()
    assert ["  words  " in line for line in shown] == [True] + 9 * [False]
    assert "lexical" not in run(built[0], "zorvex").output
    assert run(built[0], "row:id3", "--lexical").exit_code == 2
