"""Safe text for a terminal: one line, limited in width, without control sequences.

Captions, ids and file names are untrusted text. They may contain escape sequences, line breaks,
marks that reverse the writing direction, or half a character.
"""

import os
import re
import shutil
import sys

# Control characters, line and paragraph separators, direction overrides, half characters.
ACTIVE = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
# Line width if stdout is not a terminal but a file or another program.
UNSEEN_COLUMNS = 240


def printable(text: str) -> str:
    r"""Escape characters that would act on a terminal, as Python does.

    >>> printable("a\x1b[31mred\nb")
    'a\\x1b[31mred\\nb'
    """
    return ACTIVE.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def width(text: str) -> int:
    """Count the terminal columns of a text; a Chinese character takes two."""
    from wcwidth import wcwidth

    return sum(max(0, wcwidth(character)) for character in text)


def shorten(text: str, columns: int) -> str:
    """Cut a text to a number of columns; an ellipsis marks the cut.

    >>> shorten("a dog on a beach", 8), shorten("红色的圆", 5)
    ('a dog o…', '红色…')
    """
    # Most characters take at least one column: no need to look further.

    head = text[: 4 * columns + 4]
    if len(head) == len(text) and width(text) <= columns:
        return text
    while head and width(head) > columns - 1:
        over = width(head) - (columns - 1)
        head = head[: -max(1, over // 2)]
    return head.rstrip() + "…"


def columns() -> int:
    """Return the maximum width of a line on stdout."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else UNSEEN_COLUMNS


def openable(uri: str) -> str:
    """Return the path of an image as a user would type it here: the shorter of two paths.

    A URL stays unchanged; `#` and what follows name a member of a tar, or a row of a table.

    """
    if "://" in uri or not os.path.isabs(uri):
        return uri
    try:
        here = os.path.relpath(uri)
    except (OSError, ValueError):  # the current folder is gone, or on another drive
        return uri
    here = f"./{here}" if here.startswith("-") else here
    return here if len(here) < len(uri) else uri
