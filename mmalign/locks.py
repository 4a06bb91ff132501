"""A folder that one process uses at a time."""

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path

from mmalign import files


@contextlib.contextmanager
def sole_user(folder: Path) -> Iterator[bool]:
    """Lock a folder; yield False if another process holds it.

    The system releases the lock when the process ends, for any reason. Windows cannot lock a
    folder, so a file in it is locked. Where nothing can be locked, every process gets True.
    """
    lock = None if files.fcntl else folder / ".lock"
    try:
        handle = os.open(lock or folder, os.O_RDWR | os.O_CREAT if lock else os.O_RDONLY)
    except PermissionError:
        yield True
        return
    try:
        yield _held_by_us(handle)
    finally:
        os.close(handle)
        if lock:
            with contextlib.suppress(OSError):  # another process has it open
                os.unlink(lock)


def _held_by_us(handle: int) -> bool:
    try:
        if files.fcntl:
            files.fcntl.flock(handle, files.fcntl.LOCK_EX | files.fcntl.LOCK_NB)
        elif files.msvcrt:
            os.lseek(handle, files.LOCKED_BYTE, os.SEEK_SET)
            files.msvcrt.locking(handle, files.msvcrt.LK_NBLCK, 1)
    except OSError as error:
        return error.errno not in (errno.EAGAIN, errno.EACCES, errno.EDEADLK)
    return True
