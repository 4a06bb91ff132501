"""Images become vectors: decoded on the CPU, or plain JPEGs on the device that encodes them.

Shapes: B images of a batch, S side of an image in pixels, D dimensions.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from mmalign.arrays import Floats, PixelArray
from mmalign.data import decode_on, decoded, fit_image, image_meta, image_of, suits_device
from mmalign.data import thumbnail as thumbnail_of
from mmalign.encoding.batches import is_out_of_memory
from mmalign.encoding.modality_encoder import Decoded, ModalityEncoder
from mmalign.modality import IMAGE
from mmalign.model import Encoder

Part = PixelArray | bytes
"""Pixels (S, S, 3), or a JPEG that is decoded where it is encoded."""


class ImageEncoder(ModalityEncoder):
    """Decodes and encodes images."""

    def __init__(self, encoder: Encoder) -> None:
        self.encoder = encoder
        self.on_device = False
        """Decode plain JPEGs on the encoder's device, as is done on a GPU. The CPU then decodes
        them at reduced scale only: for the thumbnail, and because a device may not report that an
        image is damaged."""

    @property
    def identity(self) -> str:  # type: ignore[override]
        """Return the identity of the image tower."""
        return self.encoder.tower_identity(IMAGE.name)

    @property
    def fit(self) -> tuple[int, str, str]:
        """Return how images are made to fit the model, as `data.fit_image` takes it."""
        shape = self.encoder.preprocess
        return shape.size, shape.resize_mode, shape.interpolation

    def decode(self, content: bytes, *, thumbnail: bool = False) -> Decoded:
        """Decode an image to the pixels that the model expects, unless its device does that."""
        on_device = self.on_device or self.encoder.device.type == "cuda"
        later = on_device and suits_device(content)
        with decoded(content, 1 if later else self.fit[0]) as image:
            part: Part = content if later else fit_image(image, *self.fit)
            return Decoded([part], thumbnail=thumbnail_of(image) if thumbnail else b"")

    def decode_item(self, item: Any) -> Decoded:
        """Decode an image of any kind that `mmalign.items` lists."""
        with image_of(item, self.fit[0]) as image:
            return Decoded([fit_image(image, *self.fit)])

    def metadata(self, content: bytes) -> dict[str, Any]:
        """Return what a camera wrote into an image."""
        return image_meta(content)

    def encode(self, parts: Sequence[Part]) -> Floats:
        """Encode images to unit vectors (B, D)."""
        pixels = [part for part in parts if not isinstance(part, bytes)]
        if len(pixels) == len(parts):
            return self.encoder.encode_images(np.stack(pixels))
        is_jpeg_B = np.array([isinstance(part, bytes) for part in parts])
        vectors_BD = np.empty((len(parts), self.encoder.dim), np.float32)
        vectors_BD[is_jpeg_B] = self._encode_jpegs([p for p in parts if isinstance(p, bytes)])
        if pixels:
            vectors_BD[~is_jpeg_B] = self.encoder.encode_images(np.stack(pixels))
        return vectors_BD

    def _encode_jpegs(self, contents: Sequence[bytes]) -> Floats:
        try:
            pixels_B3SS = decode_on(self.encoder.device, contents, *self.fit)
        except RuntimeError as error:
            if is_out_of_memory(error):
                raise
            # The CPU has already decoded each of them once.
            return self.encode([self.decode_item(content).parts[0] for content in contents])
        return self.encoder.encode_pixels(pixels_B3SS)
