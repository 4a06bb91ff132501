"""A store gets another model: its rows are embedded again beside the old vectors, then swapped."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest import write_pairs
from stub_encoder import use_stub

from mmalign.embedding.embed import EmbedReport, embed
from mmalign.store import Store, open_store, verify

OLD, NEW = "old", "new-12"
ROWS = 5


@pytest.fixture(autouse=True)
def _stub(monkeypatch: pytest.MonkeyPatch) -> None:
    use_stub(monkeypatch)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    return write_pairs(tmp_path / "photos", ROWS)


@pytest.fixture
def path(photos: Path, tmp_path: Path) -> Path:
    """A store of the photos by the old model."""
    run(OLD, photos, tmp_path / "a.store")
    return tmp_path / "a.store"


def run(model: str, source: Path, path: Path, **options: object) -> EmbedReport:
    return embed(model, [str(source)], path, **options)  # type: ignore[arg-type]


def held(store: Store) -> dict[str, list[np.ndarray]]:
    """The vectors of each row, by its id."""
    numbers = store.find(ids := store.column("id")).tolist()
    modalities = store.manifest.model.positions
    return {
        i: [v for m in modalities for v in store.vectors_of(m, number)]
        for i, number in zip(ids, numbers, strict=True)
    }


def assert_as_embedded_anew(path: Path, source: Path, model: str = NEW) -> None:
    """The store holds what an empty one would after the same sources."""
    run(model, source, path.with_name("fresh.store"))
    fresh, store = open_store(path.with_name("fresh.store")), open_store(path)
    assert store.manifest.model == fresh.manifest.model
    assert store.manifest.next is None
    assert not any(shard.next for shard in store.manifest.shards)
    found, wanted = held(store), held(fresh)
    assert found.keys() == wanted.keys()
    for name, vectors in wanted.items():
        assert np.array_equal(found[name], vectors), name
    assert verify(path) == []
    shutil.rmtree(fresh.path)


def test_a_store_gets_another_model(photos: Path, path: Path) -> None:
    report = run(NEW, photos, path)
    assert (report.rebuilt, report.present, report.added, report.rows) == (ROWS, ROWS, 0, ROWS)
    assert_as_embedded_anew(path, photos)
    again = run(NEW, photos, path)
    assert (again.rebuilt, again.present, again.read) == (0, ROWS, 0)
