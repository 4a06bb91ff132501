"""Images inside tables: every type of column, each group of rows read once, in little memory."""

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data_samples import jpeg, listed, reasons, side_8, write_folder

from mmalign.data import Skip, decode_stream, read_image, row_images
from mmalign.data.arrow_tables import ParquetTable
from mmalign.errors import DataError

IMAGES = [jpeg(i) for i in range(3)]


def as_lists(kind: Any) -> pa.Array:
    signed = pa.types.is_int8(kind.value_type)
    return pa.array([[b - 256 * (signed and b > 127) for b in image] for image in IMAGES], kind)


LENGTH = len(IMAGES[0])
COLUMNS = {
    **{str(k): pa.array(IMAGES, k) for k in (pa.binary(), pa.large_binary(), pa.binary_view())},
    "dictionary": pa.array(IMAGES).dictionary_encode(),
    "list<uint8>": as_lists(pa.list_(pa.uint8())),
    "large_list<int8>": as_lists(pa.large_list(pa.int8())),
    "struct": pa.array([{"bytes": image, "path": "x.jpg"} for image in IMAGES]),
    "struct of bytes": pa.array([{"bytes": image} for image in IMAGES]),
}


@pytest.mark.parametrize("ending", [".parquet", ".arrow", ".feather"])
@pytest.mark.parametrize("kind", COLUMNS)
def test_images_of_every_type_are_read(tmp_path: Path, kind: str, ending: str) -> None:
    table = pa.table({"image": COLUMNS[kind], "caption": ["a", "b", "c"]})
    write_table(table, tmp_path / f"t{ending}")
    records = listed(tmp_path / f"t{ending}").records
    assert [read_image(r) for r in records] == IMAGES
    assert [(r.id, r.captions) for r in records] == [
        (f"t/row {i}", (c,)) for i, c in enumerate("abc")
    ]


def write_table(table: pa.Table, file: Path) -> None:
    """Write a parquet file, an Arrow stream, or a packed Arrow file, in groups of two rows."""
    if file.suffix == ".parquet":
        pq.write_table(table, file, row_group_size=2)
        return
    new = pa.ipc.new_stream if file.suffix == ".arrow" else pa.ipc.new_file
    packed = pa.ipc.IpcWriteOptions(compression="zstd" if file.suffix == ".feather" else None)
    with new(file, table.schema, options=packed) as out:
        out.write_table(table, max_chunksize=2)


def test_structs_with_paths_lead_to_files(tmp_path: Path) -> None:
    write_folder(tmp_path, {"i/a.jpg": IMAGES[0], "i/b.jpg": IMAGES[1]})
    only = [{"bytes": None, "path": "i/a.jpg"}, {"bytes": None, "path": "i/b.jpg"}]
    pq.write_table(pa.table({"image": only}), tmp_path / "only.parquet")
    pq.write_table(
        pa.table({"image": [{"path": "i/a.jpg"}, {"path": None}]}), tmp_path / "path.parquet"
    )
    both = [*only, {"bytes": IMAGES[2], "path": "c.jpg"}, {"bytes": None, "path": None}]
    both.append({"bytes": None, "path": "gone.jpg"})
    pq.write_table(pa.table({"image": both}), tmp_path / "both.parquet")

    records = listed(tmp_path / "only.parquet").records
    assert [r.uri for r in records] == [f"{tmp_path}/i/a.jpg", f"{tmp_path}/i/b.jpg"]
    assert [read_image(r) for r in records] == IMAGES[:2]
    catalog = listed(tmp_path / "path.parquet")
    assert [read_image(r) for r in catalog.records] == IMAGES[:1]
    assert list(reasons(catalog.skips).values()) == ["no image path"]
    records = listed(tmp_path / "both.parquet").records
    found = [item for _, item in decode_stream(records, side_8, 2)]
    assert [item.reason for item in found if isinstance(item, Skip)] == [
        "no image bytes",
        "cannot be read: No such file or directory",
    ]
    assert [read_image(r) for r in records[:3]] == IMAGES


@pytest.mark.parametrize(
    ("values", "kind"),
    [([1], "int64"), ([1.5], "double"), ([["a.jpg"]], "list<"), ([{"a": 1}], "struct<a: int64>")],
)
def test_what_is_no_image_is_named(tmp_path: Path, values: list[Any], kind: str) -> None:
    pq.write_table(pa.table({"image": values}), tmp_path / "t.parquet")
    with pytest.raises(DataError, match=f"'image' has type {kind}.*which holds neither images nor"):
        listed(tmp_path / "t.parquet")


def test_a_column_that_is_no_image_gives_way_to_one_that_is(tmp_path: Path) -> None:
    pq.write_table(pa.table({"image": [7], "jpg": [IMAGES[0]]}), tmp_path / "t.parquet")
    (record,) = listed(tmp_path / "t.parquet").records
    assert read_image(record) == IMAGES[0]
    assert record.meta == {"image": 7}


@pytest.fixture
def groups_read(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The groups that were read, and how many were being read at the same time."""
    read: list[int] = []
    running = threading.Semaphore(1)
    real = ParquetTable.chunks

    def chunks(self: ParquetTable, group: int, column: str) -> Iterator[Any]:
        read.append(group)
        assert running.acquire(blocking=False), "two groups are read at the same time"
        yield from real(self, group, column)
        running.release()

    monkeypatch.setattr(ParquetTable, "chunks", chunks)
    return read


@pytest.mark.parametrize("order", ["as stored", "at random"])
def test_each_group_is_read_once_whoever_asks(
    tmp_path: Path, groups_read: list[int], order: str
) -> None:
    images = [f"image {i}".encode() for i in range(400)]
    pq.write_table(pa.table({"image": images}), tmp_path / "t.parquet", row_group_size=20)
    records = listed(tmp_path / "t.parquet").records
    numbers = [i if order == "as stored" else i * 147 % 400 for i in range(400)]
    with ThreadPoolExecutor(18) as threads:
        found = list(threads.map(lambda i: read_image(records[i]), numbers))
    assert found == [images[i] for i in numbers]
    assert sorted(groups_read) == list(range(20))


def test_a_group_is_read_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mmalign.data.arrow_tables.CHUNK_BYTES", 10_000)
    images = [bytes([i]) * 1000 for i in range(100)]
    pq.write_table(pa.table({"image": images}), tmp_path / "t.parquet", use_dictionary=False)
    with pq.ParquetFile(tmp_path / "t.parquet") as file:
        sizes = [len(chunk) for chunk in ParquetTable(file).chunks(0, "image")]
    assert sum(sizes) == 100
    assert max(sizes) <= 10


def test_groups_leave_the_disk_when_others_need_the_room(
    tmp_path: Path, groups_read: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(row_images, "CACHED_BYTES", 50)
    images = [f"image {i}".encode() for i in range(100, 200)]
    pq.write_table(pa.table({"image": images}), tmp_path / "t.parquet", row_group_size=2)
    records = listed(tmp_path / "t.parquet").records
    assert [read_image(r) for r in records] == images
    assert [read_image(records[i]) for i in (99, 98, 0)] == [images[i] for i in (99, 98, 0)]
    assert groups_read == [*range(50), 0]


def test_a_table_of_many_groups_keeps_few_files_open(tmp_path: Path) -> None:
    count = 3 * row_images.CACHED_GROUPS
    table = pa.table({"image": [b"x%d" % i for i in range(count)]})
    pq.write_table(table, tmp_path / "t.parquet", row_group_size=1)
    opened: list[Any] = []
    real = row_images.files.scratch_file

    def scratch() -> Any:
        opened.append(real())
        return opened[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(row_images.files, "scratch_file", scratch)
        for row in (*range(count), *range(count)):
            path = str(tmp_path / "t.parquet")
            assert row_images.read_row_image(path, row, "image") == b"x%d" % row
    assert len(opened) == 2 * count
    assert sum(not file.closed for file in opened) <= row_images.CACHED_GROUPS


def test_a_group_that_breaks_off_costs_its_rest(tmp_path: Path) -> None:
    images = [bytes([i]) * 1000 for i in range(50)]
    table = pa.table({"image": images})
    options = {"row_group_size": 25, "use_dictionary": False, "compression": "none"}
    pq.write_table(table, tmp_path / "t.parquet", **options, data_page_size=2000,
                   write_batch_size=5, write_page_checksum=False)  # fmt: skip
    content = bytearray((tmp_path / "t.parquet").read_bytes())
    at = content.find(images[30])
    header = content.rfind(images[29], 0, at) + 1000
    content[header : header + 20] = b"\xff" * 20
    (tmp_path / "t.parquet").write_bytes(content)
    found = [i for _, i in decode_stream(listed(tmp_path / "t.parquet").records, lambda b: b, 4)]
    lost = {i: item.reason for i, item in enumerate(found) if isinstance(item, Skip)}
    assert found[:25] == images[:25]
    assert set(range(30, 50)) <= set(lost)
    assert {reason.split(":")[0] for reason in lost.values()} == {
        "rows of the table cannot be read"
    }


def test_a_full_disk_is_said_with_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> Any:
        raise OSError(28, "No space left on device")

    pq.write_table(pa.table({"image": IMAGES}), tmp_path / "t.parquet")
    (record, *_) = listed(tmp_path / "t.parquet").records
    monkeypatch.setattr(row_images.files, "scratch_file", full)
    with pytest.raises(DataError, match=r"t\.parquet: no space for its images in /.*TMPDIR"):
        read_image(record)


def test_a_table_that_became_shorter_is_no_bug(tmp_path: Path) -> None:
    for count in (3, 1):
        pq.write_table(pa.table({"image": IMAGES[:count]}), tmp_path / "t.parquet")
        if count == 3:
            old = listed(tmp_path / "t.parquet").records
    row_images.forget(str(tmp_path / "t.parquet"))
    ((_, lost),) = decode_stream(old[2:], side_8, 1)
    assert isinstance(lost, Skip)
    assert lost.reason == "the table has no row 2 any more"
