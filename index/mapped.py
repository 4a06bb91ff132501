"""Write inverted lists in the on-disk format of FAISS, so that opening an index reads none of them.

FAISS memory-maps lists of plain codes, but copies all packed fast-scan lists whenever an index is
opened. Both have the same layout: codes, then ids, so packed lists can be mapped like plain ones if
each has room for whole blocks. The format is that of `OnDiskInvertedLists`: a magic number, the
number of lists, the bytes of a code, a table with the rows, capacity and offset of each list, free
slots (none), and the name and size of the file.

Source: `index_write.cpp` and `OnDiskInvertedLists.h` of FAISS 1.15.
"""

import struct
from collections.abc import Sequence

import numpy as np

NO_LISTS, ON_DISK_LISTS, ID_BYTES = b"il00", b"ilod", 8
"""The magic numbers for no lists and for lists in a file, and the bytes of an id."""


def lists_table(lists: Sequence[tuple[int, int]], code_bytes: int) -> bytes:
    """Describe lists that are stored one after another.

    Args:
        lists: Rows and capacity in rows of each list.
        code_bytes: Bytes of one code.
    """
    rows_L, capacity_L = np.array(lists, dtype=np.uint64).T
    bytes_L = capacity_L * np.uint64(code_bytes + ID_BYTES)
    start_L = np.cumsum(bytes_L) - bytes_L
    entries = np.stack([rows_L, capacity_L, start_L], axis=1).tobytes()
    header = ON_DISK_LISTS + struct.pack("<3Q", len(lists), code_bytes, len(lists))
    return header + entries + struct.pack("<Q", 0)


def file_reference(name: str, size: int) -> bytes:
    """Return the name and size of the lists' file, as they stand at the end of an index."""
    encoded_name = name.encode()
    return struct.pack("<Q", len(encoded_name)) + encoded_name + struct.pack("<Q", size)


def with_lists_at(index: bytes, name: str, path: str, size: int) -> bytes:
    """Return the index with another path for its lists."""
    end = file_reference(name, size)
    if not index.endswith(end):
        raise ValueError(f"it does not end with the name of its lists, {name}")
    return index[: -len(end)] + file_reference(path, size)
