"""`merge` is killed at every operation of the disk: the new store is whole or not there."""

import os
import random
import shutil
from itertools import count
from pathlib import Path

import pytest
from crash_acts import age
from disk import PowerCut, SimulatedDisk, dies_at, using
from ledger import CARD, Rows, State, observe, row

from mmalign.errors import StoreError, UsageError
from mmalign.store import Writer, add_failures, merge, open_store, verify

FULL = os.environ.get("MMALIGN_CRASH") == "full"
ONE: Rows = {"a0": 1, "a1": 1, "a2": 1, "both": 1}
OTHER: Rows = {"b0": 1, "both": 2, "b1": 1}
MERGED = State({**ONE, **OTHER})


def two_stores(root: Path) -> SimulatedDisk:
    root.mkdir()
    disk = SimulatedDisk(root)
    with using(disk):
        for name, rows in (("a.store", ONE), ("b.store", OTHER)):
            with Writer(root / name, CARD, 3) as writer:
                for one in rows.items():
                    writer.add(row(*one))
            failure = {"id": name, "uri": name, "reason": "torn", "embedded": False}
            add_failures(root / name, [failure])
    return disk


def merged(disk: SimulatedDisk) -> None:
    root = disk.root
    with using(disk):
        merge([root / "a.store", root / "b.store"], root / "c.store")


def bytes_of(path: Path) -> dict[str, bytes]:
    return {str(p.relative_to(path)): p.read_bytes() for p in path.rglob("*") if p.is_file()}


def assert_whole_or_absent(root: Path, sources: list[dict[str, bytes]]) -> bool:
    """Return whether the new store is there."""
    assert [bytes_of(root / name) for name in ("a.store", "b.store")] == sources
    path = root / "c.store"
    if not path.exists():
        with pytest.raises(StoreError, match="not a store: it does not exist"):
            open_store(path)
        return False
    assert observe(path) == MERGED
    assert {failure["uri"] for failure in open_store(path).failures()} == {"a.store", "b.store"}
    assert verify(path) == []
    return True


def assert_it_can_be_done_again(disk: SimulatedDisk, sources: list[dict[str, bytes]]) -> bool:
    """Return whether there is nothing left to do."""
    is_there = assert_whole_or_absent(disk.root, sources)
    if is_there:
        with pytest.raises(UsageError, match="already exists"):
            merged(disk)
    else:
        merged(disk)
    assert assert_whole_or_absent(disk.root, sources)
    return is_there


@pytest.mark.slow
@pytest.mark.parametrize("links", [True, False])
def test_merge_is_killed_anywhere(tmp_path: Path, links: bool) -> None:
    """The process, or the machine with whatever of the unsynced had reached its disk."""
    base = two_stores(tmp_path / "base")
    sources = [bytes_of(base.root / name) for name in ("a.store", "b.store")]
    outcomes = []
    for number in count():
        disk = base.copy(tmp_path / "again")
        disk.links = links
        disk.before = dies_at(number)
        try:
            merged(disk)
            break
        except PowerCut:
            disk.before = SimulatedDisk.nothing
        for rng in (random.Random(number), None)[: 2 if FULL else 1]:
            left = disk.cut(tmp_path / "left", rng)
            left.links = links
            assert_it_can_be_done_again(left, sources)
            shutil.rmtree(tmp_path / "left")
        outcomes.append(assert_it_can_be_done_again(disk, sources))
        shutil.rmtree(tmp_path / "again")
    # It appears at once, and stays.
    assert set(outcomes) == {False, True}
    assert outcomes == sorted(outcomes)


def test_what_a_killed_merge_left_is_removed_a_day_later(tmp_path: Path) -> None:
    disk = two_stores(tmp_path / "base")
    disk.before = dies_at(disk.count + 20)
    with pytest.raises(PowerCut):
        merged(disk)
    disk.before = SimulatedDisk.nothing
    (draft,) = disk.root.glob(".c.store.*.tmp")
    other = disk.root / ".c.storey.0.tmp"
    other.mkdir()
    merged(disk)
    assert draft.exists()
    shutil.rmtree(disk.root / "c.store")
    age(disk.root)
    with using(disk):
        merge([disk.root / "a.store", disk.root / "b.store"], disk.root / "c.store")
    assert not draft.exists()
    assert other.exists()
    assert observe(disk.root / "c.store") == MERGED
