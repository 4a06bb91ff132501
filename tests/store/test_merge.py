"""Stores merged: the rows of all, the later one of equal ids, files linked or copied."""

import errno
import os
import shutil
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from format2_store import write_format2
from small_store import CARD, fill, row
from store_samples import flip, write_index

from mmalign import files, open_store
from mmalign.errors import IdentityError, StoreError, UsageError
from mmalign.store import Store, Tower, Writer, add_failures, compact, delete, merge, update, verify


def rows_of(store: Store) -> dict[str, list[Any]]:
    """Everything of each live row, by id."""
    columns = [store.column(name) for name in store.columns]
    return {values[0]: list(values) for values in zip(*columns, strict=True)}


def made(path: Path, numbers: Iterable[int], **meta: Any) -> Path:
    fill(path, (row(n, **meta) for n in numbers))
    return path


@pytest.fixture
def two(tmp_path: Path) -> tuple[Path, Path]:
    """Two stores that have five ids in common."""
    one = made(tmp_path / "a.store", range(25), of="a")
    return one, made(tmp_path / "b.store", range(20, 35), of="b")


def test_a_merged_store_has_the_rows_of_all_and_the_later_of_equal_ids(
    two: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    delete(two[0], ["id3", "id21"])
    delete(two[1], ["id22"])
    before = [open_store(path) for path in two]
    expected = rows_of(before[0]) | rows_of(before[1])
    report = merge(two, tmp_path / "c.store")
    assert (report.rows, report.replaced, report.shards) == (34, 3, 5)
    assert "3 rows were replaced by rows of a later store" in capsys.readouterr().err
    store = open_store(tmp_path / "c.store")
    assert rows_of(store) == expected
    # Still that of the first store: the second had it deleted.
    assert '"a"' in expected["id22"][3]
    assert store.column("id")[-14:] == before[1].column("id")
    assert store.manifest.physical_rows == 40
    assert store.find(["id24", "id3"]).tolist() == [29, -1]
    assert verify(tmp_path / "c.store") == []
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []


def test_files_are_linked_where_the_disk_allows_it(two: tuple[Path, Path], tmp_path: Path) -> None:
    report = merge(two, tmp_path / "c.store")
    assert (report.linked, report.copied) == (15, 0)
    for path in two:
        for file in (path / "shards").iterdir():
            assert os.path.samefile(file, tmp_path / "c.store" / "shards" / file.name)
    # What happens to one of the stores does not change the other.
    compact(tmp_path / "c.store", now=True)
    shutil.rmtree(two[0])
    assert verify(two[1]) == verify(tmp_path / "c.store") == []
    assert len(open_store(tmp_path / "c.store")) == 35


def test_files_are_copied_where_there_are_no_links(
    two: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(source: Path, target: Path) -> None:
        raise OSError(errno.EXDEV, "Invalid cross-device link", str(source))

    monkeypatch.setattr(files.disk, "link", refuse)
    report = merge(two, tmp_path / "c.store")
    assert (report.linked, report.copied) == (0, 15)
    assert verify(tmp_path / "c.store") == []
    assert len(open_store(tmp_path / "c.store")) == 35
    flip(two[0] / "shards" / open_store(two[0]).manifest.shards[0].vector_file.name)
    with pytest.raises(StoreError, match=r"-vectors.arrow: damaged; run `mmalign repair"):
        merge(two, tmp_path / "d.store")
    assert not (tmp_path / "d.store").exists()


def test_three_stores_of_which_two_are_copies(two: tuple[Path, Path], tmp_path: Path) -> None:
    copy = tmp_path / "copy.store"
    shutil.copytree(two[0], copy)
    update(copy, ["id2"], {"of": "copy"})
    report = merge([two[0], two[1], copy], tmp_path / "c.store")
    assert (report.rows, report.replaced) == (35, 25 + 5)
    store = open_store(tmp_path / "c.store")
    found = rows_of(store)
    assert found == rows_of(open_store(two[1])) | rows_of(open_store(copy))
    assert '"copy"' in found["id2"][3]
    assert len({shard.name for shard in store.manifest.shards}) == 8
    assert verify(tmp_path / "c.store") == []


def test_failures_are_joined_but_not_those_of_rows_of_another_store(
    two: tuple[Path, Path], tmp_path: Path
) -> None:
    def failure(name: str, reason: str | None = "no image") -> dict[str, Any]:
        return {"id": name, "uri": f"/{name}", "reason": reason, "embedded": False}

    add_failures(two[0], [failure("x"), failure("id30"), failure("y"), failure("id1")])
    add_failures(two[0], [failure("y", None)])
    add_failures(two[1], [failure("x", "truncated"), failure("z")])
    assert merge(two, tmp_path / "c.store").failures == 3
    found = {f["id"]: f["reason"] for f in open_store(tmp_path / "c.store").failures()}
    assert found == {"x": "truncated", "id1": "no image", "z": "no image"}


def test_an_index_is_not_copied_and_that_is_said(
    two: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_index(two[1])
    merge(two, tmp_path / "c.store")
    assert open_store(tmp_path / "c.store").manifest.index is None
    said = capsys.readouterr().err
    assert f"indexes are not copied: build one with `mmalign index {tmp_path / 'c.store'}" in said


def test_stores_of_other_models_are_refused_by_name(tmp_path: Path) -> None:
    towers = tuple(replace(tower, identity=f"{tower.modality}-1") for tower in CARD.towers)
    known = replace(CARD, towers=towers)
    changed = replace(CARD, towers=(replace(towers[0], identity="image-2"), towers[1]))
    cards = {
        "a": CARD,
        "other": replace(CARD, identity="tiny-4567"),
        "known": known,
        "changed": changed,
        "more": replace(CARD, towers=(*CARD.towers, Tower("audio"))),
    }
    paths = {name: tmp_path / f"{name}.store" for name in cards}
    for name, card in cards.items():
        with Writer(paths[name], card) as writer:
            writer.add(row(1, 1))
    out = tmp_path / "c.store"
    with pytest.raises(IdentityError, match=r"of nano-0123, .*other.store those of tiny-4567"):
        merge([paths["a"], paths["other"]], out)
    with pytest.raises(IdentityError, match=r"image image-1, .* those of .*image image-2"):
        merge([paths["a"], paths["known"], paths["changed"]], out)
    with pytest.raises(IdentityError, match="audio unknown"):
        merge([paths["a"], paths["more"]], out)
    assert not out.exists()
    merge([paths["known"], paths["a"]], out)
    assert open_store(out).manifest.model == CARD
    merge([paths["known"], made(tmp_path / "e.store", [])], tmp_path / "d.store")


def test_what_cannot_be_merged(two: tuple[Path, Path], tmp_path: Path) -> None:
    wrong: list[tuple[list[Path], Path, str]] = [
        ([two[0]], tmp_path / "c", "at least two stores"),
        ([two[0], two[0] / ".." / "a.store"], tmp_path / "c", "the same store twice"),
        (list(two), two[0], "already exists; use another --out"),
    ]
    for paths, out, said in wrong:
        with pytest.raises(UsageError, match=said):
            merge(paths, out)
    old = tmp_path / "old.store"
    write_format2(old, [[row(n) for n in range(5)]], CARD, [])
    with pytest.raises(StoreError, match="format 2, which is only read"):
        merge([two[0], old], tmp_path / "c")
    (two[0] / "shards" / open_store(two[0]).manifest.shards[1].vector_file.name).unlink()
    with pytest.raises(StoreError, match=r"-vectors.arrow: missing; .*`mmalign verify"):
        merge(two, tmp_path / "c")
    assert not (tmp_path / "c").exists()


def test_vectors_of_a_merged_store_are_those_of_its_sources(
    two: tuple[Path, Path], tmp_path: Path
) -> None:
    merge(two, tmp_path / "c.store")
    parts = [np.concatenate(open_store(path).vectors("text")) for path in two]
    merged = np.concatenate(open_store(tmp_path / "c.store").vectors("text"))
    assert merged.tobytes() == np.concatenate(parts).tobytes()
