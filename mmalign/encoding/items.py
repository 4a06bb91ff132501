"""Mixed lists of texts and images into vectors: the implementation of `Encoder.encode`.

Shapes: N items, B items of a batch, D dimensions.
"""

import contextlib
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from mmalign.arrays import Floats, PixelArray
from mmalign.data import fit_image, image_of, in_batches, in_threads
from mmalign.encoding.batches import TEXTS_AT_ONCE, BatchSplitter
from mmalign.encoding.modalities import decode_workers
from mmalign.encoding.pipeline import CPU_BATCH, GPU_BATCH
from mmalign.errors import DataError, UsageError
from mmalign.items import kind_of, unit_vector, utf8_text
from mmalign.model import Encoder
from mmalign.progress import bar

T = TypeVar("T")


def encode_items(
    encoder: Encoder, items: Sequence[Any], *, batch_size: int | None = None, progress: bool = False
) -> Floats:
    """Encode a mix of texts and images to unit vectors (N, D), in order; see `items`.

    Args:
        encoder: The model.
        items: Texts, images and vectors; vectors are only scaled to unit length.
        batch_size: Images encoded at once; by default chosen for the device.
        progress: Whether to show a progress bar.

    Raises:
        ItemError: An item is of another type.
        UsageError: A text is not UTF-8, a file is missing, or an item is a row of a store.
        DataError: An image cannot be decoded.
    """
    if isinstance(items, str | bytes):
        raise UsageError("encode takes a list of items: encode([item])")
    kinds = [kind_of(item) for item in items]
    vectors_ND = np.empty((len(items), encoder.dim), np.float32)
    with bar("encode", len(items), "items") if progress else _Silent() as shown:
        for number in (n for n, kind in enumerate(kinds) if kind in ("vector", "row")):
            if kinds[number] == "row":
                raise UsageError(
                    f"{items[number]}: a row of a store can be searched for, but not encoded"
                )
            vectors_ND[number] = unit_vector(items[number], encoder.dim)
            shown.update()
        texts = [n for n, kind in enumerate(kinds) if kind == "text"]
        if texts:
            encode_texts = BatchSplitter(encoder.encode_texts)
            for part in in_batches(texts, TEXTS_AT_ONCE):
                vectors_ND[part] = encode_texts([utf8_text(items[n]) for n in part])
                shown.update(len(part))
        images = [n for n, kind in enumerate(kinds) if kind == "image"]
        if images:
            size = batch_size or (CPU_BATCH if encoder.device.type == "cpu" else GPU_BATCH)
            encode_images: BatchSplitter[PixelArray] = BatchSplitter(
                lambda batch: encoder.encode_images(np.stack(batch))
            )
            pixels = _decoded(encoder, [items[n] for n in images], size)
            for part in in_batches(images, size):
                vectors_ND[part] = encode_images(list(islice(pixels, len(part))))
                shown.update(len(part))
    return vectors_ND


def _decoded(encoder: Encoder, images: Sequence[Any], batch: int) -> Iterator[PixelArray]:
    """Decode images in threads: the next batch while the current one is encoded."""
    shape = encoder.preprocess

    def decode(item: Any) -> PixelArray:
        try:
            with image_of(item, shape.size) as image:
                return fit_image(image, shape.size, shape.resize_mode, shape.interpolation)
        except DataError as error:
            name = str(item) if isinstance(item, Path) else _kind(item)
            raise DataError(f"{name}: cannot be used as an image: {error}") from None

    workers = min(decode_workers(), len(images))
    if workers < 2:
        return map(decode, images)
    return in_threads(decode, images, workers, ahead=max(2 * workers, 2 * batch))


class _Silent(contextlib.nullcontext[Any]):
    """A progress bar that is not shown; creating one of tqdm's takes as long as half a search."""

    def __enter__(self) -> "_Silent":
        return self

    def update(self, count: int = 1) -> None:
        """Count nothing."""


def _kind(item: Any) -> str:
    return "bytes" if isinstance(item, bytes | bytearray | memoryview) else "picture"
