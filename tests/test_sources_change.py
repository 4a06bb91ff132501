"""Sources that change between two runs of embed: what follows, what stays, what is deleted."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import pytest
from conftest import jpeg, write_tar

from mmalign.embed import EmbedReport, embed
from mmalign.errors import StoreError
from mmalign.store import open_store


@pytest.fixture
def put(run: Path, tmp_path: Path) -> Callable[..., EmbedReport]:
    """Embed sources into one store."""

    def embed_into(*sources: object, **words: Any) -> EmbedReport:
        return embed(run, list(map(str, sources)), tmp_path / "s.store", **words)

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
