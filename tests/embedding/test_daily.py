"""A folder that grows day by day, embedded each day: few shards, and nothing else is different."""

from pathlib import Path

import numpy as np
import pytest
from conftest import jpeg
from stub_encoder import use_stub

from mmalign.embedding import embed as embedding
from mmalign.errors import StoreError
from mmalign.search.build import build_index
from mmalign.search.snapshot import Snapshot
from mmalign.store import Store, open_store, verify

DAYS = 40


@pytest.fixture(autouse=True)
def _stub(monkeypatch: pytest.MonkeyPatch) -> None:
    use_stub(monkeypatch)


def grow(folder: Path, day: int) -> None:
    folder.mkdir(exist_ok=True)
    for number in range(day % 3 + 1):
        (folder / f"{day:02d}-{number}.jpg").write_bytes(jpeg(10 * day + number))
        (folder / f"{day:02d}-{number}.txt").write_text(f"picture {number} of day {day}")


def content(store: Store) -> dict[str, str]:
    columns = [name for name in store.columns if name not in ("id", "stamp")]
    values = zip(*(map(str, store.column(name)) for name in columns), strict=True)
    return dict(zip(store.column("id"), map(" ".join, values), strict=True))


def test_forty_days_are_few_shards(tmp_path: Path) -> None:
    folder, path = tmp_path / "pictures", tmp_path / "a.store"
    for day in range(DAYS):
        grow(folder, day)
        report = embedding.embed("stub", [str(folder)], path)
        assert (report.added, report.changed) == (day % 3 + 1, 0)
        if day == 9:
            build_index(path)
            indexed = open_store(path).manifest
        if day == 22:
            reader = open_store(path)
    store = open_store(path)
    assert verify(path) == []
    covered = len(indexed.shards)
    assert covered + 2 <= len(store.manifest.shards) <= covered + 10
    assert store.manifest.index == indexed.index is not None
    assert store.manifest.shards[:covered] == indexed.shards
    embedding.embed("stub", [str(folder)], tmp_path / "once.store")
    once = open_store(tmp_path / "once.store")
    assert content(store) == content(once)
    assert store.column("id") == once.column("id")
    # The reader of day 22 opens its files only now.
    assert {i: once_of for i, once_of in content(once).items() if i in content(reader)} == content(
        reader
    )
    assert len(reader) == sum(day % 3 + 1 for day in range(23))
    queries = np.concatenate(store.vectors("image"))[::7].astype(np.float32)
    scores, numbers = Snapshot(store).find(
        queries, 3, kind="image", to="image", exact=False, allowed_N=None
    )
    assert numbers[:, 0].tolist() == list(range(0, len(store), 7))
    assert np.allclose(scores[:, 0], 1, atol=1e-3)


@pytest.mark.parametrize("error", [StoreError("damaged"), OSError(28, "No space left on device")])
def test_shards_that_cannot_be_joined_do_not_fail_the_run(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    error: Exception,
) -> None:
    def fail(path: Path) -> int:
        raise error

    monkeypatch.setattr(embedding, "join_small_shards", fail)
    grow(tmp_path / "pictures", 2)
    assert embedding.embed("stub", [str(tmp_path / "pictures")], tmp_path / "a.store").added == 3
    assert "small shards stay as they are, nothing is lost: " in capsys.readouterr().err
