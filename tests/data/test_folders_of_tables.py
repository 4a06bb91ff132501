"""Folders that are tables, or hold other sources: read, or answered with what to give."""

import io
import tarfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import write_tar
from data_samples import captions, jpeg, listed

from mmalign.data import read_image, stream
from mmalign.errors import DataError
from mmalign.exchange.export import export


def test_a_folder_of_spark_is_a_table(tmp_path: Path) -> None:
    folder = tmp_path / "x.parquet"
    (folder / "year=2020").mkdir(parents=True)
    for i, name in enumerate(["part-00000-ab.snappy.parquet", "year=2020/part-00001-ab.parquet"]):
        pq.write_table(pa.table({"image": [jpeg(i)], "caption": [f"c {i}"]}), folder / name)
    (folder / "_SUCCESS").touch()
    (folder / "._SUCCESS.crc").touch()
    (folder / "_metadata.parquet").write_bytes(b"its own")
    records = listed(folder).records
    assert [(r.id, r.captions) for r in records] == [
        ("part-00000-ab.snappy/row 0", ("c 0",)),
        ("part-00001-ab/row 0", ("c 1",)),
    ]
    assert [read_image(r) for r in records] == [jpeg(0), jpeg(1)]
    assert [r.meta for r in records] == [{}, {"year": 2020}]


def test_an_export_of_our_own_is_a_source(store: Path, tmp_path: Path) -> None:
    export(store, tmp_path / "set", "hf")
    records = listed(tmp_path / "set").records
    assert len(records) == 96
    assert all(read_image(record)[8:12] == b"WEBP" and record.captions for record in records)
    assert records[0].id == "data-00000-of-00001/scenes/000000"
    assert records[0].id_from_source


def img2dataset(folder: Path) -> Path:
    """Write a folder as img2dataset does."""
    folder.mkdir()
    for i in range(2):
        members = [(f"{i}.jpg", jpeg(i)), (f"{i}.txt", b"words")]
        write_tar(folder / f"0000{i}.tar", members)
        pq.write_table(pa.table({"url": ["http://x/y.jpg"]}), folder / f"0000{i}.parquet")
        (folder / f"0000{i}_stats.json").write_text('{"count": 1}')
    return folder


def test_a_folder_of_img2dataset_says_how_to_give_it(tmp_path: Path) -> None:
    folder = img2dataset(tmp_path / "set")
    with pytest.raises(DataError, match=rf"no images found among .*: give '{folder}/\*\.tar'"):
        listed(folder)
    (tmp_path / "one").mkdir()
    pq.write_table(pa.table({"image": ["a.jpg"]}), tmp_path / "one" / "t.parquet")
    with pytest.raises(DataError, match=r"one: no images found among 1 \.parquet: give .*parquet'"):
        listed(tmp_path / "one")
    for pattern in ("*", "*.tar"):
        catalog = listed(f"{folder}/{pattern}")
        assert captions(catalog) == {"00000/0": ("words",), "00001/1": ("words",)}
        assert catalog.skips == []


def test_no_captions_at_all_are_said_with_the_columns_there_are(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.csv").write_text("image,description\na.jpg,red\n")
    (tmp_path / "b.jsonl").write_text('{"image": "b.jpg", "words": "x"}\n{"image": "c.jpg"}')
    pq.write_table(pa.table({"image": ["d.jpg"], "alt": ["x"]}), tmp_path / "c.parquet")
    sources = [str(tmp_path / name) for name in ("a.csv", "b.jsonl", "c.parquet")]
    assert len(list(stream(sources, ["captions"]))) == 4
    said = capsys.readouterr().err
    assert "no captions found: looked for under captions (see --caption-key); " in said
    told = ("a.csv has the columns image, description", "b.jsonl has the columns image, words",
            "c.parquet has the columns image, alt")  # fmt: skip
    assert all(words in said for words in told)
    with pytest.raises(DataError, match=r"no usable sample: 4 no caption; .* image, description"):
        listed(*sources, need_captions=True)
    for keys in ([], ["description"]):
        list(stream(sources, keys))
        assert "no captions found" not in capsys.readouterr().err


def test_what_must_be_made_a_source_first_says_how(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "x.tar.gz", "w:gz") as tar:
        tar.addfile(tarfile.TarInfo("a.jpg"), io.BytesIO())
    with pytest.raises(DataError, match=r"x\.tar\.gz: not a source: unpack it first"):
        listed(tmp_path / "x.tar.gz")
    (tmp_path / "x.xlsx").touch()
    with pytest.raises(DataError, match=r"x\.xlsx: not a source: save it as \.csv"):
        listed(tmp_path / "x.xlsx")
