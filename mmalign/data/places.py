"""Places where samples lie: local paths, and URLs that fsspec knows.

A local path is never parsed as a URL, so its name may hold `::`, `#` or `%`. Only regular files are
opened: reading a named pipe would wait for ever. What fails behind a URL is tried again.
"""

import inspect
import io
import os
import random
import re
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, BinaryIO, Literal, TypeVar
from urllib.parse import unquote

# A scheme of one letter is a Windows drive. fsspec chains schemes: `simplecache::s3://bucket/key`.
_URL = re.compile(r"(?:[a-z][a-z0-9+.-]+::)*[a-z][a-z0-9+.-]+://", re.IGNORECASE)
_LOCAL_URL = re.compile(r"(?:file|local)://", re.IGNORECASE)
# No image has so many bytes, and no sidecar. Each thread holds a whole file while it is decoded.
MOST_BYTES, MOST_SIDECAR_BYTES = 1 << 29, 1 << 26
# Reading from a URL is tried so often, with a pause before the second try, and twice that before
# the third. No answer is waited for longer.
TRIES, PAUSE_S, TIMEOUT_S = 3, 0.5, 120.0
# What a server says of a moment: too slow, too early, too many. And of a file that is not there.
_PASSING, _ABSENT = (408, 425, 429), (404, 410)
# Errors that say the same when one asks again.
_FINAL = (
    FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError, FileExistsError,
    ImportError, NotImplementedError, ValueError, TypeError, LookupError, AttributeError,
)  # fmt: skip
# What file systems call the things that change with a file, in small letters without signs.
_VERSION = {
    "blobid", "checksum", "contentmd5", "crc", "crc32c", "created", "datetime", "digest", "etag",
    "generation", "lastmodified", "lastwritetime", "md5", "md5hash", "modificationtime", "modified",
    "modify", "mtime", "sha", "size", "updated", "versionid",
}  # fmt: skip
WEB_EXTRA = "pip install 'mmalign[web]'"
_SPECIAL = {
    stat.S_IFIFO: "named pipe",
    stat.S_IFSOCK: "socket",
    stat.S_IFCHR: "device",
    stat.S_IFBLK: "device",
    stat.S_IFDIR: "folder",
}


T = TypeVar("T")


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

    try:
        with foreign_errors():
            fs, path = fsspec.core.url_to_fs(url)
            return fs, str(path)
    except OSError as error:
        if isinstance(error.__cause__, ImportError) and url.startswith(("http://", "https://")):
            raise OSError(f"it is read by an extra: {WEB_EXTRA}") from None
        raise


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
    with _patiently(lambda: fs.open(path, "rb")) as remote:
        yield io.BufferedReader(_Patient(remote))


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
        end = None if length < 0 else offset + length
        content = bytes(_ask(fs.cat_file, path, start=offset or None, end=end))
        # Some servers know no parts, and send the whole file.
        return content[offset:end] if 0 <= length < len(content) else content
    with open_file(place) as file:
        if length < 0:
            _refuse_large(os.fstat(file.fileno()).st_size - offset, most)
        file.seek(offset)
        return file.read(length)


def exists(url: str) -> bool:
    """Say whether there is something behind a URL; doubt says yes."""
    try:
        fs, path = file_system(url)
        _ask(fs.info, path)
    except FileNotFoundError:
        return False
    except OSError:
        return True
    return True


def version(url: str) -> list[str]:
    """Return what a server says of a file that changes when the file does: ETag, time, size.

    Raises:
        OSError: It says nothing.
    """
    fs, path = file_system(url)
    told = _ask(fs.info, path, tries=1)
    named = {re.sub("[^a-z0-9]", "", str(name).lower()): value for name, value in told.items()}
    return [f"{name}={named[name]}" for name in sorted(named.keys() & _VERSION)]


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
    listed = _ask(fs.ls, folder, detail=True)
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


class _Patient(io.RawIOBase):
    """A file behind a URL; what cannot be read is tried again; final."""

    def __init__(self, remote: Any) -> None:
        self._remote = remote

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return bool(self._remote.seekable())

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        return int(self._remote.seek(offset, whence))

    def tell(self) -> int:
        return int(self._remote.tell())

    def readinto(self, into: Any) -> int:
        at = self.tell()

        def read() -> bytes:
            if self.tell() != at:
                self.seek(at)
            return bytes(self._remote.read(len(into)))

        content = _patiently(read)
        into[: len(content)] = content
        return len(content)


def _ask(method: Callable[..., T], *args: Any, tries: int = TRIES, **words: Any) -> T:
    """Call a method of a file system, with a limit of time where it takes one."""
    if inspect.iscoroutinefunction(getattr(method, "__wrapped__", None)):
        words["timeout"] = TIMEOUT_S
    return _patiently(lambda: method(*args, **words), tries)


def _patiently(call: Callable[[], T], tries: int = TRIES) -> T:
    """Call what may fail for a moment, a few times.

    Raises:
        OSError: It fails still, or for good.
    """
    with foreign_errors():
        for number in range(1, tries):
            try:
                return call()
            except Exception as error:
                if not _may_pass(_true_error(error)):
                    raise
            # Not all threads at once.
            time.sleep(PAUSE_S * 2 ** (number - 1) * random.uniform(1, 1.5))
        return call()


def _may_pass(error: Exception) -> bool:
    status = getattr(error, "status", None)
    if isinstance(status, int):
        return status >= 500 or status in _PASSING
    return not isinstance(error, _FINAL)


def _true_error(error: Exception) -> Exception:
    """Return what went wrong: fsspec's HTTP says of any error that there is no such file."""
    cause = error.__cause__
    if not (isinstance(error, FileNotFoundError) and isinstance(cause, Exception)):
        return error
    absent = isinstance(cause, FileNotFoundError) or getattr(cause, "status", None) in _ABSENT
    return error if absent else cause


@contextmanager
def foreign_errors() -> Iterator[None]:
    """Turn whatever a file system raises into an `OSError` with its words."""
    try:
        yield
    except Exception as raised:
        error = _true_error(raised)
        if isinstance(error, OSError) and str(error):
            raise error from None
        said = "no answer in time" if isinstance(error, TimeoutError) else str(error)
        raise OSError(said or type(error).__name__) from raised


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
