"""Work items: encoded in one pipeline or each on its own, they give the same store."""

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import jpeg
from stub_encoder import StubEncoder, use_stub

from mmalign.data import Record, SpilledRecords
from mmalign.embedding import embed as embedding
from mmalign.embedding import work
from mmalign.embedding.changes import ChangeSet, ScanOptions, find_changes
from mmalign.embedding.stored import StoredRows
from mmalign.embedding.work import WorkItem, encode, slices
from mmalign.encoding.modalities import model_card
from mmalign.errors import DataError, IdentityError, StoreError
from mmalign.store import (
    Committer,
    Receipt,
    Store,
    commit_receipts,
    open_or_new,
    open_store,
    verify,
)

WORKER = Path(__file__).parents[1] / "helpers" / "encode_worker.py"
STUB: Any = StubEncoder()
CARD = model_card(STUB)


@pytest.fixture(autouse=True)
def _stub(monkeypatch: pytest.MonkeyPatch) -> None:
    use_stub(monkeypatch)


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """A folder of 23 pictures with captions and metadata, two of which cannot be read."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number in range(23):
        write(folder, number, jpeg(number))
    write(folder, 7, b"no image")
    write(folder, 22, b"")
    return folder


def write(folder: Path, number: int, content: bytes, **beside: Any) -> None:
    (folder / f"{number:02d}.jpg").write_bytes(content)
    words = {"captions": [f"picture {number}", "图片"], "number": number, "of": {"x": [1.5, None]}}
    (folder / f"{number:02d}.json").write_text(json.dumps(words | beside))


@contextmanager
def scanned(store: Path, *sources: Path) -> Iterator[ChangeSet]:
    opened = open_or_new(store, CARD)
    with SpilledRecords() as spilled:
        yield find_changes(opened, ScanOptions([str(source) for source in sources]), spilled)


def embed(store: Path, *sources: Path) -> embedding.EmbedReport:
    return embedding.embed("stub", [str(source) for source in sources], store)


def content(path: Path) -> dict[str, list[Any]]:
    """Everything of each live row, by id; vectors as their bytes."""
    store = open_store(path)
    assert verify(path) == []
    columns = [_values(store, name) for name in store.columns]
    rows = {values[0]: list(values[1:]) for values in zip(*columns, strict=True)}
    assert len(rows) == len(store)
    return rows


def _values(store: Store, name: str) -> list[Any]:
    return [
        np.asarray(value, np.float16).tobytes() if name.endswith("_embedding") else value
        for value in store.column(name)
    ]


def sent(item: WorkItem) -> WorkItem:
    return WorkItem.from_json(item.to_json())


def test_items_hold_all_of_a_scan_and_are_the_same_when_sent(
    pictures: Path, tmp_path: Path
) -> None:
    with scanned(tmp_path / "a.store", pictures) as changes:
        items = list(slices(changes, most=10))
        assert [len(item.records) for item in items] == [10, 10, 3]
        assert [r for item in items for r in item.records] == list(changes.records)
    assert [sent(item) for item in items] == items
    assert len({item.name for item in items}) == 3
    record = items[0].records[1]
    assert record.captions == ("picture 1", "图片")
    assert record.meta == {"number": 1, "of": {"x": [1.5, None]}}
    assert record.stamp


def test_names_that_are_no_utf8_are_the_same_when_sent(pictures: Path, tmp_path: Path) -> None:
    with scanned(tmp_path / "a.store", pictures) as changes:
        (item,) = slices(changes)
    odd = Record(
        id="\udcff", uri="/\udcff.jpg", path="/\udcff.jpg", captions=("a",), stamp=2**64 - 1
    )
    item = replace(item, records=(odd,))
    assert sent(item) == item


def change(folder: Path) -> None:
    """New files, changed ones, moved ones, other captions; one is unchanged but for its time."""
    for number in range(30, 34):
        write(folder, number, jpeg(number))
    write(folder, 3, jpeg(103))
    write(folder, 4, jpeg(4), captions=["another"])
    (folder / "deep").mkdir()
    for number in (9, 15):
        for ending in ("jpg", "json"):
            name = f"{number:02d}.{ending}"
            (folder / name).rename(folder / "deep" / name)
    (folder / "11.jpg").write_bytes(jpeg(11))


def test_items_sent_to_another_process_give_the_same_store(pictures: Path, tmp_path: Path) -> None:
    """The same rows, bit by bit, whatever the order in which their receipts are committed."""
    one, other = tmp_path / "one.store", tmp_path / "other.store"
    reports = []
    for _ in range(2):
        reports.append(embed(one, pictures))
        with scanned(other, pictures) as changes:
            items = list(slices(changes, most=6))
        files = [tmp_path / f"{item.name}.json" for item in items]
        for item, file in zip(items, files, strict=True):
            file.write_text(item.to_json())
        call = [sys.executable, WORKER, other, *files[::-1]]
        subprocess.run(list(map(str, call)), check=True)
        lines = [
            line for f in files for line in f.with_suffix(".receipts").read_text().splitlines()
        ]
        receipts = list(map(Receipt.from_json, lines))
        for receipt in receipts[::-1]:
            commit_receipts(other, [receipt], CARD)
        assert content(other) == content(one)
        read = sum(receipt.end - receipt.first for receipt in receipts)
        counts = {
            n: sum(r.counts.get(n, 0) for r in receipts) for n in ("added", "changed", "moved")
        }
        report = reports[-1]
        assert counts == {"added": report.added, "changed": report.changed, "moved": report.moved}
        assert read == report.read
        assert sum(len(receipt.skipped) for receipt in receipts) == report.failed == 2
        if len(reports) == 1:
            change(pictures)
    assert (reports[1].added, reports[1].changed, reports[1].moved) == (4, 4, 2)


def test_one_pipeline_encodes_all_items(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Batches go over the borders of items; a receipt covers the records of one."""
    sizes = []
    encode_images = StubEncoder.encode_images
    monkeypatch.setattr(
        StubEncoder, "encode_images", lambda self, p: sizes.append(len(p)) or encode_images(self, p)
    )
    path = tmp_path / "a.store"
    with scanned(path, pictures) as changes:
        items = list(slices(changes, most=4))
        seen: list[int] = []
        receipts = list(
            encode(items, changes.stored, STUB, progress=lambda done, busy: seen.append(done))
        )
    assert max(sizes) > 4
    assert sum(seen) == 23
    assert [(r.item, r.first, r.end) for r in receipts] == [
        (item.name, 0, len(item.records)) for item in items
    ]
    assert [len(r.skipped) for r in receipts] == [0, 1, 0, 0, 0, 1]
    assert [sum(s.rows for s in r.shards) for r in receipts] == [4, 3, 4, 4, 4, 2]
    assert sum(r.counts.get("encoded", 0) for r in receipts) == 21
    commit_receipts(path, receipts, CARD)
    embed(tmp_path / "b.store", pictures)
    assert content(path) == content(tmp_path / "b.store")
    assert list(content(path)) == list(content(tmp_path / "b.store"))


def test_receipts_come_from_time_to_time(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(work, "COMMIT_SECONDS", -1.0)
    with scanned(tmp_path / "a.store", pictures) as changes:
        receipts = list(encode(slices(changes), changes.stored, STUB))
    assert len(receipts) > 1
    ends = [(receipt.first, receipt.end) for receipt in receipts]
    assert [first for first, _ in ends] == [0, *(end for _, end in ends[:-1])]
    assert ends[-1][1] == 23
    commit_receipts(tmp_path / "a.store", receipts, CARD)
    embed(tmp_path / "b.store", pictures)
    assert content(tmp_path / "a.store") == content(tmp_path / "b.store")


def test_copies_in_a_folder_that_moved_keep_their_rows(tmp_path: Path) -> None:
    """Also if each is encoded on its own, and whichever is committed first."""
    folder = tmp_path / "old" / "pictures"
    folder.mkdir(parents=True)
    for number in range(6):
        write(folder, number, jpeg(number % 2))
    for name in ("one", "other"):
        embed(tmp_path / f"{name}.store", folder)
    ids = open_store(tmp_path / "one.store").column("id")
    moved = tmp_path / "new" / "pictures"
    moved.parent.mkdir()
    folder.rename(moved)
    report = embed(tmp_path / "one.store", moved)
    assert (report.changed, report.moved, report.rows) == (6, 6, 6)
    with scanned(tmp_path / "other.store", moved) as changes:
        items = list(slices(changes, most=1))
        receipts = [receipt for i in items for receipt in encode([i], changes.stored, STUB)]
    for receipt in receipts[::-1]:
        commit_receipts(tmp_path / "other.store", [receipt], CARD)
    assert content(tmp_path / "one.store") == content(tmp_path / "other.store")
    assert open_store(tmp_path / "one.store").column("id") == ids


def _interrupted(then: Callable[..., Any], turn: int) -> Callable[..., Any]:
    """Return a function that is interrupted at the end of one of its calls."""
    calls = count()

    def call(*args: Any, **options: Any) -> Any:
        result = then(*args, **options)
        if next(calls) == turn:
            raise KeyboardInterrupt
        return result

    return call


@pytest.mark.parametrize("turn", range(3))
@pytest.mark.parametrize(
    ("owner", "name"), [(work, "_row"), (work, "write_rows"), (Committer, "commit")]
)
def test_ctrl_c_keeps_what_was_encoded(
    pictures: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    owner: Any,
    name: str,
    turn: int,
) -> None:
    """In the middle of a batch, of writing a shard, or of a commit."""
    monkeypatch.setattr("mmalign.encoding.pipeline.CPU_BATCH", 4)
    monkeypatch.setattr(work, "COMMIT_SECONDS", -1.0)
    path = tmp_path / "a.store"
    turn = 8 * turn + 2 if name == "_row" else turn
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, _interrupted(getattr(owner, name), turn))
        with pytest.raises(KeyboardInterrupt):
            embed(path, pictures)
    assert verify(path) == []
    # Of the batches that were encoded, only the row in the making may be missing.
    held = len(open_store(path))
    assert held == turn if name == "_row" else held >= 4 * turn + 3
    report = embed(path, pictures)
    assert (report.present, report.added, report.failed) == (held, 21 - held, 2)
    embed(tmp_path / "b.store", pictures)
    assert content(path) == content(tmp_path / "b.store")


# ---------------------------------------------------------------- refused


def test_an_item_of_another_store_or_generation_is_refused(pictures: Path, tmp_path: Path) -> None:
    path = tmp_path / "a.store"
    with scanned(path, pictures) as changes:
        items = list(slices(changes, most=10))
        stored = changes.stored
        with pytest.raises(IdentityError, match="is for tiny-1"):
            next(encode([replace(items[0], model="tiny-1")], stored, STUB))
        for wrong in (
            replace(items[1], thumbnails=False),
            replace(items[1], generation=3),
            replace(items[1], scanned=replace(items[1].scanned, seen=b"\0")),
        ):
            with pytest.raises(DataError, match="are of two scans"):
                list(encode([items[0], wrong], stored, STUB))
    embed(path, pictures)
    later = StoredRows(open_store(path))
    with pytest.raises(StoreError, match=r"cut against generation 0, not 2: open that one"):
        next(encode(items, later, STUB))
    with pytest.raises(StoreError, match="scan the sources again"):
        next(encode([replace(items[0], generation=2)], later, STUB))
    other: Any = StubEncoder()
    other.identity = other.space = "other"
    other.tower_identity = lambda modality: "other"
    with pytest.raises(IdentityError, match="the model is other"):
        next(encode(items, stored, other))


def _record(**values: Any) -> Callable[[dict[str, Any]], object]:
    return lambda held: held["records"][0].update(values)


HOSTILE: dict[str, Callable[[dict[str, Any]], object]] = {
    "a name elsewhere": lambda held: held.update(name="../x"),
    "a generation below zero": lambda held: held.update(generation=-1),
    "a generation that is a text": lambda held: held.update(generation="1"),
    "no model": lambda held: held.pop("model"),
    "thumbnails by number": lambda held: held.update(thumbnails=1),
    "rows that are no base64": lambda held: held.update(seen="é"),
    "rows that are not compressed": lambda held: held.update(seen="AAAA"),
    "locations of no kind": lambda held: held.update(locations={"x": []}),
    "locations that are numbers": lambda held: held["locations"].update(scanned=[1]),
    "no records": lambda held: held.pop("records"),
    "a record of no fields": lambda held: held.update(records=[{}]),
    "a record of unknown fields": _record(colour="red"),
    "a path that is a number": _record(path=1),
    "an offset that is a text": _record(offset="0"),
    "captions of numbers": _record(captions=[1]),
    "metadata that is a list": _record(meta=[]),
    "a truth for a number": _record(stamp=True),
}


@pytest.mark.parametrize("change", HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_item_is_refused_in_one_line(
    pictures: Path, tmp_path: Path, change: Callable[[dict[str, Any]], object]
) -> None:
    with scanned(tmp_path / "a.store", pictures) as changes:
        (item,) = slices(changes)
    values = json.loads(item.to_json())
    change(values)
    with pytest.raises(DataError, match="work item not made by mmalign") as caught:
        WorkItem.from_json(json.dumps(values))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["", "[]", "null", "[" * 100_000])
def test_what_is_no_item_is_refused(text: str) -> None:
    with pytest.raises(DataError, match="work item not made by mmalign"):
        WorkItem.from_json(text)
