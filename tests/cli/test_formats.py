"""The formats of `mmalign search`: a table on a terminal, values that programs can read."""

import csv
import io
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from click.testing import CliRunner, Result
from command import call, complaint

from mmalign.cli.hits import COLUMNS, FORMATS
from mmalign.cli.local import MOST_OPENED, local_file
from mmalign.cli.main import main
from mmalign.search.searcher import Hit, Hits, Query

HOSTILE = 'tab\tline\r\nback\\slash \\n "quoted", \x1b[31m \u2028 \udce4 狗'
FOUND = (
    Hit(1, "a", 0.5, "s3://bucket/a.jpg", ("first", "second"), 0, relevance=0.75, level="likely"),
    Hit(2, HOSTILE, 0.25, "t.tar#b", (), 1, words=0.0, found_by="vectors", store="一.store"),
    Hit(3, "c", -0.125, "/c", ("x", HOSTILE), 2, HOSTILE, (0.0, 0.5, 1.0, 1.0)),
)
Answer = Callable[[Hits], None]


@pytest.fixture
def answer(monkeypatch: pytest.MonkeyPatch) -> Answer:
    """Have every search answered with given hits."""

    def answered(hits: Hits) -> None:
        searcher = SimpleNamespace(search=lambda *_, **__: hits, describe_index=dict)
        monkeypatch.setattr("mmalign.store.open_store", lambda _: SimpleNamespace(fields=()))
        monkeypatch.setattr("mmalign.search.model.model_of", lambda *_: None)
        monkeypatch.setattr("mmalign.search.searcher.Searcher", lambda *_: searcher)

    answered(Hits(Query((("red", 1.0),)), FOUND))
    return answered


def search(*words: str, encoding: str = "utf-8", query: str = "red") -> Result:
    result = CliRunner(charset=encoding).invoke(main, ["search", "s", query, *words])
    assert result.exception is None, result.exception
    return result


def unescaped(cell: str) -> str:
    """Undo the escapes, as the pages describe them."""
    escape = r"\\(?:([\\tnr])|x(..)|u(....)|U(........))"
    plain = {"\\": "\\", "t": "\t", "n": "\n", "r": "\r"}
    return re.sub(
        escape, lambda m: plain[m[1]] if m[1] else chr(int(m[2] or m[3] or m[4], 16)), cell
    )


def expected(text: Callable[[str], str] = str) -> list[list[str]]:
    hostile = text(HOSTILE)
    return [
        ["1", "a", "0.5", "likely", "0.75", "s3://bucket/a.jpg", "first", "", "", "", "", ""],
        ["2", hostile, "0.25", "", "", "t.tar#b", "", "", "0.0", "vectors", "一.store", ""],
        ["3", "c", "-0.125", "", "", "/c", hostile, "[0.0, 0.5, 1.0, 1.0]", "", "", "", ""],
    ]


@pytest.mark.parametrize("encoding", ["utf-8", "gbk", "cp1252", "latin-1"])
def test_tsv_gives_every_value_back_in_any_encoding(answer: Answer, encoding: str) -> None:
    out = search(encoding=encoding).stdout_bytes.decode(encoding)
    header, *rows = [line.split("\t") for line in out.removesuffix("\n").split("\n")]
    assert header == list(COLUMNS)
    assert [[unescaped(cell) for cell in row] for row in rows] == expected()
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028]", out)


def test_csv_is_read_by_pythons_reader(answer: Answer) -> None:
    out = search("--csv", encoding="cp1252").stdout_bytes.decode()
    header, *rows = csv.reader(io.StringIO(out, newline=""))
    assert header == list(COLUMNS)
    shown = {"\x1b": "\\x1b", "\u2028": "\\u2028", "\udce4": "\\udce4"}
    assert rows == expected(lambda text: "".join(shown.get(c, c) for c in text))


def test_jsonl_has_the_hits_of_json_one_a_line(answer: Answer) -> None:
    lines = search("--jsonl").stdout.splitlines()
    hits = json.loads(search("--json").stdout)["hits"]
    assert [json.loads(line) for line in lines] == hits
    assert [hit["id"] for hit in hits] == [hit.id for hit in FOUND]


def test_rows_that_were_listed_have_no_score(answer: Answer) -> None:
    answer(Hits(Query.parse("label:red", fields=["label"]), FOUND))
    for words, split in (((), "\t"), (("--csv",), ",")):
        first = search(*words).stdout.splitlines()[1].split(split)
        assert first[COLUMNS.index("score")] == ""


def test_no_hits_are_a_header_or_nothing(answer: Answer) -> None:
    answer(Hits(Query((("red", 1.0),)), (), nothing_found=True))
    for form in FORMATS:
        result = CliRunner().invoke(main, ["search", "s", "red", f"--{form}"])
        assert result.exit_code == 1
        wanted = {"tsv": "\t".join(COLUMNS) + "\n", "csv": ",".join(COLUMNS) + "\r\n"}
        if form != "json":
            assert result.stdout_bytes.decode() == wanted.get(form, "")
        assert result.stderr == "nothing found\n"


def test_a_terminal_gets_a_table_and_anything_else_tsv(
    answer: Answer, monkeypatch: pytest.MonkeyPatch
) -> None:
    table, tsv = search("--table").stdout, search("--tsv").stdout
    assert table.startswith("  1  0.500  likely    s3://bucket/a.jpg  first\n")
    assert search().stdout == tsv != table
    monkeypatch.setattr("mmalign.cli.hits.sys", SimpleNamespace(stdout=_Terminal()))
    assert search().stdout == table


class _Terminal:
    encoding = "utf-8"

    def isatty(self) -> bool:
        return True


def test_two_formats_are_refused_before_any_work(tmp_path: Path) -> None:
    said = complaint(2, "search", tmp_path / "no.store", "red", "--csv", "--json")
    assert "--csv and --json are different formats: give one of them" in said


def test_how_a_query_was_read_is_said_beside_every_format_but_json(answer: Answer) -> None:
    for form in FORMATS:
        said = search(f"--{form}", query="red + 2:dog").stderr
        assert ("read as: red + 2:dog\n" in said) is (form != "json"), form


# ---------------------------------------------------------------- paths


def test_paths_are_those_of_files_in_their_bytes(answer: Answer, tmp_path: Path) -> None:
    folder = os.fsencode(tmp_path)
    names = [b"a b\nc.jpg", "狗#1.jpg".encode()]
    uris = [os.fsdecode(folder + b"/" + name) for name in names]
    for uri in uris:
        Path(uri).write_bytes(b"")
    uris += [f"file://{tmp_path}/%E7%8B%97%231.jpg"]
    others = ["https://host/a.jpg", f"{uris[1]}#row=3", f"{tmp_path}/gone.jpg", "a.jpg", ""]
    found = [Hit(n + 1, str(n), 0.5, uri, (), n) for n, uri in enumerate(uris + others)]
    answer(Hits(Query((("red", 1.0),)), tuple(found)))
    result = search("--paths0")
    paths = [folder + b"/" + name for name in (*names, names[1])]
    assert result.stdout_bytes == b"".join(path + b"\0" for path in paths)
    assert result.stderr.startswith("5 of 8 hits left out, which are no files here: URLs, ")


def test_a_name_that_is_not_utf8_keeps_its_bytes(tmp_path: Path) -> None:
    name = os.fsencode(tmp_path) + b"/caf\xe9.jpg"
    try:
        Path(os.fsdecode(name)).write_bytes(b"")
    except OSError:
        pytest.skip("the file system takes only names in UTF-8")
    # As `mmalign embed` writes the name into the store.
    assert local_file(f"{tmp_path}/caf\\udce9.jpg") == name
    # A file that has this very name comes first.
    same = tmp_path / "caf\\udce9.jpg"
    same.write_bytes(b"")
    assert local_file(str(same)) == os.fsencode(same)
    assert local_file("/no\0name") is None


def test_paths_of_a_store_are_those_of_its_images(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from conftest import write_pairs

    write_pairs(tmp_path / "photos", 3)
    monkeypatch.chdir(tmp_path)
    assert call("embed", "--model", run, "--data", "photos", "--out", "p.store").exit_code == 0
    paths = call("search", "p.store", "red", "--paths0").stdout.split("\0")
    assert sorted(paths) == ["", *(str(tmp_path / f"photos/00{n}.jpg") for n in range(3))]


# ---------------------------------------------------------------- opening


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was opened; the system has a program for it."""
    files: list[str] = []
    monkeypatch.setattr("click.launch", lambda file: files.append(file) or 0)
    return files


def hits_of(*uris: str | Path, nothing_found: bool = False) -> Hits:
    found = (Hit(n + 1, str(n), 0.5, str(uri), (), n) for n, uri in enumerate(uris))
    return Hits(Query((("red", 1.0),)), tuple(found), nothing_found)


def test_images_are_opened_and_nothing_else(
    answer: Answer, opened: list[str], tmp_path: Path
) -> None:
    files = [tmp_path / name for name in ("狗 1.JPG", "run.exe", "page.svg", "a.desktop", "b.png")]
    for file in files:
        file.write_bytes(b"")
    answer(hits_of(*files, "https://host/a.jpg", f"{tmp_path}/gone.jpg"))
    assert search().stderr == ""
    assert opened == []
    result = search("--open", "--table")
    assert opened == [str(files[0]), str(files[4])]
    assert len(result.stdout.splitlines()) == 7
    assert result.stderr == "5 of 7 hits not opened, which are no image files here\n"


def test_only_the_first_images_are_opened_and_none_if_nothing_was_found(
    answer: Answer, opened: list[str], tmp_path: Path
) -> None:
    files = [tmp_path / f"{n}.jpg" for n in range(12)]
    for file in files:
        file.write_bytes(b"")
    answer(hits_of(*files, nothing_found=True))
    assert CliRunner().invoke(main, ["search", "s", "red", "--open"]).exit_code == 1
    assert opened == []
    answer(hits_of(*files))
    said = "12 image files were found, of which the first 10 are opened\n"
    assert search("--open").stderr == said
    assert opened == [str(file) for file in files[:MOST_OPENED]]


def test_a_system_that_opens_no_files_is_one_line(
    answer: Answer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "a.jpg"
    file.write_bytes(b"")
    answer(hits_of(file))
    monkeypatch.setattr("click.launch", lambda _: 1)
    result = CliRunner().invoke(main, ["search", "s", "red", "--open"])
    told = "no program was found that opens files (on Linux it is xdg-open)"
    assert result.stderr == f"mmalign: {file}: cannot be opened: {told}\n"
    assert result.exit_code == 1


# ---------------------------------------------------------------- a reader that leaves

LEAVES = """
import os, sys
from types import SimpleNamespace
import mmalign.store, mmalign.search.model, mmalign.search.searcher as searcher
from mmalign.cli.main import main
found = searcher.Hit(1, "a", 0.5, sys.argv[1], (), 0)
hits = searcher.Hits(searcher.Query((("red", 1.0),)), (found,) * 3)
mmalign.store.open_store = lambda _: SimpleNamespace(fields=())
mmalign.search.model.model_of = lambda *_: None
searcher.Searcher = lambda *_: SimpleNamespace(search=lambda *_, **__: hits, describe_index=dict)
main(["search", "s", "red", *sys.argv[2:]])
"""


@pytest.mark.parametrize("form", ["tsv", "paths0"])  # text and bytes
def test_a_reader_that_leaves_is_not_talked_of(form: str, tmp_path: Path) -> None:
    file = tmp_path / "a.jpg"
    file.write_bytes(b"")
    command = [sys.executable, "-c", LEAVES, str(file), f"--{form}"]
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True, check=False)
    os.close(write)
    assert (done.returncode, done.stderr) == (1, "")
