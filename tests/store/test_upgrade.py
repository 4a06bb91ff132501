"""A store of format 2: read as it is, refused for writing, upgraded whole or not at all."""

import errno
import shutil
from itertools import count
from pathlib import Path

import numpy as np
import pytest
from disk import PowerCut, SimulatedDisk, dies_at, fails_at, using
from format2_store import all_columns, write_format2
from store_samples import CARD, fill, flip, ids_of, row, write_index

from mmalign import open_store
from mmalign.errors import StoreError
from mmalign.store import compact, delete, repair, upgrade, verify
from mmalign.store import manifest as manifests

SHARDS = [[row(n, n % 3) for n in range(first, first + 7)] for first in (0, 7, 14)]
GONE = [2, 7, 8, 20]


@pytest.fixture
def old(tmp_path: Path) -> Path:
    path = tmp_path / "old.store"
    write_format2(path, SHARDS, CARD, GONE)
    return path


def expected() -> list[str]:
    return ids_of(n for n in range(21) if n not in GONE)


def test_a_store_of_format_2_is_read(old: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = open_store(old)
    assert store.column("id") == expected()
    assert store.find(["id3", "id7", "id19"]).tolist() == [3, -1, 19]
    images = np.concatenate(store.vectors("image"))
    assert np.allclose(images[3], row(3, 0).vectors["image"][0], atol=1e-3)
    assert store.owners("image").tolist() == list(range(21))
    texts = store.owners("text")
    assert texts.tolist() == [n for n in range(21) for _ in range(n % 3)]
    positions = store.positions("text", np.arange(len(texts)))[:, 0]
    assert positions.tolist() == [c for n in range(21) for c in range(n % 3)]
    assert np.allclose(store.vectors_of("text", 5), row(5, 2).vectors["text"], atol=1e-3)
    assert verify(old) == []
    open_store(old)
    assert capsys.readouterr().err.count("is a store of format 2") == 1


def test_a_store_of_format_2_is_not_written(old: Path) -> None:
    before = {p: p.read_bytes() for p in old.rglob("*") if p.is_file()}
    for act in (lambda: fill(old, [30]), lambda: delete(old, ["id1"]), lambda: compact(old)):
        with pytest.raises(StoreError, match=r"format 2, which is only read; run `mmalign upgrade"):
            act()
    assert {p: p.read_bytes() for p in old.rglob("*") if p.is_file()} == before


def test_an_upgrade_changes_no_row_and_no_vector(old: Path) -> None:
    before = open_store(old)
    before.open_all()
    columns = all_columns(before)
    report = upgrade(old)
    assert (report.format_before, report.shards, report.rows) == (2, 3, 17)
    after = open_store(old)
    assert after.manifest.format == 3
    assert all_columns(after) == columns
    for modality in ("image", "text"):
        one, other = (np.concatenate(s.vectors(modality)) for s in (before, after))
        assert one.tobytes() == other.tobytes()
        assert np.array_equal(before.owners(modality), after.owners(modality))
    assert np.array_equal(before.live, after.live)
    assert verify(old) == []
    again = upgrade(old)
    assert (again.format_before, again.shards, again.generation) == (3, 0, report.generation)
    fill(old, [30])
    assert len(open_store(old)) == 18
    compact(old, rows_per_shard=10, now=True)
    assert not list(old.glob("shards/000000000000000?.arrow"))
    assert open_store(old).column("id") == [*expected(), "id30"]


def test_an_index_outlives_an_upgrade(old: Path) -> None:
    upgrade(old)
    write_index(old)
    assert open_store(old).index_folder is not None
    assert upgrade(old).shards == 0
    assert open_store(old).index_folder is not None


def upgraded_or_as_before(path: Path) -> bool:
    store = open_store(path)
    assert store.column("id") == expected()
    images = np.concatenate(store.vectors("image"))
    assert np.allclose(images[9], row(9, 0).vectors["image"][0], atol=1e-3)
    assert verify(path) == []
    return store.manifest.format == 3


@pytest.mark.slow
def test_an_upgrade_is_killed_at_any_operation(tmp_path: Path) -> None:
    root = tmp_path / "whole"
    root.mkdir()
    write_format2(root / "a.store", SHARDS, CARD, GONE)
    seen = set()
    for number in count():
        disk = SimulatedDisk(root).copy(tmp_path / "disk")
        disk.before = dies_at(number)
        try:
            with using(disk):
                upgrade(disk.root / "a.store")
        except PowerCut:
            disk.before = SimulatedDisk.nothing
            left = disk.cut(tmp_path / "left", None)
            with using(left):
                seen.add(upgraded_or_as_before(left.root / "a.store"))
                upgrade(left.root / "a.store")
                assert upgraded_or_as_before(left.root / "a.store")
            shutil.rmtree(left.root)
            shutil.rmtree(disk.root)
        else:
            break
    assert number > 30
    assert seen == {False, True}


@pytest.mark.slow
def test_a_full_disk_ends_an_upgrade_and_changes_nothing(tmp_path: Path) -> None:
    root = tmp_path / "whole"
    root.mkdir()
    write_format2(root / "a.store", SHARDS, CARD, GONE)
    for number in (0, 7, 20, 33):
        disk = SimulatedDisk(root).copy(tmp_path / "disk")
        disk.before = fails_at(number, errno.ENOSPC, stays=False)
        with using(disk), pytest.raises(OSError):
            upgrade(disk.root / "a.store")
        disk.before = SimulatedDisk.nothing
        assert not upgraded_or_as_before(disk.root / "a.store")
        shutil.rmtree(disk.root)


def test_a_damaged_shard_is_not_copied_but_can_be_repaired(old: Path) -> None:
    flip(old / "shards" / f"{1:016x}.arrow")
    with pytest.raises(StoreError, match=r"0001.arrow: shard damaged; run `mmalign verify"):
        upgrade(old)
    assert open_store(old).manifest.format == 2
    report = repair(old)
    assert report.lost_rows == 5
    assert upgrade(old).shards == 2
    assert open_store(old).column("id") == ids_of(
        n for n in range(21) if n not in GONE and not 7 <= n < 14
    )
    assert verify(old) == []


def test_what_is_added_by_an_earlier_version_meanwhile_is_not_lost(
    old: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    claim, others = manifests.files.claim, [1]

    def slow_claim(path: Path, content: bytes) -> bool:
        if others:
            others.pop()
            other = old.with_name("other.store")
            write_format2(other, [*SHARDS, [row(50, 1)]], CARD, GONE)
            for file in other.glob("shards/*"):
                shutil.copy(file, old / "shards")
            text = manifests.path_of(other, 1).read_text()
            values = {**manifests.json.loads(text), "generation": 2}
            values.pop("sha256")
            values["sha256"] = manifests.hashlib.sha256(manifests.canonical(values)).hexdigest()
            manifests.path_of(old, 2).write_text(manifests.json.dumps(values))
        return claim(path, content)

    monkeypatch.setattr(manifests.files, "claim", slow_claim)
    with pytest.raises(StoreError, match="added during the upgrade; run it again"):
        upgrade(old)
    upgrade(old)
    assert open_store(old).column("id") == [*expected(), "id50"]
