"""What other libraries raise for damaged files, full disks and broken places is one line here."""

import errno
import os
import resource
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import pytest
import small_store
import torch
from click.testing import CliRunner
from conftest import write_pairs
from safetensors.torch import load_file, save_file

from mmalign import files
from mmalign.cli.main import main
from mmalign.search.sheet import Strip, draw_sheet

SMALL = 100_000


def complaint(*words: str | Path, code: int = 1) -> str:
    """Return the one line that a failing call ends with; stdout stays empty."""
    result = CliRunner().invoke(main, [str(w) for w in words], prog_name="mmalign")
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == code, result.output
    assert result.stdout == ""
    last = result.stderr.splitlines()[-1]
    assert last.startswith("mmalign: "), result.stderr
    return last


@pytest.fixture
def own_run(run: Path, tmp_path: Path) -> Path:
    """A copy of the run that a test may damage."""
    ignored = shutil.ignore_patterns("events", "cache")
    return Path(shutil.copytree(run, tmp_path / "run", ignore=ignored))


@pytest.fixture
def small_disk() -> Iterator[None]:
    """As on a full disk, no file grows beyond 100 kB; the system says so in the same way."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (SMALL, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    signal.signal(signal.SIGXFSZ, handler)


def files_in(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.rglob("*") if p.is_file())


# ---------------------------------------------------------------- damaged models

DAMAGES: dict[str, Callable[[Path], object]] = {
    "empty": lambda f: f.write_bytes(b""),
    "cut": lambda f: f.write_bytes(f.read_bytes()[: f.stat().st_size // 2]),
    "words": lambda f: f.write_text("these are words"),
    "picture": lambda f: f.write_bytes(b"\xff\xd8\xff\xe0" * 100),
    "object": lambda f: f.write_text("{}"),
    "list": lambda f: f.write_text("[1]"),
    "null": lambda f: f.write_text("null"),
    "pointer": lambda f: f.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n"),
}


@pytest.mark.parametrize("damage", list(DAMAGES))
@pytest.mark.parametrize("name", ["model.json", "model-*.safetensors", "tokenizer.json"])
def test_a_damaged_run_is_named(own_run: Path, name: str, damage: str, tmp_path: Path) -> None:
    (file,) = own_run.glob(name)
    DAMAGES[damage](file)
    said = complaint("evaluate", "--model", own_run, "--data", tmp_path)
    assert str(own_run) in said


def test_a_reason_of_many_lines_is_given_whole(own_run: Path, tmp_path: Path) -> None:
    (file,) = own_run.glob("model-*.safetensors")
    state = load_file(file)
    gone = min(state)
    del state[gone]
    save_file(state, file)
    said = complaint("evaluate", "--model", own_run, "--data", tmp_path)
    assert f"missing: {gone}" in said


# ---------------------------------------------------------------- full disks

WRITERS: dict[str, Callable[[str], object]] = {
    "safetensors": lambda path: save_file({"a": torch.zeros(SMALL)}, path),
    "bytes": lambda path: Path(path).write_bytes(bytes(2 * SMALL)),
}


@pytest.mark.parametrize("library", [*WRITERS, "torch", "faiss"])
def test_a_full_disk_is_the_same_error_from_every_library(
    library: str, small_disk: None, tmp_path: Path
) -> None:
    def by_torch(path: str) -> None:
        with open(path, "wb") as file:
            torch.save({"a": torch.zeros(SMALL)}, file)

    def by_faiss(path: str) -> None:
        import faiss
        import numpy as np

        index = faiss.IndexFlatIP(64)
        index.add(np.zeros((SMALL // 64, 64), np.float32))
        faiss.write_index(index, path)

    write = WRITERS | {"torch": by_torch, "faiss": by_faiss}
    with pytest.raises(OSError, match=os.strerror(errno.EFBIG)) as caught:
        files.write_through(tmp_path / "file", write[library])
    assert (caught.value.errno, caught.value.filename) == (errno.EFBIG, str(tmp_path / "file"))
    assert list(tmp_path.iterdir()) == []


def test_a_library_that_fails_for_another_reason_keeps_its_error(tmp_path: Path) -> None:
    def broken(_: str) -> NoReturn:
        raise ValueError("a bug")

    with pytest.raises(ValueError, match="a bug"):
        files.write_through(tmp_path / "file", broken)


@pytest.mark.slow
def test_training_on_a_full_disk(small_disk: None, tmp_path: Path) -> None:
    pairs = write_pairs(tmp_path / "pairs", 4)
    words = ["--preset", "nano", "--set", "batch_size=4", "--set", "epochs=1"]
    said = complaint("train", "--data", pairs, "--out", tmp_path / "run", *words)
    assert said.startswith(f"mmalign: {tmp_path / 'run'}/")
    assert said.endswith(": File too large")
    assert not [name for name in files_in(tmp_path / "run") if name.endswith(("tmp", "tensors"))]


@pytest.mark.parametrize("kind", ["parquet", "npy", "hf"])
def test_exporting_to_a_full_disk_leaves_nothing(
    kind: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    store = small_store.fill(tmp_path / "s.store", map(small_store.row, range(40)), 40).path
    request.getfixturevalue("small_disk")
    resource.setrlimit(resource.RLIMIT_FSIZE, (300, resource.RLIM_INFINITY))
    said = complaint("export", store, "--to", tmp_path / "out", "--format", kind)
    assert f"{tmp_path / 'out'}" in said
    assert "File too large" in said
    assert sorted(p.name for p in tmp_path.iterdir()) == ["s.store"]


@pytest.mark.parametrize("name", ["x.png", "x.jpg", "x.webp"])
def test_a_sheet_is_whole_or_absent(name: str, tmp_path: Path) -> None:
    def full(*_: Any) -> NoReturn:
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files.Disk, "sync", full)
        with pytest.raises(OSError, match=name):
            draw_sheet([Strip("a", [])], tmp_path / name)
    assert list(tmp_path.iterdir()) == []
    draw_sheet([Strip("a", [])], tmp_path / name)
    assert files_in(tmp_path) == [name]


# ---------------------------------------------------------------- places that cannot be reached


@pytest.mark.parametrize(
    "place", ["photos", "photos/*.tar", "x.tar", "x.parquet", "x.csv", "x.jsonl"]
)
@pytest.mark.parametrize("when", ["url_to_fs", "walk", "open"])
def test_a_remote_place_that_fails_is_named(
    place: str, when: str, monkeypatch: pytest.MonkeyPatch, run: Path, tmp_path: Path
) -> None:
    import fsspec
    from fsspec.implementations.memory import MemoryFileSystem

    class ServiceError(Exception):
        """As those of an HTTP library: no OSError, and of several lines."""

    def fail(*_: Any, **__: Any) -> NoReturn:
        raise ServiceError("503 from the service\nRequest ID: 17")

    if when == "url_to_fs":
        monkeypatch.setattr(fsspec.core, "url_to_fs", fail)
    else:
        for name in {"walk": ("ls", "glob"), "open": ("open", "_open", "cat_file")}[when]:
            monkeypatch.setattr(MemoryFileSystem, name, fail)
    out = tmp_path / "s.store"
    said = complaint("embed", "--model", run, "--data", f"memory://bucket/{place}", "--out", out)
    assert "memory://" in said
    assert not out.exists()


# ---------------------------------------------------------------- SQL


@pytest.mark.parametrize(
    "words", [["search", "red"], ["delete"], ["export", "--to", "out", "--format", "npy"]]
)
def test_a_database_that_fails_is_one_line(
    words: list[str], store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import duckdb

    monkeypatch.chdir(tmp_path)
    command = [words[0], store, *words[1:], "--where", "true"]

    def fail(*_: Any, **__: Any) -> NoReturn:
        raise duckdb.IOException("IO Error: cannot open\n  the database")

    with monkeypatch.context() as patch:
        patch.setattr(duckdb, "connect", fail)
        said = complaint(*command)
        assert "does not start: IO Error: cannot open the database" in said
    with monkeypatch.context() as patch:
        patch.setattr("mmalign.store.where._require_boolean", fail)
        said = complaint(*command, code=2)
        assert "IO Error: cannot open the database" in said
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "duckdb", None)
        assert "pip install 'mmalign[sql]'" in complaint(*command)
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------- texts of other encodings


def test_files_of_words_are_utf8_whatever_the_locale(
    store: Path, run: Path, scenes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # What Python takes for an encoding where nobody names one.
    monkeypatch.setattr("locale.getpreferredencoding", lambda *_: "cp1252")
    monkeypatch.setattr("locale.getencoding", lambda: "cp1252")
    words = tmp_path / "words.txt"
    words.write_bytes("红色的圆\n蓝色的方块\n".encode())
    result = CliRunner().invoke(main, ["index", str(shutil.copytree(store, tmp_path / "s")),
                                       "--queries", str(words)])  # fmt: skip
    assert result.exit_code == 0, result.output
    words.write_bytes("红色的圆\n".encode("gbk"))
    said = complaint("index", store, "--queries", words, code=1)
    assert f"{words}: queries must be UTF-8 text" in said
    said = complaint("evaluate", "--model", run, "--data", scenes, "--classes", words, code=2)
    assert f"{words}: not a text file" in said
    said = complaint("train", "--data", scenes, "--out", tmp_path / "r", "--config", words, code=2)
    assert f"{words}: not valid TOML" in said
