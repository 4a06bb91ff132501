"""Write files that are either complete or absent: atomic writes, hashes, JSON lines.

All files that mmalign must not lose are written here. A write goes to a unique temporary name, is
synced to disk and renamed to its final name; then the containing folder is synced too. A failed
sync is never retried as if nothing had happened: the system may have dropped the unwritten data,
so the file is abandoned and the caller gets the error. A temporary file left by a killed process
is not data; `leftovers` finds it.
"""

import contextlib
import errno
import hashlib
import importlib
import io
import json
import os
import re
import secrets
import stat
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

WINDOWS = os.name == "nt"
# Errors of a file system that cannot sync folders (some network mounts), or is read-only.
NO_FOLDER_SYNC = (errno.EINVAL, errno.ENOTSUP, errno.EROFS)
# Errors of a full disk; libraries repeat their messages.
DISK_ERRORS = (errno.ENOSPC, errno.EFBIG, errno.EIO, errno.EROFS, errno.EDQUOT)
# Errors of a file system without hard links: exFAT, many network mounts, some container mounts.
NO_LINKS = (
    errno.EPERM, errno.EACCES, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL,
    errno.EMLINK, errno.EXDEV,
)  # fmt: skip
TAKEN = (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR)
# An offset beyond the end of any file: on Windows nobody can read locked bytes.
LOCKED_BYTE = 2**30


def _if_there(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError:
        return None


fcntl, msvcrt = _if_there("fcntl"), _if_there("msvcrt")


class Disk:
    """The disk operations that mmalign uses, one method each.

    Everything in this module goes through `disk`, so that tests can substitute a failing disk.
    """

    def create(self, path: Path) -> BinaryIO:
        """Open a new file for writing; raise an error if the name is taken."""
        return open(path, "xb")

    def append(self, path: Path) -> BinaryIO:
        """Open a file for unbuffered appending; create it if it does not exist."""
        return open(path, "ab", buffering=0)

    def truncate(self, file: BinaryIO, size: int) -> None:
        """Discard the content of an open file beyond a size in bytes."""
        file.truncate(size)

    def sync(self, file: BinaryIO) -> None:
        """Wait until the data written to an open file is on the disk."""
        file.flush()
        _reach_the_disk(file.fileno())

    def sync_path(self, path: Path) -> None:
        """Wait until a file that was written and closed elsewhere is on the disk."""
        with open(path, "rb+") as file:
            _reach_the_disk(file.fileno())

    def sync_folder(self, folder: Path) -> None:
        """Wait until the names in a folder are on the disk; Windows has no call for that."""
        if WINDOWS:
            return
        handle = os.open(folder, os.O_RDONLY)
        try:
            _reach_the_disk(handle)
        finally:
            os.close(handle)

    def make_folder(self, path: Path) -> None:
        """Create one folder inside an existing one, unless it exists already."""
        path.mkdir(exist_ok=True)

    def replace(self, source: Path, target: Path) -> None:
        """Rename a file or folder, replacing a file of that name."""
        os.replace(source, target)

    def rename(self, source: Path, target: Path) -> None:
        """Rename a file or folder; raise an error if a non-empty folder has the new name.

        On Windows only, renaming a file to the name of an existing file is an error as well.
        """
        os.rename(source, target)

    def link(self, source: Path, target: Path) -> None:
        """Create a hard link to a file; raise an error if the name is taken."""
        os.link(source, target)

    def touch(self, path: Path) -> None:
        """Set a file's modification time to now."""
        os.utime(path)

    def unlink(self, path: Path) -> None:
        """Remove the name of a file."""
        os.unlink(path)

    def remove_folder(self, path: Path) -> None:
        """Remove an empty folder."""
        os.rmdir(path)


disk = Disk()


def _reach_the_disk(handle: int) -> None:
    # On macOS `fsync` may leave the data in the drive's cache.
    full = getattr(fcntl, "F_FULLFSYNC", None)
    if full is not None:
        try:
            fcntl.fcntl(handle, full)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.ENOTTY):
                raise
        else:
            return
    os.fsync(handle)


class Draft(io.BufferedIOBase):
    """A file that is being written sequentially.

    It hashes the bytes as they are passed in, so a byte corrupted on its way to the disk does not
    match the hash. Hashing the file after reading it back would miss that.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._hash, self.bytes = file, hashlib.sha256(), 0

    def writable(self) -> bool:
        """Return True."""
        return True

    def write(self, content: "ReadableBuffer", /) -> int:
        """Write all of the given bytes."""
        size = memoryview(content).nbytes
        self._file.write(content)
        self._hash.update(content)
        self.bytes += size
        return size

    def tell(self) -> int:
        """Return the number of bytes written so far."""
        return self.bytes

    def sha256(self) -> str:
        """Return the hash of the bytes written so far."""
        return self._hash.hexdigest()


def sync_folder(folder: Path) -> None:
    """Make renames and new names inside a folder survive a power cut."""
    with name_in_errors(folder):
        try:
            disk.sync_folder(folder)
        except OSError as error:
            if error.errno not in NO_FOLDER_SYNC:
                raise


def make_folder(path: Path) -> None:
    """Create a folder and its missing parents so that they survive a power cut."""
    missing = [folder for folder in (path, *path.parents) if not folder.is_dir()]
    # The process that created an existing folder may have died before this sync. Its parent may
    # also lie outside our control and be inaccessible.
    with contextlib.suppress(PermissionError):
        sync_folder((missing[-1].parent if missing else path).parent)
    for folder in reversed(missing):
        disk.make_folder(folder)
        sync_folder(folder.parent)


@contextlib.contextmanager
def name_in_errors(path: Path) -> Iterator[None]:
    """Add the file name to an error of the block: the system gives it on open but not on write."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = str(path)
        raise


@contextlib.contextmanager
def _temporary(path: Path) -> Iterator[Path]:
    """Provide a unique temporary name beside `path`; remove what has it afterwards."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(6)}.tmp")
    try:
        with name_in_errors(path):
            yield temporary
    except OSError as error:
        # The temporary name means nothing to the user.
        if str(error.filename).startswith(str(temporary)):
            error.filename = str(path)
        raise
    finally:
        # A file that cannot be removed is garbage; the write itself has succeeded.
        if temporary.exists():
            with contextlib.suppress(OSError):
                remove(temporary)


@contextlib.contextmanager
def _synced(path: Path) -> Iterator[Draft]:
    """Open a new file that is synced to disk when the block ends without an error."""
    with disk.create(path) as file:
        yield Draft(file)
        disk.sync(file)


@contextlib.contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary path; a block without an error gives its file or folder the final name."""
    with _temporary(path) as temporary:
        yield temporary
        move(temporary, path)


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[Draft]:
    """Open a file for writing that gets its name only if the block ends without an error."""
    with atomic_path(path) as temporary, _synced(temporary) as draft:
        yield draft


def write_bytes(path: Path, content: bytes) -> None:
    """Write a whole file atomically and durably."""
    with atomic_file(path) as file:
        file.write(content)


def write_text(path: Path, content: str) -> None:
    """Write a whole UTF-8 file atomically and durably."""
    write_bytes(path, content.encode())


def write_json(path: Path, content: Any) -> None:
    """Write one JSON document atomically and durably, in a human-readable layout."""
    write_text(path, json.dumps(content, ensure_ascii=False, indent=1) + "\n")


def write_through(path: Path, write: Callable[[str], None]) -> None:
    """Let a library (FAISS, safetensors) write a file by name, then rename it atomically.

    Raises:
        OSError: The disk is full or broken, however the library words that.
    """
    with atomic_path(path) as temporary:
        with _as_system_errors():
            write(str(temporary))
        disk.sync_path(temporary)


@contextlib.contextmanager
def _as_system_errors() -> Iterator[None]:
    """Convert a library's disk errors to the underlying system error.

    Some libraries raise their own exceptions for a full disk, without its error number or cause.
    """
    try:
        yield
    except OSError:
        raise
    except Exception as error:
        told: BaseException | None = error
        while told and not isinstance(told, OSError):
            told = told.__cause__ or told.__context__
        code = told.errno if isinstance(told, OSError) else _code_in(str(error))
        if code is None:
            raise
        raise OSError(code, os.strerror(code)) from error


def _code_in(message: str) -> int | None:
    """Find a system error number in a message, from "(os error 28)" or the error text."""
    found = re.search(r"os error (\d+)|errno:? (\d+)", message, re.IGNORECASE)
    if found:
        return int(found[1] or found[2])
    return next((code for code in DISK_ERRORS if os.strerror(code) in message), None)


def claim(path: Path, content: bytes) -> bool:
    """Create a file atomically if the name is free; return False if it was not, or may not be.

    A file system without hard links cannot do this with a file, but it can with a folder, because a
    non-empty folder is never replaced. There the name becomes a folder that holds a file of the
    same name with the content; `claimed` reads both forms.

    Raises:
        OSError: It could not be written, or it exists but might not survive a power cut. Other
            processes may have seen it and relied on it, so it stays; the caller must check before
            continuing.
    """
    with _temporary(path) as temporary:
        with _synced(temporary) as draft:
            draft.write(content)
        try:
            if not _named(temporary, path):
                return False
        except FileNotFoundError:
            # This process was silent so long that its file was taken for that of a dead process.
            if temporary.exists() or not path.parent.exists():
                raise
            return False
        try:
            sync_folder(path.parent)
        except OSError as error:
            said = f"{error.strerror} (written, but it might not survive a power cut)"
            raise OSError(error.errno, said, str(path)) from error
        return True


def claimed(path: Path) -> bytes:
    """Read the content that `claim` wrote under a name."""
    file = path / path.name if path.is_dir() else path
    require_regular(file)
    return file.read_bytes()


def _named(temporary: Path, path: Path) -> bool:
    """Give a finished file its name if that name is free."""
    try:
        disk.link(temporary, path)
    except FileExistsError:
        # On a network mount a link can succeed and its reply be lost; our file then has two names.
        return os.stat(temporary).st_nlink > 1
    except FileNotFoundError:
        raise
    except OSError as error:
        if os.stat(temporary).st_nlink > 1:
            return True
        if error.errno not in NO_LINKS:
            raise
        return _renamed(temporary, path) if WINDOWS else _in_a_folder(temporary, path)
    return True


def _renamed(temporary: Path, path: Path) -> bool:
    try:
        disk.rename(temporary, path)
    except FileExistsError:
        return False
    return True


def _in_a_folder(temporary: Path, path: Path) -> bool:
    folder = temporary.with_name(f"{temporary.stem}.folder.tmp")
    try:
        disk.make_folder(folder)
        disk.replace(temporary, folder / path.name)
        sync_folder(folder)
        disk.rename(folder, path)
    except OSError as error:
        if error.errno in TAKEN:
            return False
        raise
    finally:
        if folder.exists():
            with contextlib.suppress(OSError):
                remove(folder)
    return True


def move(path: Path, target: Path) -> None:
    """Move or rename a file or folder durably; it has a name at every moment."""
    disk.replace(path, target)
    for folder in dict.fromkeys((target.parent, path.parent)):
        sync_folder(folder)


def remove(path: Path) -> None:
    """Remove a file, or a folder with its content; do nothing if it does not exist."""
    with contextlib.suppress(FileNotFoundError):
        if path.is_dir() and not path.is_symlink():
            for inner in path.iterdir():
                remove(inner)
            disk.remove_folder(path)
        else:
            disk.unlink(path)


def leftovers(folder: Path) -> list[Path]:
    """List the temporary files in a folder, both of active writers and of killed ones."""
    return sorted(folder.glob(".*.tmp"))


def append_lines(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Append JSON lines durably: all of them, or none after an error.

    They stay separate from a partial line left by a killed process. Without rows, lines appended by
    others are synced to disk.
    """
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    # File names may hold lone surrogates; UTF-8 cannot encode them, JSON can escape them.
    content = lines.encode("utf-8", "backslashreplace")
    with _appending(path) as (file, alone):
        size = file.seek(0, os.SEEK_END)
        try:
            left = memoryview(b"\n" + content if content and _is_torn(path) else content)
            while left:
                left = left[file.write(left) :]
            disk.sync(file)
        except OSError:
            # A partial line, or a line that is visible but not on the disk, is worse than none.
            if alone:
                with contextlib.suppress(OSError):
                    disk.truncate(file, size)
            raise
    sync_folder(path.parent)


def rewrite(path: Path, change: Callable[[bytes], bytes]) -> None:
    """Replace a file's content while processes that want to append to it wait.

    Windows cannot replace an open file. There the file is overwritten in place, and the input of
    `change` is lost if the process is killed during the write.
    """
    with _appending(path) as (file, _):
        content = change(path.read_bytes())
        if not WINDOWS:
            write_bytes(path, content)
        else:
            disk.truncate(file, 0)
            file.write(content)
            disk.sync(file)


@contextlib.contextmanager
def _appending(path: Path) -> Iterator[tuple[BinaryIO, bool]]:
    """Open a file at its end; True if it is locked for us alone (some file systems lack locks)."""
    while True:
        with name_in_errors(path), disk.append(path) as file:
            alone = _lock(file)
            # The process that held the lock may have replaced the file.
            if path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat()):
                yield file, alone
                return


def _lock(file: BinaryIO) -> bool:
    """Wait for an exclusive lock on an open file; closing the file releases it."""
    try:
        if fcntl:
            fcntl.flock(file, fcntl.LOCK_EX)
        elif msvcrt:
            file.seek(LOCKED_BYTE)
            while not _locked_within_seconds(file):
                pass
        else:
            return False
    except OSError:
        return False
    return True


def _locked_within_seconds(file: BinaryIO) -> bool:
    """Lock a byte on Windows, which gives up after ten seconds."""
    try:
        msvcrt.locking(file.fileno(), msvcrt.LK_LOCK, 1)
    except OSError as error:
        if error.errno != errno.EDEADLK:
            raise
        return False
    return True


def _is_torn(path: Path) -> bool:
    """Return whether a file ends in the middle of a line."""
    with open(path, "rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - 1))
        return file.read() not in (b"", b"\n")


def in_utf8(text: str) -> str:
    """Return a name or word with its bytes decoded as UTF-8; unchanged if they are not UTF-8.

    Python represents bytes that the locale's encoding cannot decode as lone surrogates.
    """
    try:
        text.encode()
    except UnicodeEncodeError:
        with contextlib.suppress(UnicodeError):
            return os.fsencode(text).decode()
    return text


def utf8_name(path: Path | str) -> str:
    """Convert a path for a library that accepts only UTF-8 names.

    In a locale with another encoding, Python represents the bytes of a name differently.

    Raises:
        OSError: The name is not UTF-8.
    """
    try:
        return os.fsencode(path).decode()
    except UnicodeDecodeError:
        told = "the name is not UTF-8, which a library requires: rename it"
        raise OSError(errno.EILSEQ, told, str(path)) from None


_scratch: list[Path] = []


@contextlib.contextmanager
def scratch_in(folder: Path) -> Iterator[None]:
    """Place a block's temporary files beside its output, or in the parent folder.

    It applies to all threads, because decoding runs in other threads than the caller's.
    """
    _scratch.append(folder.absolute())
    try:
        yield
    finally:
        _scratch.remove(folder.absolute())


def scratch_folder() -> Path:
    """Return the folder for large temporary files; /tmp, often in memory, is the last choice."""
    if any(os.environ.get(name) for name in ("TMPDIR", "TEMP", "TMP")):
        return Path(tempfile.gettempdir())
    beside = (next(f for f in (s, *s.parents) if f.is_dir()) for s in reversed(_scratch))
    found = (f for f in (*beside, Path("/var/tmp")) if f.is_dir() and os.access(f, os.W_OK))
    return next(found, None) or Path(tempfile.gettempdir())


def scratch_file() -> BinaryIO:
    """Open an unnamed file that disappears when it is closed or the process ends."""
    folder = scratch_folder()
    with name_in_errors(folder):
        return tempfile.TemporaryFile(dir=folder)


def require_regular(path: Path) -> None:
    """Refuse a path that is not a regular file before opening it: reading a pipe may never end.

    Raises:
        OSError: It is a folder, a pipe, a device; or it does not exist.
    """
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise OSError(errno.EINVAL, "not a regular file", str(path))


def sha256(path: Path) -> str:
    """Hash a file's content."""
    require_regular(path)
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
