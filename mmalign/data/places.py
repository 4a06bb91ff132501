"""Access the places where samples are stored: local paths, and URLs that fsspec knows.

A local path is never parsed as a URL, so its name may contain `::`, `#` or `%`. Only regular files
are opened: reading a named pipe would wait forever. Failed operations on a URL are retried.
"""

import inspect
import io
import os
import re
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, BinaryIO, Literal, TypeVar
from urllib.parse import unquote

from tenacity import (
    Retrying,
    retry_if_exception,
    stop_after_attempt,
    wait_exponential,
    wait_random,
)

# A one-letter scheme is a Windows drive. fsspec chains schemes: `simplecache::s3://bucket/key`.
_URL = re.compile(r"(?:[a-z][a-z0-9+.-]+::)*[a-z][a-z0-9+.-]+://", re.IGNORECASE)
_LOCAL_URL = re.compile(r"(?:file|local)://", re.IGNORECASE)
# No image or sidecar has this many bytes. Each thread holds a whole file while decoding it.
MOST_BYTES, MOST_SIDECAR_BYTES = 1 << 29, 1 << 26
# The number of attempts to read from a URL, with a pause before the second and twice that before
# the third, and the longest wait for an answer.
TRIES, PAUSE_S, TIMEOUT_S = 3, 0.5, 120.0
# HTTP statuses of a temporary failure: too slow, too early, too many. And of a missing file.
_TEMPORARY, _ABSENT = (408, 425, 429), (404, 410)
# Errors that a retry would not change.
_PERMANENT = (
    FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError, FileExistsError,
    ImportError, NotImplementedError, ValueError, TypeError, LookupError, AttributeError,
)  # fmt: skip
# File systems' names for the properties that change with a file, in lower case without punctuation.
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
    """A name in a folder and its kind; `why` explains "other"."""

    name: str
    kind: Literal["file", "folder", "other"]
    why: str = ""
    hides: bool = False
    """Whether samples may lie behind an entry that could not be examined."""


def is_url(place: str) -> bool:
    """Return whether a place is a URL; `file://` URLs are local paths, see `local_path`."""
    return bool(_URL.match(place)) and not _LOCAL_URL.match(place)


def local_path(place: str) -> str:
    """Return the path of a `file://` URL; return any other place unchanged."""
    found = _LOCAL_URL.match(place)
    if not found:
        return place
    path = place[found.end() :].removeprefix("localhost")
    # File managers write a space as %20; an existing file with the literal name takes precedence.
    return path if os.path.lexists(path) else unquote(path)


def file_system(url: str) -> tuple[Any, str]:
    """Return the fsspec file system of a URL and the path on it.

    Raises:
        OSError: For any failure; each file system has its own errors.
    """
    import fsspec

    try:
        with foreign_errors():
            fs, path = fsspec.core.url_to_fs(url)
            return fs, str(path)
    except OSError as error:
        if isinstance(error.__cause__, ImportError) and url.startswith(("http://", "https://")):
            raise OSError(f"reading from the web needs an extra package: {WEB_EXTRA}") from None
        raise


def canonical_place(place: str) -> str:
    """Return a place as it is written in the uris below it: `memory://a` is `memory:///a`."""
    if not is_url(place):
        return local_path(place)
    fs, path = file_system(place)
    return str(fs.unstrip_protocol(path))


@contextmanager
def open_file(place: str) -> Iterator[BinaryIO]:
    """Open a regular file or a URL to read bytes.

    Raises:
        OSError: It cannot be opened, or is not a regular file.
    """
    if not is_url(place):
        with open(local_path(place), "rb", opener=_open_regular) as file:
            yield file
        return
    fs, path = file_system(place)
    with _with_retries(lambda: fs.open(path, "rb")) as remote:
        yield io.BufferedReader(_RetryingFile(remote))


def read(place: str, offset: int = 0, length: int = -1, *, most: int = MOST_BYTES) -> bytes:
    """Read a regular file or part of it; fewer than `length` bytes if it ends earlier.

    Args:
        place: A path or URL.
        offset: Where to begin.
        length: The number of bytes; -1 reads to the end.
        most: Refuse to read more; for a URL, the size of the whole file is not requested.

    Raises:
        OSError: It cannot be read, is not a regular file, or is larger.
    """
    _refuse_large(length, most)
    if is_url(place):
        fs, path = file_system(place)
        end = None if length < 0 else offset + length
        content = bytes(_ask(fs.cat_file, path, start=offset or None, end=end))
        # Some servers do not support ranges and send the whole file.
        return content[offset:end] if 0 <= length < len(content) else content
    with open_file(place) as file:
        if length < 0:
            _refuse_large(os.fstat(file.fileno()).st_size - offset, most)
        file.seek(offset)
        return file.read(length)


def exists(url: str) -> bool:
    """Return whether something exists at a URL; True if in doubt."""
    try:
        fs, path = file_system(url)
        _ask(fs.info, path)
    except FileNotFoundError:
        return False
    except OSError:
        return True
    return True


def version(url: str) -> list[str]:
    """Return the server's values that change when the file does: ETag, time, size.

    Raises:
        OSError: It gives none.
    """
    fs, path = file_system(url)
    told = _ask(fs.info, path, tries=1)
    named = {re.sub("[^a-z0-9]", "", str(name).lower()): value for name, value in told.items()}
    return [f"{name}={named[name]}" for name in sorted(named.keys() & _VERSION)]


def list_local(folder: str) -> list[Entry]:
    """List a local folder sorted by name; links are followed.

    Raises:
        OSError: The listing could not be completed.
    """
    with os.scandir(folder) as entries:
        return sorted((_entry(e) for e in entries), key=lambda e: e.name)


def list_remote(fs: Any, folder: str) -> list[Entry]:
    """List a folder of an fsspec file system sorted by name.

    Raises:
        OSError: It cannot be listed; FileNotFoundError if it does not exist.
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


class _RetryingFile(io.RawIOBase):
    """A file at a URL; failed reads are retried."""

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

        content = _with_retries(read)
        into[: len(content)] = content
        return len(content)


def _ask(method: Callable[..., T], *args: Any, tries: int = TRIES, **words: Any) -> T:
    """Call a method of a file system, with a timeout if it accepts one."""
    if inspect.iscoroutinefunction(getattr(method, "__wrapped__", None)):
        words["timeout"] = TIMEOUT_S
    return _with_retries(lambda: method(*args, **words), tries)


def _with_retries(call: Callable[[], T], tries: int = TRIES) -> T:
    """Call a function that may fail temporarily, with a few retries.

    Raises:
        OSError: It still fails, or fails permanently.
    """
    retrying = Retrying(
        retry=retry_if_exception(_is_temporary),
        stop=stop_after_attempt(tries),
        # Jitter, so that threads do not retry all at once.
        wait=wait_exponential(PAUSE_S) + wait_random(0, PAUSE_S / 2),
        reraise=True,
    )
    with foreign_errors():
        return retrying(call)


def _is_temporary(raised: BaseException) -> bool:
    if not isinstance(raised, Exception):
        return False
    error = _true_error(raised)
    status = getattr(error, "status", None)
    if isinstance(status, int):
        return status >= 500 or status in _TEMPORARY
    return not isinstance(error, _PERMANENT)


def _true_error(error: Exception) -> Exception:
    """Return the actual error: fsspec's HTTP reports any error as a missing file."""
    cause = error.__cause__
    if not (isinstance(error, FileNotFoundError) and isinstance(cause, Exception)):
        return error
    absent = isinstance(cause, FileNotFoundError) or getattr(cause, "status", None) in _ABSENT
    return error if absent else cause


@contextmanager
def foreign_errors() -> Iterator[None]:
    """Convert any error of a file system to an `OSError` with its message."""
    try:
        yield
    except Exception as raised:
        error = _true_error(raised)
        if isinstance(error, OSError) and str(error):
            raise error from None
        said = "no answer in time" if isinstance(error, TimeoutError) else str(error)
        raise OSError(said or type(error).__name__) from raised


def reason(error: OSError) -> str:
    """Describe an error in one line, without the place, which is reported beside it."""
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
        # A link to an unmounted disk: the files on it are not gone.
        return Entry(found.name, "other", "broken link", hides=True)
    except OSError as error:
        return Entry(found.name, "other", f"cannot be accessed: {reason(error)}", hides=True)


def special(mode: int) -> str:
    """Name the type of a file that is not regular, by its `st_mode`."""
    return _SPECIAL.get(stat.S_IFMT(mode), "unknown type")


def _open_regular(path: str, flags: int) -> int:
    # The open is refused before it can have an effect (a device), and must not block (a pipe that
    # replaced the file in the meantime).
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
        raise OSError(f"it has {size / 1e6:,.0f} MB, more than the limit of {most / 1e6:,.0f} MB")


def refuse_special(mode: int) -> None:
    """Raise an `OSError` if `st_mode` is not that of a regular file."""
    if not stat.S_ISREG(mode):
        raise OSError(f"not a regular file: {special(mode)}")
