"""Files are whole or absent whenever the power goes, and an error says which file it is about."""

import contextlib
import errno
import inspect
import io
import json
import os
import random
import tempfile
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from disk import PowerCut, SimulatedDisk, dies_at, fail, fails_at, using

from mmalign import files

OLD, NEW = b"old" * 5_000, b"new!" * 5_000


def content(path: Path) -> bytes | None:
    return path.read_bytes() if path.exists() else None


WRITES: dict[str, Callable[[Path], object]] = {
    "atomic": lambda path: files.write_bytes(path, NEW),
    "through": lambda path: files.write_through(path, lambda n: Path(n).write_bytes(NEW) and None),
    "claim": lambda path: files.claim(path.with_name("claimed"), NEW),
}


def test_the_simulated_disk_has_the_operations_of_the_real_one() -> None:
    def operations(kind: type) -> dict[str, list[str]]:
        found = inspect.getmembers(kind, inspect.isfunction)
        return {n: list(inspect.signature(f).parameters) for n, f in found if n[0] != "_"}

    real, simulated = operations(files.Disk), operations(SimulatedDisk)
    assert real == {name: simulated.get(name) for name in real}


@pytest.mark.parametrize("write", WRITES)
def test_a_power_cut_leaves_the_old_or_the_new(tmp_path: Path, write: str) -> None:
    """At every operation, whatever of the unsynced reached the disk."""
    name = "claimed" if write == "claim" else "file"
    allowed = [None, NEW] if write == "claim" else [OLD, NEW]
    seen = set()
    for number in range(100):
        (tmp_path / f"{number}").mkdir()
        (tmp_path / f"{number}" / "file").write_bytes(OLD)
        disk = SimulatedDisk(tmp_path / f"{number}")
        disk.before = dies_at(number)
        try:
            with using(disk):
                WRITES[write](disk.root / "file")
        except PowerCut:
            for seed in range(20):
                left = disk.cut(tmp_path / f"{number}-{seed}", random.Random(seed)).root
                assert content(left / name) in allowed
                seen.add(content(left / name))
        else:
            assert content(disk.cut(tmp_path / "done", None).root / name) == NEW
            break
    assert disk.count >= 3
    assert seen == set(allowed)


@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
@pytest.mark.parametrize("stays", [False, True])
def test_an_error_names_its_file_and_leaves_nothing(
    tmp_path: Path, write: str, code: int, stays: bool
) -> None:
    for number in range(100):
        (tmp_path / f"{number}").mkdir()
        disk = SimulatedDisk(tmp_path / f"{number}")
        disk.before = fails_at(number, code, stays)
        with using(disk):
            try:
                WRITES[write](disk.root / "file")
            except OSError as caught:
                error = caught
            else:
                # At most the temporary file could not be tidied away.
                assert disk.count <= number + 1
                break
            assert error.errno == code
            assert str(disk.root) in str(error.filename)
            assert stays or not files.leftovers(disk.root)
            disk.before = SimulatedDisk.nothing
            WRITES[write](disk.root / "file")
        name = "claimed" if write == "claim" else "file"
        assert content(disk.root / name) == NEW
        if write != "claim":
            assert content(disk.cut(tmp_path / f"{number}-left", None).root / name) == NEW
    assert number >= 3


def test_a_claim_that_may_not_last_stays_and_says_so(tmp_path: Path) -> None:
    disk = SimulatedDisk(tmp_path)
    disk.before = lambda n, operation, path: (
        fail(errno.EIO, operation, path) if operation == "sync_folder" else None
    )
    with using(disk), pytest.raises(OSError, match="might not survive a power cut.*claimed"):
        files.claim(tmp_path / "claimed", NEW)
    assert content(tmp_path / "claimed") == NEW
    assert not files.leftovers(tmp_path)


def test_a_claim_whose_answer_was_lost_is_ours(tmp_path: Path) -> None:
    for code in (errno.EEXIST, errno.EIO):
        disk = SimulatedDisk(tmp_path)

        def lose(number: int, operation: str, path: Path, code: int = code) -> None:
            if operation == "link":
                fail(code, operation, path)

        disk.after = lose
        with using(disk):
            assert files.claim(tmp_path / f"{code}", NEW)
    disk = SimulatedDisk(tmp_path)
    with using(disk):
        assert not files.claim(tmp_path / f"{errno.EIO}", OLD)
    assert content(tmp_path / f"{errno.EIO}") == NEW


def test_threads_may_write_one_name(tmp_path: Path) -> None:
    contents = [bytes([65 + i]) * 100_000 for i in range(8)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda c: files.write_bytes(tmp_path / "file", c), contents))
        won = list(pool.map(lambda c: files.claim(tmp_path / "claimed", c), contents))
    assert content(tmp_path / "file") in contents
    assert won.count(True) == 1
    assert content(tmp_path / "claimed") == contents[won.index(True)]
    assert {p.name for p in tmp_path.iterdir()} == {"file", "claimed"}


def test_a_disk_may_take_a_write_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Raw(io.FileIO):
        def write(self, content) -> int:  # type: ignore[no-untyped-def]
            return super().write(bytes(content)[:1_000])

    monkeypatch.setattr(files.Disk, "create", lambda self, path: io.BufferedWriter(Raw(path, "x")))
    files.write_bytes(tmp_path / "file", NEW)
    assert content(tmp_path / "file") == NEW


def test_a_draft_is_hashed_on_its_way(tmp_path: Path) -> None:
    with files.atomic_file(tmp_path / "file") as draft:
        draft.write(NEW[:7])
        draft.write(memoryview(NEW)[7:])
        assert (draft.bytes, draft.tell()) == (len(NEW), len(NEW))
        told = draft.sha256()
    assert told == files.sha256(tmp_path / "file")


def test_a_failed_block_leaves_the_old_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(OLD)
    with pytest.raises(ZeroDivisionError), files.atomic_file(tmp_path / "file") as draft:
        draft.write(NEW)
        raise ZeroDivisionError
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
    assert content(tmp_path / "file") == OLD


def test_a_new_folder_survives_a_power_cut(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    disk = SimulatedDisk(tmp_path / "disk")
    with using(disk):
        files.make_folder(disk.root / "a" / "b" / "c")
        files.make_folder(disk.root / "a" / "b" / "c")
        assert (disk.cut(tmp_path / "left", None).root / "a" / "b" / "c").is_dir()
        # Made by somebody who died before the sync.
        disk.make_folder(disk.root / "d")
        files.make_folder(disk.root / "d" / "e")
    assert (disk.cut(tmp_path / "left-too", None).root / "d" / "e").is_dir()
    (tmp_path / "file").touch()
    with pytest.raises(FileExistsError):
        files.make_folder(tmp_path / "file")


def test_a_moved_file_always_has_a_name(tmp_path: Path) -> None:
    for number in range(100):
        root = tmp_path / f"{number}"
        (root / "a").mkdir(parents=True)
        (root / "b").mkdir()
        (root / "a" / "file").write_bytes(OLD)
        disk = SimulatedDisk(root)
        disk.before = dies_at(number)
        try:
            with using(disk):
                files.move(root / "a" / "file", root / "b" / "file")
        except PowerCut:
            for seed in range(8):
                left = disk.cut(tmp_path / f"{number}-{seed}", random.Random(seed)).root
                assert {OLD} <= {content(left / f / "file") for f in "ab"} <= {OLD, None}
        else:
            left = disk.cut(tmp_path / "left", None).root
            assert [content(left / f / "file") for f in "ab"] == [None, OLD]
            break
    assert disk.count == 3


def test_removing_takes_files_and_folders(tmp_path: Path) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "b" / "file").touch()
    (tmp_path / "file").touch()
    for name in ("a", "file", "never was"):
        files.remove(tmp_path / name)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("code", [errno.EINVAL, errno.ENOTSUP])
def test_a_disk_without_sync_of_folders_is_no_error(tmp_path: Path, code: int) -> None:
    disk = SimulatedDisk(tmp_path)
    disk.before = lambda n, operation, path: (
        fail(code, operation, path) if operation == "sync_folder" else None
    )
    with using(disk):
        files.write_bytes(tmp_path / "file", NEW)
    assert content(tmp_path / "file") == NEW


def lines(path: Path) -> list[dict[str, Any]]:
    """Read the lines that can be read."""
    found = []
    for line in path.read_bytes().split(b"\n") if path.exists() else []:
        with contextlib.suppress(ValueError):
            found.append(json.loads(line))
    return found


def test_lines_survive_what_happens_to_others(tmp_path: Path) -> None:
    file = tmp_path / "lines.jsonl"
    files.append_lines(file, [{"uri": "a"}, {"uri": "half a surrogate \udcff, 图"}])
    with open(file, "ab") as torn:
        torn.write(b'{"uri": "\xff\n{"uri": "to')
    files.append_lines(file, [{"uri": "b"}])
    assert [r["uri"] for r in lines(file)] == ["a", "half a surrogate \udcff, 图", "b"]


def test_lines_survive_a_power_cut(tmp_path: Path) -> None:
    """Appended again after it, all of them; whoever did so may stop anywhere."""
    for number in count():
        disk = SimulatedDisk(folder(tmp_path / f"{number}"))
        file = disk.root / "lines.jsonl"
        with using(disk):
            files.append_lines(file, [{"n": 0}])
            first = disk.count
            disk.before = dies_at(first + number)
            with contextlib.suppress(PowerCut):
                files.append_lines(file, [{"n": 1}] * 400)
        for seed in range(20):
            left = disk.cut(tmp_path / f"{number}-{seed}", random.Random(seed))
            with using(left):
                files.append_lines(left.root / "lines.jsonl", [{"n": 2}])
            numbers = [line["n"] for line in lines(left.root / "lines.jsonl")]
            ones = numbers.count(1)
            assert numbers == [0, *[1] * ones, 2]
            assert ones == 400 or disk.count > first + number
        if disk.count == first + number:
            break
    assert number == first


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_lines_are_appended_all_or_none(tmp_path: Path, code: int) -> None:
    """After an error nothing can be seen that the disk may not have."""
    for number in count():
        disk = SimulatedDisk(folder(tmp_path / f"{number}"))
        file = disk.root / "lines.jsonl"
        with using(disk):
            files.append_lines(file, [{"n": 0}])
            disk.before = fails_at(disk.count + number, code, False)
            try:
                files.append_lines(file, [{"n": 1}] * 400)
            except OSError:
                seen = [line["n"] for line in lines(file)]
                # Only the name of the file may not last, and it was synced before.
                assert seen == [0] or (number == 3 and seen == [0, *[1] * 400])
            else:
                break
            files.append_lines(file, [{"n": 2}])
        left = disk.cut(tmp_path / f"{number}-left", None).root / "lines.jsonl"
        assert lines(left) == [*({"n": n} for n in seen), {"n": 2}]
    assert number == 4


def test_lines_that_others_appended_are_made_to_last(tmp_path: Path) -> None:
    disk = SimulatedDisk(folder(tmp_path / "disk"))
    file = disk.root / "lines.jsonl"
    with using(disk):
        disk.before = dies_at(2)
        with contextlib.suppress(PowerCut):
            files.append_lines(file, [{"n": 0}])
        disk.before = SimulatedDisk.nothing
        assert lines(file) == [{"n": 0}]
        files.append_lines(file, [])
    assert lines(disk.cut(tmp_path / "left", None).root / "lines.jsonl") == [{"n": 0}]


def test_a_disk_takes_lines_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Raw(io.FileIO):
        def write(self, content) -> int:  # type: ignore[no-untyped-def]
            return super().write(bytes(content)[:7])

    monkeypatch.setattr(files.Disk, "append", lambda self, path: Raw(path, "a"))
    files.append_lines(tmp_path / "file", [{"uri": "picture"}] * 9)
    assert lines(tmp_path / "file") == [{"uri": "picture"}] * 9


def test_who_appends_waits_for_who_rewrites(tmp_path: Path) -> None:
    """Lines that come while a file is rewritten are in the new one."""
    file = tmp_path / "lines.jsonl"
    files.append_lines(file, [{"n": 0}])
    with ThreadPoolExecutor(1) as pool:

        def change(content: bytes) -> bytes:
            waiting.append(pool.submit(files.append_lines, file, [{"n": 2}]))
            assert len(lines(file)) == 1
            return content + b'{"n": 1}\n'

        waiting: list[Future[None]] = []
        files.rewrite(file, change)
        waiting[0].result()
    assert [line["n"] for line in lines(file)] == [0, 1, 2]


def test_without_locks_lines_are_appended_as_well(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*told: object) -> None:
        raise OSError(errno.ENOLCK, "no locks available")

    monkeypatch.setattr(files.fcntl, "flock", refuse)
    files.append_lines(tmp_path / "file", [{"n": 0}])
    disk = SimulatedDisk(tmp_path)
    disk.before = fails_at(1, errno.ENOSPC, False)
    with using(disk), pytest.raises(OSError, match="space"):
        files.append_lines(tmp_path / "file", [{"n": 1}])
    files.append_lines(tmp_path / "file", [{"n": 2}])
    assert lines(tmp_path / "file") == [{"n": 0}, {"n": 2}]


def folder(path: Path) -> Path:
    path.mkdir()
    return path


# ---------------------------------------------------------------- temporary files


@pytest.fixture
def nothing_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody has said where temporary files go."""
    for name in ("TMPDIR", "TEMP", "TMP"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.usefixtures("nothing_chosen")
def test_temporary_files_lie_beside_what_is_written(tmp_path: Path) -> None:
    alone = files.scratch_folder()
    assert alone == Path("/var/tmp") or not os.access("/var/tmp", os.W_OK)
    with files.scratch_in(tmp_path):
        with files.scratch_in(tmp_path / "a.store" / "not yet"), files.scratch_file() as file:
            assert files.scratch_folder() == tmp_path
            assert os.fstat(file.fileno()).st_dev == tmp_path.stat().st_dev
            assert list(tmp_path.iterdir()) == []
            (tmp_path / "a.store").mkdir()
            assert files.scratch_folder() == tmp_path / "a.store"
        with ThreadPoolExecutor(1) as pool:
            assert pool.submit(files.scratch_folder).result() == tmp_path
    assert files.scratch_folder() == alone


@pytest.mark.usefixtures("nothing_chosen")
def test_temporary_files_lie_elsewhere_where_nothing_can_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    access = os.access
    monkeypatch.setattr(os, "access", lambda p, mode: p != tmp_path and access(p, mode))
    with files.scratch_in(tmp_path):
        assert files.scratch_folder() != tmp_path


def test_temporary_files_lie_where_the_environment_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)
    with files.scratch_in(tmp_path / "a.store"):
        assert files.scratch_folder() == tmp_path
