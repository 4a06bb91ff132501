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
from mmalign.modality import IMAGE, TEXT
from mmalign.model import Encoder, Preprocess
from mmalign.store import ModelCard, Tower


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


def model_card(encoder: Encoder) -> ModelCard:
    """Return what a store records of the model that makes its vectors."""
    towers = tuple(Tower(m.name, encoder.tower_identity(m.name), m.position) for m in (IMAGE, TEXT))
    return ModelCard(encoder.space, encoder.source, encoder.dim, towers)


def is_model_of(encoder: Encoder, card: ModelCard) -> bool:
    """Return whether the vectors of an encoder can be compared with those of a store.

    Towers are compared as far as they are recorded, which is quicker than the identity of all.
    """
    recorded = {tower.modality: tower.identity for tower in card.towers if tower.identity}
    if TEXT.name in recorded and encoder.tower_identity(TEXT.name) == recorded[TEXT.name]:
        return True
    return card.identity in (encoder.space, encoder.identity)


def pixels(content: bytes, shape: Preprocess) -> NDArray[np.uint8]:
    """Decode an image to the (S, S, 3) pixels that a model expects."""
    with decoded(content, shape.size) as image:
        return fit_image(image, shape.size, shape.resize_mode, shape.interpolation)


def decode_workers() -> int:
    """Return the number of decoding threads: a few more than cores, as reading waits."""
    return (os.cpu_count() or 1) + 2
