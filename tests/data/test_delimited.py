"""Tables of text as people have them: separators, encodings, quotes, numbers, headers or none."""

import csv
import gzip
import random
from pathlib import Path
from typing import Any

import pytest
from data_samples import captions, listed, reasons

from mmalign.data import Skip, stream
from mmalign.data.columns import IMAGE_COLUMNS
from mmalign.errors import DataError

ROWS = 'image{s}caption{s}price\na.jpg{s}"red{s} on white"{s}7\nb.jpg{s}blue{s}12\n'


@pytest.mark.parametrize("separator", [",", ";", "\t", "|"])
@pytest.mark.parametrize("start", ["", "sep={s}\n", "\ufeff", "\ufeffsep={s}\r\n"])
@pytest.mark.parametrize("name", ["t.csv", "t.tsv"])
def test_separators_are_found(tmp_path: Path, separator: str, start: str, name: str) -> None:
    text = (start + ROWS).replace("{s}", separator)
    (tmp_path / name).write_text(text, encoding="utf-8")
    catalog = listed(tmp_path / name)
    assert captions(catalog) == {"t/a.jpg": (f"red{separator} on white",), "t/b.jpg": ("blue",)}
    assert [r.meta for r in catalog.records] == [{"price": 7}, {"price": 12}]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be",
                                      "utf-32"])  # fmt: skip
@pytest.mark.parametrize("ends", ["\n", "\r\n", "\r"])
def test_encodings_are_found(tmp_path: Path, encoding: str, ends: str) -> None:
    text = ROWS.replace("{s}", "\t").replace("blue", "蓝色 café").replace("\n", ends)
    (tmp_path / "t.txt.csv").write_bytes(text.encode(encoding))
    assert captions(listed(tmp_path / "t.txt.csv"))["t.txt/b.jpg"] == ("蓝色 café",)


def test_a_compressed_table_is_read(tmp_path: Path) -> None:
    (tmp_path / "t.csv.gz").write_bytes(gzip.compress(ROWS.replace("{s}", ",").encode()))
    assert captions(listed(tmp_path / "t.csv.gz"))["t/b.jpg"] == ("blue",)
    (tmp_path / "broken.csv.gz").write_bytes(b"\x1f\x8b nothing")
    with pytest.raises(DataError, match=r"broken\.csv\.gz: cannot be read as \.csv: "):
        listed(tmp_path / "broken.csv.gz")
    (tmp_path / "t.tar.gz").touch()
    with pytest.raises(DataError, match=r"t\.tar\.gz: not a source: unpack it first"):
        listed(tmp_path / "t.tar.gz")


def test_a_row_of_more_fields_than_the_header_is_refused_by_name(tmp_path: Path) -> None:
    rows = "image,caption\na.jpg,a red circle, on white, alone\nb.jpg,blue\nc.jpg,green,,\nd.jpg\n"
    (tmp_path / "t.csv").write_text(rows)
    catalog = listed(tmp_path / "t.csv")
    assert captions(catalog) == {"t/b.jpg": ("blue",), "t/c.jpg": ("green",), "t/d.jpg": ()}
    assert reasons(catalog.skips) == {
        "t/row 0": "row has more fields than the header (4 instead of 2): is a field with a "
        "separator not quoted?"
    }
    assert [s.sample_is_used for s in catalog.skips] == [False]


@pytest.mark.parametrize("header", ["image,note,note", "image,Note , Note ", "image,caption,image"])
def test_doubled_headers_are_named(tmp_path: Path, header: str) -> None:
    (tmp_path / "t.csv").write_text(header.replace("Note ", "note") + "\na.jpg,x,y\n")
    with pytest.raises(DataError, match=r"t\.csv: two columns are called '(note|image)': rename"):
        listed(tmp_path / "t.csv")


@pytest.mark.parametrize(
    ("cells", "values"),
    [
        (["7", "12", "-3", "0"], [7, 12, -3, 0]),
        (["7", "", "12"], [7, None, 12]),
        (["0.5", "7", "nan", "inf"], [0.5, 7, None, None]),
        (["12.50", "3.00", "5"], [12.5, 3.0, 5]),
        (["5.0", "7.25", "1e-05"], [5.0, 7.25, 1e-05]),
        (["007", "12"], "text"),
        (["1.9", "1.10"], "text"),
        (["12", "none"], "text"),
        (["+49", "30"], "text"),
        (["1,5", "2"], "text"),
        (["1234567890123456789012", "1"], "text"),
        (["0.1234567890123456789", "1"], "text"),
        (["1_000", "2"], "text"),
        (["٣", "2"], "text"),
        (["-0", "1"], "text"),
        (["1e5", "2"], "text"),
        (["nan", "inf"], "text"),
        (["", ""], "text"),
    ],
)
def test_a_column_is_numbers_where_each_can_be_written_back(
    tmp_path: Path, cells: list[str], values: Any
) -> None:
    with (tmp_path / "t.csv").open("w", newline="", encoding="utf-8") as file:
        write = csv.writer(file).writerow
        write(["image", "price"])
        for i, cell in enumerate(cells):
            write([f"{i}.jpg", cell])
    found = [r.meta["price"] for r in listed(tmp_path / "t.csv").records]
    expected = cells if values == "text" else values
    assert found == expected
    assert [type(v) for v in found] == [type(v) for v in expected]


@pytest.mark.parametrize("seed", range(8))
def test_no_cell_is_lost_or_becomes_another(tmp_path: Path, seed: int) -> None:
    """Tables of odd cells, written as Python's csv writes them, are read cell by cell."""
    draw = random.Random(seed)
    texts = ["", " ", "a", '"', '""', ",", ";", "\t", "|", "a\nb", "\r\n", "'", "\\", "é", "红",
             "nan", "inf", "NULL", "x" * 500, "sep=;", "#"]  # fmt: skip
    numbers = [
        "0",
        "7",
        "-3",
        "12.50",
        "3.00",
        "0.5",
        "007",
        "1e5",
        "1.10",
        "9" * 25,
        "-0",
        "1e-07",
    ]
    kinds = [texts, numbers, numbers[:5], [*numbers[:3], ""], numbers[3:5], [*numbers[5:6], "7.25"]]
    columns = [draw.choice(kinds) for _ in range(4)]
    rows = [[draw.choice(column) for column in columns] for _ in range(20)]
    separator = draw.choice([",", ";", "|"])
    with (tmp_path / "t.csv").open("w", newline="", encoding="utf-8") as file:
        write = csv.writer(file, delimiter=separator, lineterminator=draw.choice(["\n", "\r\n"]))
        write.writerow(["image", "a", "b", "c", "d"])
        write.writerows([f"{i}.jpg", *row] for i, row in enumerate(rows))
    found = [list(r.meta.values()) for r in listed(tmp_path / "t.csv").records]
    for column, cells in zip(zip(*found, strict=True), zip(*rows, strict=True), strict=True):
        assert_the_same(list(column), list(cells))


def assert_the_same(values: list[Any], cells: list[str]) -> None:
    """Check that a column is its texts, or numbers that can be written as these texts."""
    places = {len(cell.partition(".")[2]) for cell in cells if "." in cell}
    for value, cell in zip(values, cells, strict=True):
        written = {value, str(value)}
        if isinstance(value, float):
            written = {repr(value), *(f"{value:.{n}f}" for n in places if len(places) == 1)}
        assert cell.strip().lower() in ("", "nan", "inf") if value is None else cell in written
    kinds = {type(value) for value in values} - {type(None)}
    assert kinds <= {str} or kinds <= {int, float}


def test_a_file_without_a_header_is_read_and_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = ['"a" red circle\tred.jpg', 'a "blue" one\thttps://x.org/b?id=1', '"open\tc.jpg']
    (tmp_path / "cc.tsv").write_text("\n".join(lines))
    catalog = listed(tmp_path / "cc.tsv")
    assert [(r.uri, r.captions) for r in catalog.records] == [
        (f"{tmp_path}/red.jpg", ('"a" red circle',)),
        ("https://x.org/b?id=1", ('a "blue" one',)),
        (f"{tmp_path}/c.jpg", ('"open',)),
    ]
    assert (
        "no header line: the columns are called column1, column2; column2 is used as the image, "
        "column1 as the caption" in capsys.readouterr().err
    )
    (tmp_path / "three.csv").write_text("1,a.jpg,red\n2,b.jpg,blue\n")
    chosen = listed(tmp_path / "three.csv", caption_keys=("column3",))
    assert captions(chosen) == {"three/a.jpg": ("red",), "three/b.jpg": ("blue",)}
    named = listed(tmp_path / "three.csv", image_column="column2", caption_keys=("column3",))
    assert captions(named) == captions(chosen)


def test_quotes_of_a_tsv_are_quotes_where_they_pair(tmp_path: Path) -> None:
    (tmp_path / "t.tsv").write_text('image\tcaption\na.jpg\t"one\ttwo ""three"""\n')
    assert captions(listed(tmp_path / "t.tsv")) == {"t/a.jpg": ('one\ttwo "three"',)}
    (tmp_path / "u.tsv").write_text('image\tcaption\na.jpg\t"one" two\nb.jpg\t5" nail\n')
    assert captions(listed(tmp_path / "u.tsv")) == {
        "u/a.jpg": ('"one" two',),
        "u/b.jpg": ('5" nail',),
    }


@pytest.mark.parametrize(
    ("header", "keys", "column"),
    [
        ("Image,Caption", (), None),
        (" image , caption", (), None),
        ("Image Path,TEXT", (), None),
        ("photo,description", ("Description",), "Photo"),
        ("photo,long  words", ("long_words",), " photo "),
    ],
)
def test_columns_are_found_without_regard_to_case_and_blanks(
    tmp_path: Path, header: str, keys: tuple[str, ...], column: str | None
) -> None:
    (tmp_path / "t.csv").write_text(f"{header}\na.jpg,red\n")
    options = {"caption_keys": keys} if keys else {}
    (record,) = listed(tmp_path / "t.csv", image_column=column, **options).records
    assert (record.uri, record.captions, record.meta) == (f"{tmp_path}/a.jpg", ("red",), {})


def test_blanks_after_separators_belong_to_them_where_the_header_has_them(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text('caption, image, n\n"x, y", a.jpg, 5\n')
    (record,) = listed(tmp_path / "t.csv").records
    assert (record.uri, record.captions, record.meta) == (f"{tmp_path}/a.jpg", ("x, y",), {"n": 5})


def test_a_table_that_is_not_utf8_is_no_table_without_captions(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "t.csv").write_bytes("image,caption\na.jpg,caf\xe9\n".encode("latin-1"))
    found = list(stream([str(tmp_path / "t.csv")], ["captions"]))
    assert [f.reason for f in found if isinstance(f, Skip)] == [
        "caption is not UTF-8 (byte 3): save the table as UTF-8"
    ]
    assert "no captions" not in capsys.readouterr().err


def test_a_column_that_stands_back_is_metadata(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("image,caption,title\na.jpg,red,T\nb.jpg,,U\n")
    records = listed(tmp_path / "t.csv").records
    assert [r.captions for r in records] == [("red",), ("U",)]
    assert [r.meta for r in records] == [{"title": "T"}, {"title": "U"}]


def test_a_column_that_is_not_there_is_answered_with_those_that_are(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "t.csv").write_text("image,description\na.jpg,red\n")
    with pytest.raises(DataError, match=r"no column is called 'imagee': did you mean 'image'"):
        listed(tmp_path / "t.csv", image_column="imagee")
    for _ in range(2):
        listed(tmp_path / "t.csv", tmp_path / "t.csv", caption_keys=("captions", "descripton"))
        said = capsys.readouterr().err
        assert said.count("no column is called 'descripton': did you mean 'description'") == 1


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "is empty"),
        (b"\xef\xbb\xbf\n", "its first line is empty"),
        (b"words\nx\n", "no image column; the table has words; .* only one column was found"),
        (b"a\0b,c\n1,2\n", "not a text file: its first line contains a NUL byte"),
        (b"image\n" + b"x" * 200_000 + b"\n", "line 2: a field has more than 131,072"),
        (b'image,caption\na.jpg,"x\nb.jpg,y\n', "line 2: unexpected end of data"),
        (b"\xff\xfei\0m\0\x00\xd8", "cannot be read as .csv: .*utf-16"),
    ],
)  # fmt: skip
def test_what_cannot_be_read_says_why_in_a_short_line(
    tmp_path: Path, content: bytes, reason: str
) -> None:
    (tmp_path / "t.csv").write_bytes(content)
    with pytest.raises(DataError, match=rf"t\.csv: .*{reason}") as caught:
        listed(tmp_path / "t.csv")
    assert len(str(caught.value)) < 700
    assert str(caught.value).isprintable()


def test_a_table_of_base64_is_one_short_line(tmp_path: Path) -> None:
    (tmp_path / "cn.tsv").write_text("1001\t" + "iVBORw0KGgo" * 9000 + "\n")
    with pytest.raises(
        DataError, match=r"no image column.* is its first line a header\?"
    ) as caught:
        listed(tmp_path / "cn.tsv")
    assert len(str(caught.value)) < 200 + len(", ".join(IMAGE_COLUMNS)) + len(str(tmp_path))
    (tmp_path / "t.tsv").write_text("id\timage\n1001\t" + "iVBORw0KGgo" * 9000 + "\n2\ta.jpg\n")
    catalog = listed(tmp_path / "t.tsv")
    assert captions(catalog) == {"t/2": ()}
    assert list(reasons(catalog.skips).values()) == [
        "image path is too long (99,000 characters): base64 images are not supported"
    ]
    assert all(len(s.id) + len(s.uri) < 1000 for s in catalog.skips)
