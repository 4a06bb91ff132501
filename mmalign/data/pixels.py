"""Decoded images by row: from a memory-mapped cache if they fit, else decoded on request.

Shapes: B rows of a batch, S side of an image in pixels.

Decoding once and then reading bytes keeps a small model supplied with data: a 64-pixel image costs
12 KB of disk and a microsecond, its JPEG a millisecond each time.
"""

import contextlib
import hashlib
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from mmalign.arrays import Ints, PixelArray
from mmalign.data.batches import in_threads
from mmalign.data.catalog import read_image
from mmalign.data.samples import Record, SampleProblem, Skip
from mmalign.errors import DataError
from mmalign.progress import bar

T = TypeVar("T")
Decode = Callable[[bytes], T]
# The largest share of the free disk space that a cache may use.
DISK_SHARE = 0.5
# The brightness grid from which a look is computed.
HASH_ROWS, HASH_COLUMNS = 8, 9


def read_and_decode(record: Record, decode: Decode[T]) -> T | Skip:
    """Read and decode the image of a record, or return the reason why that failed."""
    try:
        return decode(read_image(record))
    except SampleProblem as problem:
        return Skip(record.id, record.uri, str(problem))
    except OSError as error:
        return Skip(record.id, record.uri, f"cannot be read: {error.strerror or error}")


def decode_stream(
    records: Iterable[Record], decode: Decode[T], workers: int
) -> Iterator[tuple[Record, T | Skip]]:
    """Read and decode records in threads, in order, a bounded number ahead."""

    def one(record: Record) -> tuple[Record, T | Skip]:
        return record, read_and_decode(record, decode)

    return in_threads(one, records, workers, ahead=4 * workers)


@dataclass(frozen=True)
class Pixels:
    """Images of equal size by row number.

    `cache_NSS3` holds them all; if it is None (they did not fit on the disk), `decode` creates them
    from `records` on each fetch.
    """

    records: list[Record]
    decode: Decode[PixelArray]
    cache_NSS3: PixelArray | None
    workers: int
    content_hashes_N: Ints
    """Hash of each encoded image; 0 if it has not been read yet."""
    perceptual_hashes_N: Ints
    """64 bits of each image, see `perceptual_hash`; 0 if it has not been decoded yet."""

    def fetch(self, rows_B: NDArray[np.int64]) -> tuple[PixelArray, list[int], list[Skip]]:
        """Return the pixels of the decodable rows, their positions, and the skips."""
        if self.cache_NSS3 is not None:
            return self.cache_NSS3[rows_B], list(range(len(rows_B))), []
        records = [self.records[row] for row in rows_B]
        images = list(decode_stream(records, self.decode, self.workers))
        skips = [image for _, image in images if isinstance(image, Skip)]
        good = [(i, image) for i, (_, image) in enumerate(images) if not isinstance(image, Skip)]
        if not good:
            raise DataError(f"none of {len(skips)} images can be decoded: {skips[0].reason}")
        return np.stack([image for _, image in good]), [i for i, _ in good], skips


def decode_all(
    records: Sequence[Record],
    decode: Decode[PixelArray],
    side: int,
    file: Path,
    *,
    workers: int,
    label: str = "decode",
) -> tuple[Pixels, list[Skip]]:
    """Decode every record once into a memory-mapped file of (N, side, side, 3) uint8.

    Returns the pixels of the records that could be decoded, in order, and what was left out. If
    half of the free disk space cannot hold the cache, nothing is decoded now.

    Raises:
        OSError: The disk filled up in the meantime.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    size_bytes = len(records) * side * side * 3
    if size_bytes > DISK_SHARE * shutil.disk_usage(file.parent).free:
        zeros_N = np.zeros(len(records), np.int64)
        return Pixels(list(records), decode, None, workers, zeros_N, zeros_N), []
    cache = _reserve(file, (len(records), side, side, 3))
    good: list[Record] = []
    skips: list[Skip] = []
    content_hashes_N, perceptual_hashes_N = (
        np.zeros(len(records), np.int64),
        np.zeros(len(records), np.int64),
    )

    def decode_and_hash(content: bytes) -> tuple[PixelArray, int, int]:
        image = decode(content)
        return image, content_hash(content), perceptual_hash(image)

    with bar(label, len(records)) as progress:
        for record, result in decode_stream(records, decode_and_hash, workers):
            if isinstance(result, Skip):
                skips.append(result)
            else:
                cache[len(good)], content_hashes_N[len(good)], perceptual_hashes_N[len(good)] = (
                    result
                )
                good.append(record)
            progress.update()
    count = len(good)
    pixels = Pixels(
        good, decode, cache[:count], workers, content_hashes_N[:count], perceptual_hashes_N[:count]
    )
    return pixels, skips


def content_hash(content: bytes) -> int:
    """Hash an encoded image to 64 bits, signed, never 0."""
    digest = hashlib.blake2b(content, digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True) or 1


def perceptual_hash(pixels_SS3: PixelArray) -> int:
    """Return a signed 64-bit perceptual hash, nearly unchanged by resizing or re-encoding.

    Each bit tells whether one of 8 x 9 areas is brighter (in green) than its left neighbour.
    """
    side = len(pixels_SS3)
    sums = pixels_SS3[:, :, 1].astype(np.int64)
    edges = [np.arange(n + 1) * side // n for n in (HASH_ROWS, HASH_COLUMNS)]
    sums = np.add.reduceat(np.add.reduceat(sums, edges[0][:-1], axis=0), edges[1][:-1], axis=1)
    # An image with fewer pixels than areas has empty areas, which use their first pixel.
    heights, widths = (np.maximum(np.diff(e), 1) for e in edges)
    means = sums / (heights[:, None] * widths[None])
    bits = np.packbits(means[:, 1:] > means[:, :-1])
    return int.from_bytes(bits.tobytes(), "little", signed=True)


def _reserve(file: Path, shape: tuple[int, ...]) -> PixelArray:
    """Create a memory-mapped file of zeros whose disk space is allocated in advance.

    Otherwise, another program that fills the disk would kill this one by a signal (SIGBUS).
    """
    size = int(np.prod(shape, dtype=np.int64))
    with open(file, "wb+") as handle:
        handle.truncate(size)
        if hasattr(os, "posix_fallocate"):
            try:
                os.posix_fallocate(handle.fileno(), 0, size)
            except OSError as error:
                raise OSError(error.errno, error.strerror, str(file)) from error
    cache: PixelArray = np.memmap(file, np.uint8, "r+", shape=shape)
    # Where a mapped file needs no name, even a killed process leaves no file behind.
    with contextlib.suppress(OSError):
        os.unlink(file)
    return cache
