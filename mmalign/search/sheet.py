"""Contact sheets: queries and their hits as one image."""

import importlib.util
import io
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from mmalign import files
from mmalign.data import open_image
from mmalign.errors import UsageError, reason_of
from mmalign.progress import say
from mmalign.search.searcher import Hit
from mmalign.store import Store

INK, QUIET, PAPER, CARD, RIGHT = "#1c1d21", "#75777f", "#f6f6f3", "#ffffff", "#2e9e5b"
TILE, GAP, MARGIN = 132, 12, 28
HEADING, TEXT, NOTE, SMALL = 26, 17, 14, 13
# More characters than fit any line of a sheet.
MAX_LETTERS = 1_000
# Paths of fonts with Chinese glyphs on various systems.
FONTS = (
    "/usr/share/fonts/opentype/noto/NotoSansCJK-Regular.ttc",
    "/usr/share/fonts/noto-cjk/NotoSansCJK-Regular.ttc",
    "/usr/share/fonts/google-noto-cjk/NotoSansCJK-Regular.ttc",
    "/usr/share/fonts/truetype/droid/DroidSansFallbackFull.ttf",
    "/usr/share/fonts/truetype/wqy/wqy-microhei.ttc",
    "/System/Library/Fonts/PingFang.ttc",
    "/System/Library/Fonts/Hiragino Sans GB.ttc",
    "C:/Windows/Fonts/msyh.ttc",
)


@dataclass(frozen=True)
class Tile:
    """One image of a sheet."""

    picture: bytes
    """An encoded image; empty if there is none to show."""
    label: str
    """A short line below it."""
    right: bool = False
    """Whether it is framed as the correct answer."""


@dataclass(frozen=True)
class Strip:
    """One query and its hits."""

    query: str
    tiles: Sequence[Tile]
    picture: bytes = b""
    """The query itself, if it is an image."""


def tiles_of(store: Store, hits: Sequence[Hit], right: str = "") -> list[Tile]:
    """Make tiles of hits from the store's thumbnails; the hit with id `right` is framed."""
    pictures = store.rows([hit.row for hit in hits], ("thumbnail",))
    return [
        Tile(
            row["thumbnail"],
            f"{hit.score:.2f}   {hit.caption or hit.id.rpartition('/')[2]}",
            right=hit.id == right,
        )
        for row, hit in zip(pictures, hits, strict=True)
    ]


def check_sheet(path: Path) -> str:
    """Return the image format of a sheet with this name, checked before any search.

    Raises:
        UsageError: The name has no image format that can be written, or its folder does not exist.
    """
    kind = Image.registered_extensions().get(path.suffix.lower())
    if kind not in Image.SAVE:
        raise UsageError(f"{path}: give the sheet a name that ends in .png")
    if not path.parent.is_dir():
        raise UsageError(f"{path}: the folder {path.parent} does not exist")
    return kind


def draw_sheet(strips: Sequence[Strip], path: Path, heading: str = "", note: str = "") -> None:
    """Write an image with one strip per query; long strips wrap. The file is written atomically.

    Raises:
        UsageError: The name has no image format that can be written.
        OSError: The file cannot be written.
    """
    kind = check_sheet(path)
    columns = max(6, min(8, max((len(s.tiles) for s in strips), default=0)))
    width = 2 * MARGIN + columns * TILE + (columns - 1) * GAP
    heights = [_strip_height(strip, columns) for strip in strips]
    top = MARGIN + (HEADING + 14 if heading else 0) + (NOTE + 22 if note else 0)
    sheet = Image.new("RGB", (width, top + sum(heights) + MARGIN // 2), PAPER)
    pen = ImageDraw.Draw(sheet)
    y = MARGIN
    if heading:
        pen.text((MARGIN, y), heading, INK, _font(HEADING))
        y += HEADING + 14
    if note:
        pen.text((MARGIN, y), note, QUIET, _font(NOTE))
    y = top
    for strip, height in zip(strips, heights, strict=True):
        _draw_strip(sheet, pen, strip, y, columns)
        y += height
    if any(ord(c) > 0x2E7F for s in strips for c in s.query) and _font_file() is None:
        say("no font with Chinese glyphs found: install one with pip install 'mmalign[fonts]'")
    content = io.BytesIO()
    try:
        sheet.save(content, kind)
    except (OSError, ValueError) as error:
        # Some formats cannot hold such an image: too large, or no colour.
        reason = reason_of(error)
        raise UsageError(f"{path}: {reason}: give the sheet a name that ends in .png") from None
    files.write_bytes(path, content.getvalue())


def _strip_height(strip: Strip, columns: int) -> int:
    lines = -(-max(1, len(strip.tiles)) // columns)
    return (TILE if strip.picture else TEXT + 14) + lines * (TILE + SMALL + 14) + 16


def _draw_strip(
    sheet: Image.Image, pen: ImageDraw.ImageDraw, strip: Strip, y: int, columns: int
) -> None:
    room = sheet.width - 2 * MARGIN
    if strip.picture:
        half = TILE - 14
        sheet.paste(_fit(strip.picture, half), (MARGIN, y))
        words = _cut(pen, strip.query, room - TILE, _font(TEXT))
        pen.text((MARGIN + TILE, y + half // 2 - TEXT // 2), words, INK, _font(TEXT))
        y += TILE
    else:
        pen.text((MARGIN, y), _cut(pen, strip.query, room, _font(TEXT)), INK, _font(TEXT))
        y += TEXT + 14
    for number, tile in enumerate(strip.tiles):
        line, column = divmod(number, columns)
        x = MARGIN + column * (TILE + GAP)
        at = y + line * (TILE + SMALL + 14)
        box = (x - 3, at - 3, x + TILE + 2, at + TILE + 2)
        pen.rounded_rectangle(
            box, 6, CARD, RIGHT if tile.right else "#e2e2dd", 3 if tile.right else 1
        )
        if tile.picture:
            sheet.paste(_fit(tile.picture, TILE - 6), (x + 3, at + 3))
        else:
            pen.text((x + TILE // 2, at + TILE // 2), "no thumbnail", QUIET, _font(SMALL), "mm")
        label = _cut(pen, tile.label, TILE, _font(SMALL))
        pen.text((x, at + TILE + 5), label, QUIET, _font(SMALL))


def _fit(content: bytes, side: int) -> Image.Image:
    """Centre an image on a white square; small ones are enlarged."""
    image = open_image(content, side)
    scale = side / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    image = image.resize(size, Image.Resampling.LANCZOS)
    square = Image.new("RGB", (side, side), CARD)
    square.paste(image, ((side - size[0]) // 2, (side - size[1]) // 2))
    return square


def _cut(pen: ImageDraw.ImageDraw, text: str, room: int, font: ImageFont.FreeTypeFont) -> str:
    # A caption may be very long: only as much as could fit is measured, with its lines joined.
    text = " ".join(text[:MAX_LETTERS].split())
    if pen.textlength(text, font) <= room:
        return text
    while text and pen.textlength(text + "…", font) > room:
        text = text[:-1]
    return text + "…"


@cache
def _font_file() -> str | None:
    for path in FONTS:
        if Path(path).exists():
            return path
    bundled = importlib.util.find_spec("mplfonts")
    if bundled is not None and bundled.origin is not None:
        path = str(Path(bundled.origin).parent / "fonts" / "NotoSansCJKsc-Regular.otf")
        return path if Path(path).exists() else None
    return None


@cache
def _font(size: int) -> ImageFont.FreeTypeFont:
    file = _font_file()
    if file is not None:
        return ImageFont.truetype(file, size)
    return ImageFont.load_default(size)  # type: ignore[return-value]
