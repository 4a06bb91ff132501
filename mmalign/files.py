"""Files that are either whole or absent: atomic writes, durable renames, hashes, JSON lines.

Everything that mmalign must not lose goes through here. A write lands under a temporary name, is
synced to the disk, is renamed onto its place, and the folder that holds the name is synced too.
"""

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO


def sync_folder(folder: Path) -> None:
    """Make renames and new names inside a folder survive a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def _becoming(path: Path) -> Iterator[Path]:
    """Lend a temporary name; what was written and synced there takes the real one at the end."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
        sync_folder(path.parent)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """Open a file for writing that appears under its name only when the block ends well."""
    with _becoming(path) as temporary, open(temporary, "wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())


def write_bytes(path: Path, content: bytes) -> None:
    """Write a whole file atomically and durably."""
    with atomic_file(path) as file:
        file.write(content)


def write_text(path: Path, content: str) -> None:
    """Write a whole UTF-8 file atomically and durably."""
    write_bytes(path, content.encode())


def write_json(path: Path, content: Any) -> None:
    """Write one JSON document atomically and durably, readable by a person."""
    write_text(path, json.dumps(content, ensure_ascii=False, indent=1) + "\n")


def write_through(path: Path, write: Callable[[str], None]) -> None:
    """Let a library write a file by name (FAISS, safetensors), then make it appear atomically."""
    with _becoming(path) as temporary:
        write(str(temporary))
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())


def claim(path: Path, content: bytes) -> bool:
    """Create a file atomically only if the name is free; False when somebody else has it."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        try:
            os.link(temporary, path)
        except FileExistsError:
            return False
        sync_folder(path.parent)
        return True
    finally:
        temporary.unlink(missing_ok=True)


def append_lines(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Append JSON lines and sync them."""
    with open(path, "a", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
        file.flush()
        os.fsync(file.fileno())


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Read JSON lines; a torn last line (a crash in the middle of an append) is left out."""
    rows = []
    if path.exists():
        for line in path.read_text(encoding="utf-8").split("\n"):
            with contextlib.suppress(json.JSONDecodeError):
                rows.append(json.loads(line))
    return rows


def sha256(path: Path) -> str:
    """Hash a file's content."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
