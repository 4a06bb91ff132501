"""Decode bytes to RGB pixels of a given size, with limits; failures give a reason.

All threads together decode within one memory budget, see `budget.py`.
"""

import io
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from mmalign.arrays import PixelArray
from mmalign.data import raw
from mmalign.data.budget import decoding_budget
from mmalign.data.colours import to_srgb
from mmalign.data.exif import ORIENTATION, camera_meta, read_exif
from mmalign.data.kinds import HEAD_BYTES, content_kind, why_not_decoded
from mmalign.data.samples import SampleProblem
from mmalign.errors import UsageError

# Phones take images of 200 megapixels. Memory has a separate limit, see `budget.py`.
MAX_PIXELS = 1 << 28
# A JPEG may be decoded at a half, a quarter or an eighth as long as the result has this multiple of
# the wanted pixels: the final resize then differs by less than a grey level.
REDUCED_ROOM = 2
# At least this many pixels are decoded for any model, so that one image gives the same pixels
# whether or not a thumbnail is made as well.
THUMBNAIL_SIDE = 160
# Other images are reduced by averaging whole pixels only if they are larger than this, and this
# much resolution is kept: that bounds the work after decoding and leaves ordinary photographs
# unchanged.
REDUCED_ABOVE, AVERAGED_ROOM = 1 << 24, 4
# The number of pixels whose colours are converted at a time.
STRIP_PIXELS = 1 << 20
# Bytes per pixel used by decoding in addition to the pixels themselves; measured.
_DECODER_BYTES = {
    "WEBP": 13, "AVIF": 14, "HEIF": 8, "JPEG2000": 16, "QOI": 4, "DDS": 4, "TIFF": 4, "PSD": 4,
}  # fmt: skip
# Bytes per pixel of what is made from the decoded image: RGB, an array, copies for a resize.
_RESULT_BYTES = 12
# Formats that Pillow reads itself. EPS, which it passes to another program, and scientific data
# formats are not included. TGA has no signature, so it comes last.
FORMATS = (
    "JPEG", "PNG", "WEBP", "GIF", "AVIF", "TIFF", "BMP", "DIB", "PPM", "JPEG2000", "MPO", "ICO",
    "CUR", "ICNS", "PCX", "DDS", "QOI", "PSD", "SGI", "SUN", "TGA",
)  # fmt: skip
_TRANSPOSES = {
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM, 5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE, 8: Image.Transpose.ROTATE_90,
}  # fmt: skip
_FILTERS = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}


@contextmanager
def decoded(content: bytes, side: int = 0, max_pixels: int = MAX_PIXELS) -> Iterator[Image.Image]:
    """Decode an image to RGB: upright, on white where it is transparent, first frame only.

    Its memory is reserved until the block ends, so the block should include the step that makes the
    large image small; one thread decodes one image at a time.

    Args:
        content: The encoded image.
        side: The side in pixels that it will be resized to; a much larger JPEG is then decoded at
            reduced scale, which takes a fraction of the time. 0 decodes every pixel.
        max_pixels: Refuse images with more pixels.

    Raises:
        SampleProblem: It is not an image, is truncated, or has too many pixels.
    """
    with _as_sample_problem():
        image, container = _open(content)
        if image.width * image.height > max_pixels:
            raise SampleProblem(f"too many pixels: {image.width} x {image.height}")
        what = f"{image.width} x {image.height} {image.format} ({image.mode})"
        whole = _coefficient_bytes(image)
        room = max(side, THUMBNAIL_SIDE)
        if side:
            image.draft(None, (REDUCED_ROOM * room, REDUCED_ROOM * room))
        factor = _reduction_factor(image, room) if side else 1
        wanted_bytes = len(content) + whole + _decoding_bytes(image, content, factor)
    with decoding_budget().reserved(wanted_bytes, what):
        with _as_sample_problem():
            image.load()
            # The camera rotates a preview itself, or gives one orientation for the whole file.
            orientation = read_exif(image).get(ORIENTATION) or container.get(ORIENTATION)
            reduced = _to_rgb(image, factor)
            del image
            transpose = _TRANSPOSES.get(orientation or 1)
            upright = reduced if transpose is None else reduced.transpose(transpose)
        yield upright


@contextmanager
def image_of(item: Any, side: int = 0) -> Iterator[Image.Image]:
    """Return the RGB image of an item that `items.kind_of` calls an image; see `decoded`.

    Raises:
        UsageError: The file does not exist or is not a regular file.
        SampleProblem: It cannot be read or decoded.
    """
    if isinstance(item, Path):
        item = _read_file(item)
    if isinstance(item, bytes | bytearray | memoryview):
        with decoded(bytes(item), side) as image:
            yield image
        return
    with _as_sample_problem():
        image = Image.fromarray(item) if isinstance(item, np.ndarray) else item
        transpose = _TRANSPOSES.get(read_exif(image).get(ORIENTATION) or 1)
        image = _to_rgb(image, 1)
        upright = image if transpose is None else image.transpose(transpose)
    yield upright


def _read_file(file: Path) -> bytes:
    """Read an image file; opening anything but a regular file could block, or worse."""
    try:
        if not file.exists():
            raise UsageError(f"{file}: no such image file")
        if not file.is_file():
            raise UsageError(f"{file}: cannot be used as an image: not a regular file")
        return file.read_bytes()
    except (OSError, ValueError) as error:
        raise SampleProblem(str(getattr(error, "strerror", None) or error)) from None


def image_meta(content: bytes) -> dict[str, Any]:
    """Return an image's camera metadata, see `exif.camera_meta`; only headers are read.

    The result is empty if the content is not an image or is damaged.
    """
    try:
        with _as_sample_problem():
            image, container = _open(content)
            return {**camera_meta(container), **camera_meta(read_exif(image))}
    except SampleProblem:
        return {}


def open_image(content: bytes, side: int = 0, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Return the image that `decoded` yields, for a single image."""
    with decoded(content, side, max_pixels) as image:
        return image


def fit_image(
    image: Image.Image,
    size: int,
    mode: str = "squash",
    interpolation: str = "bicubic",
    fill: tuple[int, int, int] = (0, 0, 0),
) -> PixelArray:
    """Resize to (size, size, 3) uint8.

    Args:
        image: An RGB image.
        size: Side of the result in pixels.
        mode: "squash" changes the aspect, "shortest" scales the short side and crops the centre,
            "longest" scales the long side and pads; the names and the rounding are open_clip's.
        interpolation: "bicubic" or "bilinear", antialiased.
        fill: Colour of the padding.
    """
    plan = fit(image.width, image.height, size, mode)
    pixels = _resize(image, plan.width, plan.height, interpolation)
    if mode != "longest":
        return pixels[plan.top : plan.top + size, plan.left : plan.left + size]
    whole = np.full((size, size, 3), fill, dtype=np.uint8)
    whole[plan.top : plan.top + plan.height, plan.left : plan.left + plan.width] = pixels
    return whole


@dataclass(frozen=True)
class Fit:
    """The size to scale an image to, and the origin of the crop or of the image itself."""

    width: int
    height: int
    left: int
    top: int


def fit(width: int, height: int, size: int, mode: str) -> Fit:
    """Compute how an image of a given size becomes one of (size, size); see `fit_image`."""
    if mode == "squash":
        return Fit(size, size, 0, 0)
    if mode == "shortest":
        if width <= height:
            scaled = (size, int(size * height / width))
        else:
            scaled = (int(size * width / height), size)
        if scaled[0] * scaled[1] > MAX_PIXELS:
            raise SampleProblem(f"too narrow to scale: {width} x {height}")
        return Fit(*scaled, round((scaled[0] - size) / 2.0), round((scaled[1] - size) / 2.0))
    if mode == "longest":
        scale = size / max(width, height)
        scaled = (max(1, round(width * scale)), max(1, round(height * scale)))
        return Fit(*scaled, (size - scaled[0]) // 2, (size - scaled[1]) // 2)
    raise ValueError(f"unknown resize mode {mode!r}")


def thumbnail(image: Image.Image) -> bytes:
    """Create a WebP of at most 160 pixels a side."""
    # Averaging whole pixels first needs one pass and a quarter of the time.
    reduced = image.reduce(max(1, max(image.size) // THUMBNAIL_SIDE))
    reduced.thumbnail((THUMBNAIL_SIDE, THUMBNAIL_SIDE), Image.Resampling.BILINEAR)
    out = io.BytesIO()
    reduced.save(out, "WEBP", quality=80, method=0)
    return out.getvalue()


def _resize(image: Image.Image, width: int, height: int, interpolation: str) -> PixelArray:
    """Resize like Pillow; pure shrinking takes a third of its time and differs by one level."""
    if (image.width, image.height) == (width, height):
        return np.array(image)
    if image.width < width or image.height < height:
        return np.array(image.resize((width, height), _FILTERS[interpolation]))
    image_13HW = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None]
    image_13HW = F.interpolate(image_13HW, (height, width), mode=interpolation, antialias=True)
    return image_13HW[0].permute(1, 2, 0).numpy()


@contextmanager
def _as_sample_problem() -> Iterator[None]:
    """Convert any error of a decoder to a one-line reason."""
    try:
        yield
    except SampleProblem:
        raise
    except Image.DecompressionBombError as error:
        raise SampleProblem(f"too many pixels: {error}") from None
    except MemoryError:
        raise SampleProblem("too large to decode: not enough memory") from None
    except Exception as error:  # decoders raise anything: OSError, SyntaxError, struct.error ...
        raise SampleProblem(f"damaged image: {error}") from None


def _open(content: bytes) -> tuple[Image.Image, Image.Exif]:
    """Read an image header; the second value is the EXIF of the raw file that contains it."""
    kind = content_kind(content[:HEAD_BYTES])
    if why := why_not_decoded(f".{kind}"):
        raise SampleProblem(why)
    if kind == "heic":
        from pillow_heif import HeifImageFile

        heif: Any = HeifImageFile
        return heif(io.BytesIO(content)), Image.Exif()
    image = None if kind == "raw" else open_header(content)
    if image is None and kind not in ("raw", "tiff"):
        if not content:
            raise SampleProblem("not an image: the file is empty")
        raise SampleProblem(f"not an image: starts with {content[:12]!r}")
    if image is not None and not (kind == "tiff" and raw.is_raw(image, content)):
        return image, Image.Exif()
    preview = raw.preview(content)
    shown = preview and open_header(preview)
    if shown and (image is None or shown.width * shown.height > image.width * image.height):
        return shown, raw.exif_of(content)
    if image is None:
        raise SampleProblem("raw image without a readable preview")
    return image, Image.Exif()


def open_header(content: bytes) -> Image.Image | None:
    """Open an image with the decoders of `FORMATS`; return None if none accepts it.

    This is `Image.open` without its pixel limit, which is a single number for the whole process and
    triggers a warning at half of it.
    """
    Image.init()
    for name in FORMATS:
        factory, accepts = Image.OPEN.get(name, (None, None))
        try:
            # A missing decoder is reported as a string.
            if factory and (accepts is None or accepts(content[:16]) is True):
                return factory(io.BytesIO(content), "")
        except (SyntaxError, IndexError, TypeError, struct.error):
            continue
    return None


def _reduction_factor(image: Image.Image, side: int) -> int:
    """Return the factor by which an image is reduced after decoding."""
    if image.width * image.height <= REDUCED_ABOVE:
        return 1
    return max(1, min(image.size) // (AVERAGED_ROOM * side))


def _coefficient_bytes(image: Image.Image) -> int:
    """Return the size of all coefficients of a multi-scan JPEG, needed at any decoding scale."""
    layers = getattr(image, "layer", ()) if image.format in ("JPEG", "MPO") else ()
    if not layers:
        return 0
    most = max(across * down for _, across, down, *_ in layers)
    each = sum(across * down for _, across, down, *_ in layers) / most
    return int(2 * each * image.width * image.height)


def _decoding_bytes(image: Image.Image, content: bytes, factor: int) -> int:
    """Return the peak memory in bytes while an image is decoded, converted and resized."""
    pixels = image.width * image.height
    if image.format in ("ICO", "CUR", "ICNS"):
        # Each contains whole PNGs, which may be larger than the header says.
        pixels = max(pixels, *_png_pixels(content))
    bytes_per_pixel = (
        1 if image.mode in ("1", "L", "P") else 2 if image.mode.startswith("I;16") else 4
    )
    decoder = _DECODER_BYTES.get(str(image.format), 0)
    result = -(-pixels // factor**2)
    return pixels * (bytes_per_pixel + decoder) + result * _RESULT_BYTES + 16 * STRIP_PIXELS


def _png_pixels(content: bytes) -> Iterator[int]:
    yield 0
    at = content.find(b"IHDR")
    while at >= 0:
        width, height = content[at + 4 : at + 8], content[at + 8 : at + 12]
        yield int.from_bytes(width, "big") * int.from_bytes(height, "big")
        at = content.find(b"IHDR", at + 4)


def _to_rgb(image: Image.Image, factor: int) -> Image.Image:
    """Convert an image to RGB and reduce it in strips, without a second full copy."""
    profile = image.info.get("icc_profile")
    convert = partial(_strip_to_rgb, profile=profile, white=_white(image))
    width, height = image.size
    if factor == 1 and (image.mode == "RGB" or width * height <= STRIP_PIXELS):
        return convert(image)
    rows = max(1, STRIP_PIXELS // width // factor) * factor
    whole = Image.new("RGB", (-(-width // factor), -(-height // factor)))
    for top in range(0, height, rows):
        strip = convert(image.crop((0, top, width, min(height, top + rows))))
        whole.paste(strip.reduce(factor) if factor > 1 else strip, (0, top // factor))
    return whole


def _white(image: Image.Image) -> float:
    """Return the value of white in a 16-bit image."""
    if image.mode not in _DEEP_MODES:
        return 255
    darkest, brightest = np.ravel(image.getextrema())
    # 12-bit sensors and scanners store these numbers unscaled.
    return 4095 if darkest >= 0 and 255 < brightest < 4096 else 65535


def _strip_to_rgb(image: Image.Image, profile: bytes | None, white: float) -> Image.Image:
    if image.mode in _DEEP_MODES:
        # Pillow clips 16-bit grey at 255 on conversion; scale it instead.
        grey = np.asarray(image, dtype=np.float64) * (255 / white)
        return Image.fromarray(grey.clip(0, 255).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise SampleProblem(
            "pixel format not supported: floating-point pixels have no fixed white level"
        )
    if image.has_transparency_data:
        image = to_srgb(image.convert("RGBA"), profile)
        paper = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(paper, image).convert("RGB")
    if image.mode == "P":
        image = image.convert("RGB")
    image = to_srgb(image, profile)
    return image if image.mode == "RGB" else image.convert("RGB")


_DEEP_MODES = ("I;16", "I;16B", "I;16L", "I;16N", "I")
