"""Encode many samples at full speed: decoding, encoding and the caller's work overlap.

    records -> read, decode (threads) -> batches -> encode (threads) -> results, in order

On a CPU each encoding thread takes its own batch and computes on one core: threads that share a
batch wait for each other at every layer, and for every image that is decoded at the same time. On a
GPU two threads take turns, so that one copies while the other computes. On other devices (Apple's)
one thread encodes.

Shapes: B items of a batch, S side of an image in pixels, D dimensions.
"""

import hashlib
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from operator import length_hint
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from mmalign.arrays import Floats
from mmalign.data import (
    Record,
    Skip,
    decode_on,
    decoded,
    fit_image,
    image_meta,
    in_threads,
    read_and_decode,
    suits_device,
    thumbnail,
)
from mmalign.encoding.batches import BatchSplitter, TextCache, is_out_of_memory
from mmalign.encoding.modalities import decode_workers, modalities_of
from mmalign.memory import keep_free_memory
from mmalign.model import Encoder

T = TypeVar("T")
# Small batches fit a core's cache; a GPU needs large ones.
CPU_BATCH, GPU_BATCH = 16, 256
# Batches that are started for each encoding thread before their results are requested.
AHEAD = 3


@dataclass(frozen=True)
class Known:
    """Earlier results for an image with the same content."""

    image_D: Floats
    texts: dict[str, Floats]
    """The vectors of its captions."""
    thumbnail: bytes


@dataclass(frozen=True)
class Item:
    """An image to be encoded, and the values that are stored with it."""

    pixels_SS3: NDArray[np.uint8] | None
    """The decoded pixels; None if `jpeg` is decoded on the encoding device."""
    jpeg: bytes
    thumbnail: bytes
    checksum: bytes
    """sha256 of the encoded image."""
    stamp: int
    """The stamp of its source before it was read, see `data.Stamps`."""
    meta: dict[str, Any] = field(default_factory=dict)
    """Metadata written by its camera, see `data.image_meta`."""
    known: Known | None = None
    """Its vectors, if it was embedded before; it is then not decoded."""


@dataclass(frozen=True)
class Encoded:
    """One sample with its vectors."""

    record: Record
    item: Item
    image_D: Floats
    texts_CD: Floats
    """One unit vector per caption, in order."""


@dataclass
class Stage:
    """How busy one stage of the pipeline is."""

    name: str
    workers: int
    busy_s: float = 0.0
    lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    @contextmanager
    def working(self) -> Iterator[None]:
        """Add the time of a block, in any thread."""
        started = time.perf_counter()
        try:
            yield
        finally:
            with self.lock:
                self.busy_s += time.perf_counter() - started


class Pipeline:
    """Decodes and encodes records, several at a time.

    With a GPU, plain JPEGs are decoded there. The CPU then decodes them at reduced scale only: for
    the thumbnail, and because a GPU decoder may not report that an image is damaged.
    """

    def __init__(
        self,
        encoder: Encoder,
        *,
        thumbnails: bool,
        known: Callable[[bytes], Known | None] = lambda checksum: None,
    ) -> None:
        """Prepare to encode.

        Args:
            encoder: Computes the vectors.
            thumbnails: Make a thumbnail of each image.
            known: Returns earlier results for an image checksum; called from several threads.
        """
        self.encoder, self.thumbnails, self.known = encoder, thumbnails, known
        self.encoded = 0
        """Images whose vectors were computed."""
        self.images = modalities_of(encoder)["image"]
        self.texts = TextCache(encoder)
        self.decoded, self.jpegs = BatchSplitter(self._decoded), BatchSplitter(self._jpegs)
        on_cpu = encoder.device.type == "cpu"
        on_cuda = encoder.device.type == "cuda"
        self.decodes_on_device = on_cuda
        if on_cpu:
            keep_free_memory()
        self.threads = torch.get_num_threads()
        self.batch = CPU_BATCH if on_cpu else GPU_BATCH
        self.decoding = Stage("decode", decode_workers())
        self.encoding = Stage("encode", self.threads if on_cpu else 2 if on_cuda else 1)
        self.writing = Stage("write", 1)
        self.started = time.perf_counter()

    def run(self, records: Iterable[Record]) -> Iterator[tuple[list[Encoded], list[Skip]]]:
        """Yield encoded and skipped samples, batch by batch, in the order of the records.

        The time until the caller requests the next batch counts as writing.
        """
        self.started = time.perf_counter()
        workers = self.encoding.workers
        # Decoding must be far enough ahead that a batch is ready whenever an encoder is free.
        decoded = in_threads(
            self._decode,
            records,
            self.decoding.workers,
            ahead=max(4 * self.decoding.workers, self.batch),
            prepare=_alone,
        )
        batches = self._batches(decoded, length_hint(records))
        try:
            for result in in_threads(
                self._encode, batches, workers, ahead=AHEAD * workers, prepare=self._apart
            ):
                with self.writing.working():
                    yield result
        finally:
            decoded.close()  # type: ignore[attr-defined]
            torch.set_num_threads(self.threads)

    def describe(self) -> str:
        """Describe how busy each stage is, the bottleneck first."""
        elapsed_s = max(time.perf_counter() - self.started, 1e-9)
        stages = (self.decoding, self.encoding, self.writing)
        shares = {s.name: s.busy_s / (s.workers * elapsed_s) for s in stages}
        ordered = sorted(shares, key=lambda name: -shares[name])
        return "busy: " + ", ".join(f"{name} {min(1.0, shares[name]):.0%}" for name in ordered)

    def _apart(self) -> None:
        """Let an encoding thread compute independently: on a GPU, in its own stream."""
        _alone()
        if self.encoder.device.type == "cuda":
            # The weights may still be being copied, in the stream that loaded them.
            torch.cuda.synchronize(self.encoder.device)
            torch.cuda.set_stream(torch.cuda.Stream(self.encoder.device))

    def _batches(self, decoded: Iterator[T], count: int) -> Iterator[list[T]]:
        """Yield full batches, and smaller ones at the end so that no encoder idles for long.

        Args:
            decoded: The items to be encoded.
            count: Number of items; 0 if unknown.
        """
        left, size = count, self.batch
        while batch := list(islice(decoded, size)):
            yield batch
            left -= len(batch)
            if count:
                share = left // (2 * self.encoding.workers)
                size = min(self.batch, max(self.batch // 4, share))

    def _decode(self, record: Record) -> tuple[Record, Item | Skip]:
        with self.decoding.working():
            # The stamp is taken before the image is read: a change in between is noticed next time.
            item = read_and_decode(record, partial(self._item, record.stamp))
            if isinstance(item, Item):
                # Metadata given with an image takes precedence over that of its camera.
                record = replace(record, meta={**item.meta, **record.meta})
            return record, item

    def _item(self, seen: int, content: bytes) -> Item:
        checksum = hashlib.sha256(content).digest()
        known = self.known(checksum)
        if known and (known.thumbnail or not self.thumbnails):
            small = known.thumbnail if self.thumbnails else b""
            return Item(None, b"", small, checksum, seen, image_meta(content), known)
        shape = self.encoder.preprocess
        later = self.decodes_on_device and suits_device(content)
        how = (shape.size, shape.resize_mode, shape.interpolation)
        with decoded(content, 1 if later else shape.size) as image:
            return Item(
                pixels_SS3=None if later else fit_image(image, *how),
                jpeg=content if later else b"",
                thumbnail=thumbnail(image) if self.thumbnails else b"",
                checksum=checksum,
                stamp=seen,
                meta=image_meta(content),
            )

    def _encode(
        self, batch: Sequence[tuple[Record, Item | Skip]]
    ) -> tuple[list[Encoded], list[Skip]]:
        skips = [item for _, item in batch if isinstance(item, Skip)]
        good = [(record, item) for record, item in batch if not isinstance(item, Skip)]
        if not good:
            return [], skips
        with self.encoding.working():
            images_BD = self._images([item for _, item in good])
            texts = self._texts(good)
        rows = zip(good, images_BD, texts, strict=True)
        return [Encoded(record, item, image, text) for (record, item), image, text in rows], skips

    def _images(self, items: Sequence[Item]) -> Floats:
        """Embed images, decoded or still to be decoded."""
        images_BD = np.empty((len(items), self.encoder.dim), np.float32)
        for row, item in enumerate(items):
            if item.known:
                images_BD[row] = item.known.image_D
        with self.encoding.lock:
            self.encoded += sum(item.known is None for item in items)
        for encode, rows in (
            (self.decoded, [i for i, item in enumerate(items) if item.pixels_SS3 is not None]),
            (self.jpegs, [i for i, item in enumerate(items) if item.jpeg]),
        ):
            if rows:
                images_BD[rows] = encode([items[i] for i in rows])
        return images_BD

    def _texts(self, good: Sequence[tuple[Record, Item]]) -> list[Floats]:
        """Embed the captions of images, except those known from an earlier embedding."""
        known = [item.known.texts if item.known else {} for _, item in good]
        pairs = list(zip([record.captions for record, _ in good], known, strict=True))
        new = self.texts([[c for c in captions if c not in old] for captions, old in pairs])
        texts = []
        for (captions, old), vectors_CD in zip(pairs, new, strict=True):
            fresh = iter(vectors_CD)
            each = [old[c] if c in old else next(fresh) for c in captions]
            texts.append(np.stack(each) if each else vectors_CD)
        return texts

    def _decoded(self, items: Sequence[Item]) -> Floats:
        return self.images.encode(self.images.batch([item.pixels_SS3 for item in items]))

    def _jpegs(self, items: Sequence[Item]) -> Floats:
        shape, contents = self.encoder.preprocess, [item.jpeg for item in items]
        how = (shape.size, shape.resize_mode, shape.interpolation)
        try:
            pixels_B3SS = decode_on(self.encoder.device, contents, *how)
        except RuntimeError as error:
            if is_out_of_memory(error):
                raise
            # The CPU has already decoded each of them once.
            return self.images.encode(self.images.batch(list(map(self.images.decode, contents))))
        return self.encoder.encode_pixels(pixels_B3SS)


def _alone() -> None:
    """Let a thread compute on a single core."""
    torch.set_num_threads(1)
