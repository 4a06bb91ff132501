"""Files on systems that have less: no hard links, no `fcntl`, no sync of folders, no writing.

Each absence is simulated; nothing here ran on Windows or on a Mac.
"""

import contextlib
import errno
import importlib.util
import json
import os
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import test_files
from crash_acts import ACTS, Life, born
from disk import SimulatedDisk, fail, using
from ledger import CARD, observe, row
from store import test_crash, test_crash_collector

from mmalign import files
from mmalign.errors import MmalignError
from mmalign.locks import sole_user
from mmalign.store import Writer, add_failures, compact, delete, open_store, repair, verify
from mmalign.store import manifest as manifests
from mmalign.store.failures import path_of, read_failures

# ---------------------------------------------------------------- no hard links


@pytest.fixture
def no_links(monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system without hard links."""

    def refuse(disk: files.Disk, source: Path, target: Path) -> None:
        fail(errno.EPERM, "link", source)

    monkeypatch.setattr(SimulatedDisk, "links", False)
    monkeypatch.setattr(files.Disk, "link", refuse)


@pytest.mark.slow
@pytest.mark.usefixtures("no_links")
@pytest.mark.parametrize("act", ["create", "delete"])
def test_without_hard_links_the_power_goes(tmp_path: Path, act: str) -> None:
    test_crash.test_the_power_goes(tmp_path, act)


@pytest.mark.usefixtures("no_links")
def test_without_hard_links_a_process_dies_and_another_goes_on(tmp_path: Path) -> None:
    test_crash.test_a_process_dies_and_another_goes_on(tmp_path, "delete")


@pytest.mark.usefixtures("no_links")
def test_without_hard_links_nothing_is_tidied_up_by_the_dead(tmp_path: Path) -> None:
    test_crash.test_nothing_is_tidied_up_by_the_dead(tmp_path, "delete")


@pytest.mark.slow
@pytest.mark.usefixtures("no_links")
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_without_hard_links_the_disk_refuses(tmp_path: Path, code: int) -> None:
    test_crash.test_the_disk_refuses(tmp_path, "delete", code, stays=code == errno.EIO)


@pytest.mark.usefixtures("no_links")
def test_without_hard_links_somebody_else_comes_between(tmp_path: Path) -> None:
    test_crash.test_somebody_else_comes_between(tmp_path, "delete", "write")


@pytest.mark.usefixtures("no_links")
def test_without_hard_links_what_is_committed_is_not_collected(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(test_crash_collector, "CASES", 10)
    test_crash_collector.looks_are_steps(monkeypatch)
    test_crash_collector.test_what_is_committed_is_not_collected(tmp_path, "write", "now")


@pytest.mark.usefixtures("no_links")
def test_without_hard_links_a_life_is_lived(tmp_path: Path) -> None:
    """Every act, and in the end a generation is a folder that all who read take for one."""
    life = born(tmp_path / "life", "again")
    with using(life.disk):
        ACTS["again"](life)
        assert observe(life.path) == life.ledger.state
        assert all(map(Path.is_dir, manifests.generations(life.path)))
        assert verify(life.path) == []
        newest = manifests.generations(life.path)[0]
    (newest / newest.name).write_bytes(files.claimed(newest).replace(b"somewhere", b"anywhere!"))
    assert repair(life.path).saved_shards
    assert observe(life.path) == life.ledger.state


@pytest.mark.usefixtures("no_links")
def test_without_hard_links_one_of_many_claims_a_name(tmp_path: Path) -> None:
    contents = [bytes([65 + i]) * 10_000 for i in range(8)]
    with ThreadPoolExecutor(8) as pool:
        won = list(pool.map(lambda c: files.claim(tmp_path / "claimed", c), contents))
    assert won.count(True) == 1
    assert files.claimed(tmp_path / "claimed") == contents[won.index(True)]
    assert [p.name for p in tmp_path.iterdir()] == ["claimed"]


@pytest.mark.parametrize("first_has_links", [True, False])
def test_a_name_is_claimed_once_by_hosts_with_and_without_hard_links(
    tmp_path: Path, first_has_links: bool
) -> None:
    for links, won in ((first_has_links, True), (not first_has_links, False)):
        disk = SimulatedDisk(tmp_path)
        disk.links = links
        with using(disk):
            assert files.claim(tmp_path / "name", f"{won}".encode()) == won
    assert files.claimed(tmp_path / "name") == b"True"
    assert not files.leftovers(tmp_path)


def test_a_store_is_written_with_and_without_hard_links_in_turn(tmp_path: Path) -> None:
    for number, links in enumerate([True, False, True, False, False, True]):
        disk = SimulatedDisk(tmp_path)
        disk.links = links
        with using(disk), Writer(tmp_path / "a.store", CARD) as writer:
            writer.add(row(f"r{number}", 1))
    assert observe(tmp_path / "a.store").rows == {f"r{n}": 1 for n in range(6)}
    assert compact(tmp_path / "a.store", now=True).rows == 6
    assert verify(tmp_path / "a.store") == []


# ---------------------------------------------------------------- Windows


def is_open(path: Path) -> bool:
    """Say whether this process has a file open."""
    found = path.stat()
    for handle in range(64):
        with contextlib.suppress(OSError):
            if os.path.samestat(os.fstat(handle), found):
                return True
    return False


@pytest.fixture
def windows(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """What Windows does otherwise; the list has the files that are locked."""
    locked: list[int] = []
    tries = count()

    def locking(handle: int, mode: int, size: int) -> None:
        assert os.lseek(handle, 0, os.SEEK_CUR) >= 2**30
        if next(tries) % 2 == 0:
            raise OSError(errno.EDEADLK, "ten seconds are over")
        locked.append(handle)

    def rename(disk: files.Disk, source: Path, target: Path) -> None:
        if target.exists():
            raise FileExistsError(errno.EEXIST, "file exists", str(target))
        os.rename(source, target)

    def replace(disk: files.Disk, source: Path, target: Path) -> None:
        if target.exists() and (target.is_dir() or is_open(target)):
            raise PermissionError(errno.EACCES, "access is denied", str(target))
        os.replace(source, target)

    real_open = os.open

    def no_folders(path: Any, flags: int, *rest: int) -> int:
        if os.path.isdir(path):
            raise PermissionError(errno.EACCES, "permission denied", str(path))
        return real_open(path, flags, *rest)

    monkeypatch.setattr(files, "WINDOWS", True)
    monkeypatch.setattr(files, "fcntl", None)
    monkeypatch.setattr(files, "msvcrt", SimpleNamespace(locking=locking, LK_LOCK=1))
    monkeypatch.setattr(files.Disk, "rename", rename)
    monkeypatch.setattr(files.Disk, "replace", replace)
    monkeypatch.setattr(os, "open", no_folders)
    return locked


@pytest.mark.parametrize("links", [True, False])
def test_windows_keeps_a_store(
    tmp_path: Path, windows: list[int], links: bool, request: pytest.FixtureRequest
) -> None:
    if not links:
        request.getfixturevalue("no_links")
    path = tmp_path / "a.store"
    for version in (1, 2):
        with Writer(path, CARD, 2) as writer:
            for name in "abcde":
                writer.add(row(name, version))
    delete(path, ["b"])
    add_failures(path, [{"id": "x", "uri": "x", "reason": "torn", "embedded": False}])
    assert len(windows) == 1
    with open(path_of(path), "ab") as file:
        file.write(b'{"half a line')
    repair(path)
    assert len(windows) == 2
    assert [f["uri"] for f in read_failures(path)] == ["x"]
    assert compact(path, now=True).rows == 4
    assert observe(path).rows == dict.fromkeys("acde", 2)
    assert verify(path) == []
    assert all(p.is_file() for p in manifests.generations(path))


@pytest.mark.usefixtures("windows")
def test_windows_lets_one_use_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    held: list[int] = []

    def locking(handle: int, mode: int, size: int) -> None:
        assert os.lseek(handle, 0, os.SEEK_CUR) >= 2**30
        if held:
            raise PermissionError(errno.EACCES, "permission denied")
        held.append(handle)

    monkeypatch.setattr(files, "msvcrt", SimpleNamespace(locking=locking, LK_NBLCK=2))
    with sole_user(tmp_path) as alone:
        assert alone
        with sole_user(tmp_path) as other:
            assert not other
    held.clear()
    with sole_user(tmp_path) as alone:
        assert alone
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("windows", "no_links")
def test_windows_without_hard_links_lets_one_have_a_name(tmp_path: Path) -> None:
    assert files.claim(tmp_path / "name", b"1")
    assert not files.claim(tmp_path / "name", b"2")
    assert files.claimed(tmp_path / "name") == b"1"
    assert not files.leftovers(tmp_path)


def without(*modules: str) -> ModuleType:
    """Load the module of files anew, as if a system had no such modules."""
    spec = importlib.util.spec_from_file_location("files_elsewhere", files.__file__)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        for name in modules:
            patch.setitem(sys.modules, name, None)
        spec.loader.exec_module(module)
    return module


def test_a_system_without_locks_appends_lines(tmp_path: Path) -> None:
    elsewhere = without("fcntl", "msvcrt")
    elsewhere.append_lines(tmp_path / "file", [{"n": 0}])
    elsewhere.append_lines(tmp_path / "file", [{"n": 1}])
    assert test_files.lines(tmp_path / "file") == [{"n": 0}, {"n": 1}]


# ---------------------------------------------------------------- Mac


class Mac:
    """The module `fcntl` of a Mac; final."""

    F_FULLFSYNC, LOCK_EX = 51, 2

    def __init__(self, code: int) -> None:
        self.code, self.flushed = code, 0

    def fcntl(self, handle: int, command: int) -> None:
        assert command == self.F_FULLFSYNC
        self.flushed += 1
        if self.code:
            raise OSError(self.code, os.strerror(self.code))

    def flock(self, file: Any, how: int) -> None:
        """Lock nothing."""


@pytest.mark.parametrize("code", [0, errno.ENOTSUP, errno.EIO])
def test_a_mac_writes_through_the_cache_of_its_drive(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    mac, plain = Mac(code), []
    monkeypatch.setattr(files, "fcntl", mac)
    monkeypatch.setattr(os, "fsync", plain.append)
    writes: dict[str, Callable[[], object]] = {
        "file": lambda: files.write_bytes(tmp_path / "file", b"x"),
        "through": lambda: files.write_through(
            tmp_path / "through", lambda name: Path(name).write_bytes(b"x") and None
        ),
        "lines": lambda: files.append_lines(tmp_path / "lines", [{}]),
    }
    for write in writes.values():
        before = mac.flushed
        if code == errno.EIO:
            with pytest.raises(OSError, match=str(tmp_path)):
                write()
        else:
            write()
            # A drive that does not know the call is asked as any other is.
            assert len(plain) == (mac.flushed if code else 0)
        assert mac.flushed > before


# ---------------------------------------------------------------- read-only, names


def test_a_read_only_store_is_read(tmp_path: Path) -> None:
    """Whoever reads asks the disk for no change; whoever would write is told where he may not."""
    life = born(tmp_path / "life", "again")
    path = life.path
    life.disk.before = lambda n, operation, where: fail(errno.EROFS, operation, where)
    with using(life.disk):
        assert observe(path) == life.ledger.state
        assert verify(path) == []
        assert open_store(path).failures()
        refused: list[Callable[[], object]] = [
            lambda: delete(path, [next(iter(life.ledger.rows))]),
            lambda: compact(path, now=True),
            lambda: add_failures(path, [{"id": "", "uri": "n", "reason": "", "embedded": False}]),
            lambda: ACTS["again"](life),
        ]
        for write in refused:
            with pytest.raises((OSError, MmalignError)) as caught:
                write()
            assert "ead-only" in str(caught.value)
            assert str(path) in str(caught.value)
    assert observe(path) == life.ledger.state


def test_no_two_names_differ_only_in_case(tmp_path: Path) -> None:
    """A file system that knows no case would take them for one."""
    life: Life = born(tmp_path / "life", "again")
    names = [p.relative_to(life.path).as_posix() for p in life.path.rglob("*")]
    assert len(names) > 10
    assert [name for name in names if name != name.lower()] == []


def test_the_format_page_reads_a_generation_that_is_a_folder(
    tmp_path: Path, no_links: None, capsys: pytest.CaptureFixture[str]
) -> None:
    import test_docs

    with Writer(tmp_path / "photos.store", CARD) as writer:
        writer.add(row("a", 1))
    code = test_docs.reader_of_the_format_page()
    place = json.dumps(str(tmp_path / "photos.store"))
    exec(compile(code.replace('"photos.store"', place), "docs/format.md", "exec"), {})
    assert capsys.readouterr().out.startswith("a 1 (1, 8)")


@pytest.fixture(autouse=True)
def _nothing_is_left_patched() -> Iterator[None]:
    yield
    assert isinstance(files.disk, files.Disk)
