"""Decoded images by row: from a memory-mapped cache where they fit, else decoded when asked for.

B rows of a batch, S side of an image in pixels.

Decoding once and reading bytes ever after is what keeps a small model fed: a 64-pixel image costs
12 KB of disk and a microsecond, its JPEG a millisecond each time.
"""

import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from mmalign.data.batches import in_threads
from mmalign.data.catalog import read_image
from mmalign.data.samples import Record, SampleProblem, Skip
from mmalign.errors import DataError
from mmalign.progress import bar

T = TypeVar("T")
Array = NDArray[np.uint8]
Decode = Callable[[bytes], T]
# A cache may take this share of the free disk.
DISK_SHARE = 0.5


def read_and_decode(record: Record, decode: Decode[T]) -> T | Skip:
    """Read the image of a record and decode it, or say why it cannot be."""
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

    `cache_NSS3` holds them all; where it is None (they did not fit on the disk), `decode` makes
    them from `records` on each fetch.
    """

    records: list[Record]
    decode: Decode[Array]
    cache_NSS3: Array | None
    workers: int

    def fetch(self, rows_B: NDArray[np.int64]) -> tuple[Array, list[int], list[Skip]]:
        """Return the pixels of the rows that can be decoded, their positions, and what is lost."""
        if self.cache_NSS3 is not None:
            return self.cache_NSS3[rows_B], list(range(len(rows_B))), []
        wanted = [self.records[row] for row in rows_B]
        images = list(decode_stream(wanted, self.decode, self.workers))
        lost = [image for _, image in images if isinstance(image, Skip)]
        good = [(i, image) for i, (_, image) in enumerate(images) if not isinstance(image, Skip)]
        if not good:
            raise DataError(f"none of {len(lost)} images can be decoded: {lost[0].reason}")
        return np.stack([image for _, image in good]), [i for i, _ in good], lost


def decode_all(
    records: Sequence[Record],
    decode: Decode[Array],
    side: int,
    file: Path,
    *,
    workers: int,
    label: str = "decode",
) -> tuple[Pixels, list[Skip]]:
    """Decode every record once into a memory-mapped file of (N, side, side, 3) uint8.

    Returns the pixels of the records that could be decoded, in order, and what was left out. Where
    half of the free disk would not hold the cache, nothing is decoded now.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    size_bytes = len(records) * side * side * 3
    if size_bytes > DISK_SHARE * shutil.disk_usage(file.parent).free:
        return Pixels(list(records), decode, None, workers), []
    cache = np.lib.format.open_memmap(
        file, mode="w+", dtype=np.uint8, shape=(len(records), side, side, 3)
    )
    kept: list[Record] = []
    skips: list[Skip] = []
    with bar(label, len(records)) as progress:
        for record, image in decode_stream(records, decode, workers):
            if isinstance(image, Skip):
                skips.append(image)
            else:
                cache[len(kept)] = image
                kept.append(record)
            progress.update()
    cache.flush()
    return Pixels(kept, decode, cache[: len(kept)], workers), skips
