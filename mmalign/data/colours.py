"""Convert colours to sRGB, which models expect, by applying the colour profiles of image files."""

import io
from functools import lru_cache
from typing import Any

from PIL import Image, ImageCms

# Image modes, and the colour spaces allowed for their profiles.
_SPACES = {"RGB": "RGB", "RGBA": "RGB", "L": "GRAY", "CMYK": "CMYK"}


def to_srgb(image: Image.Image, profile: bytes | None) -> Image.Image:
    """Return an image with its colours as sRGB; unchanged if it is sRGB or has no profile.

    A profile that is damaged, or has another colour space than the image, is ignored, as viewers
    do.
    """
    transform = _transform(profile, image.mode) if profile and image.mode in _SPACES else None
    return image if transform is None else transform.apply(image)


def is_srgb(profile: bytes | None, mode: str = "RGB") -> bool:
    """Return whether an image with this profile is used unchanged."""
    return not profile or _transform(profile, mode) is None


@lru_cache(maxsize=64)
def _transform(profile: bytes, mode: str) -> Any:
    """Return the ImageCms transform from a profile to sRGB, or None if none is needed."""
    try:
        found = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if found.profile.xcolor_space.strip() != _SPACES[mode]:
            return None
        if "srgb" in (found.profile.profile_description or "").lower():
            return None
        return ImageCms.buildTransform(
            found, _srgb(), mode, "RGBA" if mode == "RGBA" else "RGB",
            ImageCms.Intent.RELATIVE_COLORIMETRIC, ImageCms.Flags.BLACKPOINTCOMPENSATION,
        )  # fmt: skip
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError):
        return None


@lru_cache(maxsize=1)
def _srgb() -> Any:
    return ImageCms.createProfile("sRGB")
