"""Bytes to RGB pixels of a wanted size, with limits; what cannot be decoded says why."""

import io
import warnings

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from mmalign.data.samples import SampleProblem

Pixels = NDArray[np.uint8]
# The size at which Pillow itself refuses: a 20,000 x 20,000 image would need 1.2 GB.
MAX_PIXELS = 178_956_970
# The limit is ours to hold; Pillow's own warning at half of it would only repeat it. Set once, as
# filters cannot be changed safely in threads.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
_FILTERS = {
    "bicubic": Image.Resampling.BICUBIC,
    "bilinear": Image.Resampling.BILINEAR,
    "nearest": Image.Resampling.NEAREST,
}


def open_image(content: bytes, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Decode an image to RGB: upright, on white where it is transparent, first frame only.

    Raises:
        SampleProblem: It is no image, is cut short, or has too many pixels.
    """
    try:
        image = Image.open(io.BytesIO(content))
        if image.width * image.height > max_pixels:
            raise SampleProblem(f"too many pixels: {image.width} x {image.height}")
        image.load()
        return _to_rgb(ImageOps.exif_transpose(image))
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
    resample = _FILTERS[interpolation]
    width, height = image.size
    if mode == "squash":
        image = image.resize((size, size), resample)
    elif mode == "shortest":
        if width <= height:
            scaled = (size, int(size * height / width))
        else:
            scaled = (int(size * width / height), size)
        if scaled[0] * scaled[1] > MAX_PIXELS:
            raise SampleProblem(f"too narrow to scale: {width} x {height}")
        image = image.resize(scaled, resample)
        left, top = round((image.width - size) / 2.0), round((image.height - size) / 2.0)
        image = image.crop((left, top, left + size, top + size))
    elif mode == "longest":
        scale = size / max(width, height)
        image = image.resize(
            (max(1, round(width * scale)), max(1, round(height * scale))), resample
        )
        whole = Image.new("RGB", (size, size), fill)
        whole.paste(image, ((size - image.width) // 2, (size - image.height) // 2))
        image = whole
    else:
        raise ValueError(f"unknown resize mode {mode!r}")
    return np.asarray(image, dtype=np.uint8)


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
    return image.convert("RGB")
