"""Names and words where the locale is not UTF-8, and names that are not UTF-8 in any locale."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small_store
from conftest import write_pairs

from mmalign import files
from mmalign.data import scan
from mmalign.data.gone import is_gone
from mmalign.exchange.export import export
from mmalign.index import approximate
from mmalign.index.spec import IndexSpec
from mmalign.store import compact, delete, open_store, verify
from mmalign.training.train import TrainConfig, train

PLAIN = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}


def in_plain_locale(code: str, *words: object) -> str:
    """Run Python where the locale has no letters but those of English; return its output."""
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, words)],
        env={**os.environ, **PLAIN}, capture_output=True, text=True, encoding="utf-8", check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


COMMANDS = """
import sys, json
from click.testing import CliRunner
from mmalign.cli.main import main
assert sys.getfilesystemencoding() == "ascii" or sys.platform == "darwin"
for words in json.loads(sys.argv[1]):
    words = [w.encode().decode("ascii", "surrogateescape") for w in words]
    result = CliRunner().invoke(main, words)
    assert result.exit_code == 0, ascii((words, result.output, result.exception))
    print(json.dumps(result.stdout))
from mmalign.data.gone import is_gone
print([is_gone(uri, inside=False) for uri in json.loads(sys.argv[2])])
"""


@pytest.mark.slow
def test_the_whole_path_in_a_locale_without_chinese(run: Path, tmp_path: Path) -> None:
    pictures = write_pairs(tmp_path / "图片", 6)
    store = str(tmp_path / "商店.store")
    chosen = "array_to_string(captions, ' ') = '图片4'"
    commands = [
        ["embed", "--model", run, "--data", pictures, "--out", store, "--caption-key"],
        ["search", store, "图片4", "--to", "text", "-k", "1", "--json"],
        ["info", store, "--json"],
        ["index", store],
        ["delete", store, "--where", chosen, "--json", "--yes"],
        ["compact", store, "--now"],
        ["export", store, "--to", tmp_path / "出", "--format", "npy"],
        ["import", tmp_path / "出", "--out", tmp_path / "二.store", "--model", run],
    ]
    commands[0].append("captions_zh")
    uris = [str(pictures / "004.jpg"), str(pictures / "别的.jpg")]
    words = json.dumps([[str(w) for w in c] for c in commands])
    *said, are_gone = in_plain_locale(COMMANDS, words, json.dumps(uris)).splitlines()
    _, found, told, _, gone, *_ = map(json.loads, said)
    # What is there must not count as removed because the locale has no letters for its name.
    assert json.loads(are_gone.lower()) == [is_gone(u, inside=False) for u in uris] == [False, True]
    answer: dict[str, Any] = json.loads(found)
    assert answer["query"] == answer["hits"][0]["caption"] == "图片4"
    assert answer["hits"][0]["uri"] == str(pictures / "004.jpg")
    assert json.loads(told)["captions"] == 6
    assert json.loads(gone)["ids"] == ["图片/004.jpg"]
    assert verify(store) == []
    assert "图片/005.jpg" in open_store(tmp_path / "二.store").column("id")


@pytest.fixture
def latin(tmp_path: Path) -> Path:
    """A folder whose name is in Latin 1."""
    folder = tmp_path / os.fsdecode(b"caf\xe9")
    try:
        folder.mkdir()
    except OSError:
        pytest.skip("the file system takes only names in UTF-8")
    return folder


def test_a_store_in_a_folder_whose_name_is_not_utf8(latin: Path) -> None:
    store = latin / "a.store"
    small_store.fill(store, (small_store.row(n) for n in range(12)))
    delete(store, ["id3"])
    assert compact(store, now=True).rows == 11
    assert verify(store) == []
    assert open_store(store).column("id")[3] == "id4"
    for kind in ("parquet", "npy", "hf"):
        assert export(store, latin / kind, kind).rows == 11


def test_pictures_in_a_folder_whose_name_is_not_utf8(latin: Path) -> None:
    """No text can hold the name, so it is escaped; that it is gone cannot be told."""
    write_pairs(latin, 2)
    (one, _) = scan([str(latin)]).records
    assert one.id == "caf\\udce9/000.jpg"
    assert not is_gone(one.uri, inside=False)


def test_what_needs_a_name_in_utf8_says_so_before_any_work(latin: Path) -> None:
    with pytest.raises(OSError, match="the name is not UTF-8, which a library requires"):
        train([str(latin / "none")], latin / "run", TrainConfig())
    assert list(latin.iterdir()) == []
    vectors = np.random.default_rng(0).normal(size=(300, 8)).astype(np.float16)
    built = approximate.build(
        approximate.VectorReader([vectors]), IndexSpec("hnsw", "SQ8", links=8)
    )
    with pytest.raises(OSError, match="the name is not UTF-8"):
        approximate.save(built, latin / "image.faiss")


def test_words_are_read_in_utf8_where_they_are() -> None:
    halves = "图片".encode().decode("ascii", "surrogateescape")
    assert files.in_utf8(halves) == files.in_utf8("图片") == "图片"
    assert files.in_utf8("caf\udce9") == "caf\udce9"
    assert files.in_utf8("\ud83d") == "\ud83d"
