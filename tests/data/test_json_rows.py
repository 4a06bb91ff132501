"""JSON tables: lines or arrays; what is neither says so, and a bad line costs one line."""

import gzip
import json
from pathlib import Path

import pytest
from data_samples import captions, listed, reasons

from mmalign.data import json_rows
from mmalign.errors import DataError

ROWS = [{"image": f"{i}.jpg", "caption": f"c {i}", "n": [i, {"{": "]"}]} for i in range(40)]
LINES = "\n".join(map(json.dumps, ROWS))
ALL = {f"t/{i}.jpg": (f"c {i}",) for i in range(40)}


@pytest.mark.parametrize("name", ["t.jsonl", "t.ndjson", "t.json", "t.jsonl.gz"])
@pytest.mark.parametrize(
    "content",
    [
        LINES,
        LINES.replace("\n", "\r\n\r\n"),
        "\ufeff" + LINES,
        json.dumps(ROWS),
        json.dumps(ROWS, indent=1),
        " \n[" + LINES.replace("\n", " ,\n") + "\n]\n",
    ],
    ids=["lines", "crlf", "bom", "array", "indented", "array of lines"],
)
@pytest.mark.parametrize("chunk", [7, 1 << 18])
def test_lines_and_arrays_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, content: str, chunk: int
) -> None:
    monkeypatch.setattr(json_rows, "CHUNK", chunk)
    whole = content.encode()
    (tmp_path / name).write_bytes(gzip.compress(whole) if name.endswith(".gz") else whole)
    catalog = listed(tmp_path / name)
    assert captions(catalog) == ALL
    assert [r.meta["n"] for r in catalog.records] == [row["n"] for row in ROWS]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("", "is empty"),
        (" \n", "is empty"),
        ('{\n "image": "a.jpg"\n}', "contains one JSON object over several lines"),
        ('{"images": [\n{"file_name": "a.jpg"}], "annotations": []}', "over several lines"),
        ('{"count": 3, "bytes_": 5}', "no image column; the table has count, bytes_; looked for"),
        ("3\n4\n", "no image column; the table has no columns; looked for"),
        ('[{"image": "a.jpg"}, {"image', "cannot be read as .json"),
        ('[{"image": "a.jpg"} "b"', "cannot be read as .json"),
        ("[" + '{"a":' * 100_000, "cannot be read as .json: element is nested too deeply"),
        ("[1, 2]", "no image column"),
    ],
)
def test_what_is_no_table_says_why(tmp_path: Path, content: str, reason: str) -> None:
    (tmp_path / "t.json").write_text(content)
    with pytest.raises(DataError, match=reason) as caught:
        listed(tmp_path / "t.json")
    assert len(str(caught.value)) < 600
    assert "\n" not in str(caught.value)


def test_hostile_lines_cost_a_line_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_rows, "MAX_LINE", 1 << 18)
    lines = {
        "too long": '{"image": "' + "x" * (1 << 18) + '"}',
        "no JSON": '{"image": "a.jpg"',
        "too deep": '{"image": "deep.jpg", "n": ' + "[" * 50_000 + "]" * 50_000 + "}",
        "deep": '{"image": "deep.jpg", "n": ' + "[" * 90 + "]" * 90 + ', "m": 1}',
        "a long number": '{"image": "long.jpg", "n": ' + "9" * 5000 + "}",
        "a list": "[]",
        "a NUL": '{"image": "a\\u0000.jpg"}',
        "a list of images": '{"image": ["a.jpg"]}',
        "a long path": json.dumps({"image": "x" * 5000}),
        "escapes": '{"image": "\\u001b[31m.jpg", "id": "a\\nb\\u009b", "\\u0007": 1}',
        "half": '{"image": "half.jpg", "caption": "\\ud83d", "n": "\\ud83d"}',
        "NaN": '{"image": "nan.jpg", "caption": NaN, "n": NaN, "m": [1e999, -Infinity]}',
        "good": '{"image": "good.jpg", "caption": "c"}',
    }
    (tmp_path / "t.jsonl").write_text("\n".join(lines.values()))
    catalog = listed(tmp_path / "t.jsonl")
    assert {r.id: (r.captions, r.meta) for r in catalog.records} == {
        "t/deep.jpg": ((), {"m": 1}),
        "t/a\\nb\\x9b": ((), {"\x07": 1}),
        "t/half.jpg": ((), {"n": "\\ud83d"}),
        "t/nan.jpg": ((), {"n": None, "m": [None, None]}),
        "t/good.jpg": (("c",), {}),
    }
    numbers = {int(s.uri.rpartition("=")[2]) for s in catalog.skips if not s.sample_is_used}
    refused = {name for i, name in enumerate(lines) if i in numbers}
    assert refused == {
        "too long", "no JSON", "too deep", "a long number", "a list", "a NUL", "a list of images",
        "a long path",
    }  # fmt: skip
    assert reasons([s for s in catalog.skips if s.sample_is_used]) == {
        "t/half.jpg": "caption is not UTF-8 (character 0): save the table as UTF-8"
    }
    assert all(len(s.reason) < 200 for s in catalog.skips)


def test_what_was_left_out_of_metadata_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    row = {"image": "a.jpg", "long": "x" * 2_000_000, "list": list(range(300_000)), "n": 1}
    (tmp_path / "t.jsonl").write_text(json.dumps(row))
    (record,) = listed(tmp_path / "t.jsonl").records
    assert record.meta == {"n": 1}
    said = capsys.readouterr().err
    assert "column 'long': more than 1,048,576 characters: left out of the metadata 1 times" in said
    assert "column 'list': more than 1,048,576 characters: left out of the metadata 1 times" in said
