"""What is printed: no text acts on a terminal, any encoding will do, lines do not grow."""

import json
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import small_store
from click.testing import CliRunner, Result

from mmalign import progress
from mmalign.cli.main import main
from mmalign.search.searcher import Hit, Hits, Query
from mmalign.terminal import ACTIVE, UNSEEN_COLUMNS, openable, printable, shorten, width

HOSTILE = {
    "escapes": "\x1b]0;title\x07\x1b[2J\x1b[31mred",
    "lines": "one\r\ntwo\u2028three\x85four",
    "controls": "a\0b\x9bc\x7fd\te",
    "direction": "gnp.\u202ecod\u2066x",
    "half": "half \udce4 character",
    "wide": "一只狗在海滩上" * 60,
    "long": "x" * 100_000,
    "emoji": "👩‍👩‍👧‍👦🇩🇪é" * 50,
    "empty": "",
}
ENCODINGS = ["utf-8", "cp1252", "latin-1", "ascii", "cp437", "gbk"]


@pytest.fixture(params=list(HOSTILE))
def text(request: pytest.FixtureRequest) -> str:
    return HOSTILE[request.param]


@pytest.fixture
def hits(text: str, monkeypatch: pytest.MonkeyPatch) -> list[Hit]:
    """What `mmalign search` finds."""
    found = [
        Hit(1, f"id {text}", 0.5, f"/pictures/{text[:200]}.jpg", (text,), 0),
        Hit(2, "id", 0.4, "s3://bucket/x.tar#a.jpg", (), 1),
        Hit(3, "id3", -0.4, "table.csv#row=3", ("no", text), 2, text),
    ]
    answered = Hits(Query((("red", 1.0),)), tuple(found))
    searcher = SimpleNamespace(
        search=lambda *_, **__: answered, describe_index=lambda: {"kind": "exact"}, store=None
    )
    monkeypatch.setattr("mmalign.store.open_store", lambda _: SimpleNamespace(fields=()))
    monkeypatch.setattr("mmalign.search.model.model_of", lambda *_: None)
    monkeypatch.setattr("mmalign.search.searcher.Searcher", lambda *_: searcher)
    return found


def search(encoding: str, *words: str) -> Result:
    result = CliRunner(charset=encoding).invoke(main, ["search", "s", "red", *words])
    assert result.exception is None, result.exception
    assert result.exit_code == 0
    return result


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_hits_are_lines_that_do_nothing(hits: list[Hit], encoding: str) -> None:
    # click takes ASCII for a locale that nobody has set, and prints UTF-8.
    out = search(encoding, "--table").stdout_bytes.decode(
        "utf-8" if encoding == "ascii" else encoding
    )
    assert out.count("\n") == len(hits)
    assert not ACTIVE.search(out.replace("\n", ""))
    for line, hit in zip(out.splitlines(), hits, strict=True):
        assert line.split()[0] == str(hit.rank)
        assert width(line) <= UNSEEN_COLUMNS + len(printable(hit.uri))


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_json_is_the_same_in_every_encoding(hits: list[Hit], encoding: str) -> None:
    out = search(encoding, "--json").stdout
    assert out.count("\n") == 1
    assert not ACTIVE.search(out[:-1])
    found = json.loads(out)["hits"]
    assert [h["id"] for h in found] == [h.id for h in hits]
    assert [h["uri"] for h in found] == [h.uri for h in hits]
    assert [tuple(h["captions"]) for h in found] == [h.captions for h in hits]


def test_json_is_readable_where_it_can_be(hits: list[Hit], text: str) -> None:
    if "\u4e00" <= text[:1] <= "\u9fff":
        assert text in search("utf-8", "--json").stdout


@pytest.mark.parametrize("columns", [20, 40, 80, 200])
def test_lines_keep_to_the_width_of_the_terminal(
    hits: list[Hit], columns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mmalign.cli.hits.columns", lambda: columns)
    for line, hit in zip(search("utf-8", "--table").stdout.splitlines(), hits, strict=True):
        # A place is whole, as one that is cut cannot be opened; what is left goes to the words.
        assert printable(openable(hit.uri)) in line
        place = width(f"{hit.rank:>3}  {hit.score:.3f}  {printable(openable(hit.uri))}  ")
        assert width(line) <= max(columns, place + 20)


@pytest.mark.parametrize("columns", [1, 2, 3, 10, 79, 80, 1_000_000])
def test_shorten_fits_and_keeps_what_fits(text: str, columns: int) -> None:
    shown = printable(text)
    short = shorten(shown, columns)
    assert width(short) <= columns
    if width(shown) <= columns:
        assert short == shown
    else:
        assert short.endswith("…")
        assert shown.startswith(short[:-1])
        assert width(short) >= columns - 2 or short[:-1] == shown[: len(short) - 1].rstrip()


def test_places_are_as_short_as_they_can_be_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    file = tmp_path / "a" / "cat.jpg"
    file.write_bytes(b"")
    monkeypatch.chdir(tmp_path / "a" / "b")
    assert openable(str(file)) == "../cat.jpg"
    monkeypatch.chdir(tmp_path)
    assert openable(str(file)) == "a/cat.jpg"
    assert openable(f"{tmp_path}/x.tar#a/b.jpg") == "x.tar#a/b.jpg"
    assert openable(f"{tmp_path}/-dash.jpg") == "./-dash.jpg"
    monkeypatch.chdir("/")
    assert openable("/x.jpg") == "x.jpg"
    assert openable("https://host/a.jpg") == "https://host/a.jpg"
    assert openable("0/17") == "0/17"
    assert os.path.samefile(openable(str(file)), file)


def test_a_current_folder_that_is_gone_leaves_paths_as_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "gone"
    folder.mkdir()
    monkeypatch.chdir(folder)
    folder.rmdir()
    assert openable("/pictures/cat.jpg") == "/pictures/cat.jpg"


def test_rows_that_are_deleted_are_lines_that_do_nothing(text: str, tmp_path: Path) -> None:
    name = text.replace("\udce4", "")[:300] or "x"
    row = small_store.row(1)
    store = small_store.fill(tmp_path / "s.store", [small_store.replace(row, id=name, uri=name)])
    result = CliRunner().invoke(main, ["delete", str(store.path), "--dry-run", "--", name])
    assert result.exit_code == 0, result.output
    assert result.stdout.count("\n") == 2
    assert not ACTIVE.search(result.stdout.replace("\n", ""))
    result = CliRunner().invoke(main, ["delete", str(store.path), "--", name + "?"])
    assert result.exit_code == 1
    assert result.stderr.count("\n") == 1
    assert not ACTIVE.search(result.stderr[:-1])


# ---------------------------------------------------------------- stderr, and who may silence it


@pytest.fixture
def logger() -> Iterator[logging.Logger]:
    """The logger of the library, as a program finds it that says nothing of logging."""
    logger = logging.getLogger("mmalign")
    before = (logger.handlers[:], logger.level, logger.propagate)
    logger.handlers[:], logger.propagate = [], True
    logger.setLevel(logging.NOTSET)
    yield logger
    logger.handlers[:], logger.propagate = before[0], before[2]
    logger.setLevel(before[1])


def test_what_is_said_does_nothing_to_a_terminal(
    text: str, logger: logging.Logger, capsys: pytest.CaptureFixture[str]
) -> None:
    progress.to_stderr()
    progress.say(f"first\nskipped: {text}")
    said = capsys.readouterr().err
    assert not ACTIVE.search(said.replace("\n", ""))
    assert said.startswith("first\nskipped: ")


def test_a_program_can_silence_what_is_said_and_shown(
    logger: logging.Logger, capsys: pytest.CaptureFixture[str]
) -> None:
    def heard() -> str:
        progress.say("a word")
        progress.say("warning: a loss")
        list(progress.over("scan", range(3)))
        return capsys.readouterr().err

    progress.to_stderr()
    every = heard()
    assert "a word\n" in every
    assert "warning: a loss\n" in every
    assert "scan" in every
    logger.setLevel(logging.WARNING)
    assert heard() == "warning: a loss\n"
    logger.setLevel(logging.CRITICAL)
    assert heard() == ""


def test_a_program_can_take_what_is_said(
    logger: logging.Logger, capsys: pytest.CaptureFixture[str]
) -> None:
    taken: list[Any] = []
    handler = logging.Handler()
    handler.emit = taken.append  # type: ignore[method-assign]
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    progress.say("a word")
    progress.say("warning: a loss")
    assert [(r.levelname, r.getMessage()) for r in taken] == [
        ("INFO", "a word"),
        ("WARNING", "warning: a loss"),
    ]
    assert capsys.readouterr().err == ""
