"""Encode many samples at full speed: decoding, encoding and the caller's work overlap.

    records -> read, decode (threads) -> batches -> encode (threads) -> results, in order

On a CPU each encoding thread takes its own batch and computes on one core: threads that share a
batch wait for each other at every layer, and for every image that is decoded at the same time. On a
GPU two threads take turns, so that one copies while the other computes. On other devices (Apple's)
one thread encodes.

Shapes: B parts of a batch, V vectors of an item, C captions of one, D dimensions, P numbers of a
position.
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

from mmalign.arrays import Floats
from mmalign.data import Record, Skip, in_threads, read_and_decode
from mmalign.encoding.batches import BatchSplitter, TextCache
from mmalign.encoding.modalities import decode_workers, encoder_of
from mmalign.encoding.modality_encoder import Decoded
from mmalign.memory import keep_free_memory
from mmalign.modality import TEXT
from mmalign.model import Encoder

T = TypeVar("T")
# Small batches fit a core's cache; a GPU needs large ones.
CPU_BATCH, GPU_BATCH = 16, 256
# Batches that are started for each encoding thread before their results are requested.
AHEAD = 3


@dataclass(frozen=True)
class Known:
    """Earlier results for a file with the same content."""

    vectors: dict[str, Floats]
    """By modality, (V, D)."""
    positions: dict[str, Floats]
    """By modality, (V, P)."""
    texts: dict[str, Floats]
    """The vectors of its captions."""
    thumbnail: bytes


@dataclass(frozen=True)
class Item:
    """A file to be encoded, and the values that are stored with it."""

    decoded: Decoded
    checksum: bytes
    """sha256 of the file."""
    stamp: int
    """The stamp of its source before it was read, see `data.Stamps`."""
    meta: dict[str, Any] = field(default_factory=dict)
    """What the file says of itself, see `ModalityEncoder.metadata`."""
    known: Known | None = None
    """Its vectors, if it was embedded before."""


@dataclass(frozen=True)
class Encoded:
    """One sample with its vectors."""

    record: Record
    item: Item
    vectors: dict[str, Floats]
    """Unit vectors by modality, (V, D): those of the file, and one for each caption, in order."""
    positions: dict[str, Floats]
    """Where in the file they are, by modality, (V, P), where that must be told."""


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
    """Decodes and encodes records of any modality, several at a time."""

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
            thumbnails: Make a thumbnail of each item.
            known: Returns earlier results for a checksum; called from several threads.
        """
        self.encoder, self.thumbnails, self.known = encoder, thumbnails, known
        self.encoded = 0
        """Items whose vectors were computed."""
        self.texts = TextCache(encoder)
        self._encoders: dict[str, BatchSplitter[Any]] = {}
        on_cpu = encoder.device.type == "cpu"
        on_cuda = encoder.device.type == "cuda"
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
            item = read_and_decode(record, partial(self._item, record))
            if isinstance(item, Item):
                # What is written beside a file takes precedence over what is in it.
                record = replace(record, meta={**item.meta, **record.meta})
            return record, item

    def _item(self, record: Record, content: bytes) -> Item:
        checksum, modality = hashlib.sha256(content).digest(), record.modality
        encoder = encoder_of(self.encoder, modality)
        known = self.known(checksum)
        if known and modality not in known.vectors:
            known = None
        if known and (known.thumbnail or not self.thumbnails):
            small = known.thumbnail if self.thumbnails else b""
            decoded = Decoded([], known.positions.get(modality), small)
        else:
            # Also for the thumbnail alone, if the earlier embedding made none.
            decoded = encoder.decode(content, thumbnail=self.thumbnails)
        return Item(decoded, checksum, record.stamp, encoder.metadata(content), known)

    def _encode(
        self, batch: Sequence[tuple[Record, Item | Skip]]
    ) -> tuple[list[Encoded], list[Skip]]:
        skips = [item for _, item in batch if isinstance(item, Skip)]
        good = [(record, item) for record, item in batch if not isinstance(item, Skip)]
        if not good:
            return [], skips
        with self.encoding.working():
            vectors = self._vectors(good)
            texts = self._texts(good)
        return [
            _encoded(*pair, vectors_VD, texts_CD)
            for pair, vectors_VD, texts_CD in zip(good, vectors, texts, strict=True)
        ], skips

    def _vectors(self, good: Sequence[tuple[Record, Item]]) -> list[Floats]:
        """Embed the files of samples, those of one modality together; (V, D) for each."""
        found = {
            i: item.known.vectors[record.modality]
            for i, (record, item) in enumerate(good)
            if item.known
        }
        new: dict[str, list[int]] = {}
        for i, (record, _) in enumerate(good):
            if i not in found:
                new.setdefault(record.modality, []).append(i)
        for modality, numbers in new.items():
            parts = [part for i in numbers for part in good[i][1].decoded.parts]
            ends = np.cumsum([len(good[i][1].decoded.parts) for i in numbers])
            vectors_BD = self._encoder(modality)(parts)
            found |= zip(numbers, np.split(vectors_BD, ends[:-1]), strict=True)
        with self.encoding.lock:
            self.encoded += sum(map(len, new.values()))
        return [found[i] for i in range(len(good))]

    def _encoder(self, modality: str) -> BatchSplitter[Any]:
        encode = encoder_of(self.encoder, modality).encode
        return self._encoders.setdefault(modality, BatchSplitter(encode))

    def _texts(self, good: Sequence[tuple[Record, Item]]) -> list[Floats]:
        """Embed the captions of samples, except those known from an earlier embedding."""
        known = [item.known.texts if item.known else {} for _, item in good]
        pairs = list(zip([record.captions for record, _ in good], known, strict=True))
        new = self.texts([[c for c in captions if c not in old] for captions, old in pairs])
        texts = []
        for (captions, old), vectors_CD in zip(pairs, new, strict=True):
            fresh = iter(vectors_CD)
            each = [old[c] if c in old else next(fresh) for c in captions]
            texts.append(np.stack(each) if each else vectors_CD)
        return texts


def _encoded(record: Record, item: Item, vectors_VD: Floats, texts_CD: Floats) -> Encoded:
    positions_VP = item.decoded.positions
    positions = {} if positions_VP is None else {record.modality: positions_VP}
    return Encoded(record, item, {record.modality: vectors_VD, TEXT.name: texts_CD}, positions)


def _alone() -> None:
    """Let a thread compute on a single core."""
    torch.set_num_threads(1)
