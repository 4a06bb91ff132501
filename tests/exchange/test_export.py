"""Export: what other programs read, whole or not at all."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from small_store import CARD, DIM, fill, row, thumbnail

from mmalign.errors import StoreError, UsageError
from mmalign.exchange import export as exporting
from mmalign.exchange import parts
from mmalign.exchange.export import export
from mmalign.exchange.imports import import_parts
from mmalign.store import delete, open_store

COUNT = 25


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """25 rows in three shards, of which three rows are deleted."""
    path = tmp_path_factory.mktemp("export") / "s.store"
    fill(path, (row(n, label=("dress", "shoe")[n % 2], 名=n) for n in range(COUNT)))
    delete(path, ["id0", "id11", "id24"])
    return path


LIVE = [n for n in range(COUNT) if n not in (0, 11, 24)]


def test_parquet_has_every_column_of_live_rows(small: Path, tmp_path: Path) -> None:
    out = tmp_path / "s.parquet"
    report = export(small, out, "parquet")
    table = pq.read_table(out)
    assert report.rows == len(table) == len(LIVE)
    assert report.bytes == out.stat().st_size
    assert table["id"].to_pylist() == [f"id{n}" for n in LIVE]
    assert table["captions"].to_pylist() == [list(row(n).captions) for n in LIVE]
    assert json.loads(table["meta"][3].as_py()) == {"label": "dress", "名": 4}
    assert set(open_store(small).rows([1], ["stamp", "checksum"])[0]) <= set(table.column_names)
    assert "thumbnail" not in table.column_names
    vectors = table["image_embedding"].combine_chunks()
    assert vectors.type == pa.list_(pa.float16(), DIM)
    for n, vector in zip(LIVE, vectors.flatten().to_numpy().reshape(-1, DIM), strict=True):
        assert np.allclose(vector, row(n).vectors["image"][0], atol=2e-3)
    for n, texts in zip(LIVE, table["text_embedding"].to_pylist(), strict=True):
        assert np.allclose(np.reshape(texts, (-1, DIM)), row(n).vectors["text"], atol=2e-3)
    file = pq.ParquetFile(out)
    assert file.num_row_groups == 3
    assert file.metadata.row_group(0).column(0).compression == "ZSTD"
    assert json.loads(file.schema_arrow.metadata[b"mmalign.model"])["identity"] == CARD.identity


def test_parquet_with_thumbnails(small: Path, tmp_path: Path) -> None:
    export(small, tmp_path / "s.parquet", "parquet", thumbnails=True)
    held = pq.read_table(tmp_path / "s.parquet")["thumbnail"].to_pylist()
    assert held == [thumbnail(n) for n in LIVE]


def test_only_rows_for_which_sql_is_true(small: Path, tmp_path: Path) -> None:
    pytest.importorskip("duckdb", reason="rows by SQL need DuckDB")
    report = export(small, tmp_path / "s.parquet", "parquet", where="label = 'shoe' and 名 > 9")
    ids = pq.read_table(tmp_path / "s.parquet")["id"].to_pylist()
    assert ids == [f"id{n}" for n in LIVE if n % 2 and n > 9]
    assert report.rows == len(ids)
    with pytest.raises(StoreError, match="no rows to export: no row matches 名 > 99"):
        export(small, tmp_path / "none", "npy", where="名 > 99")
    assert [p.name for p in tmp_path.iterdir()] == ["s.parquet"]


def test_npy_parts_are_aligned_row_by_row(
    small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    held, out = open_store(small), tmp_path / "parts"
    numbers = np.flatnonzero(held.live)
    ticks: list[int] = []
    parts.write_parts(held, numbers, out, ticks.append, rows_per_part=2)
    assert sum(ticks) == len(LIVE)
    names = sorted(p.name for p in (out / "img_emb").iterdir())
    assert names == [f"img_emb_{n:02d}.npy" for n in range(11)]
    for part in range(11):
        images = np.load(out / "img_emb" / f"img_emb_{part:02d}.npy")
        texts = np.load(out / "text_emb" / f"text_emb_{part:02d}.npy")
        told = pq.read_table(out / "metadata" / f"metadata_{part:02d}.parquet").to_pylist()
        assert images.dtype == texts.dtype == np.float16
        for n, image, text, record in zip(
            LIVE[2 * part : 2 * part + 2], images, texts, told, strict=True
        ):
            wanted = row(n)
            assert (record["image_path"], record["key"]) == (wanted.uri, wanted.id)
            assert record["captions"] == list(wanted.captions)
            assert record["caption"] == (wanted.captions[0] if wanted.captions else None)
            assert np.allclose(image, wanted.vectors["image"][0], atol=2e-3)
            first = wanted.vectors["text"][0] if wanted.captions else np.zeros(DIM)
            assert np.allclose(text, first, atol=2e-3)
    report = export(small, tmp_path / "again", "npy")
    beyond = sum(n % 3 == 2 for n in LIVE)
    assert report.captions_left_out == beyond
    assert report.captions == sum(n % 3 > 0 for n in LIVE)
    assert (
        f"{beyond} more captions are in the metadata, without a vector" in capsys.readouterr().err
    )
    assert sorted(p.name for p in (tmp_path / "again").rglob("*.*")) == [
        "img_emb_0.npy",
        "metadata_0.parquet",
        "text_emb_0.npy",
    ]


def test_npy_without_captions_has_no_texts(tmp_path: Path) -> None:
    fill(tmp_path / "s.store", (row(n, 0) for n in range(5)))
    export(tmp_path / "s.store", tmp_path / "out", "npy")
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["img_emb", "metadata"]


def test_a_dataset_folder_tells_what_its_columns_are(small: Path, tmp_path: Path) -> None:
    out = tmp_path / "hf"
    assert export(small, out, "hf").rows == len(LIVE)
    state = json.loads((out / "state.json").read_bytes())
    info = json.loads((out / "dataset_info.json").read_bytes())
    names = [f["filename"] for f in state["_data_files"]]
    assert names == [f"data-0000{i}-of-00003.arrow" for i in range(3)]
    table = pa.concat_tables(pa.ipc.open_stream(out / name).read_all() for name in names)
    assert table.column_names == list(info["features"])
    assert table["id"].to_pylist() == [f"id{n}" for n in LIVE]
    for n, image in zip(LIVE, table["image"].to_pylist(), strict=True):
        assert image == ({"bytes": thumbnail(n), "path": None} if thumbnail(n) else None)
    assert info["features"]["image"] == {"_type": "Image"}
    vector = {"feature": {"dtype": "float16", "_type": "Value"}, "length": DIM, "_type": "Sequence"}
    assert info["features"]["image_embedding"] == vector
    assert info["features"]["text_embedding"] == {"feature": vector, "_type": "Sequence"}


def test_a_dataset_without_thumbnails_has_no_images(tmp_path: Path) -> None:
    fill(tmp_path / "s.store", [row(0), row(4)])
    export(tmp_path / "s.store", tmp_path / "out", "hf")
    info = json.loads((tmp_path / "out" / "dataset_info.json").read_bytes())
    assert "image" not in info["features"]


def arrow_type(feature: dict[str, Any]) -> pa.DataType:
    """Return the type that the library expects of a column, from its description of it."""
    match feature:
        case {"_type": "Image"}:
            return pa.struct({"bytes": pa.binary(), "path": pa.string()})
        case {"_type": "Sequence", "feature": inner}:
            return pa.list_(arrow_type(inner), feature.get("length", -1))
        case {"_type": "Value", "dtype": str(name)}:
            return {"string": pa.string(), "float16": pa.float16()}[name]
    raise AssertionError(feature)


@pytest.mark.parametrize("pictures", [True, False])
def test_a_dataset_folder_is_what_the_library_reads(tmp_path: Path, pictures: bool) -> None:
    """As `load_from_disk` goes about it, which refuses columns of other types than described."""
    fill(tmp_path / "s.store", (row(n) for n in range(0, 40, 1 if pictures else 4)))
    export(tmp_path / "s.store", tmp_path / "hf", "hf")
    state = json.loads((tmp_path / "hf" / "state.json").read_bytes())
    info = json.loads((tmp_path / "hf" / "dataset_info.json").read_bytes())
    assert {
        "_data_files", "_fingerprint", "_format_columns", "_format_kwargs", "_format_type",
        "_output_all_columns", "_split",
    } == set(state)  # fmt: skip
    made = [tmp_path / "hf" / f["filename"] for f in state["_data_files"]]
    assert {*(tmp_path / "hf").iterdir()} - {*made} == {
        tmp_path / "hf" / "state.json",
        tmp_path / "hf" / "dataset_info.json",
    }
    table = pa.concat_tables(pa.ipc.open_stream(pa.memory_map(str(f))).read_all() for f in made)
    table.validate(full=True)
    assert ("image" in table.column_names) == pictures
    assert dict(zip(table.column_names, table.schema.types, strict=True)) == {
        name: arrow_type(feature) for name, feature in info["features"].items()
    }
    assert len(table) == len(open_store(tmp_path / "s.store"))
    for n, vector in zip(
        table["id"].to_pylist(), table["image_embedding"].to_pylist(), strict=True
    ):
        assert np.allclose(vector, row(int(n[2:])).vectors["image"][0], atol=2e-3)


def test_the_library_opens_a_dataset(small: Path, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets", reason="the Hugging Face library is not installed")
    export(small, tmp_path / "hf", "hf")
    held = datasets.load_from_disk(str(tmp_path / "hf"))
    assert held["id"][:] == [f"id{n}" for n in LIVE]
    assert held[0]["image"].size == (6, 4)
    assert np.allclose(held[0]["image_embedding"], row(LIVE[0]).vectors["image"][0], atol=2e-3)


@pytest.mark.parametrize("kind", ["parquet", "npy", "hf"])
def test_what_exists_is_never_written_over(small: Path, tmp_path: Path, kind: Any) -> None:
    out = tmp_path / "out"
    out.write_text("mine")
    with pytest.raises(UsageError, match="out: already exists"):
        export(small, out, kind)
    out.unlink()
    out.mkdir()
    with pytest.raises(UsageError, match="out: already exists"):
        export(small, out, kind)
    assert list(tmp_path.iterdir()) == [out]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
@pytest.mark.parametrize("kind", ["parquet", "npy", "hf"])
def test_an_export_that_breaks_leaves_nothing(
    small: Path, tmp_path: Path, kind: Any, error: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Broken:
        def __enter__(self) -> "Broken":
            return self

        def __exit__(self, *_: object) -> None: ...

        def update(self, rows: int) -> None:
            raise error

    monkeypatch.setattr(exporting, "bar", lambda *_: Broken())
    with pytest.raises(type(error)):
        export(small, tmp_path / "out", kind)
    assert list(tmp_path.iterdir()) == []


def test_a_place_taken_meanwhile_is_not_written_over(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = exporting.write_parquet

    def slow(*words: Any, **named: Any) -> None:
        written(*words, **named)
        (tmp_path / "out").write_text("mine")

    monkeypatch.setattr(exporting, "write_parquet", slow)
    with pytest.raises(UsageError, match="out: already exists"):
        export(small, tmp_path / "out", "parquet")
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    assert (tmp_path / "out").read_text() == "mine"


def test_export_needs_no_torch(small: Path, tmp_path: Path) -> None:
    code = (
        "import sys; from mmalign.exchange.export import export\n"
        "export(sys.argv[1], sys.argv[2], 'npy')\n"
        "assert 'torch' not in sys.modules and 'faiss' not in sys.modules"
    )
    words = [sys.executable, "-c", code, str(small), str(tmp_path / "out")]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_pictures_have_no_place_in_npy(small: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="npy format cannot hold pictures"):
        export(small, tmp_path / "out", "npy", thumbnails=True)


def test_another_store_of_the_same_vectors_is_searched_alike(
    store: Path, run: Path, tmp_path: Path
) -> None:
    """Out and in again, under the model that made them."""
    from mmalign.search.searcher import Searcher

    export(store, tmp_path / "parts", "npy")
    report = import_parts(tmp_path / "parts", tmp_path / "b.store", run)
    assert (report.added, report.failed) == (96, 0)
    for query in ("a red circle", "蓝色"):
        one, two = (Searcher.open(s).search(query, 5) for s in (store, tmp_path / "b.store"))
        assert [h.id for h in one] == [h.id for h in two]
        assert np.allclose([h.score for h in one], [h.score for h in two], atol=2e-3)
