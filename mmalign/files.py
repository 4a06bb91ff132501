"""Files that are either whole or absent: atomic writes, durable names, hashes, JSON lines.

Everything that mmalign must not lose goes through here. A write lands under a temporary name that
nobody else has, is synced to the disk, is renamed onto its place, and the folder that holds the
name is synced too. A sync that fails is never repeated as if nothing had been: what the system
could not write it may have dropped, so the file is given up and the caller gets the error. A
temporary file that a killed process left is no data; `leftovers` finds it.
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
# What a file system says that has no sync of folders (some network mounts), or cannot be written.
NO_FOLDER_SYNC = (errno.EINVAL, errno.ENOTSUP, errno.EROFS)
# What a system says of a disk that takes no more; libraries repeat its words.
DISK_ERRORS = (errno.ENOSPC, errno.EFBIG, errno.EIO, errno.EROFS, errno.EDQUOT)
# What one says that has no hard links: exFAT, many network mounts, some mounts of containers.
NO_LINKS = (
    errno.EPERM, errno.EACCES, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL,
    errno.EMLINK, errno.EXDEV,
)  # fmt: skip
TAKEN = (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR)
# Beyond the end of any file: Windows lets nobody read what is locked.
LOCKED_BYTE = 2**30


def _if_there(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError:
        return None


fcntl, msvcrt = _if_there("fcntl"), _if_there("msvcrt")


class Disk:
    """What mmalign asks of a disk, one method an operation; final.

    Everything in this module goes through `disk`, so that tests can put one there that fails.
    """

    def create(self, path: Path) -> BinaryIO:
        """Open a new file for writing; an error if the name is taken."""
        return open(path, "xb")

    def append(self, path: Path) -> BinaryIO:
        """Open a file for writing at its end, unbuffered; it is made if there is none."""
        return open(path, "ab", buffering=0)

    def truncate(self, file: BinaryIO, size: int) -> None:
        """Forget what an open file holds beyond a size in bytes."""
        file.truncate(size)

    def sync(self, file: BinaryIO) -> None:
        """Return when what was written to an open file is on the disk."""
        file.flush()
        _reach_the_disk(file.fileno())

    def sync_path(self, path: Path) -> None:
        """Return when a file that somebody else wrote and closed is on the disk."""
        with open(path, "rb+") as file:
            _reach_the_disk(file.fileno())

    def sync_folder(self, folder: Path) -> None:
        """Return when the names inside a folder are on the disk; Windows has no call for that."""
        if WINDOWS:
            return
        handle = os.open(folder, os.O_RDONLY)
        try:
            _reach_the_disk(handle)
        finally:
            os.close(handle)

    def make_folder(self, path: Path) -> None:
        """Make one folder inside an existing one; fine if it is there."""
        path.mkdir(exist_ok=True)

    def replace(self, source: Path, target: Path) -> None:
        """Give a file or folder another name; a file of that name is gone."""
        os.replace(source, target)

    def rename(self, source: Path, target: Path) -> None:
        """Give a file or folder a free name; an error if a folder that is not empty has it.

        Only on Windows it is an error as well if a file has the name of a file.
        """
        os.rename(source, target)

    def link(self, source: Path, target: Path) -> None:
        """Give a file a second name; an error if that is taken."""
        os.link(source, target)

    def touch(self, path: Path) -> None:
        """Make a file as young as if it had been written just now."""
        os.utime(path)

    def unlink(self, path: Path) -> None:
        """Remove the name of a file."""
        os.unlink(path)

    def remove_folder(self, path: Path) -> None:
        """Remove an empty folder."""
        os.rmdir(path)


disk = Disk()


def _reach_the_disk(handle: int) -> None:
    # On a Mac `fsync` leaves in the drive's cache what it should write.
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
    """A file that is being written, from its first byte to its last; final.

    It hashes what is handed to it: a byte that goes wrong on its way to the disk does not fit
    the hash, as it would if the file were read back for that.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._hash, self.bytes = file, hashlib.sha256(), 0

    def writable(self) -> bool:
        """Say yes."""
        return True

    def write(self, content: "ReadableBuffer", /) -> int:
        """Take some bytes, all of them."""
        size = memoryview(content).nbytes
        self._file.write(content)
        self._hash.update(content)
        self.bytes += size
        return size

    def tell(self) -> int:
        """Count the bytes so far."""
        return self.bytes

    def sha256(self) -> str:
        """Hash what was written so far."""
        return self._hash.hexdigest()


def sync_folder(folder: Path) -> None:
    """Make renames and new names inside a folder survive a power cut."""
    with naming(folder):
        try:
            disk.sync_folder(folder)
        except OSError as error:
            if error.errno not in NO_FOLDER_SYNC:
                raise


def make_folder(path: Path) -> None:
    """Make a folder, and those above it that are missing, so that they survive a power cut."""
    missing = [folder for folder in (path, *path.parents) if not folder.is_dir()]
    # Whoever made the one that is there may have died before this. Its parent may also be none of
    # our business, and closed to us.
    with contextlib.suppress(PermissionError):
        sync_folder((missing[-1].parent if missing else path).parent)
    for folder in reversed(missing):
        disk.make_folder(folder)
        sync_folder(folder.parent)


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Name the file in an error; the system does so when a file is opened, not when written."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = str(path)
        raise


@contextlib.contextmanager
def _temporary(path: Path) -> Iterator[Path]:
    """Lend a name beside `path` that no other process or thread has; nothing is left under it."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(6)}.tmp")
    try:
        with naming(path):
            yield temporary
    except OSError as error:
        # The temporary name says nothing to a person.
        if error.filename == str(temporary):
            error.filename = str(path)
        raise
    finally:
        # What cannot be removed is garbage, and no reason to call a finished write a failure.
        if temporary.exists():
            with contextlib.suppress(OSError):
                disk.unlink(temporary)


@contextlib.contextmanager
def _synced(path: Path) -> Iterator[Draft]:
    """Open a new file that is on the disk when the block ends well."""
    with disk.create(path) as file:
        yield Draft(file)
        disk.sync(file)


def _put(temporary: Path, path: Path) -> None:
    """Give a finished file its real name."""
    disk.replace(temporary, path)
    sync_folder(path.parent)


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[Draft]:
    """Open a file for writing that appears under its name only when the block ends well."""
    with _temporary(path) as temporary:
        with _synced(temporary) as draft:
            yield draft
        _put(temporary, path)


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
    """Let a library write a file by name (FAISS, safetensors), then make it appear atomically.

    Raises:
        OSError: The disk is full or broken, in whichever words the library says so.
    """
    with _temporary(path) as temporary:
        with _as_system_errors():
            write(str(temporary))
        disk.sync_path(temporary)
        _put(temporary, path)


@contextlib.contextmanager
def _as_system_errors() -> Iterator[None]:
    """Raise what a library says of a disk as the error of the system that it stems from.

    Libraries have exceptions of their own for a full disk, some without its number or its reason.
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
    """Find the number of a system's error in a message: "(os error 28)", or its words."""
    found = re.search(r"os error (\d+)|errno:? (\d+)", message, re.IGNORECASE)
    if found:
        return int(found[1] or found[2])
    return next((code for code in DISK_ERRORS if os.strerror(code) in message), None)


def claim(path: Path, content: bytes) -> bool:
    """Create a file atomically only if the name is free; False when it was not, or may not be.

    A file system without hard links cannot do this with a file, but it can with a folder: one that
    is not empty is never replaced. There the name is that of a folder, and the file of the same
    name inside of it has the content; `claimed` reads either.

    Raises:
        OSError: It could not be written, or it is there but might not survive a power cut. Others
            may have seen it and built on it, so it stays; its maker must look before going on.
    """
    with _temporary(path) as temporary:
        with _synced(temporary) as draft:
            draft.write(content)
        try:
            if not _named(temporary, path):
                return False
        except FileNotFoundError:
            # Who was silent for so long that its file was taken for that of a dead process.
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
    """Read what `claim` has written under a name."""
    file = path / path.name if path.is_dir() else path
    require_regular(file)
    return file.read_bytes()


def _named(temporary: Path, path: Path) -> bool:
    """Give a finished file its name if that is free."""
    try:
        disk.link(temporary, path)
    except FileExistsError:
        # Over a network a link can be made and its answer lost; then our file has two names.
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
    """Rename a file or folder into another folder, durably; it never has no name at all."""
    disk.replace(path, target)
    sync_folder(target.parent)
    sync_folder(path.parent)


def remove(path: Path) -> None:
    """Remove a file, or a folder with all that is in it; fine if it is gone already."""
    with contextlib.suppress(FileNotFoundError):
        if path.is_dir() and not path.is_symlink():
            for inner in path.iterdir():
                remove(inner)
            disk.remove_folder(path)
        else:
            disk.unlink(path)


def leftovers(folder: Path) -> list[Path]:
    """Temporary files in a folder: of writers at work, and of killed ones."""
    return sorted(folder.glob(".*.tmp"))


def append_lines(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Append JSON lines durably: all of them, or after an error none.

    A line that a killed process has torn stays apart from them. Without rows, what others appended
    is made to last.
    """
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    # Names of files may hold half a surrogate; UTF-8 has none, JSON has an escape for it.
    content = lines.encode("utf-8", "backslashreplace")
    with _appending(path) as (file, alone):
        size = file.seek(0, os.SEEK_END)
        try:
            left = memoryview(b"\n" + content if content and _is_torn(path) else content)
            while left:
                left = left[file.write(left) :]
            disk.sync(file)
        except OSError:
            # Half a line, or one that can be seen and is not on the disk, is worse than none.
            if alone:
                with contextlib.suppress(OSError):
                    disk.truncate(file, size)
            raise
    sync_folder(path.parent)


def rewrite(path: Path, change: Callable[[bytes], bytes]) -> None:
    """Change a file as a whole while those who would append to it wait.

    Windows replaces no file that is open. There it is written over, and what `change` was given is
    lost if the process is killed meanwhile.
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
    """Open a file at its end; True where nobody else can (some file systems have no locks)."""
    while True:
        with naming(path), disk.append(path) as file:
            alone = _lock(file)
            # Whoever was waited for may have put another file in its place.
            if path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat()):
                yield file, alone
                return


@contextlib.contextmanager
def sole_user(folder: Path) -> Iterator[bool]:
    """Hold a folder; False where another process holds it.

    The system ends the hold with the process, however that ends. Where there are no locks of
    folders, everybody gets True.
    """
    try:
        handle = os.open(folder, os.O_RDONLY)
    except PermissionError:  # Windows opens no folders
        yield True
        return
    try:
        yield _held_by_us(handle)
    finally:
        os.close(handle)


def _held_by_us(handle: int) -> bool:
    if not fcntl:
        return True
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True
    return True


def _lock(file: BinaryIO) -> bool:
    """Wait until nobody else has a lock on an open file; it goes when the file is closed."""
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
    """Say whether a file ends in the middle of a line."""
    with open(path, "rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - 1))
        return file.read() not in (b"", b"\n")


def in_utf8(text: str) -> str:
    """Return a name or word as its bytes read in UTF-8; as it is where they are none.

    Python holds bytes that the locale's encoding has no letters for as halves of characters.
    """
    try:
        text.encode()
    except UnicodeEncodeError:
        with contextlib.suppress(UnicodeError):
            return os.fsencode(text).decode()
    return text


def utf8_name(path: Path | str) -> str:
    """Write a path for a library that knows no names but those in UTF-8.

    Where the locale has another encoding, Python holds the bytes of a name in a way of its own.

    Raises:
        OSError: The name is not UTF-8.
    """
    try:
        return os.fsencode(path).decode()
    except UnicodeDecodeError:
        told = "the name is not UTF-8, and a library needs one: rename it"
        raise OSError(errno.EILSEQ, told, str(path)) from None


_scratch: list[Path] = []


@contextlib.contextmanager
def scratch_in(folder: Path) -> Iterator[None]:
    """Let the temporary files of a block lie beside what it writes, or in the folder around it.

    It holds for all threads: who decodes is another one than who asked for it.
    """
    _scratch.append(folder.absolute())
    try:
        yield
    finally:
        _scratch.remove(folder.absolute())


def scratch_folder() -> Path:
    """Return where large temporary files go: /tmp, which is memory on many systems, comes last."""
    if any(os.environ.get(name) for name in ("TMPDIR", "TEMP", "TMP")):
        return Path(tempfile.gettempdir())
    beside = (next(f for f in (s, *s.parents) if f.is_dir()) for s in reversed(_scratch))
    found = (f for f in (*beside, Path("/var/tmp")) if f.is_dir() and os.access(f, os.W_OK))
    return next(found, None) or Path(tempfile.gettempdir())


def scratch_file() -> BinaryIO:
    """Open a file that has no name, and is gone when it is closed or the process ends."""
    folder = scratch_folder()
    with naming(folder):
        return tempfile.TemporaryFile(dir=folder)


def require_regular(path: Path) -> None:
    """Refuse what is there and is no file, before it is opened: to read from a pipe may never end.

    Raises:
        OSError: It is a folder, a pipe, a device; or there is nothing.
    """
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise OSError(errno.EINVAL, "not a regular file", str(path))


def sha256(path: Path) -> str:
    """Hash a file's content."""
    require_regular(path)
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
