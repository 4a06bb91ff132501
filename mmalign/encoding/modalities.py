"""Modalities: how each kind of item becomes vectors. Images and texts are the first two.

A new kind (audio, video frames) is another `Modality` in `modalities_of`, a decoder in `data/` and
a tower in `model/`; its column in a store is `<name>_embedding`.
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmalign.data import decoded, fit_image
from mmalign.model import Encoder, Preprocess


@dataclass(frozen=True)
class Modality:
    """One kind of thing that can be embedded."""

    name: str
    decode: Callable[[bytes], Any]
    """Converts encoded bytes to one item; raises `DataError` with the reason if it cannot."""
    batch: Callable[[Sequence[Any]], Any]
    """Converts decoded items to the input of `encode`."""
    encode: Callable[[Any], NDArray[np.float32]]
    """Encodes a batch to unit vectors (B, D)."""


def modalities_of(encoder: Encoder) -> dict[str, Modality]:
    """Return the modalities of an encoder by name."""
    shape = encoder.preprocess
    return {
        "image": Modality("image", lambda b: pixels(b, shape), np.stack, encoder.encode_images),
        "text": Modality("text", lambda b: b.decode(), list, encoder.encode_texts),
    }


def pixels(content: bytes, shape: Preprocess) -> NDArray[np.uint8]:
    """Decode an image to the (S, S, 3) pixels that a model expects."""
    with decoded(content, shape.size) as image:
        return fit_image(image, shape.size, shape.resize_mode, shape.interpolation)


def decode_workers() -> int:
    """Return the number of decoding threads: a few more than cores, as reading waits."""
    return (os.cpu_count() or 1) + 2
