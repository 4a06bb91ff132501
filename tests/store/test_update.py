"""Metadata changed in place: one generation, only files of rows, nothing lost of what others do."""

import json
import random
import shutil
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from disk import PowerCut, SimulatedDisk, dies_at, using
from format2_store import write_format2
from small_store import CARD, fill, row
from store_samples import flip, write_index

from mmalign import open_store
from mmalign.errors import StoreError, UsageError
from mmalign.store import (
    Store,
    compact,
    delete,
    manifest,
    repair,
    update,
    update_rows,
    upgrade,
    verify,
)
from mmalign.store.where import where


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """25 rows in three shards."""
    place = tmp_path / "s.store"
    fill(place, (row(n, label="draft", price=n, place={"city": "Bern"}) for n in range(25)))
    return place


def metas(path: Path) -> dict[str, dict[str, Any]]:
    store = open_store(path)
    texts = zip(store.column("id"), store.column("meta"), strict=True)
    return {name: json.loads(text) for name, text in texts}


def everything_else(store: Store) -> list[list[Any]]:
    return [store.column(name) for name in store.columns if name != "meta"]


def meanwhile(monkeypatch: pytest.MonkeyPatch, other: Any) -> None:
    """Let somebody else act between the reading of a generation and the claim of the next."""
    claim, others = manifest.files.claim, [other]

    def slow_claim(place: Path, content: bytes) -> bool:
        if others:
            others.pop()()
        return claim(place, content)

    monkeypatch.setattr(manifest.files, "claim", slow_claim)


def test_an_update_sets_fields_of_chosen_rows_and_changes_nothing_else(path: Path) -> None:
    delete(path, ["id3"])
    write_index(path)
    before, metas_before = open_store(path), metas(path)
    others = everything_else(before)
    report = update(path, ["id4", "id11", "id4"], {"label": "dress", "tags": ["a", 1.5, True]})
    assert (report.rows, report.shards) == (2, 2)
    assert report.generation == before.manifest.generation + 1
    after = open_store(path)
    new = {"label": "dress", "tags": ["a", 1.5, True]}
    wanted = {i: m | new if i in ("id4", "id11") else m for i, m in metas_before.items()}
    assert metas(path) == wanted
    assert everything_else(after) == others
    assert after.index_folder == before.index_folder
    assert verify(path) == []
    assert after.find(["id4", "id3"]).tolist() == [4, -1]
    pairs = list(zip(before.manifest.shards, after.manifest.shards, strict=True))
    assert [old.row_file != new.row_file for old, new in pairs] == [True, True, False]
    assert [old.vector_file == new.vector_file for old, new in pairs] == [True] * 3
    assert [old.thumbnail_file == new.thumbnail_file for old, new in pairs] == [True] * 3
    assert pairs[0][1].row_file.name.startswith(f"{pairs[0][1].name}-rows-")


def test_null_removes_a_field_and_tables_are_merged(path: Path) -> None:
    update(path, ["id1"], {"label": None, "place": {"street": "Aare", "city": None}, "none": None})
    assert metas(path)["id1"] == {"price": 1, "place": {"street": "Aare"}}
    update(path, ["id1"], {"price": {"chf": 3}, "place": 5})
    assert metas(path)["id1"] == {"price": {"chf": 3}, "place": 5}


def test_equal_values_make_no_generation(path: Path) -> None:
    before = open_store(path).manifest
    report = update(path, ["id1", "id12"], {"label": "draft", "absent": None})
    assert (report.rows, report.shards, report.generation) == (0, 0, before.generation)
    assert update(path, [], {"label": "x"}).rows == 0
    assert open_store(path).manifest == before
    assert len(list((path / "shards").iterdir())) == 9
    # In Python 1 equals true.
    assert update(path, ["id1"], {"price": True}).rows == 1
    assert metas(path)["id1"]["price"] is True


def test_rows_chosen_by_sql_are_found_by_their_new_values(path: Path) -> None:
    pytest.importorskip("duckdb", reason="rows by SQL need DuckDB")
    opened = open_store(path)
    report = update_rows(opened, where(opened, "price >= 20"), {"label": "late", "price": None})
    assert (report.rows, report.shards) == (5, 1)
    found = where(open_store(path), "label = 'late' and price is null")
    assert found.tolist() == list(range(20, 25))


@pytest.mark.parametrize("name", ["id", "uri", "captions", "META", "thumbnail", "image_embedding"])
def test_columns_are_no_fields(name: str, path: Path) -> None:
    with pytest.raises(UsageError, match=f"'{name}' is a column, which cannot be updated"):
        update(path, ["id1"], {name: 1})


def test_what_cannot_be_set_is_refused(path: Path) -> None:
    deep: Any = 1
    for _ in range(70):
        deep = [deep]
    wrong = [({}, "no field to set"), ({"": 1}, "without a name"), ({"a": deep}, "nested more")]
    for values, said in wrong:
        with pytest.raises(UsageError, match=said):
            update(path, ["id1"], values)
    with pytest.raises(StoreError, match="no row has the id 'x', 'y'; nothing was updated"):
        update(path, ["id1", "x", "y"], {"a": 1})
    with pytest.raises(IndexError):
        update_rows(open_store(path), [25], {"a": 1})


def test_a_store_of_format_2_is_not_updated(tmp_path: Path) -> None:
    old = tmp_path / "old.store"
    write_format2(old, [[row(n) for n in range(5)]], CARD, [])
    with pytest.raises(StoreError, match="format 2, which is only read"):
        update(old, ["id1"], {"a": 1})
    upgrade(old)
    update(old, ["id1"], {"a": 1})
    assert metas(old)["id1"] == {"a": 1}
    assert verify(old) == []


def test_damage_is_not_copied(path: Path) -> None:
    file = open_store(path).manifest.shards[0].row_file.name
    # In the checksums, where any bytes are valid.
    content = bytearray((path / "shards" / file).read_bytes())
    at = content.index(bytes(32))
    content[at] ^= 1
    (path / "shards" / file).write_bytes(content)
    with pytest.raises(StoreError, match=f"{file}: shard damaged"):
        update(path, ["id1"], {"a": 1})
    update(path, ["id11"], {"a": 1})


def test_metadata_that_is_no_object_is_named(tmp_path: Path) -> None:
    fill(tmp_path / "s.store", [replace(row(1), meta="[1]")])
    with pytest.raises(StoreError, match="metadata of row 'id1' is not a JSON object"):
        update(tmp_path / "s.store", ["id1"], {"a": 1})


# ---------------------------------------------------------------- others meanwhile


def test_two_updates_at_once_are_both_kept(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    meanwhile(monkeypatch, lambda: update(path, ["id1", "id2", "id12"], {"a": 1}))
    assert update(path, ["id1", "id3"], {"b": 2}).rows == 2
    found = metas(path)
    fields = {i: {k: v for k, v in found[i].items() if k in "ab"} for i in ("id1", "id2", "id3")}
    assert fields == {"id1": {"a": 1, "b": 2}, "id2": {"a": 1}, "id3": {"b": 2}}
    assert found["id12"]["a"] == 1
    assert verify(path) == []


def test_rows_deleted_or_replaced_meanwhile_are_left_out(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = open_store(path)
    delete(path, ["id1"])
    fill(path, [row(2, label="new")])
    meanwhile(monkeypatch, lambda: delete(path, ["id3"]))
    assert update_rows(opened, [1, 2, 3, 4], {"label": "x"}).rows == 1
    labels = {i: m["label"] for i, m in metas(path).items()}
    assert labels == {f"id{n}": "draft" for n in range(25) if n not in (1, 3)} | {
        "id2": "new",
        "id4": "x",
    }


def test_rows_that_are_all_gone_leave_their_shard_untouched(path: Path) -> None:
    opened = open_store(path)
    delete(path, ["id1"])
    generation = open_store(path).manifest.generation
    report = update_rows(opened, [1], {"label": "x"})
    assert (report.rows, report.shards, report.generation) == (0, 0, generation)


def test_a_store_that_was_compacted_meanwhile_is_not_updated(path: Path) -> None:
    delete(path, ["id1"])
    opened = open_store(path)
    opened.open_all()
    compact(path)
    with pytest.raises(StoreError, match="compacted or repaired meanwhile; nothing was updated"):
        update_rows(opened, [2], {"label": "x"})
    assert update(path, ["id2"], {"label": "x"}).rows == 1


def test_a_compaction_does_not_undo_an_update(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    delete(path, ["id1"])
    meanwhile(monkeypatch, lambda: update(path, ["id2"], {"label": "x"}))
    with pytest.raises(StoreError, match="rows were updated during the compaction; run it again"):
        compact(path)
    assert metas(path)["id2"]["label"] == "x"
    compact(path, now=True)
    assert metas(path)["id2"]["label"] == "x"
    assert verify(path) == []


def test_rows_that_an_update_replaced_are_removed_by_compact(path: Path) -> None:
    old = open_store(path)
    old.open_all()
    update(path, ["id2"], {"label": "secret"})
    update(path, ["id2"], {"label": "open"})
    compact(path, now=True)
    assert not any(b"secret" in f.read_bytes() for f in (path / "shards").iterdir())
    assert metas(path)["id2"]["label"] == "open"
    assert json.loads(old.rows([2], ("meta",))[0]["meta"])["label"] == "draft"


def test_an_update_in_a_damaged_generation_is_saved_by_repair(path: Path) -> None:
    update(path, ["id2"], {"label": "x"})
    newest = max(path.glob("manifest-*.json"))
    flip(newest, bit=8 * (len(newest.read_bytes()) - 20))
    repair(path)
    assert metas(path)["id2"]["label"] == "x"
    assert len(open_store(path)) == 25
    assert verify(path) == []


# ---------------------------------------------------------------- killed


@pytest.mark.slow
def test_an_update_that_is_killed_changes_all_rows_or_none(tmp_path: Path) -> None:
    root = tmp_path / "whole"
    root.mkdir()
    fill(root / "a.store", [row(n, label="draft") for n in range(25)])
    ids = ["id1", "id12", "id24"]
    seen = set()
    for number in count():
        disk = SimulatedDisk(root).copy(tmp_path / "disk")
        disk.before = dies_at(number)
        try:
            with using(disk):
                update(disk.root / "a.store", ids, {"label": "x"})
        except PowerCut:
            disk.before = SimulatedDisk.nothing
            rng = random.Random(number) if number % 2 else None
            left = disk.cut(tmp_path / "left", rng)
            with using(left):
                seen.add(labels_of(left.root / "a.store", ids))
                update(left.root / "a.store", ids, {"label": "x"})
                assert labels_of(left.root / "a.store", ids) == ("x",)
            shutil.rmtree(left.root)
            shutil.rmtree(disk.root)
        else:
            break
    assert number > 20
    assert seen == {("draft",), ("x",)}


def labels_of(path: Path, ids: list[str]) -> tuple[str, ...]:
    """The labels of some rows, which must all be the same; the others must have the first one."""
    assert verify(path) == []
    found = metas(path)
    assert len(found) == 25
    assert {m["label"] for i, m in found.items() if i not in ids} == {"draft"}
    return tuple({found[i]["label"] for i in ids})
