"""How FAISS writes down lists that stay in a file, so that opening an index reads none of them.

FAISS maps lists of plain codes, but copies those that fast-scan has packed, all of them, whenever
an index is opened. Both lie in memory alike: packed codes, then ids, so packed lists can be mapped
as plain ones are, if each has room for whole blocks. What must be written is what FAISS reads as
`OnDiskInvertedLists`: a mark, the number of lists, the bytes of a code, a table with the rows, the
room and the place of each list, free slots (none), and the name and size of the file.

Source: `index_write.cpp` and `OnDiskInvertedLists.h` of FAISS 1.15.
"""

import struct
from collections.abc import Sequence

import numpy as np

NONE, MARK, ID_BYTES = b"il00", b"ilod", 8
"""The words for no lists and for lists in a file."""


def table(lists: Sequence[tuple[int, int]], code_bytes: int) -> bytes:
    """Describe lists that lie one after another.

    Args:
        lists: Rows of each list, and rows that it has room for.
        code_bytes: Bytes of one code.
    """
    rows_L, room_L = np.array(lists, dtype=np.uint64).T
    bytes_L = room_L * np.uint64(code_bytes + ID_BYTES)
    start_L = np.cumsum(bytes_L) - bytes_L
    entries = np.stack([rows_L, room_L, start_L], axis=1).tobytes()
    head = MARK + struct.pack("<3Q", len(lists), code_bytes, len(lists))
    return head + entries + struct.pack("<Q", 0)


def place(name: str, size: int) -> bytes:
    """Say which file the lists are in, and its bytes; this stands at the end of an index."""
    written = name.encode()
    return struct.pack("<Q", len(written)) + written + struct.pack("<Q", size)


def moved(index: bytes, name: str, path: str, size: int) -> bytes:
    """Return an index that looks for its lists under another name."""
    end = place(name, size)
    if not index.endswith(end):
        raise ValueError(f"it does not end with the place of its lists, {name}")
    return index[: -len(end)] + place(path, size)
