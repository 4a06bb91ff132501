"""Deletions of many rows have files of their own, written twice."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from store_samples import fill, flip, ids_of, versions

from mmalign.errors import StoreError
from mmalign.store import Store, compact, delete, merge, open_store, repair, shards, verify
from mmalign.store.groups import Shard, StoredFile, parse, render

GONE = range(0, 40, 3)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A store of 40 rows in one shard, a third of them deleted."""
    path = tmp_path / "a.store"
    fill(path, range(40), rows_per_shard=40)
    delete(path, ids_of(GONE))
    return path


def only(path: Path) -> Shard:
    (shard,) = open_store(path).manifest.shards
    return shard


def live(store: Store) -> list[int]:
    return np.flatnonzero(store.live).tolist()


def test_few_are_in_the_group_and_many_in_files(path: Path) -> None:
    assert [file.name.split("-")[1] for file in only(path).deleted_files] == ["deleted"] * 2
    assert only(path).deleted == ""
    assert live(open_store(path)) == [n for n in range(40) if n not in GONE]
    few = path.with_name("few.store")
    fill(few, range(8), rows_per_shard=8)
    delete(few, ids_of([2, 3]))
    assert only(few).deleted_files == ()
    assert live(open_store(few)) == [0, 1, 4, 5, 6, 7]


def test_a_group_stays_small_however_many_rows_are_deleted(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.undo()
    rng = np.random.default_rng(0)
    shard = Shard("s", 262_144, *only_files())
    for share, is_in_group in ((0.0005, True), (0.01, False), (0.5, False)):
        deleted = shard.with_live(rng.random(shard.rows) >= share)
        (tmp_path / "shards").mkdir(exist_ok=True)
        stored = shards.with_deleted_files(tmp_path, deleted)
        assert (stored.deleted_files == ()) == is_in_group
        assert len(render([stored])) < 2_000
        (again,) = parse(render([stored]), tmp_path)
        assert again == stored
        assert np.array_equal(again.live, deleted.live)


def only_files() -> tuple[StoredFile, StoredFile]:
    file = StoredFile("s-rows.arrow", 1, "0" * 64)
    return file, replace(file, name="s-vectors.arrow")


def test_old_files_stay_for_those_who_read_them(path: Path) -> None:
    before = open_store(path)
    before.open_all()
    also_before = open_store(path)
    delete(path, ids_of([1]))
    compact(path)
    assert live(before) == live(also_before) == [n for n in range(40) if n not in GONE]
    compact(path, now=True)
    assert not list((path / "shards").glob("*deleted*"))
    assert verify(path) == []


def test_one_damaged_file_costs_nothing(path: Path) -> None:
    expected = live(open_store(path))
    for number in (0, 1):
        flip(path / "shards" / only(path).deleted_files[number].name)
        assert live(open_store(path)) == expected
        (damage,) = verify(path)
        assert "-deleted" in damage
        report = repair(path)
        assert (report.lost_rows, len(report.moved)) == (0, 2)
        assert verify(path) == []
        assert live(open_store(path)) == expected


def test_without_both_files_nobody_knows_what_was_deleted(path: Path) -> None:
    fill(path, range(40, 50))
    for file in only_first(path).deleted_files:
        flip(path / "shards" / file.name)
    with pytest.raises(StoreError, match=r"deletions are damaged; run `mmalign repair"):
        versions(open_store(path))
    report = repair(path)
    assert report.lost_rows == 40 - len(GONE)
    assert report.listed_rows == 40
    assert versions(open_store(path)) == dict.fromkeys(ids_of(range(40, 50)), 0)
    assert verify(path) == []


def test_a_reader_of_files_that_a_compaction_removed_is_told_to_open_again(path: Path) -> None:
    before = open_store(path)
    compact(path, now=True)
    with pytest.raises(StoreError, match="deletions are missing .* open it again"):
        _ = before.live


def only_first(path: Path) -> Shard:
    return open_store(path).manifest.shards[0]


def test_a_merged_store_has_them(path: Path, tmp_path: Path) -> None:
    other = tmp_path / "b.store"
    fill(other, range(30, 60), rows_per_shard=40)
    delete(other, ids_of(range(45, 60, 2)))
    merge([path, other], tmp_path / "c.store")
    merged = versions(open_store(tmp_path / "c.store"))
    assert merged.keys() == versions(open_store(path)).keys() | versions(open_store(other)).keys()
    assert verify(tmp_path / "c.store") == []


@pytest.mark.parametrize("count", [13, 15])
def test_files_of_another_shard_are_refused(path: Path, tmp_path: Path, count: int) -> None:
    """Their hashes are right, as whoever wrote them also wrote the group."""
    bad = only(path).with_live(np.arange(40) >= count)
    written = shards.with_deleted_files(path, bad)
    shard = replace(only(path), deleted_files=written.deleted_files)
    with pytest.raises(StoreError, match="deletions are damaged"):
        _ = shard.live


def test_groups_that_mmalign_never_writes_are_refused(path: Path) -> None:
    values = json.loads(render([only(path)]))
    del values["shards"][0]["files"]["deleted-copy"]
    with pytest.raises(StoreError, match="1 files of deletions"):
        parse(json.dumps(values).encode(), path)
    values = json.loads(render([only(path)]))
    values["shards"][0]["deleted"] = "eJxjAAAAAQAB"
    with pytest.raises(StoreError, match="not made by mmalign"):
        parse(json.dumps(values).encode(), path)
