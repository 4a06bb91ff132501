"""Ids: live once, found without a Python object each, whoever writes at the same time."""

import multiprocessing
from pathlib import Path

import numpy as np
import pytest
from store_samples import CARD, fill, ids_of, row, versions

from mmalign import open_store
from mmalign.store import Writer, delete, ids, schema


def test_a_row_replaces_the_one_with_its_id(tmp_path: Path) -> None:
    fill(tmp_path, range(25))
    generation = open_store(tmp_path).manifest.generation
    fill(tmp_path, [3, 14, 24, 30], version=1)
    store = open_store(tmp_path)
    assert store.manifest.generation == generation + 1
    assert store.manifest.physical_rows == 29
    assert versions(store) == {f"id{i}": int(i in (3, 14, 24, 30)) for i in [*range(25), 30]}
    assert store.live is not None
    assert np.flatnonzero(~store.live).tolist() == [3, 14, 24]


def test_the_last_of_equal_ids_in_one_batch_wins(tmp_path: Path) -> None:
    with Writer(tmp_path, CARD, 10) as writer:
        for version in range(3):
            for number in range(4):
                writer.add(row(number, number % 3, version))
    store = open_store(tmp_path)
    assert versions(store) == dict.fromkeys(ids_of(range(4)), 2)
    assert store.manifest.physical_rows == 4


def test_a_commit_that_is_repeated_changes_no_row(tmp_path: Path) -> None:
    """The generation was made, but its maker was told that it might not last."""
    writer = Writer(tmp_path, CARD)
    writer.add(row(0, 0))
    kept = dict(writer._rows)
    writer.commit()
    writer._rows = kept
    writer.commit()
    assert versions(open_store(tmp_path)) == {"id0": 0}


def test_a_commit_reads_no_old_ids_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(tmp_path, range(50))
    writer = Writer(tmp_path, CARD, 10)
    writer.add(row(100))
    writer.commit()
    opened = []
    reader = ids.ShardReader
    monkeypatch.setattr(ids, "ShardReader", lambda *a: (opened.append(a), reader(*a))[1])
    writer.add(row(101))
    writer.commit()
    # Only the shard that this writer has written itself.
    assert len(opened) == 1
    assert len(open_store(tmp_path)) == 52


def test_rows_are_found_by_id(tmp_path: Path) -> None:
    fill(tmp_path, range(95))
    fill(tmp_path, range(20, 30), version=1)
    delete(tmp_path, ids_of([50]))
    store = open_store(tmp_path)
    asked = [*ids_of(range(100)), "", "id7", "id007", "图片"]
    found = store.find(asked)
    assert found.dtype == np.int64
    held = {name: n for n, name in zip(found, asked, strict=True) if n >= 0}
    assert set(held) == set(store.column("id"))
    assert [r["id"] for r in store.rows(list(held.values()), ("id",))] == list(held)
    assert found[20] == 95
    assert found[[50, 95, 99, 100, 102, 103]].tolist() == [-1] * 6
    assert found[101] == 7
    assert store.find([]).tolist() == []


def test_an_empty_store_has_no_ids(tmp_path: Path) -> None:
    fill(tmp_path, [])
    store = open_store(tmp_path)
    assert store.find(["id0"]).tolist() == [-1]
    assert store.vectors("image") == []
    assert store.owners("text").tolist() == []
    assert store.column("id") == []
    assert store.rows([], ("id",)) == []


def test_equal_hashes_mix_nothing_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hashes that tell only even from odd."""

    def poor(ids: list[str]) -> np.ndarray:
        return np.array([int(i[-1], 36) % 2 for i in ids], np.uint64)

    for module in ("ids", "reader", "schema"):
        monkeypatch.setattr(f"mmalign.store.{module}.id_hashes", poor)
    fill(tmp_path, range(25))
    fill(tmp_path, [3, 4], version=1)
    delete(tmp_path, ids_of([7, 12]))
    store = open_store(tmp_path)
    assert versions(store) == {f"id{i}": int(i in (3, 4)) for i in range(25) if i not in (7, 12)}
    assert store.find(ids_of([3, 7, 0, 12, 24, 26])).tolist() == [25, -1, 0, -1, 24, -1]


def test_hashes_are_the_same_in_each_process_and_stored_in_order(tmp_path: Path) -> None:
    assert schema.id_hashes(["a", "图片"]).tolist() == [3405396810240292928, 5350863773218565870]
    fill(tmp_path, range(200), rows_per_shard=200)
    store = open_store(tmp_path)
    (shard,) = store._shards
    hashes, rows = shard.id_hashes
    assert (np.diff(hashes.astype(object)) >= 0).all()
    names = store.column("id")
    assert hashes.tolist() == schema.id_hashes([names[row] for row in rows]).tolist()


def _write_some(path: str, first: int, version: int) -> None:
    fill(Path(path), range(first, first + 20), rows_per_shard=2, version=version)


@pytest.mark.slow
@pytest.mark.parametrize("apart", [100, 7])
def test_two_writers_lose_nothing_and_double_nothing(tmp_path: Path, apart: int) -> None:
    fill(tmp_path, range(1))
    context = multiprocessing.get_context("spawn")
    writers = [
        context.Process(target=_write_some, args=(str(tmp_path), apart * w, w)) for w in (1, 2)
    ]
    for process in writers:
        process.start()
    for process in writers:
        process.join()
    assert [p.exitcode for p in writers] == [0, 0]
    found = versions(open_store(tmp_path))
    ranges = {w: {f"id{i}" for i in range(apart * w, apart * w + 20)} for w in (1, 2)}
    assert set(found) == {"id0"} | ranges[1] | ranges[2]
    assert all(name in ranges[version] for name, version in found.items() if version)
