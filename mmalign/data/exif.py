"""Read what a camera writes into an image: when, with what and where it was taken."""

import math
from contextlib import suppress
from datetime import datetime
from typing import Any

from PIL import Image

ORIENTATION = 0x0112
_MAKE, _MODEL, _DATE = 0x010F, 0x0110, 0x0132
_EXIF, _GPS = 0x8769, 0x8825
_ORIGINAL, _DIGITIZED, _LENS = 0x9003, 0x9004, 0xA434
_LATITUDE, _LONGITUDE, _ALTITUDE = 2, 4, 6


def read_exif(image: Image.Image) -> Image.Exif:
    """Return the EXIF of an image; empty if it is missing or damaged."""
    try:
        # PNG's own method would decode the pixels to check whether EXIF follows them.
        return Image.Image.getexif(image)
    except Exception:  # parsers raise anything; damaged EXIF must not cost the image
        return Image.Exif()


def camera_meta(exif: Image.Exif) -> dict[str, Any]:
    """Return the searchable camera metadata that is present.

    Returns:
        `taken`: "2020-01-31 12:00:00" on the camera's clock; `camera`; `lens`; `latitude` and
        `longitude` in degrees, north and east positive; `altitude` in metres.
    """
    meta: dict[str, Any] = {}
    details, gps = _ifd(exif, _EXIF), _ifd(exif, _GPS)
    for date in (details.get(_ORIGINAL), details.get(_DIGITIZED), exif.get(_DATE)):
        with suppress(ValueError, TypeError):
            taken = datetime.strptime(_text(date)[:19], "%Y:%m:%d %H:%M:%S")
            meta["taken"] = taken.isoformat(sep=" ")
            break
    make, model = _text(exif.get(_MAKE)), _text(exif.get(_MODEL))
    if camera := model if model.lower().startswith(make.lower()) else f"{make} {model}".strip():
        meta["camera"] = camera
    if lens := _text(details.get(_LENS)):
        meta["lens"] = lens
    latitude = _degrees(gps, _LATITUDE, "S", 90)
    longitude = _degrees(gps, _LONGITUDE, "W", 180)
    if latitude is not None and longitude is not None:
        meta["latitude"], meta["longitude"] = latitude, longitude
    with suppress(ValueError, TypeError, ZeroDivisionError):
        metres = float(gps[_ALTITUDE]) if _ALTITUDE in gps else math.nan
        if math.isfinite(metres):
            meta["altitude"] = round(-metres if gps.get(5) in (1, b"\x01") else metres, 1)
    return meta


def _ifd(exif: Image.Exif, number: int) -> dict[int, Any]:
    try:
        return dict(exif.get_ifd(number))
    except Exception:  # parsers raise anything
        return {}


def _text(value: Any) -> str:
    if isinstance(value, bytes):
        value = value.decode("utf-8", "replace")
    return " ".join(value.partition("\0")[0].split()) if isinstance(value, str) else ""


def _degrees(gps: dict[int, Any], number: int, negative: str, most: int) -> float | None:
    try:
        degrees, minutes, seconds = (float(part) for part in gps[number])
    except (KeyError, TypeError, ValueError, ZeroDivisionError):
        return None
    found = degrees + minutes / 60 + seconds / 3600
    if not abs(found) <= most:  # NaN too
        return None
    return round(-found if _text(gps.get(number - 1)).upper() == negative else found, 6)
