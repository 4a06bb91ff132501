"""Small pictures beside the hits of the table, in terminals that can show them.

kitty    pictures, in terminals that know kitty's graphics protocol with Unicode placeholders: they
         scroll, wrap and are erased like text (sw.kovidgoyal.net/kitty/graphics-protocol)
blocks   characters of two pixels each, in any terminal with colours
"""

import base64
import io
import os
import sys
import zlib
from collections.abc import Mapping
from dataclasses import dataclass

from mmalign.errors import DataError

WAYS = ("auto", "kitty", "blocks", "off")
PLACEHOLDER, BLOCK = "\U0010eeee", "▀"
# The marks that number rows and columns of placeholders, from 0.
NUMBERS = "\u0305\u030d\u030e\u0310\u0312\u033d\u033e\u033f"
# Most characters of a picture in one sequence.
CHUNK = 4096
RESET = "\x1b[0m"
# Levels of a colour in the cube of 216, which begins at colour 16 of 256.
LEVELS = (0, 95, 135, 175, 215, 255)


@dataclass(frozen=True)
class Size:
    """The cells that a picture covers; a cell is about twice as high as wide."""

    columns: int
    rows: int


SIZES = {"kitty": Size(8, 4), "blocks": Size(16, 8)}


def way(wanted: str, environment: Mapping[str, str] = os.environ) -> str | None:
    """Return how pictures are shown on stdout, "kitty" or "blocks"; None if they are not.

    Terminals are told by their names, which also come through ssh. A question to the terminal would
    tell no more: some answer that they know kitty's protocol, but not its placeholders.

    Args:
        wanted: One of `WAYS`. "auto" shows pictures where they are sharp; blocks are for who asks.
        environment: The variables of the process.
    """
    if wanted == "auto":
        plain = environment.get("NO_COLOR") or not sys.stdout.isatty()
        wanted = "off" if plain or not _is_kitty(environment) else "kitty"
    needed = {"kitty": PLACEHOLDER + NUMBERS, "blocks": BLOCK}.get(wanted)
    try:
        return wanted if needed and needed.encode(sys.stdout.encoding or "ascii") else None
    except (UnicodeEncodeError, LookupError):
        return None


def lines(how: str, content: bytes, environment: Mapping[str, str] = os.environ) -> list[str]:
    """Return the lines of a picture, with escape sequences; each is as wide as `SIZES[how]`.

    Args:
        how: "kitty" or "blocks".
        content: The encoded picture; one that is empty or damaged is an empty place.
        environment: The variables of the process.
    """
    from mmalign.data import fit_image, open_image

    size = SIZES[how]
    try:
        image = open_image(content) if content else None
    except DataError:
        image = None
    if image is None:
        return [" " * size.columns] * size.rows
    if how == "kitty":
        png = io.BytesIO()
        image.save(png, "PNG")
        return _placeholders(png.getvalue(), size, through_tmux=_in_tmux(environment))
    pixels = fit_image(image, size.columns, "shortest").tolist()
    colour = _true_colour if _has_true_colour(environment) else _one_of_256
    return [
        "".join(
            f"\x1b[38;{colour(*above)};48;{colour(*below)}m{BLOCK}"
            for above, below in zip(pixels[2 * row], pixels[2 * row + 1], strict=True)
        )
        + RESET
        for row in range(size.rows)
    ]


def _placeholders(png: bytes, size: Size, *, through_tmux: bool) -> list[str]:
    """Send a picture, and return cells that show it where they are printed."""
    # By its content: the same picture in an earlier table stays what it is.
    number = zlib.crc32(png) % 0xFFFFFF + 1
    text = base64.b64encode(png).decode()
    parts = [text[at : at + CHUNK] for at in range(0, len(text), CHUNK)]
    # Answers are suppressed (q=2): nobody would read them.
    keys = f"a=T,U=1,q=2,f=100,i={number},c={size.columns},r={size.rows},"
    sent = ""
    for at, part in enumerate(parts):
        more = int(at < len(parts) - 1)
        one = f"\x1b_G{keys if at == 0 else 'q=2,'}m={more};{part}\x1b\\"
        sent += "\x1bPtmux;" + one.replace("\x1b", "\x1b\x1b") + "\x1b\\" if through_tmux else one
    colour = f"\x1b[38;{_true_colour(number >> 16, number >> 8 & 255, number & 255)}m"
    cells = [
        "".join(PLACEHOLDER + NUMBERS[row] + NUMBERS[column] for column in range(size.columns))
        for row in range(size.rows)
    ]
    return [(sent if row == 0 else "") + colour + line + RESET for row, line in enumerate(cells)]


def _is_kitty(environment: Mapping[str, str]) -> bool:
    known = environment.get("TERM") in ("xterm-kitty", "xterm-ghostty")
    known = known or environment.get("TERM_PROGRAM") == "ghostty"
    return known and not _in_tmux(environment)


def _in_tmux(environment: Mapping[str, str]) -> bool:
    return bool(environment.get("TMUX"))


def _has_true_colour(environment: Mapping[str, str]) -> bool:
    known = environment.get("COLORTERM") in ("truecolor", "24bit") or "WT_SESSION" in environment
    return known or environment.get("TERM", "").endswith(("-direct", "-kitty", "-ghostty"))


def _true_colour(red: int, green: int, blue: int) -> str:
    return f"2;{red};{green};{blue}"


def _one_of_256(red: int, green: int, blue: int) -> str:
    """Return the nearest colour of the cube of 216 or of the 24 greys, which begin at 232."""
    wanted = (red, green, blue)
    nearest = [min(range(6), key=lambda n: abs(LEVELS[n] - part)) for part in wanted]
    grey = min(23, max(0, round((sum(wanted) / 3 - 8) / 10)))
    in_cube = sum((LEVELS[n] - part) ** 2 for n, part in zip(nearest, wanted, strict=True))
    if sum((8 + 10 * grey - part) ** 2 for part in wanted) < in_cube:
        return f"5;{232 + grey}"
    return f"5;{16 + 36 * nearest[0] + 6 * nearest[1] + nearest[2]}"
