"""What a caller may encode or search by; its type alone decides what it is.

    str                         a text, never opened as a file
    Path                        a file: of an image, or of another modality with its suffix
    bytes                       an encoded image
    PIL image, uint8 (H, W, 3)  a picture
    float (D,)                  a vector
    Row(id)                     a row of the store that is searched

Shapes: D dimensions, H and W sides of a picture in pixels.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mmalign.errors import ItemError, UsageError, VectorError
from mmalign.modality import IMAGE, TEXT, of_file

Kind = str
"""The name of a modality, or one of `modality.OTHER_KINDS`."""


@dataclass(frozen=True)
class Row:
    """A row of a store by its id; as a query it stands for its image, or whatever it is."""

    id: str


def kind_of(item: Any) -> Kind:
    """Say what an item is.

    >>> [kind_of(x) for x in ("cat.jpg", Path("cat.jpg"), b"...", np.ones(4), Row("7"))]
    ['text', 'image', 'image', 'vector', 'row']

    Raises:
        ItemError: It is none, a `TypeError`.
    """
    if isinstance(item, str):
        return TEXT.name
    if isinstance(item, Path):
        return of_file(item.name).name
    if isinstance(item, bytes | bytearray | memoryview) or is_picture(item):
        return IMAGE.name
    if isinstance(item, np.ndarray) and item.ndim == 1 and item.dtype.kind == "f":
        return "vector"
    if isinstance(item, Row):
        return "row"
    raise ItemError(
        "an item must be a text (str), an image file (Path), an encoded image (bytes), a picture "
        "(PIL image, or uint8 of shape (H, W, 3)), a vector (float (D,)) or a Row, "
        f"not {_type(item)}"
    )


def is_picture(item: Any) -> bool:
    """Say whether an item is a decoded image."""
    pillow = sys.modules.get("PIL.Image")  # not loaded: then nobody can have given one
    if pillow is not None and isinstance(item, pillow.Image):
        return True
    return (
        isinstance(item, np.ndarray)
        and item.dtype == np.uint8
        and item.ndim == 3
        and item.shape[2] == 3
    )


def utf8_text(text: str) -> str:
    """Return a text that can be tokenized.

    Raises:
        UsageError: It is not UTF-8.
    """
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UsageError(f"a text is not UTF-8: {text!a}") from None
    return text


def unit_vector(vector_D: Any, dim: int) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Return a vector as float32 of unit length, (D,).

    Raises:
        VectorError: It has another number of dimensions, or is zero, infinite or not a number.
    """
    if len(vector_D) != dim:
        raise VectorError(
            f"a vector has {len(vector_D)} dimensions, but the model's vectors have {dim}"
        )
    wide_D = np.asarray(vector_D, np.float64)
    length = float(np.linalg.norm(wide_D))
    if not (np.isfinite(length) and length > 0):
        raise VectorError("a vector is zero, infinite or not a number")
    unit_D: np.ndarray[Any, np.dtype[np.float32]] = (wide_D / length).astype(np.float32)
    return unit_D


def _type(item: Any) -> str:
    if isinstance(item, np.ndarray):
        return f"an array of {item.dtype} of shape {item.shape}"
    return type(item).__name__
