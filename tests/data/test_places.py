"""Places that cannot be read to their end, are no files, or have names like URLs."""

import io
import os
import socket
import tarfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import write_tar
from data_samples import captions, jpeg, listed, reasons, write_folder

from mmalign.data import Skip, read_image
from mmalign.data.places import is_url
from mmalign.errors import DataError

T = TypeVar("T")


def soon(run: Callable[[], T]) -> T:
    """Run something that might wait for ever."""
    results: list[T] = []
    thread = threading.Thread(target=lambda: results.append(run()), daemon=True)
    thread.start()
    thread.join(10)
    assert results, "it waits, or has failed"
    return results[0]


def lost_places(skips: list[Skip]) -> list[str]:
    return [s.uri for s in skips if s.affects == "place"]


@pytest.fixture(scope="module")
def whole_tar(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    members = [m for i in range(3) for m in ((f"{i}.jpg", jpeg(i)), (f"{i}.txt", b"words"))]
    return write_tar(tmp_path_factory.mktemp("t") / "s.tar", members).read_bytes()


@pytest.mark.parametrize("cut", range(300, 12_000, 389))
def test_a_tar_cut_anywhere_loses_a_place(tmp_path: Path, whole_tar: bytes, cut: int) -> None:
    good = write_folder(tmp_path / "f", {"a.jpg": jpeg()})
    (tmp_path / "s.tar").write_bytes(whole_tar[:cut])
    catalog = listed(tmp_path / "s.tar", good)
    assert [r.id for r in catalog.records][-1] == "f/a.jpg"
    assert all(read_image(r) == jpeg(int(r.id[-1])) for r in catalog.records[:-1])
    assert len(catalog.records) == 4 or lost_places(catalog.skips)


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda b: b[: len(b.rstrip(b"\0")) // 512 * 512 + 512], "it has no end mark"),
        (lambda b: b[:2048] + b"\xff" * 512 + b[2560:], "no valid header at byte 2048"),
        (lambda b: b + b, "data follows its end mark"),
        (lambda b: b"\x1f\x8b" + b[2:], "cannot be read as a tar"),
        (lambda b: b"", "cannot be read as a tar"),
    ],
)
def test_a_damaged_tar_loses_a_place_and_no_other_source(
    tmp_path: Path, whole_tar: bytes, damage: Callable[[bytes], bytes], reason: str
) -> None:
    good = write_folder(tmp_path / "f", {"a.jpg": jpeg()})
    (tmp_path / "s.tar").write_bytes(damage(whole_tar))
    catalog = listed(tmp_path / "s.tar", good)
    assert catalog.records[-1].id == "f/a.jpg"
    assert lost_places(catalog.skips) == [str(tmp_path / "s.tar")]
    assert any(reason in s.reason for s in catalog.skips)


def test_a_whole_tar_loses_nothing(tmp_path: Path, whole_tar: bytes) -> None:
    (tmp_path / "s.tar").write_bytes(whole_tar)
    assert listed(tmp_path / "s.tar").skips == []


@pytest.fixture
def memory() -> Iterator[Any]:
    fs = fsspec.filesystem("memory")
    yield fs
    fs.store.clear()
    fs.pseudo_dirs[:] = [""]


@pytest.mark.parametrize(
    "error", [OSError("503 Slow Down"), PermissionError("403"), RuntimeError("reset by peer")]
)
def test_a_remote_folder_that_cannot_be_listed_is_named(
    memory: Any, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    for year in (2019, 2020, 2021):
        memory.pipe(f"/photos/{year}/a.jpg", jpeg(year))
    ls = type(memory).ls

    def refusing(self: Any, path: str, **options: Any) -> Any:
        if path.endswith("2020"):
            raise error
        return ls(self, path, **options)

    monkeypatch.setattr(type(memory), "ls", refusing)
    catalog = listed("memory://photos")
    assert [r.id for r in catalog.records] == ["photos/2019/a.jpg", "photos/2021/a.jpg"]
    assert lost_places(catalog.skips) == ["memory:///photos/2020"]
    assert str(error) in catalog.skips[0].reason


def test_a_remote_tar_that_stops_in_between_loses_a_place(
    memory: Any, monkeypatch: pytest.MonkeyPatch, whole_tar: bytes
) -> None:
    memory.pipe("/s.tar", whole_tar)
    memory.pipe("/t.tar", whole_tar)

    class Breaking(io.BytesIO):
        def read(self, size: int | None = -1) -> bytes:
            if self.tell() >= 5000:
                raise RuntimeError("connection lost")
            return super().read(min(size or 0, 5000 - self.tell()))

    real = type(memory).open

    def opening(self: Any, path: str, *args: Any, **options: Any) -> Any:
        return Breaking(whole_tar) if "s.tar" in path else real(self, path, *args, **options)

    monkeypatch.setattr(type(memory), "open", opening)
    catalog = listed("memory://s.tar", "memory://t.tar")
    assert 0 < len([r for r in catalog.records if r.id.startswith("s/")]) < 3
    assert len([r for r in catalog.records if r.id.startswith("t/")]) == 3
    assert lost_places(catalog.skips) == ["memory://s.tar"]


def test_a_source_that_is_not_there_is_an_error_beside_others(memory: Any, tmp_path: Path) -> None:
    good = write_folder(tmp_path / "f", {"a.jpg": jpeg()})
    for missing in ("memory://none", "memory://none.tar", str(tmp_path / "none")):
        with pytest.raises(DataError, match="no such"):
            listed(good, missing)


def test_a_link_to_a_disk_that_is_not_there_loses_a_place(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "f", {"a.jpg": jpeg()})
    (folder / "disk").symlink_to(tmp_path / "unmounted")
    (folder / "loop").symlink_to(folder / "loop")
    (folder / "b.jpg").symlink_to(tmp_path / "gone.jpg")
    catalog = listed(folder)
    assert [r.id for r in catalog.records] == ["f/a.jpg"]
    assert lost_places(catalog.skips) == [str(folder / "disk"), str(folder / "loop")]
    assert reasons(catalog.skips)["f/b.jpg"] == "broken link"


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
def test_what_is_no_regular_file_is_named_and_not_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_folder(tmp_path / "f", {"a.jpg": jpeg(), "b.jpg": jpeg(1)})
    for name in ("pipe.jpg", "pipe", "a.txt", "a.json", "metadata.csv", "b.caption"):
        os.mkfifo(folder / name)
    with socket.socket(socket.AF_UNIX) as server:
        monkeypatch.chdir(folder)  # the name of a socket must be short
        server.bind("socket.png")
        catalog = soon(lambda: listed(folder))
    assert captions(catalog) == {"f/a.jpg": (), "f/b.jpg": ()}
    why = {s.uri.rpartition("/")[2]: s.reason for s in catalog.skips}
    pipe = "not a regular file: named pipe"
    assert why["pipe.jpg"] == why["pipe"] == why["metadata.csv"] == pipe
    assert why["socket.png"] == "not a regular file: socket"
    assert why["a.jpg"] == why["b.jpg"] == f"captions cannot be read: {pipe}"
    for kind in ("tar", "parquet", "csv", "jsonl"):
        os.mkfifo(tmp_path / f"source.{kind}")
        with pytest.raises(DataError, match="named pipe"):
            soon(lambda kind=kind: failing(tmp_path / f"source.{kind}"))()


def failing(source: Path) -> Callable[[], None]:
    """Scan in this thread, and raise what it raised when called in another."""
    try:
        listed(source)
    except DataError as error:
        kept = error

        def again() -> None:
            raise kept

        return again
    return lambda: None


def test_a_file_that_became_a_pipe_does_not_wait(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "f", {"a.jpg": jpeg()})
    (record,) = listed(folder).records
    (folder / "a.jpg").unlink()
    os.mkfifo(folder / "a.jpg")

    def reading() -> str:
        with pytest.raises(DataError) as caught:
            read_image(record)
        return str(caught.value)

    assert soon(reading) == "cannot be read: not a regular file: named pipe"


def test_special_members_of_a_tar_are_named(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "s.tar", "w") as tar:
        content = jpeg()
        whole = tarfile.TarInfo("a.jpg")
        whole.size = len(content)
        tar.addfile(whole, io.BytesIO(content))
        for name, kind in (
            ("pipe.jpg", tarfile.FIFOTYPE), ("link.jpg", tarfile.SYMTYPE), ("dir", tarfile.DIRTYPE),
            ("hard.txt", tarfile.LNKTYPE), ("dev.png", tarfile.CHRTYPE),
        ):  # fmt: skip
            special = tarfile.TarInfo(name)
            special.type, special.linkname = kind, "a.jpg"
            tar.addfile(special)
    catalog = listed(tmp_path / "s.tar")
    assert [r.id for r in catalog.records] == ["s/a"]
    assert reasons(catalog.skips) == {
        "s/pipe": "not a regular file: named pipe",
        "s/link": "not a regular file: link in a tar",
        "s/hard": "not a regular file: link in a tar",
        "s/dev": "not a regular file: device",
    }


NAMES = ("my :: photos", "file:x", "s3::a", "a#b%20c?", "zip:", "[x]{1,2}", "~x", "http:")


@pytest.mark.parametrize("name", NAMES)
def test_a_local_name_is_never_parsed_as_a_url(tmp_path: Path, name: str) -> None:
    folder = write_folder(tmp_path / name, {f"{name}.jpg": jpeg(), f"{name}.txt": "words"})
    tar = write_tar(folder / f"{name}.tar", [("k.jpg", jpeg(1)), ("k.txt", b"words")])
    csv = folder / f"{name}.csv"
    csv.write_text(f'image,caption\n"{name}.jpg",words\n')
    table = folder / f"{name}.parquet"
    pq.write_table(pa.table({"image": [jpeg(2)], "caption": ["words"]}), str(table))
    for source, seed in ((folder, 0), (tar, 1), (csv, 0), (table, 2)):
        (record,) = listed(source).records
        assert record.captions == ("words",), source
        assert read_image(record) == jpeg(seed)


def test_a_file_url_is_the_local_path(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "my photos", {"a.jpg": jpeg()})
    plain = listed(folder)
    assert listed(f"file://{folder}") == plain
    assert listed(f"file://{str(folder).replace(' ', '%20')}") == plain
    (folder / "t.csv").write_text(f"image\nfile://{folder}/a.jpg\n")
    assert listed(folder / "t.csv").records[0].uri == str(folder / "a.jpg")


@pytest.mark.parametrize(
    ("place", "url"),
    [
        ("s3://bucket/key", True),
        ("simplecache::s3://bucket/key", True),
        ("hf://datasets/a/b", True),
        ("/photos/a::b://c", False),
        ("file:///photos", False),
        ("C:/photos", False),
        ("c://photos", False),
        ("my :: photos", False),
    ],
)
def test_what_a_url_is(place: str, url: bool) -> None:
    assert is_url(place) == url


def test_files_of_gigabytes_are_not_read_into_memory(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "f", {"a.jpg": jpeg(), "b.jpg": jpeg(1)})
    for name in ("a.jpg", "b.txt"):
        with open(folder / name, "wb") as file:
            file.truncate(3 << 30)
    catalog = listed(folder)
    why = "captions cannot be read: it has 3,221 MB, more than the limit of 67 MB"
    assert reasons(catalog.skips) == {"f/b.jpg": why}
    with pytest.raises(
        DataError, match="cannot be read: it has 3,221 MB, more than the limit of 537 MB"
    ):
        read_image(catalog.records[0])
