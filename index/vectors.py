"""The vectors that an index is built over and scored with, in any number of shards.

Shapes: N vectors, P vector numbers, D dimensions.
"""

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from mmalign.arrays import Bools, Floats, Halves, Ints
from mmalign.errors import VectorError
from mmalign.index.owners import Owners
from mmalign.index.spec import Shards

BLOCK_ROWS = 1 << 14
# A sample of whole rows has at least this many of them.
MIN_SAMPLED_ROWS = 128


class _Writable:
    """Presents an array as writable."""

    def __init__(self, array: Any) -> None:
        self.array = array  # keeps the memory alive
        address, _ = array.__array_interface__["data"]
        self.__array_interface__ = {**array.__array_interface__, "data": (address, False)}


def shared_tensor(array: Any) -> torch.Tensor:
    """Return a tensor that shares an array's memory and must not be written to.

    Memory-mapped vectors are read-only; torch would warn, as it has no read-only tensors.
    """
    return torch.from_numpy(np.asarray(_Writable(array)))


class VectorReader:
    """Shards of float16 vectors, numbered consecutively across shards.

    Deleted vectors keep their numbers and are skipped.
    """

    def __init__(
        self, shards: Shards, live_N: Bools | None = None, owners: Ints | None = None
    ) -> None:
        """Take shards, each (vectors, D) and contiguous, in memory or memory-mapped.

        Args:
            shards: They must not be changed or unmapped while this object lives.
            live_N: Which vectors are not deleted; None if all are live.
            owners: The row of each vector, ascending; None if each row has one. Not copied.
        """
        self.owners = Owners.of(owners)
        self.shards = [s for s in shards if len(s)]
        self.ends = np.cumsum([len(s) for s in self.shards], dtype=np.int64)
        self.total = int(self.ends[-1]) if self.shards else 0
        self.live_N = live_N
        self.live = self.total if live_N is None else int(np.count_nonzero(live_N))
        self._first_rows = self.ends - np.array([len(s) for s in self.shards], dtype=np.int64)
        if self.shards:
            self._view, self._starts, self._step = _view_of_all_shards(self.shards)

    @property
    def dim(self) -> int:
        """Number of dimensions."""
        return int(self.shards[0].shape[1])

    def first_rows(self, count: int) -> list[Halves]:
        """Return views of the first rows, by shard."""
        starts = self.ends - [len(s) for s in self.shards]
        views = [s[: max(0, count - first)] for s, first in zip(self.shards, starts, strict=True)]
        return [view for view in views if len(view)]

    def sample_rows(self, count: int, seed: int) -> Ints:
        """Draw numbers of live rows at random, without replacement; ascending."""
        row_numbers = np.arange(self.total) if self.live_N is None else np.flatnonzero(self.live_N)
        sampled = np.random.default_rng(seed).choice(
            len(row_numbers), size=min(count, len(row_numbers)), replace=False
        )
        return np.sort(row_numbers[sampled])

    @property
    def per_row(self) -> float:
        """Mean number of vectors of a row."""
        return 1.0 if self.owners is None else self.owners.mean

    def rows_of(self, vectors_MK: Ints) -> Ints:
        """Return the row of each vector; -1 stays -1."""
        return vectors_MK if self.owners is None else self.owners.of_vectors(vectors_MK)

    def sample(self, count: int, seed: int) -> "VectorReader":
        """Copy about `count` live vectors, drawn at random by row: all vectors of each."""
        if self.owners is None:
            return VectorReader([self.gather(self.sample_rows(count, seed))])
        rows_V = self.owners.rows_V
        starts = np.concatenate([[0], 1 + np.flatnonzero(rows_V[1:] != rows_V[:-1])])
        sizes = np.diff(starts, append=len(rows_V))
        if self.live_N is not None:
            live = self.live_N[starts]
            starts, sizes = starts[live], sizes[live]
        wanted = max(MIN_SAMPLED_ROWS, round(count / self.owners.mean))
        drawn = np.random.default_rng(seed).choice(
            len(starts), size=min(wanted, len(starts)), replace=False
        )
        starts, sizes = starts[np.sort(drawn)], sizes[np.sort(drawn)]
        owners = np.repeat(np.arange(len(starts)), sizes)
        # Consecutive numbers from the start of each row.
        numbers = np.arange(len(owners)) + np.repeat(starts - (np.cumsum(sizes) - sizes), sizes)
        return VectorReader([self.gather(numbers)], owners=owners)

    def gather(self, rows_P: Ints, out: torch.Tensor | None = None) -> Halves:
        """Copy the vectors of some rows, shape (P, D), with all threads of torch.

        They are written to the start of `out` (P or more, D), if given.
        """
        if not len(rows_P):
            return np.zeros((0, self.dim if self.shards else 0), np.float16)
        if not 0 <= rows_P.min() <= rows_P.max() < self.total:
            raise IndexError(f"there are rows 0 to {self.total - 1}")
        shard_P = np.searchsorted(self.ends, rows_P, side="right")
        positions_P = self._starts[shard_P] + (rows_P - self._first_rows[shard_P]) * self._step
        out = torch.empty(len(rows_P), self.dim, dtype=torch.float16) if out is None else out
        gathered_PD, positions = out[: len(rows_P)], torch.from_numpy(positions_P)
        torch.index_select(shared_tensor(self._view), 0, positions, out=gathered_PD)
        return gathered_PD.numpy()

    def blocks(self) -> Iterator[tuple[Ints, Floats]]:
        """Yield numbers and float32 vectors of live rows, a few thousand at a time.

        Raises:
            VectorError: A vector holds NaN or infinity, or is zero.
        """
        first = 0
        for shard in self.shards:
            for start in range(0, len(shard), BLOCK_ROWS):
                block = shard[start : start + BLOCK_ROWS]
                row_numbers = np.arange(first + start, first + start + len(block))
                if self.live_N is not None:
                    live = self.live_N[row_numbers]
                    row_numbers, block = row_numbers[live], block[live]
                if len(row_numbers):
                    # torch converts with all threads.
                    yield row_numbers, _validated(shared_tensor(block).float().numpy(), row_numbers)
            first += len(shard)


def _validated(block_BD: Floats, row_numbers_B: Ints) -> Floats:
    squared_norm_B = np.einsum("bd,bd->b", block_BD, block_BD)
    bad_B = ~(np.isfinite(squared_norm_B) & (squared_norm_B > 0))
    if bad_B.any():
        row = int(row_numbers_B[bad_B][0])
        raise VectorError(f"the vector of row {row} is zero, infinite or not a number")
    return block_BD


def _view_of_all_shards(shards: Shards) -> tuple[Halves, Ints, int]:
    """View all shards as one array, so that one copy gathers rows of any shard.

    Shards lie anywhere in memory, but the distances between them are multiples of a small unit. So
    they are rows of one array that starts at the lowest address and has a row at each unit; rows
    overlap, and memory between shards is never read.

    Returns:
        The array, and for each shard the index of its first row and the stride to the next.
    """
    width = shards[0].shape[1]
    row_bytes = 2 * width
    if any(
        s.dtype != np.float16 or s.strides != (row_bytes, 2) or not s.flags.aligned for s in shards
    ):
        raise VectorError("shards must be aligned float16 arrays of contiguous rows")
    starts = np.array([s.ctypes.data for s in shards], dtype=np.int64)
    lowest = int(starts.min())
    unit = math.gcd(row_bytes, *[int(start) - lowest for start in starts])
    end = max(int(start) + s.nbytes for start, s in zip(starts, shards, strict=True))
    view = np.lib.stride_tricks.as_strided(
        shards[int(starts.argmin())],
        shape=((end - lowest - row_bytes) // unit + 1, width),
        strides=(unit, 2),
        writeable=False,
    )
    return view, (starts - lowest) // unit, row_bytes // unit
