"""Places where samples lie: local paths, and URLs that fsspec knows.

A local path is never parsed as a URL, so its name may hold `::`, `#` or `%`. Only regular files are
opened: reading a named pipe would wait for ever.
"""

import os
import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, BinaryIO, Literal
from urllib.parse import unquote

# A scheme of one letter is a Windows drive. fsspec chains schemes: `simplecache::s3://bucket/key`.
_URL = re.compile(r"(?:[a-z][a-z0-9+.-]+::)*[a-z][a-z0-9+.-]+://", re.IGNORECASE)
_LOCAL_URL = re.compile(r"(?:file|local)://", re.IGNORECASE)
# No image has so many bytes, and no sidecar. Each thread holds a whole file while it is decoded.
MOST_BYTES, MOST_SIDECAR_BYTES = 1 << 29, 1 << 26
_SPECIAL = {
    stat.S_IFIFO: "named pipe",
    stat.S_IFSOCK: "socket",
    stat.S_IFCHR: "device",
    stat.S_IFBLK: "device",
    stat.S_IFDIR: "folder",
}


@dataclass(frozen=True, slots=True)
class Entry:
    """A name in a folder, and what it stands for; "other" is explained by `why`."""

    name: str
    kind: Literal["file", "folder", "other"]
    why: str = ""
    hides: bool = False
    """Whether samples may lie behind what could not be looked at."""


def is_url(place: str) -> bool:
    """Say whether a place is a URL; `file://` URLs are local paths, see `local_path`."""
    return bool(_URL.match(place)) and not _LOCAL_URL.match(place)


def local_path(place: str) -> str:
    """Return the path of a `file://` URL, and any other place as it is."""
    found = _LOCAL_URL.match(place)
    if not found:
        return place
    path = place[found.end() :].removeprefix("localhost")
    # File managers write a blank as %20; a name that holds the very characters wins.
    return path if os.path.lexists(path) else unquote(path)


def file_system(url: str) -> tuple[Any, str]:
    """Return the fsspec file system of a URL, and the path on it.

    Raises:
        OSError: Whatever went wrong; each file system has errors of its own.
    """
    import fsspec

    with foreign_errors():
        fs, path = fsspec.core.url_to_fs(url)
        return fs, str(path)


def spelled(place: str) -> str:
    """Return a place as the uris of what lies below it begin: `memory://a` is `memory:///a`."""
    if not is_url(place):
        return local_path(place)
    fs, path = file_system(place)
    return str(fs.unstrip_protocol(path))


@contextmanager
def open_file(place: str) -> Iterator[BinaryIO]:
    """Open a regular file, or a URL, to read bytes.

    Raises:
        OSError: It cannot be opened, or is no regular file.
    """
    if not is_url(place):
        with open(local_path(place), "rb", opener=_open_regular) as file:
            yield file
        return
    fs, path = file_system(place)
    with foreign_errors():
        remote = fs.open(path, "rb")
    with remote:
        yield remote


def read(place: str, offset: int = 0, length: int = -1, *, most: int = MOST_BYTES) -> bytes:
    """Read a regular file, or a part of it; less than `length` where it ends before.

    Args:
        place: A path or URL.
        offset: Where to begin.
        length: How many bytes; -1 up to the end.
        most: Refuse to read more; behind a URL, the size of a whole file is not asked for.

    Raises:
        OSError: It cannot be read, is no regular file, or has more.
    """
    _refuse_large(length, most)
    if is_url(place):
        fs, path = file_system(place)
        with foreign_errors():
            end = None if length < 0 else offset + length
            return bytes(fs.cat_file(path, start=offset or None, end=end))
    with open_file(place) as file:
        if length < 0:
            _refuse_large(os.fstat(file.fileno()).st_size - offset, most)
        file.seek(offset)
        return file.read(length)


def list_local(folder: str) -> list[Entry]:
    """List a local folder in the order of names; links are followed.

    Raises:
        OSError: It cannot be listed to its end.
    """
    with os.scandir(folder) as entries:
        return sorted((_entry(e) for e in entries), key=lambda e: e.name)


def list_remote(fs: Any, folder: str) -> list[Entry]:
    """List a folder of an fsspec file system in the order of names.

    Raises:
        OSError: It cannot be listed; FileNotFoundError where there is none.
    """
    with foreign_errors():
        listed = fs.ls(folder, detail=True)
    here = folder.rstrip("/")
    found = []
    for info in listed:
        path = str(info["name"]).rstrip("/")
        if path == here:
            continue  # object stores may list the folder itself as an empty object
        name, kind = path.rpartition("/")[2], info.get("type")
        if kind == "directory":
            found.append(Entry(name, "folder"))
        elif kind in ("file", "link", None):
            found.append(Entry(name, "file"))
        else:
            found.append(Entry(name, "other", f"not a regular file: {kind}"))
    return sorted(found, key=lambda e: e.name)


@contextmanager
def foreign_errors() -> Iterator[None]:
    """Turn whatever a file system raises into an `OSError` with its words."""
    try:
        yield
    except OSError:
        raise
    except Exception as error:
        raise OSError(str(error) or type(error).__name__) from error


def reason(error: OSError) -> str:
    """Say in one line what an error is about, without the place, which is said beside it."""
    return " ".join(str(error.strerror or error).split())


def _entry(found: "os.DirEntry[str]") -> Entry:
    try:
        if found.is_dir():
            return Entry(found.name, "folder")
        if found.is_file():
            return Entry(found.name, "file")
        mode = os.stat(found.path).st_mode
        return Entry(found.name, "other", f"not a regular file: {special(mode)}")
    except FileNotFoundError:
        # A link to a disk that is not mounted: what lay there is not gone.
        return Entry(found.name, "other", "link that leads nowhere", hides=True)
    except OSError as error:
        return Entry(found.name, "other", f"cannot be looked at: {reason(error)}", hides=True)


def special(mode: int) -> str:
    """Name what is no regular file by its `st_mode`."""
    return _SPECIAL.get(stat.S_IFMT(mode), "of an unknown kind")


def _open_regular(path: str, flags: int) -> int:
    # Opening is refused before it can have an effect (a device), and must not wait (a pipe that
    # took the place of a file in between).
    refuse_special(os.stat(path).st_mode)
    number = os.open(path, flags | getattr(os, "O_NONBLOCK", 0))
    try:
        refuse_special(os.fstat(number).st_mode)
    except OSError:
        os.close(number)
        raise
    return number


def _refuse_large(size: int, most: int) -> None:
    if size > most:
        raise OSError(f"it has {size / 1e6:,.0f} MB, more than {most / 1e6:,.0f}")


def refuse_special(mode: int) -> None:
    """Raise an `OSError` for what is no regular file, by its `st_mode`."""
    if not stat.S_ISREG(mode):
        raise OSError(f"not a regular file: {special(mode)}")
