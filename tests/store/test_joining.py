"""Small shards at the end of a store are joined, behind the index and under the eyes of readers."""

import os
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from store_samples import CARD, fill, flip, ids_of, row, versions

from mmalign import files
from mmalign.errors import StoreError
from mmalign.store import (
    NextSpace,
    Writer,
    changes,
    commit_index,
    commit_receipts,
    compact,
    delete,
    join_small_shards,
    open_store,
    verify,
    write_rows,
)
from mmalign.store import manifest as manifests
from mmalign.store.groups import Shard, StoredFile


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    """A shard is small below 20 rows, and full with 40."""
    monkeypatch.setattr(changes, "SMALL_SHARD", 20)
    monkeypatch.setattr(changes, "ROWS_PER_SHARD", 40)
    monkeypatch.setattr(changes, "MOST_ROWS_JOINED", 200)


def sizes(path: Path) -> list[int]:
    return [shard.rows for shard in open_store(path).manifest.shards]


def index(path: Path, name: str = "abc") -> None:
    """Commit an index of all shards."""
    shards = tuple(shard.name for shard in open_store(path).manifest.shards)
    files.make_folder(path / "index" / name)
    files.write_json(path / "index" / name / "index.json", {"shards": shards})
    commit_index(path, name, shards, CARD.identity)


def add(path: Path, first: int, *counts: int, version: int = 0) -> int:
    """Commit shards of so many rows; return the next number."""
    for count in counts:
        fill(path, range(first, first + count), version=version)
        first += count
    return first


def test_days_of_few_rows_become_few_shards(tmp_path: Path) -> None:
    """And each row is rewritten a few times, however many days there are."""
    written = 0
    for day in range(70):
        add(tmp_path, 2 * day, 2)
        before = {shard.name for shard in open_store(tmp_path).manifest.shards}
        join_small_shards(tmp_path)
        shards = open_store(tmp_path).manifest.shards
        written += sum(shard.rows for shard in shards if shard.name not in before)
        assert len(shards) <= 2 * day / 20 + 2 + changes.FEWEST_JOINED
    assert written < 3 * 140
    store = open_store(tmp_path)
    assert store.column("id") == ids_of(range(140))
    assert versions(store) == dict.fromkeys(ids_of(range(140)), 0)
    assert verify(tmp_path) == []


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ([2] * 7, [2] * 7),
        ([2] * 8, [16]),
        ([40, *[2] * 8], [40, 16]),
        # Larger than all behind it.
        ([17, *[2] * 8], [17, 16]),
        ([16, *[2] * 8], [32]),
        ([16, *[2] * 7], [16, *[2] * 7]),
        # The last ones differ in size, and are joined.
        ([3, 1, 4, 1, 5, 9, 2, 6], [31]),
        ([19] * 8, [38] * 4),
        ([2] * 9 + [25], [2] * 9 + [25]),
        # No more rows than so many at once.
        ([10] * 25, [10] * 5 + [40] * 5),
    ],
)
def test_which_shards_are_joined(tmp_path: Path, before: list[int], after: list[int]) -> None:
    stored = StoredFile("x.arrow", 1, "0" * 64)
    shards = tuple(Shard(f"s{n}", rows, stored, stored) for n, rows in enumerate(before))
    joined = changes._small_at_the_end(shards)
    rows = sum(shard.rows for shard in joined)
    new = np.diff(np.linspace(0, rows, -(-rows // 40) + 1).astype(int)).tolist()
    assert joined == shards[len(shards) - len(joined) :]
    assert before[: len(shards) - len(joined)] + new == after


def test_rows_keep_everything_but_deleted_ones_their_place(tmp_path: Path) -> None:
    add(tmp_path, 0, *[2] * 9)
    add(tmp_path, 4, 1, version=1)
    delete(tmp_path, ["id7"])
    before = open_store(tmp_path)
    wanted = {name: before.column(name) for name in before.columns}
    assert join_small_shards(tmp_path) == 10
    after = open_store(tmp_path)
    assert sizes(tmp_path) == [17]
    for name in before.columns:
        assert str(after.column(name)) == str(wanted[name])
    # The reader of before goes on, also with files that it had not opened.
    assert versions(before) == versions(after)
    assert before.manifest.physical_rows == 19
    assert join_small_shards(tmp_path) == 0
    assert verify(tmp_path) == []


def test_only_shards_behind_the_index_are_joined(tmp_path: Path) -> None:
    add(tmp_path, 0, *[2] * 9)
    index(tmp_path)
    indexed = open_store(tmp_path).manifest
    assert join_small_shards(tmp_path) == 0
    add(tmp_path, 18, *[2] * 8)
    assert join_small_shards(tmp_path) == 8
    now = open_store(tmp_path).manifest
    assert now.index == indexed.index is not None
    assert now.shards[:9] == indexed.shards
    assert sizes(tmp_path) == [*[2] * 9, 16]
    # One that cannot be read may cover all.
    add(tmp_path, 34, *[2] * 8)
    flip(tmp_path / "index" / "abc" / "index.json")
    assert join_small_shards(tmp_path) == 0


def test_nothing_is_joined_while_an_index_is_built(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add(tmp_path, 0, *[2] * 8)
    before = sizes(tmp_path)
    building = tmp_path / "index" / "def"
    building.mkdir(parents=True)
    assert join_small_shards(tmp_path) == 0
    # Its builder was killed.
    day_ago = time.time() - 86_401
    os.utime(building, (day_ago, day_ago))
    rewrite = changes._rewrite

    def while_an_index_is_built(*args: object) -> object:
        index(tmp_path)
        return rewrite(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(changes, "_rewrite", while_an_index_is_built)
    with pytest.raises(StoreError, match="an index was built meanwhile"):
        join_small_shards(tmp_path)
    assert sizes(tmp_path) == before
    assert open_store(tmp_path).manifest.index is not None


def test_what_others_do_meanwhile_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    add(tmp_path, 0, *[2] * 8)
    rewrite = changes._rewrite

    def meanwhile(*args: object) -> object:
        monkeypatch.setattr(changes, "_rewrite", rewrite)
        delete(tmp_path, ["id3"])
        add(tmp_path, 5, 1, version=1)
        add(tmp_path, 16, 3)
        return rewrite(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(changes, "_rewrite", meanwhile)
    assert join_small_shards(tmp_path) == 8
    expected = {f"id{n}": int(n == 5) for n in range(19) if n != 3}
    assert versions(open_store(tmp_path)) == expected
    assert sizes(tmp_path) == [16, 1, 3]
    # Another one that joins the same shards finishes first.
    add(tmp_path, 19, *[2] * 8)

    def another(*args: object) -> object:
        monkeypatch.setattr(changes, "_rewrite", rewrite)
        join_small_shards(tmp_path)
        return rewrite(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(changes, "_rewrite", another)
    with pytest.raises(StoreError, match="another compaction finished first"):
        join_small_shards(tmp_path)
    assert len(open_store(tmp_path)) == 34
    assert verify(tmp_path) == []


def test_damage_is_not_copied(tmp_path: Path) -> None:
    add(tmp_path, 0, *[2] * 8)
    before = open_store(tmp_path).manifest
    flip(tmp_path / "shards" / before.shards[3].vector_file.name)
    with pytest.raises(StoreError, match="mmalign repair"):
        join_small_shards(tmp_path)
    assert open_store(tmp_path).manifest == before


def test_shards_of_two_precisions_are_not_joined(tmp_path: Path) -> None:
    for number in range(12):
        with Writer(tmp_path, CARD, precision="int8" if number < 6 else "float32") as writer:
            writer.add(row(number, number % 3))
    assert join_small_shards(tmp_path) == 0
    add_one = write_rows(tmp_path, CARD, [row(12, 0), row(13, 1)], precision="float32")
    more = [write_rows(tmp_path, CARD, [row(14, 2)], precision="float32")]
    commit_receipts(tmp_path, [add_one, *more], CARD)
    assert join_small_shards(tmp_path) == 8
    shards = open_store(tmp_path).manifest.shards
    assert [s.precision for s in shards] == [*["int8"] * 6, "float32"]


def test_what_was_joined_leaves_the_disk_a_day_later(tmp_path: Path) -> None:
    add(tmp_path, 0, *[2] * 8)
    old = open_store(tmp_path).manifest
    assert join_small_shards(tmp_path) == 8
    first = add(tmp_path, 16, *[2] * 8)
    named = sorted(manifests.names_of(old.shards))
    for hours, are_there in ((2, True), (25, False)):
        for name in named:
            (path,) = manifests.paths_of(tmp_path, name)
            os.utime(path, (time.time() - hours * 3600,) * 2)
        assert join_small_shards(tmp_path) > 0
        assert [manifests.is_there(tmp_path, name) for name in named] == [are_there] * len(named)
        first = add(tmp_path, first, *[2] * 16)
    assert versions(open_store(tmp_path)) == dict.fromkeys(ids_of(range(first)), 0)
    assert verify(tmp_path) == []


def test_a_receipt_of_joined_rows_is_not_committed_again(tmp_path: Path) -> None:
    receipts = [write_rows(tmp_path, CARD, [row(n, n % 3)]) for n in range(8)]
    commit_receipts(tmp_path, receipts, CARD)
    assert join_small_shards(tmp_path) == 8
    commit_receipts(tmp_path, receipts, CARD)
    assert sizes(tmp_path) == [8]


def test_compaction_and_joining_go_together(tmp_path: Path) -> None:
    add(tmp_path, 0, *[2] * 20)
    join_small_shards(tmp_path)
    report = compact(tmp_path, 40)
    assert sizes(tmp_path) == [40]
    assert report.rows == 40


def test_nothing_is_joined_while_another_model_is_built(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add(tmp_path, 0, *[2] * 8)
    before = sizes(tmp_path)
    new = NextSpace(tmp_path, replace(CARD, identity="tiny-4567"))
    rewrite = changes._rewrite

    def while_it_begins(*args: object) -> object:
        new.begin()
        return rewrite(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(changes, "_rewrite", while_it_begins)
    with pytest.raises(StoreError, match="another model was begun meanwhile"):
        join_small_shards(tmp_path)
    assert join_small_shards(tmp_path) == 0
    assert sizes(tmp_path) == before
