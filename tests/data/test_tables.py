"""Tables as sources: parquet, csv, tsv and jsonl."""

import json
import tracemalloc
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data_samples import captions, jpeg, listed, reasons, side_8, write_folder

from mmalign.data import Record, Skip, decode_stream, read_image, stream
from mmalign.errors import DataError


@pytest.mark.parametrize("shape", ["bytes", "struct"])
def test_parquet_with_image_bytes(tmp_path: Path, shape: str) -> None:
    images: list[Any] = [jpeg(i) for i in range(5)]
    if shape == "struct":
        images = [{"bytes": b, "path": "x.jpg"} for b in images]
    table = pa.table({"image": images, "text": [f"t{i}" for i in range(5)], "year": range(5)})
    pq.write_table(table, tmp_path / "t.parquet", row_group_size=2)
    catalog = listed(tmp_path / "t.parquet")
    assert list(captions(catalog).values()) == [(f"t{i}",) for i in range(5)]
    assert len({r.id for r in catalog.records}) == 5
    assert catalog.records[3].meta == {"year": 3}
    # Backwards, as the cells of a row group are cached.
    assert [read_image(r) for r in catalog.records[::-1]] == [jpeg(i) for i in range(5)][::-1]


def test_parquet_written_anew_is_read_anew(tmp_path: Path) -> None:
    file = tmp_path / "t.parquet"
    for seeds in ([0, 1], [2, 3, 4]):
        pq.write_table(pa.table({"jpg": [jpeg(i) for i in seeds]}), file)
        assert [read_image(r) for r in listed(file).records] == [jpeg(i) for i in seeds]


def test_parquet_with_null_bytes_and_with_paths(tmp_path: Path) -> None:
    write_folder(tmp_path, {"a.jpg": jpeg(7)})
    pq.write_table(pa.table({"bytes": [jpeg(0), None]}), tmp_path / "t.parquet")
    lost = [i for _, i in decode_stream(listed(tmp_path / "t.parquet").records, side_8, 2)][1]
    assert isinstance(lost, Skip)
    assert lost.reason == "no image bytes"
    table = pa.table({"path": ["a.jpg", None], "captions": [["x", None, "y"], ["z"]]})
    pq.write_table(table, tmp_path / "p.parquet")
    catalog = listed(tmp_path / "p.parquet")
    assert captions(catalog) == {"p/a.jpg": ("x", "y")}
    assert read_image(catalog.records[0]) == jpeg(7)
    assert [s.reason for s in catalog.skips] == ["no image path"]


def test_csv_rows_of_one_image_are_one_sample(tmp_path: Path) -> None:
    write_folder(tmp_path, {"i/a.jpg": jpeg(0), "i/b.jpg": jpeg(1)})
    rows = 'id,image,caption,n\n1,i/a.jpg,"one, two",4\n2,i/b.jpg,b\u2028c,5\n3,i/a.jpg,three,6\n'
    (tmp_path / "c.csv").write_text(rows)
    catalog = listed(tmp_path / "c.csv")
    assert captions(catalog) == {"c/1": ("one, two", "three"), "c/2": ("b\u2028c",)}
    assert catalog.records[0].meta == {"n": 4}
    assert read_image(catalog.records[1]) == jpeg(1)


def test_equal_ids_in_a_table_lose_nothing(tmp_path: Path) -> None:
    (tmp_path / "c.csv").write_text("id,image,caption\n1,a.jpg,x\n1,b.jpg,y\n,c.jpg,z\n")
    catalog = listed(tmp_path / "c.csv")
    assert captions(catalog) == {"c/1": ("x",), f"{tmp_path}/b.jpg": ("y",), "c/c.jpg": ("z",)}
    assert catalog.skips == []


def test_an_id_column_names_samples_wherever_their_rows_are(tmp_path: Path) -> None:
    for order in ("ab", "xab"):
        table = pa.table({"image": [jpeg(ord(c)) for c in order], "key": list(order)})
        pq.write_table(table, tmp_path / "t.parquet")
        rows = {r.id: (r.row, r.id_from_source) for r in listed(tmp_path / "t.parquet").records}
        assert rows == {f"t/{c}": (order.index(c), True) for c in order}
    (tmp_path / "c.csv").write_text("id,image\n1,a.jpg\n1,b.jpg\n,c.jpg\n")
    given = [(r.id, r.id_from_source) for r in listed(tmp_path / "c.csv").records]
    # Where an id stands twice or not at all, the place of the image stands in for it.
    assert given == [("c/1", True), (f"{tmp_path}/b.jpg", True), ("c/c.jpg", False)]


def test_tsv_and_a_caption_that_is_not_utf8(tmp_path: Path) -> None:
    (tmp_path / "c.tsv").write_bytes(b"\xef\xbb\xbffile\ttitle\na.jpg\tfine\nb.jpg\tcaf\xe9\n")
    catalog = listed(tmp_path / "c.tsv")
    assert captions(catalog) == {"c/a.jpg": ("fine",), "c/b.jpg": ()}
    assert reasons(catalog.skips) == {
        "c/b.jpg": "caption is not UTF-8 (byte 3): save the table as UTF-8"
    }


def test_paths_of_windows_are_found_elsewhere(tmp_path: Path) -> None:
    write_folder(tmp_path, {"i/sub/a.jpg": jpeg(0), "i\\b.jpg": jpeg(1)})
    (tmp_path / "c.csv").write_text("image\ni\\sub\\a.jpg\ni\\b.jpg\ni\\gone.jpg\n")
    records = listed(tmp_path / "c.csv").records
    assert [read_image(r) for r in records[:2]] == [jpeg(0), jpeg(1)]
    assert len(records) == 3


def test_an_open_quote_does_not_swallow_rows(tmp_path: Path) -> None:
    (tmp_path / "c.csv").write_text('image,caption\na.jpg,x\nb.jpg,"y\nc.jpg,z\n')
    with pytest.raises(DataError, match=r"c\.csv: .* starts in line 3: unexpected end .* quote"):
        listed(tmp_path / "c.csv")


def test_jsonl_with_broken_lines(tmp_path: Path) -> None:
    lines = ['{"id": 0, "url": "a.jpg", "captions": ["x", "y"]}', "{torn", "", "[1]"]
    (tmp_path / "c.jsonl").write_text("\n".join([*lines, '{"url": "b.jpg"}', '{"id": 5}']))
    catalog = listed(tmp_path / "c.jsonl")
    assert captions(catalog) == {"c/0": ("x", "y"), "c/b.jpg": ()}
    rows = {s.uri.rsplit("=", 1)[1]: s.reason.split(":")[0] for s in catalog.skips}
    assert rows == {
        "1": "line is not valid JSON",
        "3": "line is not a JSON object",
        "5": "no image path",
    }


@pytest.mark.parametrize("name", ["t.csv", "t.jsonl", "t.json", "t.parquet"])
def test_memory_does_not_grow_with_a_table(tmp_path: Path, name: str) -> None:
    rows = [{"image": f"{i % 1500}.jpg", "caption": f"{i} " + "x" * 3000} for i in range(3000)]
    lines = [json.dumps(row) for row in rows]
    if name == "t.parquet":
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / name, row_group_size=100)
    elif name == "t.csv":
        lines = ["image,caption", *(f"{row['image']},{row['caption']}" for row in rows)]
    content = f"[{','.join(lines)}]" if name == "t.json" else "\n".join(lines)
    if name != "t.parquet":
        (tmp_path / name).write_text(content)
    del content, rows, lines
    tracemalloc.start()
    try:
        found = stream([str(tmp_path / name)], ["captions"])
        count = sum(len(record.captions) for record in found if isinstance(record, Record))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert count == 3000
    assert peak < 4_500_000  # half of the table


def test_missing_columns_are_listed(tmp_path: Path) -> None:
    (tmp_path / "c.csv").write_text("picture,words\na.jpg,x\n")
    with pytest.raises(
        DataError, match=r"no image column; the table has picture, words; looked for im"
    ):
        listed(tmp_path / "c.csv")
    (tmp_path / "d.csv").write_text("image,words\na.jpg,x\n")
    with pytest.raises(DataError, match="no caption"):
        listed(tmp_path / "d.csv", need_captions=True)
    assert captions(listed(tmp_path / "d.csv", caption_keys=("words",))) == {"d/a.jpg": ("x",)}


@pytest.mark.parametrize("name", ["t.parquet", "t.csv", "t.jsonl"])
def test_a_broken_table_is_one_line(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"PAR1\x00\x01" * 10)
    with pytest.raises(DataError, match=name) as caught:
        listed(tmp_path / name)
    assert "\n" not in str(caught.value)
