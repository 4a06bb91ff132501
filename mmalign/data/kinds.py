"""Decide which files are images: by extension, else by their first bytes.

A known extension decides; a file with none, or an unspecific one, is inspected. Images are decoded
by content alone, so a wrong extension among image formats does no harm.
"""

import importlib.util
import re
from collections.abc import Callable
from pathlib import PurePosixPath
from typing import Literal

from mmalign.modality import IMAGE, of_file

# fmt: off
IMAGE_SUFFIXES = frozenset((
    ".jpg", ".jpeg", ".jpe", ".jfif", ".jif", ".mpo", ".png", ".apng", ".webp", ".gif", ".bmp",
    ".dib", ".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".pnm", ".jp2", ".j2k", ".jpf", ".jpx", ".j2c",
    ".tga", ".ico", ".cur", ".icns", ".pcx", ".dds", ".qoi", ".psd", ".avif", ".sgi", ".ras",
))
HEIC_SUFFIXES = frozenset((".heic", ".heif", ".hif"))
# Camera raw files contain a JPEG for viewers, which is the part that is read.
RAW_SUFFIXES = frozenset((
    ".dng", ".cr2", ".cr3", ".nef", ".nrw", ".arw", ".srf", ".sr2", ".orf", ".rw2", ".raf", ".pef",
    ".srw", ".3fr", ".fff", ".iiq", ".erf", ".mef", ".mos", ".mrw", ".kdc", ".dcr", ".rwl",
))
# Images to a person, but not decoded here: reported as skipped.
FOREIGN_SUFFIXES = frozenset((
    ".svg", ".svgz", ".jxl", ".pdf", ".eps", ".ai", ".wmf", ".emf", ".xcf", ".exr", ".hdr", ".jxr",
    ".wdp", ".dcm", ".djvu", ".x3f",
))
# These may contain images, but are not single images: they are sources of their own.
SOURCE_SUFFIXES = frozenset((
    ".tar", ".parquet", ".arrow", ".feather", ".csv", ".tsv", ".jsonl", ".ndjson",
))
# Files beside a sample that describe it, see `sidecars.py`.
CAPTION_SUFFIXES = (".txt", ".caption")
SIDECAR_SUFFIXES = frozenset((*CAPTION_SUFFIXES, ".json", ".xmp"))
# Never images: their content is not inspected.
OTHER_SUFFIXES = frozenset((
    ".mp4", ".m4v", ".mov", ".avi", ".mkv", ".webm", ".mpg", ".mpeg", ".3gp", ".mts", ".wmv",
    ".mp3", ".m4a", ".wav", ".flac", ".ogg", ".aac", ".txt", ".md", ".rst", ".html", ".htm", ".css",
    ".js", ".json", ".xml", ".xmp", ".yaml", ".yml", ".toml", ".ini", ".cfg", ".log", ".py",
    ".ipynb", ".sh", ".c", ".h", ".cpp", ".rs", ".go", ".java", ".doc", ".docx", ".xls", ".xlsx",
    ".ppt", ".pptx", ".odt", ".ods", ".rtf", ".tex", ".zip", ".gz", ".tgz", ".bz2", ".xz", ".zst",
    ".7z", ".rar", ".iso", ".exe", ".dll", ".so", ".db", ".sqlite", ".npy", ".npz", ".pt", ".bin",
    ".safetensors", ".pkl", ".h5", ".aae", ".thm", ".caption",
))
# fmt: on
PICTURE_SUFFIXES = IMAGE_SUFFIXES | HEIC_SUFFIXES | RAW_SUFFIXES | FOREIGN_SUFFIXES
# This many bytes of a file identify its kind.
HEAD_BYTES = 64
PHOTOS_EXTRA = "pip install 'mmalign[photos]'"

_STARTS = (
    (b"\xff\xd8\xff", "jpeg"),
    (b"\x89PNG\r\n\x1a\n", "png"),
    (b"GIF87a", "gif"),
    (b"GIF89a", "gif"),
    (b"II*\x00", "tiff"),
    (b"MM\x00*", "tiff"),
    (b"II+\x00", "tiff"),
    (b"MM\x00+", "tiff"),
    (b"\x00\x00\x00\x0cjP  \r\n\x87\n", "jp2"),
    (b"\xff\x4f\xff\x51", "jp2"),
    (b"8BPS\x00", "psd"),
    (b"DDS \x7c\x00\x00\x00", "dds"),
    (b"qoif", "qoi"),
    (b"icns", "icns"),
    (b"\x01\xda\x00", "sgi"),
    (b"\x01\xda\x01", "sgi"),
    (b"\x59\xa6\x6a\x95", "ras"),
    (b"FUJIFILMCCD-RAW", "raw"),
    (b"IIRO", "raw"),
    (b"IIRS", "raw"),
    (b"MMOR", "raw"),
    (b"IIU\x00", "raw"),
    (b"\x00\x00\x00\x0cJXL \r\n\x87\n", "jxl"),
    (b"<svg", "svg"),
)
_PNM = re.compile(rb"P[1-6]\s+(#|\d)")
_HEIF_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"mif1", b"msf1")


def suffix(path: str) -> str:
    """Return the lower-case extension with its dot; a name such as `.gitignore` has none."""
    return PurePosixPath(path).suffix.lower()


def content_kind(head: bytes) -> str:
    """Name the kind of an image by its first `HEAD_BYTES`, "" for anything else.

    TGA, which has no signature, is recognised by its extension only. "jxl" and "svg" are
    recognised, although neither is decoded.
    """
    for start, kind in _STARTS:
        if head.startswith(start):
            return kind
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return "webp"
    if head[:2] == b"BM" and head[14:18] in _BMP_HEADERS:
        return "bmp"
    if head[:4] in (b"\x00\x00\x01\x00", b"\x00\x00\x02\x00") and head[4:6] > b"\x00\x00":
        return "ico" if head[9:10] == b"\x00" else ""
    if head[4:8] == b"ftyp":
        return _iso_kind(head)
    return "pnm" if _PNM.match(head) else ""


def is_taken_suffix(end: str) -> bool:
    """Return whether files of an extension are images, sources or captions already."""
    return end in PICTURE_SUFFIXES | SOURCE_SUFFIXES | SIDECAR_SUFFIXES


def is_image_content(content: bytes) -> bool:
    """Return whether a file is an image by its first bytes, whatever its name.

    >>> is_image_content(b"a dog on a beach")
    False
    """
    return bool(content_kind(content[:HEAD_BYTES]))


def has_heif() -> bool:
    """Return whether the package that decodes HEIC is installed."""
    return importlib.util.find_spec("pillow_heif") is not None


def reason_to_skip(
    name: str, head: Callable[[], bytes]
) -> tuple[str, Literal["sample", "extension"]] | None:
    """Say why a file is not used, and what that affects; None if it is an image.

    Files of other modalities that are known by their extension are used, too.

    Args:
        name: Its name.
        head: Reads its first `HEAD_BYTES`; called only if the extension does not decide.
    """
    end = suffix(name)
    if of_file(name) is not IMAGE:
        return None
    if end in SOURCE_SUFFIXES:
        return f"a source, not an image: {end}", "extension"
    if end in OTHER_SUFFIXES:
        return f"not an image by its extension: {end}", "extension"
    if end not in PICTURE_SUFFIXES:
        kind = content_kind(head())
        if not kind:
            return f"not an image by its content: {end or 'no extension'}", "extension"
        end = f".{kind}"
    why = why_not_decoded(end)
    return (why, "sample") if why else None


def why_not_decoded(end: str) -> str:
    """Say why images of an extension, or of a kind with a leading dot, are not decoded; else ""."""
    if end in FOREIGN_SUFFIXES:
        return f"image type not supported: {end}"
    if end in HEIC_SUFFIXES and not has_heif():
        return f"HEIC needs an extra package: {PHOTOS_EXTRA}"
    return ""


def _iso_kind(head: bytes) -> str:
    """Distinguish the kinds of one container by brand: AVIF, HEIC, Canon's raw, or a video."""
    length = min(int.from_bytes(head[:4], "big"), len(head))
    brands = [head[8:12], *(head[i : i + 4] for i in range(16, length - 3, 4))]
    if brands[0] == b"crx ":
        return "raw"
    if b"avif" in brands or b"avis" in brands:
        return "avif"
    return "heic" if any(b in _HEIF_BRANDS for b in brands) else ""


_BMP_HEADERS = {n.to_bytes(4, "little") for n in (12, 40, 52, 56, 64, 108, 124)}
