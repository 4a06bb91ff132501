"""What a query is: in the shell a file decides, in Python a type, never the ending of a text."""

import json
import os
import shutil
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result

from mmalign import Row, Searcher
from mmalign.cli.main import main
from mmalign.errors import DataError, UsageError, VectorError

NOTE = "looks like a file name, but there is no such file: it is searched as text"


@pytest.fixture(scope="module")
def searcher(store: Path) -> Searcher:
    return Searcher.open(store)


@pytest.fixture
def picture(scenes: Path, tmp_path: Path) -> Path:
    """The image of one scene, as a file without an ending."""
    with tarfile.open(scenes) as tar:
        member = next(m for m in tar if m.name.endswith(".png"))
        content = tar.extractfile(member)
        assert content is not None
        (tmp_path / "picture").write_bytes(content.read())
    return tmp_path / "picture"


def search(store: Path, *words: str | Path) -> Result:
    result = CliRunner().invoke(main, ["search", str(store), *map(str, words)])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def best(store: Path, *words: str | Path) -> dict[str, Any]:
    """Return the best hit of a call that goes well."""
    result = search(store, *words, "-k", "1", "--json")
    assert result.exit_code == 0, result.output
    hit: dict[str, Any] = json.loads(result.stdout)["hits"][0]
    return hit


# ---------------------------------------------------------------- Python: the type decides


def test_a_str_is_words_even_where_a_file_of_that_name_exists(
    searcher: Searcher, picture: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = shutil.copy(picture, picture.with_name("red.jpg"))
    monkeypatch.chdir(file.parent)
    monkeypatch.setattr(Path, "read_bytes", lambda path: pytest.fail(f"{path} was read"))
    for name in ("red.jpg", str(file)):
        vector = searcher.encode([name])
        assert np.array_equal(vector, searcher.encoder.encode_texts([name]))


def test_a_path_and_bytes_are_images(searcher: Searcher, picture: Path) -> None:
    by_path, by_bytes = searcher.search_many([picture, picture.read_bytes()], 3)
    assert by_path.hits == by_bytes.hits
    assert by_path[0].score > 0.999


def test_kinds_of_queries_keep_their_order(searcher: Searcher, picture: Path) -> None:
    mixed = searcher.search_many(["a red circle", picture, "two blue squares"], 3)
    assert [hits[0].row for hits in mixed] == [
        searcher.search(query, 1)[0].row for query in ("a red circle", picture, "two blue squares")
    ]


@pytest.mark.parametrize(
    ("query", "error", "said"),
    [
        ("", UsageError, "the query is empty"),
        (" \t\n", UsageError, "the query is empty"),
        ("\udcff", UsageError, "a text is not UTF-8"),
        (b"", DataError, "bytes: cannot be used as an image: not an image"),
        (b"words", DataError, "bytes: cannot be used as an image: not an image"),
        (Path("gone.jpg"), UsageError, "gone.jpg: no such image file"),
        (Path(), UsageError, "not a regular file"),
        (Path("a" * 300), DataError, "cannot be used as an image: File name too long"),
        (Path("a\0"), UsageError, "no such image file"),
        (np.zeros(128, np.float32), VectorError, "a vector is zero"),
        (
            np.ones(5, np.float32),
            VectorError,
            "a vector has 5 dimensions, but the model's vectors have",
        ),
        (np.ones((2, 2), np.float32), TypeError, r"not an array of float32 of shape \(2, 2\)"),
        (Row("no such row"), UsageError, "no row has the id 'no such row'"),
        (["a", "b"], TypeError, "not list"),
        (None, TypeError, r"an item must be a text \(str\).* not NoneType"),
    ],
)
def test_queries_that_are_none(
    searcher: Searcher, query: Any, error: type[Exception], said: str
) -> None:
    with pytest.raises(error, match=said):
        searcher.search(query)


def test_one_text_is_not_a_list_of_its_letters(searcher: Searcher) -> None:
    with pytest.raises(UsageError, match="search_many takes a list"):
        searcher.search_many("red")


# ---------------------------------------------------------------- the shell: a file decides


@pytest.mark.parametrize("name", ["x.jpg", "x.heic", "x.svg", "x.txt", "x", "a red circle", "-x"])
def test_a_file_that_is_an_image_is_searched_by_whatever_its_name(
    store: Path, picture: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(picture.parent)
    shutil.copy(picture, name)
    for query in (name, f"@{name}"):
        result = search(store, "-k", "1", "--json", "--", query)
        assert json.loads(result.stdout)["hits"][0]["score"] > 0.999
        assert result.stderr == ""


@pytest.mark.parametrize("name", ["x.jpg", "x.heic", "x.svg", "x.jp2", "notes.txt", "circle"])
def test_a_file_that_is_no_image_is_refused_and_not_searched_by_its_name(
    store: Path, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        "mmalign.search.model.model_of", lambda *_: pytest.fail("loaded for nothing")
    )
    Path(name).write_text("<svg/>")
    for query in (name, f"@{name}", tmp_path / name):
        result = search(store, query)
        assert result.exit_code == 1
        assert result.stdout == ""
        assert result.stderr.count("\n") == 1
        assert f"{name}: cannot be used as an image: image type not supported" in result.stderr


def test_the_words_of_a_file_name_can_be_searched_as_the_message_says(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("circle").write_text("no image")
    said = search(store, "circle").stderr
    assert said.rstrip().endswith("to search for this text, add a space at its end: 'circle '")
    assert best(store, "circle ")["id"]


@pytest.mark.parametrize(
    "query", ["red.jpg", "a red circle.png", "./red", "../red.HEIC", "~/red", "https://x/red.jpg"]
)
def test_a_name_of_no_file_is_searched_as_words_and_that_is_said(
    store: Path, searcher: Searcher, query: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = search(store, query, "-k", "1", "--json")
    assert result.stderr == f"{query!r} {NOTE}\n"
    assert json.loads(result.stdout)["hits"][0]["id"] == searcher.search(query, 1)[0].id


@pytest.mark.parametrize("query", ["red", "black/white", "St. Mary", "f/2.8", "v1.2", "photos"])
def test_words_are_searched_without_a_word(
    store: Path, query: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("photos").mkdir()
    result = search(store, query)
    assert (result.exit_code, result.stderr) == (0, "")


def test_what_would_block_is_not_opened(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    os.mkfifo("pipe.jpg")
    for query in ("pipe.jpg", "@pipe.jpg", "/dev/null"):
        result = search(store, query)
        assert result.exit_code == 2
        assert "not a regular file" in result.stderr


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            ["@gone.jpg"],
            "gone.jpg: no such image file; to search for text that begins with @, put a space",
        ),
        (["@"], ".: not a regular file"),
        (["@" + "a" * 300], "no such image file"),
        ([""], "the query is empty"),
        (["  "], "the query is empty"),
        (["red", "blue"], "put its words in quotes: 'red blue'"),
        (["-dash.jpg"], "put -- before a query that begins with a dash: -- -d"),
        (["--red"], "put -- before a query that begins with a dash: -- --red"),
    ],
)
def test_queries_that_are_off_in_the_shell(store: Path, words: list[str], said: str) -> None:
    result = search(store, *words)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr.count("\n") == 1
    assert said in result.stderr


def test_words_behind_two_dashes_may_begin_with_one(store: Path) -> None:
    assert search(store, "--", "-dash").exit_code == 0


def test_a_pattern_that_the_shell_expanded_is_explained() -> None:
    for command in (["embed", "--model", "m", "--out", "s"], ["train", "--out", "r"]):
        result = CliRunner().invoke(main, [*command, "--data", "a.tar", "b.tar", "c.tar"])
        assert result.exit_code == 2
        assert "put a pattern in quotes (--data '*.tar'), or repeat --data" in result.stderr


def test_the_home_folder_is_found_where_the_shell_does_not_write_it_out(
    store: Path, scenes: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HOME", str(store.parent))
    assert search(Path("~") / store.name, "red").exit_code == 0
    for model, data, missing in (
        ("~/no-run", scenes, "no-run"),
        ("~/no-run", "~/no-photos", "no-photos"),
    ):
        words = ["embed", f"--model={model}", f"--data={data}", f"--out={tmp_path / 's'}"]
        assert f"{store.parent}/{missing}" in CliRunner().invoke(main, words).stderr
