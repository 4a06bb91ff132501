"""Two committers and the same receipts, interleaved at every operation of the disk."""

import shutil
from itertools import count
from pathlib import Path

import pytest
from crash_acts import Life, age, born, with_received, written
from disk import PowerCut, SimulatedDisk, dies_at, using
from ledger import CARD, State, observe

from mmalign.errors import StoreError
from mmalign.store import Receipt, commit_receipts, compact, verify
from mmalign.store import manifest as manifests


def prepared(root: Path) -> tuple[Life, State, list[str]]:
    """A store, what it will hold, and receipts for that."""
    life = born(root, "receive")
    with using(life.disk):
        receipts = [written(life, {"f0": 2, "a2": 3}, {"e1": 1}), written(life, {"a2": 4, "f1": 1})]
    return life, with_received(life.ledger), [receipt.to_json() for receipt in receipts]


def commit(life: Life, receipts: list[str]) -> None:
    commit_receipts(life.path, [Receipt.from_json(receipt) for receipt in receipts], CARD)


class _Other:
    """Commits one of the receipts before an operation, and all of them before the next; final."""

    def __init__(self, life: Life, number: int, receipts: list[str]) -> None:
        self.life, self.number = life, number
        self.turns = iter([receipts[:1], receipts])

    def __call__(self, number: int, operation: str, path: Path) -> None:
        part = next(self.turns, None) if number >= self.number else None
        if part:
            commit(self.life, part)


@pytest.mark.slow
def test_another_commits_the_same_receipts_in_between(tmp_path: Path) -> None:
    """Each row is there once, and no receipt twice."""
    base, after, receipts = prepared(tmp_path / "life")
    for number in count():
        life = base.copy(tmp_path / "again")
        other = _Other(life, number, receipts)
        life.disk.before = other
        with using(life.disk):
            commit(life, receipts)
        life.disk.before = SimulatedDisk.nothing
        assert observe(life.path) == after
        names = [shard.name for r in receipts for shard in Receipt.from_json(r).shards]
        held = [shard.name for shard in manifests.newest(life.path).shards]
        assert sorted(held[-2:]) == sorted(names)
        assert verify(life.path) == []
        shutil.rmtree(tmp_path / "again")
        if next(other.turns, None) == receipts[:1]:
            break
    assert number


@pytest.mark.slow
def test_a_committer_dies_and_another_commits_the_same_receipts(tmp_path: Path) -> None:
    base, after, receipts = prepared(tmp_path / "life")
    for number in count():
        life = base.copy(tmp_path / "again")
        life.disk.before = dies_at(number)
        try:
            with using(life.disk):
                commit(life, receipts)
            break
        except PowerCut:
            life.disk.before = SimulatedDisk.nothing
        assert observe(life.path) in (base.ledger.state, after)
        with using(life.disk):
            commit(life, receipts)
        left = life.disk.cut(tmp_path / "left", None)
        path = Life(left, life.ledger).path
        assert observe(path) == after
        assert verify(path) == []
        shutil.rmtree(tmp_path / "again")
        shutil.rmtree(tmp_path / "left")
    assert number


def test_receipts_that_nobody_commits_are_garbage_a_day_later(tmp_path: Path) -> None:
    life, _, receipts = prepared(tmp_path / "life")
    with using(life.disk):
        before = observe(life.path)
        held = set((life.path / "shards").iterdir())
        age(life.path)
        compact(life.path)
        assert len(held - set((life.path / "shards").iterdir())) >= 6
        with pytest.raises(StoreError, match="was removed before it was committed"):
            commit(life, receipts)
    assert observe(life.path).rows == before.rows
    assert verify(life.path) == []
