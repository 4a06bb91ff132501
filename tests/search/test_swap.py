"""A store gets another model under a running `Searcher`: every answer is of one of the two."""

import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import write_pairs
from stub_encoder import stub, use_stub

from mmalign import Query, Row, Searcher
from mmalign.embedding import rebuild
from mmalign.embedding.embed import embed
from mmalign.errors import ModelError
from mmalign.search import model as models
from mmalign.store import compact, open_store

ROWS, THREADS = 24, 4
QUERIES: list[Any] = [
    "picture 3",
    Row("photos/005.jpg"),
    Query((("picture 1", 1.0), (Row("photos/002.jpg"), 0.5)), k=ROWS),
    Query((("number 4", 1.0),), k=5, to="text"),
]
Answer = tuple[tuple[str, float], ...]


@pytest.fixture(autouse=True)
def _stub(monkeypatch: pytest.MonkeyPatch) -> None:
    use_stub(monkeypatch)
    monkeypatch.setattr(models, "find_model", stub)
    monkeypatch.setattr(rebuild, "COMMIT_SECONDS", 0.0)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    return write_pairs(tmp_path / "photos", ROWS)


@pytest.fixture
def path(photos: Path, tmp_path: Path) -> Path:
    embed("old", [str(photos)], tmp_path / "a.store")
    return tmp_path / "a.store"


def answers(searcher: Searcher) -> list[Answer]:
    """What it finds for all queries, asked at once."""
    return [tuple((h.id, h.score) for h in hits) for hits in searcher.search_many(QUERIES)]


@pytest.mark.parametrize("new", ["new", "new-12"], ids=["same dimensions", "other dimensions"])
def test_answers_are_of_the_old_model_or_of_the_new_one(
    new: str, path: Path, photos: Path, tmp_path: Path
) -> None:
    copy = shutil.copytree(path, tmp_path / "copy.store")
    embed(new, [str(photos)], copy)
    before, after = answers(Searcher.open(path)), answers(Searcher.open(copy))
    assert not {*before} & {*after}
    searcher = Searcher.open(path)
    stop = threading.Event()
    seen: list[list[list[Answer]]] = [[] for _ in range(THREADS)]
    errors: list[BaseException] = []

    def guarded(work: Any) -> None:
        try:
            while not stop.is_set():
                work()
        except BaseException as error:
            errors.append(error)

    work = [lambda own=own: own.append(answers(searcher)) for own in seen]
    threads = [threading.Thread(target=guarded, args=(one,)) for one in (*work, searcher.refresh)]
    for thread in threads:
        thread.start()
    wait(errors, lambda: all(seen))
    embed(new, [str(photos)], path)
    wait(errors, lambda: searcher.store.manifest.model.identity == new)
    compact(path, now=True)  # what the old model made is removed
    counts = [len(own) for own in seen]
    wait(errors, lambda: all(len(own) > n + 2 for own, n in zip(seen, counts, strict=True)))
    stop.set()
    for thread in threads:
        thread.join()
    assert errors == []
    for own in seen:
        switch = own.index(after)
        assert switch
        assert own == [before] * switch + [after] * (len(own) - switch)


def wait(errors: list[BaseException], until: Callable[[], bool]) -> None:
    while not errors and not until():
        time.sleep(0.001)


def test_a_new_model_that_is_not_found_leaves_the_old_one_in_use(
    path: Path, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    searcher = Searcher.open(path)
    before = answers(searcher)
    embed("new-12", [str(photos)], path)

    def missing(*_: object, **__: object) -> None:
        raise ModelError("the model new-12 is not found")

    with monkeypatch.context() as patch:
        patch.setattr(models, "find_model", missing)
        with pytest.raises(ModelError, match="new-12 is not found"):
            searcher.refresh()
    assert (searcher.encoder.space, answers(searcher)) == ("old", before)
    assert searcher.refresh()
    assert searcher.encoder.space == open_store(path).manifest.model.identity == "new-12"
    assert answers(searcher) != before
