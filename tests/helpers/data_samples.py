"""Pictures, folders and short names that the tests of the data room share."""

import functools
import io
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from mmalign.data import Augment, Catalog, Skip, fit_image, open_image, scan

STILL = Augment(crop_min=1, flip=False, colour=0, erase=0)


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    """Encode an image."""
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def noise(seed: int = 0, size: tuple[int, int] = (40, 30)) -> Image.Image:
    """Draw a noisy picture; each seed another."""
    pixels = np.random.default_rng(seed).integers(0, 255, (*size[::-1], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def jpeg(seed: int = 0) -> bytes:
    return encoded(noise(seed), "JPEG")


@functools.cache
def huge_png() -> bytes:
    """A whole 20,000 x 20,000 PNG of one bit a pixel: 50 KB that decode to 400 MB."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        check = zlib.crc32(kind + content).to_bytes(4, "big")
        return len(content).to_bytes(4, "big") + kind + content + check

    side = (20_000).to_bytes(4, "big")
    rows = zlib.compress(bytes((1 + 20_000 // 8) * 20_000))
    header = chunk(b"IHDR", side * 2 + bytes([1, 0, 0, 0, 0]))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def write_folder(folder: Path, members: dict[str, bytes | str]) -> Path:
    """Write files at relative paths."""
    for name, content in members.items():
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content.encode() if isinstance(content, str) else content)
    return folder


def listed(*sources: Path | str, **options: Any) -> Catalog:
    return scan([str(s) for s in sources], **options)


def captions(catalog: Catalog) -> dict[str, tuple[str, ...]]:
    return {r.id: r.captions for r in catalog.records}


def reasons(skips: list[Skip]) -> dict[str, str]:
    return {s.id: s.reason for s in skips}


def side_8(content: bytes) -> Any:
    return fit_image(open_image(content), 8)
