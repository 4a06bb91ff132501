"""Rows out of a store: delete, compact, and what is garbage, with others writing meanwhile."""

import os
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from store_samples import CARD, fill, flip, ids_of, row, versions, write_index

from mmalign import files, open_store
from mmalign.errors import StoreError
from mmalign.store import ModelCard, Writer, changes, compact, delete, delete_rows, garbage, verify
from mmalign.store import manifest as manifests
from mmalign.store.garbage import AGE_S, UNFINISHED_AGE_S
from mmalign.store.groups import Groups, StoredFile


def shards(path: Path) -> list[int]:
    return [s.rows for s in open_store(path).manifest.shards]


def list_files(path: Path) -> list[str]:
    """Names of the files of all shards."""
    return [f.name for s in open_store(path).manifest.shards for f in s.files.values()]


def make_old(path: Path, age_s: float = AGE_S) -> None:
    then = time.time() - age_s - 60
    for inner in [path, *path.rglob("*")]:
        os.utime(inner, (then, then))


def write_meanwhile(monkeypatch: pytest.MonkeyPatch, other: object) -> None:
    """Let somebody else act between the reading of a generation and the claim of the next."""
    claim, others = manifests.files.claim, [other]

    def slow_claim(path: Path, content: bytes) -> bool:
        if others:
            others.pop()()
        return claim(path, content)

    monkeypatch.setattr(manifests.files, "claim", slow_claim)


# ---------------------------------------------------------------- delete


def test_deleted_rows_are_gone_in_one_generation(tmp_path: Path) -> None:
    fill(tmp_path, range(25))
    before = open_store(tmp_path)
    assert delete(tmp_path, ids_of([0, 9, 10, 24, 24])) == 4
    store = open_store(tmp_path)
    assert store.manifest.generation == before.manifest.generation + 1
    assert versions(store) == dict.fromkeys(ids_of(set(range(25)) - {0, 9, 10, 24}), 0)
    assert (len(store), store.manifest.rows, store.manifest.physical_rows) == (21, 21, 25)
    assert store.live is not None
    assert np.flatnonzero(~store.live).tolist() == [0, 9, 10, 24]
    assert len(np.concatenate(store.vectors("image"))) == 25
    assert len(before) == 25
    assert verify(tmp_path) == []


def test_a_deleted_id_can_be_added_again(tmp_path: Path) -> None:
    fill(tmp_path, range(5))
    delete(tmp_path, ids_of([3]))
    fill(tmp_path, [3], version=1)
    assert versions(open_store(tmp_path)) == {f"id{i}": int(i == 3) for i in range(5)}


def test_an_unknown_id_deletes_nothing(tmp_path: Path) -> None:
    fill(tmp_path, range(5))
    delete(tmp_path, ids_of([4]))
    before = open_store(tmp_path).manifest
    with pytest.raises(StoreError, match=r"no row has the id 'id4', 'x'; nothing was deleted"):
        delete(tmp_path, ["id1", "id4", "x"])
    with pytest.raises(StoreError, match=r"'0', '1', '2' and 7 more; nothing"):
        delete(tmp_path, list("0123456789"))
    assert delete(tmp_path, []) == 0
    assert open_store(tmp_path).manifest == before


def test_a_row_that_was_replaced_meanwhile_is_deleted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(tmp_path, range(5))
    write_meanwhile(monkeypatch, lambda: fill(tmp_path, range(3, 9), version=1))
    assert delete(tmp_path, ids_of([4])) == 1
    assert versions(open_store(tmp_path)) == {f"id{i}": int(i >= 3) for i in range(9) if i != 4}


def test_a_row_that_was_deleted_meanwhile_is_added(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(tmp_path, range(5))
    writer = Writer(tmp_path, CARD)
    writer.add(row(4, 1, version=1))
    write_meanwhile(monkeypatch, lambda: delete(tmp_path, ids_of([3, 4])))
    writer.commit()
    assert versions(open_store(tmp_path)) == {"id0": 0, "id1": 0, "id2": 0, "id4": 1}


def test_rows_are_deleted_by_the_numbers_of_an_older_generation(tmp_path: Path) -> None:
    fill(tmp_path, range(25))
    delete(tmp_path, ids_of([2]))
    opened = open_store(tmp_path)
    opened.open_all()
    fill(tmp_path, [3, 30], version=1)
    delete(tmp_path, ids_of([5]))
    compact(tmp_path, rows_per_shard=10)
    # 2 was deleted before, 5 since, 3 replaced; 24 is where it was, or not.
    assert delete_rows(opened, np.array([2, 3, 5, 24])) == 2
    left = set(range(25)) - {2, 3, 5, 24} | {30}
    assert set(open_store(tmp_path).column("id")) == set(ids_of(left))
    assert delete_rows(opened, [5]) == 0


# ---------------------------------------------------------------- compact


def test_compaction_keeps_rows_and_their_order(tmp_path: Path) -> None:
    fill(tmp_path, range(30))
    fill(tmp_path, range(30, 42), rows_per_shard=3)
    delete(tmp_path, ids_of([11, 12, 35]))
    fill(tmp_path, [0, 20], version=1)
    before = open_store(tmp_path)
    columns = ("id", "uri", "captions", "meta", "thumbnail", "stamp", "text_embedding")
    content = [before.column(name) for name in columns]
    report = compact(tmp_path, rows_per_shard=10)
    after = open_store(tmp_path)
    assert [after.column(name) for name in columns] == content
    assert versions(after) == versions(before)
    assert after.live is None
    assert shards(tmp_path) == [9, 10, 10, 10]
    assert (report.rows, report.deleted_rows) == (39, 5)
    assert (report.shards_before, report.shards) == (8, 4)
    assert report.generation == after.manifest.generation == before.manifest.generation + 1
    assert verify(tmp_path) == []


def test_only_worn_shards_are_rewritten(tmp_path: Path) -> None:
    fill(tmp_path, range(30))
    fill(tmp_path, range(30, 33))
    delete(tmp_path, ids_of([15]))
    names = [s.name for s in open_store(tmp_path).manifest.shards]
    report = compact(tmp_path, rows_per_shard=10)
    assert shards(tmp_path) == [10, 9, 10, 3]
    left = [s.name for s in open_store(tmp_path).manifest.shards]
    assert [left[i] == names[i] for i in range(4)] == [True, False, True, True]
    again = compact(tmp_path, rows_per_shard=10)
    assert again.generation == report.generation
    assert again.deleted_rows == 0


def test_a_shard_without_live_rows_goes(tmp_path: Path) -> None:
    fill(tmp_path, range(20))
    delete(tmp_path, ids_of(range(10)))
    compact(tmp_path, rows_per_shard=10)
    assert open_store(tmp_path).column("id") == ids_of(range(10, 20))
    assert shards(tmp_path) == [10]
    delete(tmp_path, ids_of(range(10, 20)))
    compact(tmp_path, rows_per_shard=10)
    assert shards(tmp_path) == []
    fill(tmp_path, range(3))
    assert len(open_store(tmp_path)) == 3


def test_compaction_drops_the_index_only_if_rows_move(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fill(tmp_path, range(20))
    write_index(tmp_path)
    assert not compact(tmp_path, rows_per_shard=10).index_dropped
    assert open_store(tmp_path).manifest.index is not None
    delete(tmp_path, ids_of([3]))
    assert compact(tmp_path, rows_per_shard=10).index_dropped
    assert open_store(tmp_path).manifest.index is None
    assert "the index was removed: build a new one with `mmalign index " in capsys.readouterr().err


def test_what_is_written_while_compacting_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(tmp_path, range(25))
    delete(tmp_path, ids_of([1, 11]))

    def others() -> None:
        fill(tmp_path, [2, 13, 40], version=1)
        delete(tmp_path, ids_of([9, 24]))

    write_meanwhile(monkeypatch, others)
    compact(tmp_path, rows_per_shard=10)
    gone, replaced = {1, 11, 9, 24}, {2, 13, 40}
    wanted = {f"id{i}": int(i in replaced) for i in {*range(25), 40} - gone}
    assert versions(open_store(tmp_path)) == wanted
    assert verify(tmp_path) == []


def test_the_slower_of_two_compactions_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(tmp_path, range(25))
    delete(tmp_path, ids_of([1, 11]))
    before = versions(open_store(tmp_path))
    write_meanwhile(monkeypatch, lambda: compact(tmp_path, rows_per_shard=10))
    with pytest.raises(StoreError, match="another compaction finished first"):
        compact(tmp_path, rows_per_shard=10)
    assert versions(open_store(tmp_path)) == before


def test_damage_is_not_copied(tmp_path: Path) -> None:
    fill(tmp_path, range(20))
    delete(tmp_path, ids_of([3]))
    before = open_store(tmp_path).manifest
    flip(tmp_path / "shards" / before.shards[0].vector_file.name)
    with pytest.raises(
        StoreError, match=r"damaged; run `mmalign verify .*`, then `mmalign repair .*`"
    ):
        compact(tmp_path, rows_per_shard=10)
    assert open_store(tmp_path).manifest == before


def test_compaction_holds_one_shard_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A new shard is written before the next old one is read."""
    fill(tmp_path, range(60))
    delete(tmp_path, ids_of(range(0, 60, 10)))
    read, ahead = [], []
    live_rows, write_tables = changes._live_rows, changes.write_tables

    def reading(store: Path, shard: manifests.Shard, model: ModelCard) -> object:
        read.append(shard.rows)
        return live_rows(store, shard, model)

    def writing(*tables: object, **about: str) -> object:
        ahead.append(sum(read))
        read.clear()
        return write_tables(*tables, **about)

    monkeypatch.setattr(changes, "_live_rows", reading)
    monkeypatch.setattr(changes, "write_tables", writing)
    compact(tmp_path, rows_per_shard=9)
    assert shards(tmp_path) == [9] * 6
    assert max(ahead) <= 10


# ---------------------------------------------------------------- garbage


def test_a_store_at_rest_gives_space_back_when_an_hour_is_over(tmp_path: Path) -> None:
    fill(tmp_path, range(20))
    delete(tmp_path, ids_of([0, 10]))
    old = {f"shards/{p.name}" for p in tmp_path.glob("shards/*")}
    first = compact(tmp_path, rows_per_shard=10)
    assert first.removed == ()
    assert first.waiting_bytes > 2000
    make_old(tmp_path)
    report = compact(tmp_path, rows_per_shard=10)
    assert {name for name in report.removed if not name.startswith("groups/")} == old | {
        f"manifest-{n:08d}.json" for n in range(1, 5)
    }
    assert report.removed_bytes > 2000
    assert report.waiting_bytes == 0
    assert len(manifests.generations(tmp_path)) == 2
    generations = [manifests.read(file) for file in manifests.generations(tmp_path)]
    named = {f.name for m in generations for s in m.shards for f in s.files.values()}
    assert {p.name for p in tmp_path.glob("shards/*")} == named
    assert {p.name[:64] for p in tmp_path.glob("groups/*")} == {
        g for m in generations for g in m.groups
    }
    assert set(open_store(tmp_path).column("id")) == set(ids_of({*range(20)} - {0, 10}))
    assert verify(tmp_path) == []
    # There is nothing left to do, so nothing is done.
    before = sorted(tmp_path.rglob("*"))
    for _ in range(2):
        make_old(tmp_path)
        assert compact(tmp_path, rows_per_shard=10).removed == ()
        assert sorted(tmp_path.rglob("*")) == before


def test_now_leaves_nothing_on_the_disk_of_what_was_deleted(tmp_path: Path) -> None:
    secret = replace(row(3), captions=("a secret", "another"), thumbnail=b"a private picture")
    with Writer(tmp_path, CARD, 10) as writer:
        for one in [row(0), secret, row(1)]:
            writer.add(one)
    write_index(tmp_path)
    delete(tmp_path, ["id3"])

    def on_disk(content: bytes) -> bool:
        return any(content in f.read_bytes() for f in tmp_path.rglob("*") if f.is_file())

    assert compact(tmp_path, rows_per_shard=10).removed == ()
    parts = (b"id3", b"a secret", b"a private picture", secret.uri.encode())
    assert all(map(on_disk, parts))
    report = compact(tmp_path, rows_per_shard=10, now=True)
    assert "index/abc" in report.removed
    assert not any(map(on_disk, parts))
    assert report.waiting_bytes == 0
    assert open_store(tmp_path).column("id") == ["id0", "id1"]
    assert verify(tmp_path) == []


def test_now_leaves_what_is_about_to_be_committed(tmp_path: Path) -> None:
    fill(tmp_path, range(10))
    coming = tmp_path / "shards" / "0123456789abcdef.arrow"
    coming.write_bytes(b"x")
    building = tmp_path / "index" / "begun" / "image.faiss"
    building.parent.mkdir(parents=True)
    building.write_bytes(b"x")
    delete(tmp_path, ids_of([3]))
    assert compact(tmp_path, rows_per_shard=10, now=True).waiting_bytes == 2
    assert coming.exists()
    assert building.exists()


def test_a_writer_whose_base_goes_meanwhile_tries_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the reading of a generation and that of its shards, `compact --now` removes these."""
    fill(tmp_path, range(10))
    delete(tmp_path, ids_of([3]))
    writer = Writer(tmp_path, CARD)
    writer.add(row(4, 1, version=1))
    parse, others = manifests.parse, [1]

    def slow_parse(content: bytes, groups: Groups) -> manifests.Manifest:
        held = parse(content, groups)
        if others:
            others.pop()
            compact(tmp_path, rows_per_shard=10, now=True)
        return held

    monkeypatch.setattr(manifests, "parse", slow_parse)
    writer.commit()
    assert versions(open_store(tmp_path)) == {f"id{i}": int(i == 4) for i in range(10) if i != 3}


def test_a_generation_that_was_just_the_newest_is_kept(tmp_path: Path) -> None:
    fill(tmp_path, range(20))
    make_old(tmp_path)
    reader = open_store(tmp_path)
    delete(tmp_path, ids_of([0, 10]))
    report = compact(tmp_path, rows_per_shard=10)
    assert report.removed == ()
    fill(tmp_path, range(100, 109), rows_per_shard=1)
    assert compact(tmp_path, rows_per_shard=1).removed == ()
    assert len(np.concatenate(reader.vectors("image"))) == 20
    assert delete_rows(reader, [3]) == 1


def test_each_commit_removes_what_only_old_generations_need(tmp_path: Path) -> None:
    fill(tmp_path, range(60), rows_per_shard=1)
    found = manifests.generations(tmp_path)
    assert [manifests.number_of(f) for f in found] == list(range(61, 61 - manifests.KEPT, -1))
    named = {g for file in found for g in manifests.read(file).groups}
    on_disk = {path.name[:64] for path in tmp_path.glob("groups/*")}
    # Those of the generation that went last go with the next commit.
    assert named <= on_disk
    assert len(on_disk - named) <= 1
    assert verify(tmp_path) == []


def test_a_long_compaction_keeps_what_it_has_written_young(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(tmp_path, range(60))
    delete(tmp_path, ids_of([5, 25, 45]))
    write_tables = changes.write_tables

    def half_an_hour_later(*tables: object, **about: str) -> object:
        shard = write_tables(*tables, **about)
        for file in tmp_path.rglob("*"):
            os.utime(file, (file.stat().st_mtime - AGE_S / 2,) * 2)
        garbage.collect(tmp_path)
        return shard

    monkeypatch.setattr(changes, "write_tables", half_an_hour_later)
    make_old(tmp_path)
    compact(tmp_path, rows_per_shard=10)
    assert len(open_store(tmp_path).column("id")) == 57
    assert verify(tmp_path) == []


def test_what_windows_does_not_remove_goes_the_next_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fill(tmp_path, range(20))
    delete(tmp_path, ids_of([3]))
    mapped = tmp_path / "shards" / open_store(tmp_path).manifest.shards[0].row_file.name
    unlink = files.Disk.unlink

    def refusing(disk: files.Disk, path: Path) -> None:
        if path == mapped:
            raise PermissionError(13, "The process cannot access the file", str(path))
        unlink(disk, path)

    with monkeypatch.context() as patch:
        patch.setattr(files.Disk, "unlink", refusing)
        assert compact(tmp_path, rows_per_shard=10, now=True).waiting_bytes
    assert (
        f"{mapped}: cannot be removed now; try again later with `mmalign compact "
        in capsys.readouterr().err
    )
    assert compact(tmp_path, rows_per_shard=10).removed == (f"shards/{mapped.name}",)


def test_two_can_collect_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(tmp_path, range(12), rows_per_shard=1)
    for number in range(3):
        (tmp_path / "shards" / f"{number:016x}.arrow").write_bytes(b"x")
    make_old(tmp_path)
    remove, others = garbage.files.remove, [1, 2]

    def slow_remove(path: Path) -> None:
        if others:
            others.pop()
            compact(tmp_path, rows_per_shard=1)
        remove(path)

    monkeypatch.setattr(garbage.files, "remove", slow_remove)
    compact(tmp_path, rows_per_shard=1)
    assert len(list(tmp_path.glob("shards/*"))) == len(list_files(tmp_path))
    assert verify(tmp_path) == []


def test_what_killed_writers_left_goes_when_it_is_old(tmp_path: Path) -> None:
    fill(tmp_path, range(10))
    kept = write_index(tmp_path, "kept")
    left = [
        tmp_path / "shards" / "0123456789abcdef.arrow",
        tmp_path / "shards" / ".fedcba.arrow.77.tmp",
        tmp_path / ".manifest-00000004.json.77.tmp",
        tmp_path / "index" / "done" / "index.json",
        tmp_path / "index" / "begun" / "image.faiss",
        kept / ".image.faiss.77.tmp",
    ]
    for file in left:
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(b"x")
    assert compact(tmp_path, rows_per_shard=10).removed == ()
    make_old(tmp_path)
    removed = compact(tmp_path, rows_per_shard=10).removed
    wanted = [*left[:3], left[3].parent, left[5]]
    assert sorted(removed) == sorted(str(p.relative_to(tmp_path)) for p in wanted)
    # An index that is being built may be silent for long.
    assert left[4].exists()
    make_old(tmp_path, UNFINISHED_AGE_S)
    removed = compact(tmp_path, rows_per_shard=10).removed
    assert removed == ("index/begun",)
    assert verify(tmp_path) == []
    assert open_store(tmp_path).index_folder == kept


def test_nothing_is_garbage_while_a_generation_cannot_be_read(tmp_path: Path) -> None:
    fill(tmp_path, range(30))
    delete(tmp_path, ids_of([3]))
    make_old(tmp_path)
    flip(manifests.generations(tmp_path)[1])
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(StoreError, match=r"unreadable: .*; first run `mmalign repair .*`"):
        compact(tmp_path, rows_per_shard=10)
    assert sorted(tmp_path.rglob("*")) == before


def test_an_open_reader_outlives_a_compaction(tmp_path: Path) -> None:
    fill(tmp_path, range(20))
    reader, late = open_store(tmp_path), open_store(tmp_path)
    images = np.concatenate(reader.vectors("image"))
    for file in (tmp_path / "shards").iterdir():
        file.unlink()
    assert np.array_equal(np.concatenate(reader.vectors("image")), images)
    with pytest.raises(StoreError, match="compacted since it was opened, open it again"):
        late.vectors("image")


def test_masks_come_back_as_they_went_in() -> None:
    file = StoredFile("x.arrow", 0, "")
    shard = manifests.Shard("x", 21, file, file)
    assert shard.live.all()
    assert shard.with_rows_deleted([]) is shard
    some = shard.with_rows_deleted([0, 20]).with_rows_deleted([7, 20])
    assert some.deleted_rows == 3
    assert np.flatnonzero(~some.live).tolist() == [0, 7, 20]
    assert some.with_live(np.ones(21, bool)) == shard
    assert replace(some, deleted="", deleted_rows=0) == shard
