"""Sources behind URLs: what was replaced is seen, what fails for a moment is tried again."""

import io
import os
import tempfile
import threading
from collections.abc import Callable, Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import jpeg, write_tar
from stub_encoder import use_stub

from mmalign.data import Record, Stamps, is_gone, places
from mmalign.embedding.embed import EmbedReport, embed
from mmalign.errors import DataError
from mmalign.store import open_store


@pytest.fixture
def put(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., EmbedReport]:
    """Embed sources into one store."""
    use_stub(monkeypatch)
    return lambda *sources, **words: embed("stub", sources, tmp_path / "s.store", **words)


class Handler(SimpleHTTPRequestHandler):
    """Serves a folder; it fails when it is told to."""

    fails: ClassVar[dict[str, list[int]]] = {}
    asked: ClassVar[list[str]] = []

    def send_head(self) -> Any:
        Handler.asked.append(f"{self.command} {self.path}")
        left = Handler.fails.get(f"{self.command} {self.path}")
        if left:
            self.send_error(left.pop(0))
            return None
        return super().send_head()

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def web(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The address of a server of the folder `web`, which is made."""
    (tmp_path / "web").mkdir()
    monkeypatch.setattr(Handler, "fails", {})
    monkeypatch.setattr(Handler, "asked", [])
    handler = partial(Handler, directory=tmp_path / "web")
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


def table_of(*urls: str, folder: Path) -> str:
    table = folder / "t.csv"
    table.write_text("\n".join(["image", *urls]))
    return str(table)


def checksums(tmp_path: Path) -> list[bytes]:
    store = open_store(tmp_path / "s.store")
    numbers = range(store.manifest.physical_rows) if store.live is None else store.live.nonzero()[0]
    return sorted(row["checksum"] for row in store.rows(list(numbers), ("checksum",)))


def test_an_image_that_was_replaced_behind_a_url_is_embedded_again(
    put: Callable[..., EmbedReport], tmp_path: Path
) -> None:
    fs = fsspec.filesystem("memory")
    for i in range(3):
        fs.pipe(f"/replaced/{i}.jpg", jpeg(i))
    put("memory://replaced")
    fs.pipe("/replaced/0.jpg", jpeg(9))
    report = put("memory://replaced")
    assert (report.changed, report.present, report.read) == (1, 2, 1)
    # Written anew as it was: read once, and known by its new time.
    fs.pipe("/replaced/1.jpg", jpeg(1))
    assert [(r.changed, r.read) for r in (put("memory://replaced"), put("memory://replaced"))] == [
        (0, 1),
        (0, 0),
    ]


def remote_tar(name: str, seeds: list[int]) -> None:
    fsspec.filesystem("memory").pipe(name, tar_bytes(seeds))


def tar_bytes(seeds: list[int]) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        members = [(f"{i}.jpg", jpeg(seed)) for i, seed in enumerate(seeds)]
        return write_tar(Path(folder) / "t.tar", members).read_bytes()


def remote_table(name: str, seeds: list[int]) -> None:
    out = io.BytesIO()
    pq.write_table(pa.table({"id": [*"abc"], "image": [jpeg(s) for s in seeds]}), out)
    fsspec.filesystem("memory").pipe(name, out.getvalue())


@pytest.mark.parametrize(("write", "ending"), [(remote_tar, "tar"), (remote_table, "parquet")])
def test_a_tar_or_a_table_that_was_replaced_behind_a_url_is_read_again(
    write: Callable[[str, list[int]], None], ending: str,
    put: Callable[..., EmbedReport],
) -> None:  # fmt: skip
    url = f"memory://whole/t.{ending}"
    write(f"/whole/t.{ending}", [1, 2, 3])
    put(url)
    assert put(url).read == 0
    write(f"/whole/t.{ending}", [1, 20, 3])
    report = put(url)
    assert (report.changed, report.present, report.read) == (1, 2, 3)


def test_of_a_server_etag_time_and_size_count(tmp_path: Path, web: str) -> None:
    (tmp_path / "web" / "a.jpg").write_bytes(jpeg())
    record = Record("a", f"{web}/a.jpg", f"{web}/a.jpg")
    first = Stamps().of(record)
    assert Stamps().of(record) == first
    os.utime(tmp_path / "web" / "a.jpg", (1, 1))
    assert Stamps().of(record) != first
    said = {"ETag": '"1"', "size": 3, "url": "signed for an hour", "mtime": 5.0}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(places, "_ask", lambda *args, **words: said)
        first = Stamps().of(record)
        said["url"] = "signed again"
        assert Stamps().of(record) == first
        for name, value in (("ETag", '"2"'), ("size", 4), ("mtime", 6.0)):
            before, said[name] = said[name], value
            assert Stamps().of(record) != first
            said[name] = before


def test_a_server_is_asked_of_a_tar_once(tmp_path: Path, web: str) -> None:
    (tmp_path / "web" / "t.tar").write_bytes(tar_bytes([1, 2]))
    url, stamps = f"{web}/t.tar", Stamps()
    for offset in (512, 2048):
        stamps.of(Record(f"t/{offset}", f"{url}#{offset}", url, offset=offset, length=100))
    assert Handler.asked == ["HEAD /t.tar"]


def test_what_fails_behind_a_url_is_tried_again(
    put: Callable[..., EmbedReport], tmp_path: Path, web: str
) -> None:
    for i in range(3):
        (tmp_path / "web" / f"{i}.jpg").write_bytes(jpeg(i))
    Handler.fails |= {"GET /0.jpg": [503, 429], "GET /1.jpg": [500, 502, 503], "GET /2.jpg": [403]}
    table = table_of(*(f"{web}/{i}.jpg" for i in range(4)), folder=tmp_path)
    report = put(table)
    assert (report.added, report.failed) == (1, 3)
    reasons = {f["uri"]: f["reason"] for f in open_store(tmp_path / "s.store").failures()}
    assert "503" in reasons[f"{web}/1.jpg"]
    assert "403" in reasons[f"{web}/2.jpg"]
    # What is forbidden, or not there, is so the next moment too.
    gets = [a for a in Handler.asked if a.startswith("GET")]
    assert [gets.count(f"GET /{i}.jpg") for i in range(3)] == [3, 3, 1]
    assert put(table).added == 2
    # Replaced on the server.
    (tmp_path / "web" / "0.jpg").write_bytes(jpeg(50))
    assert put(table).changed == 1


def test_a_tar_behind_a_url_is_read_again_where_it_fails(
    put: Callable[..., EmbedReport], monkeypatch: pytest.MonkeyPatch
) -> None:
    remote_tar("/flaky/t.tar", [1, 2, 3])
    fs = type(fsspec.filesystem("memory"))
    opened, failed = fs.open, []

    class Flaky(io.BytesIO):
        def read(self, size: int | None = -1) -> bytes:
            if self.tell() > 0 and len(failed) < 2:
                self.seek(7)
                failed.append(size)
                raise ConnectionError("reset by peer")
            return super().read(size)

    def open_flaky(self: Any, path: str, mode: str = "rb", **words: Any) -> Any:
        return Flaky(opened(self, path, mode, **words).getvalue())

    monkeypatch.setattr(fs, "open", open_flaky)
    report = put("memory://flaky/t.tar")
    assert (report.added, report.failed, len(failed)) == (3, 0, 2)


def test_an_answer_that_does_not_come_ends(monkeypatch: pytest.MonkeyPatch, web: str) -> None:
    monkeypatch.setattr(places, "TIMEOUT_S", 0.05)
    monkeypatch.setattr(Handler, "send_head", lambda self: threading.Event().wait(0.3))
    with pytest.raises(OSError, match="no answer in time"):
        places.read(f"{web}/a.jpg")


def test_without_its_extra_the_web_is_refused_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def without(url: str) -> None:
        raise ImportError('HTTPFileSystem requires "aiohttp" to be installed')

    monkeypatch.setattr(fsspec.core, "url_to_fs", without)
    with pytest.raises(
        OSError,
        match=r"^reading from the web needs an extra package: pip install 'mmalign\[web\]'$",
    ):
        places.read("https://example.org/a.jpg")
    with pytest.raises(OSError, match="requires"):
        places.read("s3://a/b.jpg")


def test_a_server_that_knows_no_parts_sends_the_whole_tar(
    put: Callable[..., EmbedReport], tmp_path: Path, web: str
) -> None:
    content = tar_bytes([1, 2])
    (tmp_path / "web" / "t.tar").write_bytes(content)
    assert places.read(f"{web}/t.tar", 512, 100) == content[512:612]
    assert places.read(f"{web}/t.tar") == content


def test_only_what_a_server_says_is_not_there_has_gone(
    put: Callable[..., EmbedReport], tmp_path: Path, web: str
) -> None:
    url = f"{web}/a.jpg"
    assert is_gone(url, inside=False)
    for fault in ([503] * 9, [403] * 9):
        Handler.fails |= {"HEAD /a.jpg": list(fault), "GET /a.jpg": list(fault)}
        assert not is_gone(url, inside=False)
    assert not is_gone("http://127.0.0.1:1/a.jpg", inside=False)
    Handler.fails |= {"HEAD /t.tar": [503] * 9, "GET /t.tar": [503] * 9}
    with pytest.raises(DataError, match="503"):
        put(f"{web}/t.tar")
    with pytest.raises(DataError, match="no such file"):
        put(f"{web}/u.tar")
