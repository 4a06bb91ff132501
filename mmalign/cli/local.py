"""The files of this machine that hits name: their paths, and opening them."""

import os
import re
from typing import TYPE_CHECKING

import click

from mmalign.errors import DataError

if TYPE_CHECKING:
    from mmalign.search.searcher import Hits

MOST_OPENED = 10
# How a byte of a name that is not UTF-8 is written in a uri.
ESCAPED_BYTE = re.compile(r"\\u(dc[89a-f][0-9a-f])")


def local_file(uri: str) -> bytes | None:
    """Return the path of the file that a uri names, in the bytes of the file system.

    None for URLs, members of archives, rows of tables and relative paths, and if there is no such
    file.
    """
    from mmalign.data.places import is_url, local_path

    path = "" if is_url(uri) else local_path(uri)
    if not os.path.isabs(path):
        return None
    named = ESCAPED_BYTE.sub(lambda found: chr(int(found[1], 16)), path)
    names = (_in_bytes(path), _in_bytes(named))
    return next((name for name in names if os.path.isfile(name)), None)


def open_files(hits: "Hits") -> None:
    """Open the image files of hits, the best first, with the program that the system has for them.

    A store may come from somebody else, so only files with the name of an image are opened: some
    systems run a program when it is opened.

    Raises:
        DataError: The system cannot open files.
    """
    from mmalign.data.kinds import HEIC_SUFFIXES, IMAGE_SUFFIXES, RAW_SUFFIXES, suffix
    from mmalign.progress import say

    files = [os.fsdecode(path) for hit in hits if (path := local_file(hit.uri))]
    kinds = IMAGE_SUFFIXES | HEIC_SUFFIXES | RAW_SUFFIXES
    images = [file for file in files if suffix(file) in kinds]
    for file in images[:MOST_OPENED]:
        if click.launch(file):
            told = "no program was found that opens files (on Linux it is xdg-open)"
            raise DataError(f"{file}: cannot be opened: {told}")
    if left := len(hits) - len(images):
        say(f"{left} of {len(hits)} hits not opened, which are no image files here")
    if len(images) > MOST_OPENED:
        say(f"{len(images)} image files were found, of which the first {MOST_OPENED} are opened")


def _in_bytes(path: str) -> bytes:
    try:
        return os.fsencode(path)
    except UnicodeEncodeError:  # the locale of this process has no letters for the name
        return path.encode("utf-8", "surrogateescape")
