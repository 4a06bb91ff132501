"""Mixed lists of items into vectors: the implementation of `Encoder.encode`.

Shapes: N items, B parts of a batch, V parts of an item, D dimensions.
"""

import contextlib
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from mmalign.arrays import Floats
from mmalign.data import in_batches, in_threads
from mmalign.encoding.batches import BatchSplitter
from mmalign.encoding.modalities import decode_workers, encoder_of
from mmalign.encoding.modality_encoder import Decoded, ModalityEncoder
from mmalign.encoding.pipeline import CPU_BATCH, GPU_BATCH
from mmalign.errors import DataError, UsageError
from mmalign.items import kind_of, unit_vector
from mmalign.modality import OTHER_KINDS
from mmalign.model import Encoder
from mmalign.progress import bar

T = TypeVar("T")


def encode_items(
    encoder: Encoder, items: Sequence[Any], *, batch_size: int | None = None, progress: bool = False
) -> Floats:
    """Encode a mix of texts, images and other items to unit vectors (N, D), in order; see `items`.

    An item of several parts gets the mean of their vectors.

    Args:
        encoder: The model.
        items: Texts, images and vectors; vectors are only scaled to unit length.
        batch_size: Items encoded at once; by default chosen for the device. Texts have their own.
        progress: Whether to show a progress bar.

    Raises:
        ItemError: An item is of another type.
        UsageError: A text is not UTF-8, a file is missing, or an item is a row of a store.
        DataError: An item cannot be decoded.
    """
    if isinstance(items, str | bytes):
        raise UsageError("encode takes a list of items: encode([item])")
    kinds = [kind_of(item) for item in items]
    vectors_ND = np.empty((len(items), encoder.dim), np.float32)
    with bar("encode", len(items), "items") if progress else _Silent() as shown:
        for number in (n for n, kind in enumerate(kinds) if kind in OTHER_KINDS):
            if kinds[number] == "row":
                raise UsageError(
                    f"{items[number]}: a row of a store can be searched for, but not encoded"
                )
            vectors_ND[number] = unit_vector(items[number], encoder.dim)
            shown.update()
        for name in dict.fromkeys(kind for kind in kinds if kind not in OTHER_KINDS):
            numbers = [n for n, kind in enumerate(kinds) if kind == name]
            with_modality = encoder_of(encoder, name)
            size = with_modality.batch_size or batch_size or _batch_size(encoder)
            encode = BatchSplitter(with_modality.encode)
            decoded = _decoded(with_modality, [items[n] for n in numbers], size)
            for batch in in_batches(numbers, size):
                items_parts = [one.parts for one in islice(decoded, len(batch))]
                vectors_BD = encode([part for parts in items_parts for part in parts])
                ends = np.cumsum([len(parts) for parts in items_parts])
                vectors_ND[batch] = [mean_vector(v) for v in np.split(vectors_BD, ends[:-1])]
                shown.update(len(batch))
    return vectors_ND


def mean_vector(vectors_VD: Floats) -> Floats:
    """Return the one vector (D,) that stands for all vectors of an item."""
    if len(vectors_VD) == 1:
        only_D: Floats = vectors_VD[0]
        return only_D
    return unit_vector(vectors_VD.mean(axis=0), vectors_VD.shape[1])


def _batch_size(encoder: Encoder) -> int:
    return CPU_BATCH if encoder.device.type == "cpu" else GPU_BATCH


def _decoded(encoder: ModalityEncoder, items: Sequence[Any], batch: int) -> Iterator[Decoded]:
    """Decode items in threads: the next batch while the current one is encoded."""

    def decode(item: Any) -> Decoded:
        try:
            return encoder.decode_item(item)
        except DataError as error:
            kind = kind_of(item)
            name = str(item) if isinstance(item, Path) else _kind(item)
            raise DataError(f"{name}: cannot be used as {_an(kind)}: {error}") from None

    workers = min(decode_workers(), len(items))
    if workers < 2 or isinstance(items[0], str):
        return map(decode, items)
    return in_threads(decode, items, workers, ahead=max(2 * workers, 2 * batch))


def _an(noun: str) -> str:
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


class _Silent(contextlib.nullcontext[Any]):
    """A progress bar that is not shown; creating one of tqdm's takes as long as half a search."""

    def __enter__(self) -> "_Silent":
        return self

    def update(self, count: int = 1) -> None:
        """Count nothing."""


def _kind(item: Any) -> str:
    return "bytes" if isinstance(item, bytes | bytearray | memoryview) else "picture"
