"""Tables through the commands: columns by name, filters over numbers, and what is said of both."""

import csv
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from command import answer, call, complaint
from conftest import jpeg


@pytest.fixture
def shop(tmp_path: Path) -> Path:
    """A csv of five products, with columns that nobody would guess."""
    with (tmp_path / "shop.csv").open("w", newline="", encoding="utf-8") as file:
        write = csv.writer(file).writerow
        write(["photo", "Description", "price", "code"])
        for i in range(5):
            (tmp_path / f"{i}.jpg").write_bytes(jpeg(i))
            write([f"{i}.jpg", f"product {i}", ["19.50", "5", "", "100", "20.00"][i], f"00{i}"])
    return tmp_path / "shop.csv"


@pytest.mark.slow
def test_columns_are_named_by_options(run: Path, shop: Path, tmp_path: Path) -> None:
    said = complaint(1, "embed", "--model", run, "--data", shop, "--out", tmp_path / "s")
    assert "no image column; the table has photo, Description, price, code" in said
    assert "--image-column" in said
    columns = ("--image-column", "photo", "--caption-key", "description")
    data = ("--model", run, "--data", shop, *columns)
    assert answer("embed", *data, "--out", tmp_path / "s")["added"] == 5
    assert answer("evaluate", *data)["captions"] == 5
    found = answer("search", tmp_path / "s", "x", "--where", "price < 20", "--model", run)
    assert {hit["captions"][0] for hit in found["hits"]} == {"product 0", "product 1"}
    found = answer("search", tmp_path / "s", "x", "--where", "code = '003'", "--model", run)
    assert [hit["captions"] for hit in found["hits"]] == [["product 3"]]
    words = ("train", "--data", shop, "--out", tmp_path / "r", "--preset", "nano", *columns)
    assert answer(*words, "--set", "batch_size=4", "--set", "epochs=1")["step"] >= 1
    assert 'image_column = "photo"' in (tmp_path / "r" / "config.toml").read_text()


def test_labels_are_found_like_columns(run: Path, shop: Path) -> None:
    columns = ("--image-column", "photo", "--caption-key", "description")
    words = ("evaluate", "--model", run, "--data", shop, *columns, "--classes", "000,001")
    assert answer(*words, "--label-key", "Code")["acc1"] >= 0
    said = complaint(1, *words, "--label-key", "kode")
    assert "no sample has a field 'kode': did you mean 'code'?" in said


@pytest.mark.slow
def test_times_decimals_and_bytes_of_a_table_can_be_filtered(run: Path, tmp_path: Path) -> None:
    table: dict[str, Any] = {
        "image": [jpeg(i) for i in range(3)],
        "taken": pa.array([0, 1_600_000_000, None], pa.timestamp("s")),
        "day": pa.array([0, 18_600, None], pa.date32()),
        "cost": pa.array(["1.10", "12.50", None]).cast(pa.decimal128(10, 2)),
        "sha": [b"\xff\x00", b"\xff\x01", None],
        "score": [float("nan"), 2.5, float("inf")],
    }
    pq.write_table(pa.table(table), tmp_path / "t.parquet")
    store = tmp_path / "s"
    words = ("--model", run, "--data", tmp_path / "t.parquet", "--out", store)
    assert answer("embed", *words)["added"] == 3
    for where, rows in (
        ("taken > '2020-06-01'", [1]),
        ("day = '2020-12-04'", [1]),
        ("cost < 10", [0]),
        ("sha = 'ff01'", [1]),
        ("score > 1", [1]),
        ("score is null", [0, 2]),
        ("taken is null", [2]),
    ):
        found = answer("search", store, "x", "--model", run, "--where", where)
        assert sorted(hit["id"] for hit in found["hits"]) == [f"t/row {i}" for i in rows], where


@pytest.mark.parametrize("ending", [".csv", ".jsonl", ".parquet"])
def test_a_typo_in_a_column_is_answered_once(run: Path, tmp_path: Path, ending: str) -> None:
    rows = [{"image": f"{i}.jpg", "caption": f"c {i}", "n": i} for i in range(3)]
    for row in rows:
        (tmp_path / str(row["image"])).write_bytes(jpeg(row["n"]))
    tables = [tmp_path / f"{name}{ending}" for name in "ab"]
    for file in tables:
        if ending == ".parquet":
            pq.write_table(pa.Table.from_pylist(rows), file)
        elif ending == ".jsonl":
            file.write_text("\n".join(map(json.dumps, rows)))
        else:
            lines = [f"{row['image']},{row['caption']},{row['n']}" for row in rows]
            file.write_text("\n".join(["image,caption,n", *lines]))
    data = ("--data", tables[0], "--data", tables[1])
    words = ("embed", "--model", run, *data, "--out", tmp_path / "s", "--caption-key", "captoin")
    result = call(*words)
    assert result.exit_code == 0
    assert result.stderr.count("no column is called 'captoin': did you mean 'caption'") == 1
