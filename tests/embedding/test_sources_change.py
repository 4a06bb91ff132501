"""Sources that change between two runs of embed: what follows, what stays, what is deleted."""

import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import jpeg, write_tar
from stub_encoder import use_stub

from mmalign.embedding.embed import EmbedReport, embed
from mmalign.errors import StoreError
from mmalign.store import Store, open_store, update


@pytest.fixture
def put(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., EmbedReport]:
    """Embed sources into one store."""
    use_stub(monkeypatch)

    def embed_into(*sources: object, **words: Any) -> EmbedReport:
        return embed("stub", list(map(str, sources)), tmp_path / "s.store", **words)

    return embed_into


def fill(folder: Path, names: str, first: int = 0) -> Path:
    """Write pictures of these names, each with a caption, and each another."""
    folder.mkdir(parents=True, exist_ok=True)
    for i, name in enumerate(names.split(), first):
        (folder / f"{name}.jpg").write_bytes(jpeg(i))
        (folder / f"{name}.txt").write_text(f"picture {i}")
    return folder


def ids(tmp_path: Path) -> list[str]:
    return sorted(open_store(tmp_path / "s.store").column("id"))


# ---------------------------------------------------------------- what could not be read stays


def break_tar(tar: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tar.write_bytes(tar.read_bytes()[: tar.stat().st_size // 3])


def lock_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scandir = os.scandir

    def refusing(path: Any) -> Any:
        if str(path) == str(folder):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refusing)


@pytest.mark.parametrize("damage", [break_tar, lock_folder])
def test_what_cannot_be_listed_to_its_end_is_not_removed(
    damage: Callable[[Path, pytest.MonkeyPatch], None],
    put: Callable[..., EmbedReport], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    folder = fill(tmp_path / "f", "a b c")
    members = [(f"{i}.jpg", jpeg(9 + i)) for i in range(6)]
    place = write_tar(tmp_path / "d.tar", members) if damage is break_tar else folder / "sub"
    if damage is lock_folder:
        fill(place, "x y z u v w", 9)
    sources = (folder, place) if damage is break_tar else (folder,)
    put(*sources)
    before = ids(tmp_path)
    (folder / "a.jpg").unlink()
    (folder / "a.txt").unlink()
    damage(place, monkeypatch)
    report = put(*sources, drop_removed=True, yes=True)
    # Only what was seen to be gone.
    assert (report.removed, report.rows) == (1, 8)
    assert ids(tmp_path) == [i for i in before if i != "f/a.jpg"]


def test_a_remote_listing_that_fails_removes_nothing(
    put: Callable[..., EmbedReport],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    fs = fsspec.filesystem("memory")
    for i, name in enumerate(("2019/a", "2019/b", "2020/deep/c", "2020/d")):
        fs.pipe(f"/listed/{name}.jpg", jpeg(i))
    put("memory://listed")
    ls = type(fs).ls

    def flaky(self: Any, path: str, detail: bool = True, **words: Any) -> Any:
        if path.rstrip("/").endswith("deep"):
            raise ConnectionError("503 Slow Down")
        return ls(self, path, detail=detail, **words)

    monkeypatch.setattr(type(fs), "ls", flaky)
    fs.rm("/listed/2020/d.jpg")
    report = put("memory://listed", drop_removed=True, yes=True)
    assert (report.removed, report.rows) == (1, 3)
    assert ids(tmp_path) == ["listed/2019/a.jpg", "listed/2019/b.jpg", "listed/2020/deep/c.jpg"]
    assert "memory:///listed/2020/deep: folder cannot be read: 503 Slow" in capsys.readouterr().err


def test_more_than_a_tenth_is_dropped_only_if_it_is_meant(
    put: Callable[..., EmbedReport], tmp_path: Path
) -> None:
    folder = fill(tmp_path / "f", "a b c d")
    put(folder)
    for name in ("a", "b"):
        (folder / f"{name}.jpg").rename(tmp_path / f"{name}.jpg")
        (folder / f"{name}.txt").unlink()
    fill(folder, "new", 20)
    with pytest.raises(StoreError, match="2 of 5 rows would be deleted, .*add --yes"):
        put(folder, drop_removed=True)
    # What is new was added all the same.
    assert ids(tmp_path) == [f"f/{name}.jpg" for name in ("a", "b", "c", "d", "new")]
    assert put(folder, drop_removed=True, yes=True).removed == 2
    assert ids(tmp_path) == ["f/c.jpg", "f/d.jpg", "f/new.jpg"]


# ---------------------------------------------------------------- rows follow their content


def counts(report: EmbedReport) -> tuple[int, int, int, int, int]:
    """Added, changed, of them moved, already there; and vectors that were computed."""
    return report.added, report.changed, report.moved, report.present, report.encoded


def places(tmp_path: Path) -> dict[str, str]:
    """The uri of each row by its id, below the test's own folder."""
    store = open_store(tmp_path / "s.store")
    uris = [uri.removeprefix(f"{tmp_path}/") for uri in store.column("uri")]
    return dict(zip(store.column("id"), uris, strict=True))


def test_a_moved_folder_keeps_its_rows(put: Callable[..., EmbedReport], tmp_path: Path) -> None:
    folder = fill(tmp_path / "x" / "photos", "a b c")
    put(folder)
    (tmp_path / "y").mkdir()
    moved = folder.rename(tmp_path / "y" / "photos")
    assert counts(put(moved)) == (0, 3, 3, 0, 0)
    assert places(tmp_path) == {f"photos/{n}.jpg": f"y/photos/{n}.jpg" for n in "abc"}
    # Renamed, the ids are those of a new store.
    renamed = moved.rename(tmp_path / "y" / "pictures")
    assert counts(put(renamed)) == (0, 3, 3, 0, 0)
    assert places(tmp_path) == {f"pictures/{n}.jpg": f"y/pictures/{n}.jpg" for n in "abc"}
    report = put(renamed)
    assert counts(report) == (0, 0, 0, 3, 0)
    assert report.read == 0


def test_files_that_are_renamed_swapped_and_copied(
    put: Callable[..., EmbedReport], tmp_path: Path
) -> None:
    folder = fill(tmp_path / "f", "a b c d")
    put(folder)
    # The captions stay where they are: c takes over the one that lies beside its new name.
    (folder / "c.jpg").rename(folder / "new.jpg")
    (folder / "a.jpg").rename(folder / "t")
    (folder / "b.jpg").rename(folder / "a.jpg")
    (folder / "t").rename(folder / "b.jpg")
    (folder / "copy.jpg").write_bytes((folder / "d.jpg").read_bytes())
    report = put(folder)
    assert counts(report) == (1, 3, 1, 1, 0)
    store = open_store(tmp_path / "s.store")
    rows = {r["id"]: r for r in store.rows(range(store.manifest.physical_rows), ("id", "checksum"))}
    assert ids(tmp_path) == [f"f/{n}.jpg" for n in ("a", "b", "copy", "d", "new")]
    assert rows["f/copy.jpg"]["checksum"] == rows["f/d.jpg"]["checksum"]
    assert_fresh(tmp_path, folder)


def test_a_file_elsewhere_of_equal_name_is_no_moved_one(
    put: Callable[..., EmbedReport], tmp_path: Path
) -> None:
    """A disk that is not mounted, and another that is."""
    put(fill(tmp_path / "one" / "DCIM", "a b"))
    (tmp_path / "one").rename(tmp_path / "unplugged")
    assert counts(put(fill(tmp_path / "two" / "DCIM", "a b", 50))) == (2, 0, 0, 0, 2)
    assert len(ids(tmp_path)) == 4
    # One of them again, and a copy of it: nothing has moved.
    (tmp_path / "unplugged").rename(tmp_path / "one")
    fill(tmp_path / "three" / "DCIM", "a")
    assert counts(put(tmp_path / "three" / "DCIM")) == (1, 0, 0, 0, 0)
    assert len(ids(tmp_path)) == 5


def test_a_file_that_moves_from_a_tar_to_a_folder(
    put: Callable[..., EmbedReport], tmp_path: Path
) -> None:
    tar = write_tar(tmp_path / "t.tar", [("a.jpg", jpeg(1)), ("b.jpg", jpeg(2))])
    folder = fill(tmp_path / "f", "x")
    put(tar, folder)
    write_tar(tar, [("b.jpg", jpeg(2))])
    (folder / "a.jpg").write_bytes(jpeg(1))
    # Only the folder: whether the tar still has it was not looked at.
    assert counts(put(folder)) == (1, 0, 0, 1, 0)
    assert len(ids(tmp_path)) == 4
    (folder / "again.jpg").write_bytes(jpeg(1))
    assert counts(put(tar, folder)) == (0, 1, 1, 3, 0)
    assert ids(tmp_path) == ["f/a.jpg", "f/again.jpg", "f/x.jpg", "t/b"]


def test_a_row_inserted_in_a_table_with_ids_changes_nothing(
    put: Callable[..., EmbedReport], tmp_path: Path
) -> None:
    table = tmp_path / "t.parquet"
    write_table(table, [1, 2, 3])
    put(table)
    write_table(table, [7, 1, 2, 3])
    assert counts(put(table)) == (1, 0, 0, 3, 1)
    assert sorted(ids(tmp_path)) == ["t/1", "t/2", "t/3", "t/7"]
    report = put(table)
    assert (report.present, report.read) == (4, 0)
    # Without ids it is the number of a row that names it, and nothing is computed twice.
    other = tmp_path / "u.parquet"
    write_table(other, [11, 12, 13], with_id=False)
    put(other)
    write_table(other, [17, 11, 12, 13], with_id=False)
    assert counts(put(other)) == (1, 3, 0, 0, 1)
    assert_fresh(tmp_path, table, other)


def test_two_tables_of_one_name_keep_their_rows(
    put: Callable[..., EmbedReport], tmp_path: Path
) -> None:
    tables = []
    for i, name in enumerate(("one", "two")):
        (tmp_path / name).mkdir()
        tables.append(tmp_path / name / "t.parquet")
        write_table(tables[-1], [1, 2], first=10 * i)
    for order in ([0], [1], [0, 1], [1, 0]):
        put(*(tables[i] for i in order))
    assert len(ids(tmp_path)) == 4
    write_table(tables[1], [9, 1, 2], first=10)
    assert counts(put(tables[1], tables[0])) == (1, 0, 0, 4, 1)


def test_a_table_that_names_other_images_by_its_ids(
    put: Callable[..., EmbedReport], tmp_path: Path
) -> None:
    fill(tmp_path / "f", "a b c d")
    table = tmp_path / "t.csv"
    table.write_text("id,image\n" + "".join(f"{i},f/{n}.jpg\n" for i, n in enumerate("abc")))
    put(table)
    table.write_text("id,image\n0,f/b.jpg\n1,f/a.jpg\n2,f/d.jpg\n")
    assert counts(put(table)) == (0, 3, 0, 0, 1)
    assert places(tmp_path) == {"t/0": "f/b.jpg", "t/1": "f/a.jpg", "t/2": "f/d.jpg"}


def test_a_folder_in_a_folder_is_no_other_source(
    put: Callable[..., EmbedReport], tmp_path: Path
) -> None:
    folder = fill(tmp_path / "f", "a")
    fill(folder / "sub", "b", 5)
    put(folder)
    assert counts(put(folder / "sub")) == (0, 0, 0, 1, 0)
    assert counts(put(folder / "sub", folder)) == (0, 0, 0, 2, 0)
    assert ids(tmp_path) == ["f/a.jpg", "f/sub/b.jpg"]
    # A table that names one of the files, with words of its own, is.
    table = tmp_path / "t.csv"
    table.write_text("image,caption\nf/a.jpg,other words\n")
    assert counts(put(table, folder)) == (1, 0, 0, 2, 0)


# ---------------------------------------------------------------- what is read


def test_touched_files_are_read_once(put: Callable[..., EmbedReport], tmp_path: Path) -> None:
    folder = fill(tmp_path / "f", "a b c")
    put(folder)
    for file in folder.glob("*.jpg"):
        os.utime(file, (1, 1))
    reports = [put(folder) for _ in range(3)]
    assert [r.read for r in reports] == [3, 0, 0]
    assert [counts(r) for r in reports] == [(0, 0, 0, 3, 0)] * 3
    report = put(folder, checksum=True)
    assert (report.read, report.present) == (3, 3)
    assert_fresh(tmp_path, folder)


def test_other_words_cost_no_image(put: Callable[..., EmbedReport], tmp_path: Path) -> None:
    folder = fill(tmp_path / "f", "a b")
    put(folder)
    (folder / "a.txt").write_text("another word\npicture 0")
    assert counts(put(folder)) == (0, 1, 0, 1, 0)
    assert_fresh(tmp_path, folder)


def test_vectors_of_a_damaged_shard_are_not_used_again(
    put: Callable[..., EmbedReport], tmp_path: Path
) -> None:
    folder = fill(tmp_path / "f", "a b")
    put(folder)
    shard = next((tmp_path / "s.store" / "shards").glob("*-vectors.arrow"))
    content = bytearray(shard.read_bytes())
    at = content.index(vector_bytes(tmp_path))
    content[at] ^= 1
    shard.write_bytes(content)
    for file in folder.glob("*.jpg"):
        os.utime(file, (1, 1))
    assert put(folder).encoded == 2
    assert_fresh(tmp_path, folder)


def vector_bytes(tmp_path: Path) -> bytes:
    return open_store(tmp_path / "s.store").vectors("image")[0][0].tobytes()


# ---------------------------------------------------------------- helpers


def write_table(file: Path, numbers: list[int], *, with_id: bool = True, first: int = 0) -> None:
    """Write pictures into a table; the number of a picture is its id."""
    columns: dict[str, Any] = {"image": [jpeg(first + n) for n in numbers]}
    columns["caption"] = [f"picture {n}" for n in numbers]
    if with_id:
        columns["id"] = [str(n) for n in numbers]
    pq.write_table(pa.table(columns), file)


def content_of(store: Store) -> dict[str, Any]:
    """All that a store says of each place."""
    numbers = range(store.manifest.physical_rows) if store.live is None else store.live.nonzero()[0]
    names = ("uri", "captions", "meta", "stamp", "checksum", "image_embedding", "text_embedding")
    rows = store.rows(list(numbers), names)
    assert len({row["uri"] for row in rows}) == len(rows)
    return {row.pop("uri"): row for row in rows}


def assert_fresh(tmp_path: Path, *sources: object) -> None:
    """Hold that the store is, but for its ids, what it would be if it were made now."""
    with tempfile.TemporaryDirectory() as new:
        embed("stub", list(map(str, sources)), Path(new) / "s.store")
        fresh = content_of(open_store(Path(new) / "s.store"))
    assert content_of(open_store(tmp_path / "s.store")) == fresh


# ---------------------------------------------------------------- metadata set in the store


def metas(tmp_path: Path) -> dict[str, Any]:
    store = open_store(tmp_path / "s.store")
    texts = zip(store.column("id"), store.column("meta"), strict=True)
    return {name: json.loads(text) for name, text in texts}


def test_updated_metadata_stays_until_the_source_changes(
    put: Callable[..., EmbedReport], tmp_path: Path
) -> None:
    folder = tmp_path / "f"
    folder.mkdir()
    for number, name in enumerate("ab"):
        (folder / f"{name}.jpg").write_bytes(jpeg(number))
        (folder / f"{name}.json").write_text(json.dumps({"captions": [name], "label": "draft"}))
    put(folder)
    update(tmp_path / "s.store", ["f/a.jpg", "f/b.jpg"], {"label": "dress", "mine": 1})
    updated = {"label": "dress", "mine": 1}
    assert put(folder).present == 2
    assert metas(tmp_path) == {"f/a.jpg": updated, "f/b.jpg": updated}
    # Nothing is written anew for rows that others are added to.
    (folder / "c.jpg").write_bytes(jpeg(3))
    assert put(folder).added == 1
    assert metas(tmp_path)["f/a.jpg"] == updated
    (folder / "a.json").write_text(json.dumps({"captions": ["a"], "label": "hat"}))
    report = put(folder)
    assert (report.changed, report.encoded) == (1, 0)
    assert metas(tmp_path) == {"f/a.jpg": {"label": "hat"}, "f/b.jpg": updated, "f/c.jpg": {}}
    # All images are read and compared with their sources.
    assert put(folder, checksum=True).changed == 1
    assert metas(tmp_path)["f/b.jpg"] == {"label": "draft"}
