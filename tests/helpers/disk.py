"""A disk that loses power: it does everything for real, and knows what would be left.

`SimulatedDisk` takes the place of `mmalign.files.disk`. Every operation happens in a scratch
folder, where readers see it; beside that a model tells what has reached the disk:

- of a file, what was there at its last sync; more of it may be there, torn anywhere
- of a folder, the names at its last sync; each later change may be there or not, in any order

What a failed sync should have written of a file is out of all later ones, as on Linux; names are
kept by the file system's journal, so that of a folder a later sync can be believed.
"""

import contextlib
import errno
import io
import os
import random
import secrets
import shutil
from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, Union

from mmalign import files

REAL = files.Disk()
NEEDS_NO_SPACE = {"unlink", "remove_folder"}
IN_MEMORY = {"truncate"}
NAMES_NO_FILE = {"write", "sync", "sync_path", "sync_folder", "truncate"}


class PowerCut(BaseException):
    """The machine is off: nothing that runs now reaches the disk; final."""


@dataclass(eq=False)
class File:
    """Content of a file; final."""

    written: bytes = b""
    durable: bytes = b""
    doomed: bool = False
    """A sync failed: what was not durable then never will be for sure."""
    forgotten: bytes = b""
    """What was there before the file was cut, which may not have reached the disk."""

    def sync(self) -> None:
        if not self.doomed:
            self.durable, self.forgotten = self.written, b""

    def truncate(self, size: int) -> None:
        self.forgotten = max(self.forgotten, self.written, key=len)
        self.written = self.written[:size]
        # What is written from now on is new to the system.
        self.doomed = self.doomed and size > len(self.durable)

    def torn(self, rng: random.Random) -> bytes:
        """What a power cut may leave: the durable part, and any of the rest, cut or zeroed."""
        tail = rng.choice([self.written, self.forgotten])[len(self.durable) :]
        kept = tail[: rng.randint(0, len(tail))]
        if rng.random() < 0.3:
            # The length was written, the blocks were not, or not all of them.
            kept = kept + bytes(rng.randint(0, len(tail) - len(kept)))
            hole = rng.randint(0, len(kept))
            kept = bytes(hole) + kept[hole:] if rng.random() < 0.5 else kept
        return self.durable + kept


Node = Union[File, "Folder"]


@dataclass(eq=False)
class Change:
    """Names of one folder and what they stand for from now on (None: for nothing); final."""

    names: dict[str, Node | None]
    only_with: "Change | None" = None
    """The new name of what was moved to another folder: it is there before the old one is gone."""


@dataclass(eq=False)
class Folder:
    """Names in a folder; final."""

    names: dict[str, Node] = field(default_factory=dict)
    durable: dict[str, Node] = field(default_factory=dict)
    pending: list[Change] = field(default_factory=list)

    def change(self, change: Change) -> None:
        _apply(self.names, change)
        self.pending.append(change)

    def sync(self, only: Sequence[Change] | None = None) -> None:
        """Make all changes durable that are pending, or those of `only` among them."""
        for change in [c for c in self.pending if only is None or c in only]:
            _apply(self.durable, change)
            self.pending.remove(change)


def _apply(names: dict[str, Node], change: Change) -> None:
    for name, node in change.names.items():
        if node is None:
            names.pop(name, None)
        else:
            names[name] = node


class SimulatedDisk:
    """The operations of `files.Disk` in a scratch folder that can lose power; final."""

    links = True
    """False is a file system without hard links."""

    def __init__(self, root: Path) -> None:
        """Take what lies under `root` as durable."""
        self.root = root
        self.count = 0
        self.tree = _read(root)
        self.names = random.Random()
        """Draws the names of new shards, so that a copy of the disk sees the same operations."""
        self.before: Callable[[int, str, Path], None] = self.nothing
        """Called before each operation; what it raises is the operation's outcome."""
        self.after: Callable[[int, str, Path], None] = self.nothing
        """Called when it has happened; what it raises hides that."""

    @staticmethod
    def nothing(number: int, operation: str, path: Path) -> None:
        """Let an operation happen."""

    def copy(self, root: Path) -> "SimulatedDisk":
        """Return an equal disk in another scratch folder, as it is now: no power was lost."""
        shutil.copytree(self.root, root)
        other = SimulatedDisk.__new__(SimulatedDisk)
        other.root, other.count = root, 0
        other.tree = deepcopy(self.tree)
        other.names = deepcopy(self.names)
        other.before = other.after = self.nothing
        return other

    def cut(self, root: Path, rng: random.Random | None) -> "SimulatedDisk":
        """Return a disk as it may be after a power cut; without `rng`, with the least there is."""
        happened: set[Change] = set()
        for folder in _folders(self.tree) if rng else []:
            happened |= {c for c in folder.pending if rng and rng.random() < 0.6}
        happened |= {c.only_with for c in happened if c.only_with}
        _write(self.tree, root, happened, rng)
        other = SimulatedDisk(root)
        # What it goes on to write must not take the names that were drawn before.
        other.names = deepcopy(self.names)
        return other

    def flip(self, path: Path, bit: int) -> None:
        """Change one bit of a file that is durable."""
        content = bytearray(path.read_bytes())
        content[bit // 8] ^= 1 << bit % 8
        path.write_bytes(content)
        node = self.folder(path.parent).names[path.name]
        assert isinstance(node, File)
        node.written = node.durable = bytes(content)

    def folder(self, path: Path) -> Folder:
        """Return the model of a folder."""
        node: Node = self.tree
        for part in path.relative_to(self.root).parts:
            assert isinstance(node, Folder)
            if part not in node.names:
                fail(errno.ENOENT, "open", path)
            node = node.names[part]
        assert isinstance(node, Folder)
        return node

    def token_hex(self, nbytes: int | None = None) -> str:
        """Stand in for `secrets.token_hex`: where a group of shards ends depends on their names."""
        return self.names.randbytes(nbytes or 32).hex()

    @contextlib.contextmanager
    def doing(self, operation: str, path: Path) -> Iterator[None]:
        """Number an operation, and let the test have its say."""
        number, self.count = self.count, self.count + 1
        self.before(number, operation, path)
        yield
        self.after(number, operation, path)

    # The operations of files.Disk.

    def create(self, path: Path) -> BinaryIO:
        with self.doing("create", path):
            raw = io.FileIO(path, "x")
            node = File()
            self.folder(path.parent).change(Change({path.name: node}))
        return io.BufferedWriter(_Raw(self, path, node, raw))  # type: ignore[return-value]

    def append(self, path: Path) -> BinaryIO:
        with self.doing("append", path):
            raw = io.FileIO(path, "a")
            names = self.folder(path.parent)
            if path.name not in names.names:
                names.change(Change({path.name: File()}))
            node = names.names[path.name]
        assert isinstance(node, File)
        return _Raw(self, path, node, raw)  # type: ignore[return-value]

    def truncate(self, file: BinaryIO, size: int) -> None:
        with self.doing("truncate", file.path):  # type: ignore[attr-defined]
            file.raw.truncate(size)  # type: ignore[attr-defined]
            file.node.truncate(size)  # type: ignore[attr-defined]

    def sync(self, file: BinaryIO) -> None:
        file.flush()
        raw = file if isinstance(file, _Raw) else file.raw  # type: ignore[attr-defined]
        try:
            with self.doing("sync", raw.path):
                raw.node.sync()
        except OSError:
            raw.node.doomed = True
            raise

    def sync_path(self, path: Path) -> None:
        node = File(path.read_bytes())
        self.folder(path.parent).change(Change({path.name: node}))
        with self.doing("sync_path", path):
            node.sync()

    def sync_folder(self, folder: Path) -> None:
        # A store's own parent is inside of the root; what lies above is not simulated.
        if not folder.is_relative_to(self.root):
            return
        with self.doing("sync_folder", folder):
            moved = [c.only_with for c in self.folder(folder).pending if c.only_with]
            for other in _folders(self.tree):
                other.sync(moved)
            self.folder(folder).sync()

    def make_folder(self, path: Path) -> None:
        with self.doing("make_folder", path):
            if not path.is_dir():
                REAL.make_folder(path)
                self.folder(path.parent).change(Change({path.name: Folder()}))

    def replace(self, source: Path, target: Path) -> None:
        with self.doing("replace", source):
            os.rename(source, target)
            old, new = self.folder(source.parent), self.folder(target.parent)
            node = old.names.get(source.name) or File()
            if old is new:
                old.change(Change({source.name: None, target.name: node}))
            else:
                there = Change({target.name: node})
                new.change(there)
                old.change(Change({source.name: None}, only_with=there))

    def rename(self, source: Path, target: Path) -> None:
        self.replace(source, target)

    def link(self, source: Path, target: Path) -> None:
        with self.doing("link", target):
            if not self.links:
                fail(errno.EPERM, "link", source)
            REAL.link(source, target)
            node = self.folder(source.parent).names[source.name]
            self.folder(target.parent).change(Change({target.name: node}))

    def touch(self, path: Path) -> None:
        REAL.touch(path)

    def unlink(self, path: Path) -> None:
        with self.doing("unlink", path):
            REAL.unlink(path)
            self.folder(path.parent).change(Change({path.name: None}))

    def remove_folder(self, path: Path) -> None:
        with self.doing("remove_folder", path):
            REAL.remove_folder(path)
            self.folder(path.parent).change(Change({path.name: None}))


class _Raw(io.RawIOBase):
    """An open file: each write that reaches the system is an operation; final."""

    def __init__(self, disk: SimulatedDisk, path: Path, node: File, raw: io.FileIO) -> None:
        self.disk, self.path, self.node, self.raw = disk, path, node, raw

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self.raw.fileno()

    def seek(self, offset: int, whence: int = 0) -> int:
        return self.raw.seek(offset, whence)

    def write(self, content) -> int:  # type: ignore[no-untyped-def]
        content = bytes(content)
        try:
            with self.disk.doing("write", self.path):
                self._take(content)
        except OSError:
            # A full disk takes what still fits.
            self._take(content[: len(content) // 2])
            raise
        return len(content)

    def _take(self, content: bytes) -> None:
        self.raw.write(content)
        self.node.written += content

    def close(self) -> None:
        if not self.closed:
            self.raw.close()
        super().close()


def _read(folder: Path) -> Folder:
    """Model what lies in a real folder, all of it durable."""
    found: dict[str, Node] = {}
    for path in folder.iterdir():
        found[path.name] = _read(path) if path.is_dir() else File(c := path.read_bytes(), c)
    return Folder(found, dict(found))


def _folders(tree: Folder) -> list[Folder]:
    inner = [*tree.names.values(), *tree.durable.values()]
    inner += [n for c in tree.pending for n in c.names.values() if n]
    folders = {id(n): n for n in inner if isinstance(n, Folder)}
    return [tree, *(f for folder in folders.values() for f in _folders(folder))]


def _write(tree: Folder, path: Path, happened: set[Change], rng: random.Random | None) -> None:
    """Lay out what a power cut leaves of a folder."""
    names = dict(tree.durable)
    for change in tree.pending:
        if change in happened:
            _apply(names, change)
    path.mkdir()
    for name, node in names.items():
        if isinstance(node, Folder):
            _write(node, path / name, happened, rng)
        else:
            (path / name).write_bytes(node.torn(rng) if rng else node.durable)


@contextlib.contextmanager
def using(disk: SimulatedDisk) -> Iterator[SimulatedDisk]:
    """Put a disk under mmalign."""
    held, files.disk = files.disk, disk  # type: ignore[assignment]
    drawn, secrets.token_hex = secrets.token_hex, disk.token_hex
    try:
        yield disk
    finally:
        files.disk, secrets.token_hex = held, drawn


def dies_at(number: int) -> Callable[[int, str, Path], None]:
    """No operation from this one on happens: the process, or the machine, is gone."""

    def before(current: int, operation: str, path: Path) -> None:
        if current >= number:
            raise PowerCut

    return before


def fails_at(number: int, code: int, stays: bool) -> Callable[[int, str, Path], None]:
    """One operation fails with an error of the system, or it and all later ones.

    A disk that stays full still removes names, and a broken one is not asked to cut a file.
    """

    def before(current: int, operation: str, path: Path) -> None:
        spared = operation in IN_MEMORY or (code == errno.ENOSPC and operation in NEEDS_NO_SPACE)
        if current == number or (stays and current > number and not spared):
            fail(code, operation, path)

    return before


def fail(code: int, operation: str, path: Path) -> None:
    """Raise what the system would."""
    raise OSError(code, os.strerror(code), *([] if operation in NAMES_NO_FILE else [str(path)]))
