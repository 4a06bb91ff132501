"""Share one memory budget among all threads that decode.

A file of a few hundred kilobytes may decode to a gigabyte, and every core decodes one at a time.
"""

import os
import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path

from mmalign.data.samples import SampleProblem

# Decoding may use this share of the memory for any number of threads, and no more than ...
MEMORY_SHARE = 0.25
MOST_BYTES = 4 << 30
# ... if the memory size cannot be determined, it is assumed to be this.
ASSUMED_BYTES = 8 << 30
# One image may use this much, if the budget allows it.
IMAGE_BYTES = 1 << 30
_CGROUP_LIMITS = (
    "/sys/fs/cgroup/memory.max",
    "/sys/fs/cgroup/memory/memory.limit_in_bytes",
)


class ByteBudget:
    """A byte budget shared by threads; first come, first served, so none starves."""

    def __init__(self, total_bytes: int, each_bytes: int) -> None:
        """Set the total, and the maximum `each_bytes` for one image."""
        self.total_bytes, self.each_bytes = total_bytes, min(each_bytes, total_bytes)
        self._free = total_bytes
        self._waiting: deque[object] = deque()
        self._changed = threading.Condition()

    @contextmanager
    def reserved(self, wanted_bytes: int, what: str) -> Iterator[None]:
        """Reserve bytes while an image is decoded; wait until they are free.

        A thread must not request more while it holds some, because all threads could deadlock.

        Raises:
            SampleProblem: The image needs more than one image may use.
        """
        if wanted_bytes > self.each_bytes:
            raise SampleProblem(
                f"too large to decode: {what} needs {wanted_bytes / 1e9:.1f} GB, more than the "
                f"{self.each_bytes / 1e9:.1f} GB allowed for one image"
            )
        ticket = object()
        with self._changed:
            self._waiting.append(ticket)
            try:
                self._changed.wait_for(
                    lambda: self._waiting[0] is ticket and self._free >= wanted_bytes
                )
                self._free -= wanted_bytes
            finally:
                self._waiting.remove(ticket)
                self._changed.notify_all()
        try:
            yield
        finally:
            with self._changed:
                self._free += wanted_bytes
                self._changed.notify_all()


@cache
def decoding_budget() -> ByteBudget:
    """Return the only budget of this process."""
    return ByteBudget(min(MOST_BYTES, int(MEMORY_SHARE * memory_bytes())), IMAGE_BYTES)


def memory_bytes() -> int:
    """Return the memory of this machine, or of the container in which this process runs."""
    found = ASSUMED_BYTES
    with suppress(AttributeError, ValueError, OSError):  # no sysconf on Windows
        found = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    for limit in _CGROUP_LIMITS:
        with suppress(ValueError, OSError):  # no such file, or "max"
            found = min(found, int(Path(limit).read_text(encoding="ascii")))
    return found
