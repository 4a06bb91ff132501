"""Receipts: rows that are written anywhere, and become part of a store once."""

import json
import os
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from store_samples import CARD, fill, ids_of, row, versions

from mmalign.errors import IdentityError, StoreError
from mmalign.store import (
    Committer,
    Receipt,
    commit_receipts,
    compact,
    delete,
    open_store,
    update,
    verify,
    write_rows,
)
from mmalign.store import manifest as manifests


def written(
    path: Path, numbers: Iterable[int], version: int = 0, replaces: Iterable[int] = ()
) -> Receipt:
    """Write rows without committing them."""
    rows = [row(number, number % 3, version) for number in numbers]
    places = [(f"id{number}", f"/pictures/{number}.jpg") for number in replaces]
    return write_rows(path, CARD, rows, precision="float32", replaces=places)


def sent(receipt: Receipt) -> Receipt:
    """Return a receipt as another process would read it."""
    return Receipt.from_json(receipt.to_json())


def test_rows_are_nowhere_until_their_receipt_is_committed(tmp_path: Path) -> None:
    fill(tmp_path, range(5))
    before = open_store(tmp_path).manifest
    receipt = written(tmp_path, range(3, 8), version=1, replaces=[0, 99])
    assert open_store(tmp_path).manifest == before
    after = commit_receipts(tmp_path, [sent(receipt)], CARD)
    assert after.generation == before.generation + 1
    store = open_store(tmp_path)
    assert versions(store) == {f"id{n}": int(n >= 3) for n in range(1, 8)}
    assert store.manifest.shards[-1] == receipt.shards[0]
    assert receipt.shards[0].precision == "float32"
    assert verify(tmp_path) == []


def test_a_receipt_is_the_same_when_it_was_sent(tmp_path: Path) -> None:
    receipt = replace(
        written(tmp_path, range(3)),
        replaces=(("a", "/b"), ("\udcff", "/\udcff.jpg")),
        item="c0ffee00-000001",
        first=10,
        end=14,
        counts={"added": 3, "moved": 1},
        skipped=({"id": "x", "uri": "/\udcff.jpg", "reason": "empty", "count": 1},),
        moved_rows=(7, 9),
    )
    assert sent(receipt) == receipt
    assert sent(Receipt(CARD)) == Receipt(CARD)


def test_no_rows_are_no_shard_and_no_generation(tmp_path: Path) -> None:
    fill(tmp_path, range(2))
    before = open_store(tmp_path).manifest
    receipt = written(tmp_path, [])
    assert receipt.shards == ()
    assert commit_receipts(tmp_path, [receipt], CARD) == before


def test_a_receipt_is_committed_once(tmp_path: Path) -> None:
    fill(tmp_path, range(3))
    receipts = [written(tmp_path, range(2, 6), 1), written(tmp_path, range(6, 9), 1)]
    committer = Committer(tmp_path, CARD)
    after = committer.commit(receipts)
    assert committer.commit(receipts) == after
    assert commit_receipts(tmp_path, [*map(sent, receipts), receipts[0]], CARD) == after
    delete(tmp_path, ["id4"])
    fill(tmp_path, [5], version=2)
    # It brings back neither what was deleted nor what was replaced since.
    again = commit_receipts(tmp_path, receipts, CARD)
    assert again == open_store(tmp_path).manifest
    expected = {"id0": 0, "id1": 0, **{f"id{n}": 1 for n in (2, 3, 6, 7, 8)}, "id5": 2}
    assert versions(open_store(tmp_path)) == expected


def test_a_receipt_is_known_after_its_shards_were_rewritten(tmp_path: Path) -> None:
    receipt = written(tmp_path, range(4))
    commit_receipts(tmp_path, [receipt], CARD)
    update(tmp_path, ["id1"], {"seen": True})
    after = commit_receipts(tmp_path, [receipt], CARD)
    assert after == open_store(tmp_path).manifest
    delete(tmp_path, ["id2"])
    compact(tmp_path)
    assert not {s.name for s in open_store(tmp_path).manifest.shards} & {receipt.shards[0].name}
    commit_receipts(tmp_path, [receipt], CARD)
    assert open_store(tmp_path).column("id") == ["id0", "id1", "id3"]
    # Later its files are gone, and nothing tells it from one whose files were garbage.
    compact(tmp_path, now=True)
    fill(tmp_path, [9])
    with pytest.raises(StoreError, match="was removed before it was committed; run it again"):
        commit_receipts(tmp_path, [receipt], CARD)
    assert open_store(tmp_path).column("id") == ["id0", "id1", "id3", "id9"]


def test_of_one_id_the_last_receipt_counts(tmp_path: Path) -> None:
    fill(tmp_path, range(4))
    receipts = [written(tmp_path, range(n, 6), version=n) for n in (1, 2, 3)]
    commit_receipts(tmp_path, receipts, CARD)
    expected = {"id0": 0, "id1": 1, "id2": 2, "id3": 3, "id4": 3, "id5": 3}
    assert versions(open_store(tmp_path)) == expected
    twice = write_rows(tmp_path, CARD, [row(7, 1, 1), row(8, 2, 1), row(7, 1, 2)])
    commit_receipts(tmp_path, [twice], CARD)
    assert versions(open_store(tmp_path)) == {**expected, "id8": 1, "id7": 2}


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
@pytest.mark.parametrize("at_once", [True, False])
def test_what_one_receipt_replaces_is_not_what_another_adds(
    tmp_path: Path, order: tuple[int, int], at_once: bool
) -> None:
    """A row moves, and its old id goes to another sample, whichever receipt is committed first."""
    fill(tmp_path, range(3))
    other = replace(row(0, 0, 1), uri="/elsewhere/0.jpg")
    both = [written(tmp_path, [5], 1, replaces=[0, 2]), write_rows(tmp_path, CARD, [other])]
    receipts = [both[number] for number in order]
    for part in [receipts] if at_once else [[receipt] for receipt in receipts]:
        commit_receipts(tmp_path, part, CARD)
    assert versions(open_store(tmp_path)) == {"id0": 1, "id1": 0, "id5": 1}


def test_two_committers_take_turns(tmp_path: Path) -> None:
    committers = [Committer(tmp_path, CARD) for _ in range(2)]
    receipts = [written(tmp_path, range(n, n + 2)) for n in range(0, 20, 2)]
    for number, receipt in enumerate(receipts):
        committers[number % 2].commit([receipt])
        committers[1 - number % 2].commit([receipts[number // 2], receipt])
    assert versions(open_store(tmp_path)) == dict.fromkeys(ids_of(range(20)), 0)
    assert open_store(tmp_path).manifest.generation == 11
    assert verify(tmp_path) == []


# ---------------------------------------------------------------- refused


def test_a_receipt_of_another_model_is_refused(tmp_path: Path) -> None:
    fill(tmp_path, range(3))
    before = open_store(tmp_path).manifest
    other = replace(CARD, identity="tiny-4567")
    receipts = [written(tmp_path, [5]), write_rows(tmp_path, other, [row(6)])]
    with pytest.raises(IdentityError, match=r"of nano-0123, the receipt '' those of tiny-4567"):
        commit_receipts(tmp_path, receipts, CARD)
    with pytest.raises(IdentityError, match="use that model, or a new store"):
        commit_receipts(tmp_path, receipts[1:], other)
    assert open_store(tmp_path).manifest == before
    # As many dimensions as the store, or it is not committed, whatever the receipt says.
    wide = replace(CARD, dim=16)
    vectors = {"image": row(7).vectors["image"].repeat(2, axis=1) / 2**0.5}
    receipt = write_rows(tmp_path, wide, [replace(row(7), captions=(), vectors=vectors)])
    with pytest.raises(StoreError, match="wrong columns or dimensions"):
        commit_receipts(tmp_path, [receipt], CARD)
    assert open_store(tmp_path).manifest == before


def test_a_receipt_whose_files_are_gone_is_refused(tmp_path: Path) -> None:
    fill(tmp_path, range(3))
    old, lost = written(tmp_path, [5]), written(tmp_path, [6])
    day_ago = time.time() - 86_400
    for file in old.shards[0].files.values():
        os.utime(tmp_path / "shards" / file.name, (day_ago, day_ago))
    (tmp_path / "shards" / lost.shards[0].vector_file.name).unlink()
    removed = compact(tmp_path).removed
    assert f"shards/{old.shards[0].row_file.name}" in removed
    before = open_store(tmp_path).manifest
    for receipt in (old, lost):
        with pytest.raises(StoreError) as caught:
            commit_receipts(tmp_path, [written(tmp_path, [7]), receipt], CARD)
        assert "was removed before it was committed; run it again" in str(caught.value)
        assert "\n" not in str(caught.value)
        assert open_store(tmp_path).manifest == before


def test_a_file_that_is_being_removed_is_not_committed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(tmp_path, range(3))
    receipt = written(tmp_path, [5])
    announced = sorted(manifests.names_of(receipt.shards))
    manifests.commit(tmp_path, lambda base: replace(base, removing=tuple(announced)), CARD)
    with pytest.raises(StoreError, match="was removed before it was committed"):
        commit_receipts(tmp_path, [receipt], CARD)


def _shard(**values: Any) -> Callable[[dict[str, Any]], object]:
    return lambda held: held["shards"][0].update(values)


def _file(place: int, value: Any) -> Callable[[dict[str, Any]], object]:
    return lambda held: held["shards"][0]["files"]["rows"].__setitem__(place, value)


HOSTILE: dict[str, Callable[[dict[str, Any]], object]] = {
    "a file elsewhere": _file(0, "../../home/id_rsa.arrow"),
    "a hash that is none": _file(2, "x"),
    "rows without end": _shard(rows=10**15),
    "a shard elsewhere": _shard(name="../x"),
    "deleted rows": _shard(deleted_rows=1, deleted="eJz7DwABAQEA"),
    "a shard twice": lambda held: held["shards"].append(held["shards"][0]),
    "no shards": lambda held: held.pop("shards"),
    "no model": lambda held: held.pop("model"),
    "a model that is a number": lambda held: held.update(model=1),
    "an item that is a list": lambda held: held.update(item=[]),
    "ids that are numbers": lambda held: held.update(replaces=[[1, "x"]]),
    "ids without a uri": lambda held: held.update(replaces=[["id1"]]),
    "a range that goes back": lambda held: held.update(range=[2, 1]),
    "a range of one": lambda held: held.update(range=[2]),
    "a count that is a text": lambda held: held.update(counts={"added": "1"}),
    "a skipped sample of lists": lambda held: held.update(skipped=[{"id": []}]),
    "a skipped sample that is a text": lambda held: held.update(skipped=["x"]),
    "rows below zero": lambda held: held.update(moved_rows=[-1]),
}


@pytest.mark.parametrize("change", HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_receipt_is_refused_in_one_line(
    tmp_path: Path, change: Callable[[dict[str, Any]], object]
) -> None:
    values = json.loads(written(tmp_path, range(8)).to_json())
    change(values)
    with pytest.raises(StoreError, match="receipt not made by mmalign") as caught:
        Receipt.from_json(json.dumps(values))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "1", "[" * 100_000, '{"shards":[]}'])
def test_what_is_no_receipt_is_refused(text: str) -> None:
    with pytest.raises(StoreError, match="receipt not made by mmalign"):
        Receipt.from_json(text)
