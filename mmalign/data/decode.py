"""Bytes to RGB pixels of a wanted size, with limits; what cannot be decoded says why."""

import io
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from mmalign.data.samples import SampleProblem

Pixels = NDArray[np.uint8]
# The size at which Pillow itself refuses: a 20,000 x 20,000 image would need 1.2 GB.
MAX_PIXELS = 178_956_970
# A JPEG may be decoded at a half, a quarter or an eighth as long as so many times the wanted pixels
# are left: what the last resize then sees differs by less than a grey level.
REDUCED_ROOM = 2
ORIENTATION = 0x0112
THUMBNAIL_SIDE = 160
_FILTERS = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}


def open_image(content: bytes, side: int = 0, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Decode an image to RGB: upright, on white where it is transparent, first frame only.

    Args:
        content: The encoded image.
        side: The side in pixels that it will be resized to; a much larger JPEG is then decoded at
            reduced scale, which takes a fraction of the time. 0 decodes every pixel.
        max_pixels: Refuse images with more.

    Raises:
        SampleProblem: It is no image, is cut short, or has too many pixels.
    """
    try:
        image = Image.open(io.BytesIO(content))
        if image.width * image.height > max_pixels:
            raise SampleProblem(f"too many pixels: {image.width} x {image.height}")
        if side:
            image.draft(None, (REDUCED_ROOM * side, REDUCED_ROOM * side))
        image.load()
        return _to_rgb(_upright(image))
    except SampleProblem:
        raise
    except Image.DecompressionBombError as error:
        raise SampleProblem(f"too many pixels: {error}") from None
    except UnidentifiedImageError:
        start = content[:12]
        raise SampleProblem(f"not an image: starts with {start!r}") from None
    except Exception as error:  # decoders raise anything: OSError, SyntaxError, struct.error ...
        raise SampleProblem(f"damaged image: {error}") from None


def fit_image(
    image: Image.Image,
    size: int,
    mode: str = "squash",
    interpolation: str = "bicubic",
    fill: tuple[int, int, int] = (0, 0, 0),
) -> Pixels:
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
    """To which size an image is scaled, and where the crop of it, or itself, then begins."""

    width: int
    height: int
    left: int
    top: int


def fit(width: int, height: int, size: int, mode: str) -> Fit:
    """Plan how an image of some size becomes one of (size, size); see `fit_image`."""
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
    """Draw a WebP of at most 160 pixels a side."""
    # Whole pixels are averaged first: one pass, in a quarter of the time.
    small = image.reduce(max(1, max(image.size) // THUMBNAIL_SIDE))
    small.thumbnail((THUMBNAIL_SIDE, THUMBNAIL_SIDE), Image.Resampling.BILINEAR)
    out = io.BytesIO()
    small.save(out, "WEBP", quality=80, method=0)
    return out.getvalue()


def _resize(image: Image.Image, width: int, height: int, interpolation: str) -> Pixels:
    """Resize as Pillow does; what only shrinks takes a third of its time, and is off by a level."""
    if (image.width, image.height) == (width, height):
        return np.array(image)
    if image.width < width or image.height < height:
        return np.array(image.resize((width, height), _FILTERS[interpolation]))
    image_13HW = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None]
    image_13HW = F.interpolate(image_13HW, (height, width), mode=interpolation, antialias=True)
    return image_13HW[0].permute(1, 2, 0).numpy()


def _upright(image: Image.Image) -> Image.Image:
    # Pillow's own function copies an image that stands upright already.
    turned = image.getexif().get(ORIENTATION, 1) != 1
    return ImageOps.exif_transpose(image) if turned else image


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode in ("I;16", "I;16B", "I;16L", "I"):
        # Pillow clips 16-bit grey at 255 on conversion; scale it instead.
        grey = np.asarray(image, dtype=np.float64) / 257.0
        return Image.fromarray(grey.clip(0, 255).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise SampleProblem("wrong mode: floating-point pixels have no fixed white")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")
