"""Read camera raw files: the embedded JPEG that the camera made for viewers."""

from collections.abc import Iterator
from contextlib import suppress

from PIL import Image

_START = b"\xff\xd8\xff"
# Frame types of lossy JPEG; raw pixels may be stored as lossless JPEG, which looks similar.
_LOSSY = (0xC0, 0xC1, 0xC2)
_DNG_VERSION, _SUBFILE, _COMPRESSION = 50706, 254, 259
# Compressions that only raw files use: Nikon's, Sony's, Pentax's.
_RAW_COMPRESSIONS = (34713, 32767, 65535)
# A JPEG start occurs by chance once in 16 MB; a file made to be slow could contain millions.
_MOST_STARTS = 1000
_TIFF_STARTS = (b"II*\x00", b"MM\x00*", b"IIRO", b"IIRS", b"MMOR", b"IIU\x00")


def is_raw(image: Image.Image, content: bytes) -> bool:
    """Return whether a file that Pillow reads as a small TIFF preview is a raw file."""
    tags = getattr(image, "tag_v2", {})
    return (
        content[8:10] == b"CR"
        or _DNG_VERSION in tags
        or tags.get(_SUBFILE) == 1
        or tags.get(_COMPRESSION) in _RAW_COMPRESSIONS
    )


def preview(content: bytes) -> bytes | None:
    """Return the largest JPEG in a raw file, up to the file's end; None if there is none."""
    found = [(size, start) for start in _starts(content) if (size := _pixels(content, start))]
    return content[max(found)[1] :] if found else None


def exif_of(content: bytes) -> Image.Exif:
    """Return the EXIF of the raw file itself; empty if it cannot be read."""
    start = content.find(b"CMT1", 0, 1 << 16) + 4 if content[4:8] == b"ftyp" else 0
    tiff = content[start : start + (1 << 20)]
    exif = Image.Exif()
    if tiff[:4] in _TIFF_STARTS:
        # Some makers write their own number in place of TIFF's 42.
        number = b"*\x00" if tiff[:1] == b"I" else b"\x00*"
        with suppress(Exception):  # parsers raise anything
            exif.load(b"Exif\0\0" + tiff[:2] + number + tiff[4:])
    return exif


def _starts(content: bytes) -> Iterator[int]:
    start = -1
    for _ in range(_MOST_STARTS):
        start = content.find(_START, start + 1)
        if start < 0:
            return
        yield start


def _pixels(content: bytes, start: int) -> int:
    """Return the pixel count of the lossy 8-bit JPEG at a given start; 0 if there is none."""
    at = start + 2
    for _ in range(64):
        marker, length = content[at + 1 : at + 2], int.from_bytes(content[at + 2 : at + 4], "big")
        if content[at : at + 1] != b"\xff" or not marker or length < 2:
            return 0
        if marker[0] in _LOSSY:
            precision, height, width = (
                content[at + 4 : at + 5],
                int.from_bytes(content[at + 5 : at + 7], "big"),
                int.from_bytes(content[at + 7 : at + 9], "big"),
            )
            return width * height if precision == b"\x08" else 0
        if marker[0] == 0xDA or (0xC0 <= marker[0] <= 0xCF and marker[0] not in (0xC4, 0xCC)):
            return 0
        at += 2 + length
    return 0
