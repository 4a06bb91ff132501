"""Read the images of tables by row: each group of rows is read once for all threads.

A group is copied in chunks to an unnamed file; from there its images are read in any order. Memory
use depends neither on the group size nor on the number of threads, but on the page size chosen by
the writer: pyarrow puts up to 1,024 images into one page.
"""

import os
import shutil
import threading
import weakref
from array import array
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterable
from functools import lru_cache
from typing import Any

from mmalign import files
from mmalign.data.arrow_tables import images_of, open_table
from mmalign.data.samples import SampleProblem
from mmalign.errors import DataError, reason_of

# The maximum disk space of cached groups, and the share of the free space that they may use.
CACHED_BYTES, FREE_DIVISOR = 8 << 30, 8
# Each is an open file, of which macOS allows a process 256.
CACHED_GROUPS = 64


def read_row_image(path: str, row: int, column: str) -> bytes | str:
    """Return the encoded image of one row of a table, or the path stored in its place.

    Raises:
        SampleProblem: There is no image, or its group cannot be read.
        DataError: There is no room on the disk.
    """
    _, ends = _metadata_and_ends(path)
    group = bisect_right(ends, row)
    if group == len(ends):
        raise SampleProblem(f"the table has no row {row} any more")
    start = ends[group - 1] if group else 0
    return _cache.group(path, group, column).image(row - start)


def forget(path: str) -> None:
    """Discard cached data of a table, because it may have been rewritten."""
    _metadata_and_ends.cache_clear()
    _cache.forget(path)


@lru_cache(maxsize=64)
def _metadata_and_ends(path: str) -> tuple[Any, list[int]]:
    """Return the metadata of a parquet file, and the number of the row after each group."""
    with open_table(path) as table:
        return table.metadata, table.ends


class _Group:
    """The images of one group of rows, in an unnamed file."""

    def __init__(self, images: Iterable[bytes | str | None]) -> None:
        self._file = files.scratch_file()
        weakref.finalize(self, self._file.close)
        self._lock = threading.Lock()
        self._ends = array("Q", [0])
        self._is_path = bytearray()
        self.problem = ""
        for image in images:
            content = os.fsencode(image) if isinstance(image, str) else image or b""
            self._file.write(content)
            self._ends.append(self._ends[-1] + len(content))
            self._is_path.append(isinstance(image, str))
        self._file.flush()

    @property
    def size(self) -> int:
        """The size on disk in bytes."""
        return self._ends[-1]

    def image(self, number: int) -> bytes | str:
        """Return an image of the group."""
        if number >= len(self._is_path):
            raise SampleProblem(self.problem)
        start, end = self._ends[number], self._ends[number + 1]
        if start == end:
            raise SampleProblem("no image bytes")
        with self._lock:
            self._file.seek(start)
            content = self._file.read(end - start)
        return os.fsdecode(content) if self._is_path[number] else content


class _GroupCache:
    """The most recently used groups on disk."""

    def __init__(self) -> None:
        self._groups: OrderedDict[tuple[str, str, int], _Group] = OrderedDict()
        self._lock, self._reading = threading.Lock(), threading.Lock()

    def group(self, path: str, group: int, column: str) -> _Group:
        """Return a group; the first caller reads it, others wait."""
        key = (path, column, group)
        found = self._find(key)
        if found is None:
            # One at a time: two would need twice the memory.
            with self._reading:
                found = self._find(key)
                if found is None:
                    found = _read_group(path, group, column)
                    self._add(key, found)
        return found

    def forget(self, path: str) -> None:
        """Drop the groups of a table; threads that are reading one can continue."""
        with self._lock:
            for key in [key for key in self._groups if key[0] == path]:
                del self._groups[key]

    def _find(self, key: tuple[str, str, int]) -> _Group | None:
        with self._lock:
            if key in self._groups:
                self._groups.move_to_end(key)
            return self._groups.get(key)

    def _add(self, key: tuple[str, str, int], group: _Group) -> None:
        with self._lock:
            self._groups[key] = group
            free = shutil.disk_usage(files.scratch_folder()).free
            room = min(CACHED_BYTES, free // FREE_DIVISOR)
            # Threads may be at the end of one group and at the beginning of the next.
            while len(self._groups) > 2 and (
                len(self._groups) > CACHED_GROUPS
                or sum(g.size for g in self._groups.values()) > room
            ):
                self._groups.popitem(last=False)


_cache = _GroupCache()


def _read_group(path: str, group: int, column: str) -> _Group:
    metadata, _ = _metadata_and_ends(path)
    problem = ""

    def images() -> Iterable[bytes | str | None]:
        nonlocal problem
        try:
            with open_table(path, metadata) as table:
                for chunk in table.chunks(group, column):
                    yield from images_of(chunk)
        except Exception as error:  # Arrow's own, and those of each file system
            problem = f"rows of the table cannot be read: {reason_of(error)}"

    try:
        read = _Group(images())
    except OSError as error:
        place = files.scratch_folder()
        raise DataError(
            f"{path}: no space for its images in {place}: {error.strerror} "
            "(set TMPDIR to another folder)"
        ) from None
    read.problem = problem
    return read
