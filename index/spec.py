"""What an index is, and which one a set of vectors gets.

N rows, M queries, D dimensions, K neighbours.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Halves = NDArray[np.float16]
Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]
Shards = Sequence[Halves]

EXACT_ROWS = 50_000
"""Below this, comparing every row takes milliseconds and misses nothing."""


class Index(ABC):
    """Finds rows by vector; abstract."""

    rows: int

    @abstractmethod
    def search(
        self, queries_MD: Floats, k: int, allow_N: Bools | None = None
    ) -> tuple[Floats, Ints]:
        """Return scores (M, K), best first, and rows (M, K); row -1 where there are fewer.

        Rows that are False in `allow_N` are not found.
        """


@dataclass(frozen=True)
class Spec:
    """Kind and parameters of an index."""

    kind: Literal["exact", "ivf"]
    rows: int
    dim: int
    lists: int = 0
    """Inverted lists."""
    nprobe: int = 0
    """Lists that a search looks into."""


def choose(rows: int, dim: int) -> Spec:
    """Exact search below 50,000 rows, else IVF with about 4 sqrt(N) lists.

    >>> choose(1_000, 512).kind, choose(200_000, 512).lists
    ('exact', 2048)
    """
    if rows < EXACT_ROWS:
        return Spec("exact", rows, dim)
    lists = 1 << round(float(np.log2(4 * np.sqrt(rows))))
    return Spec("ivf", rows, dim, lists=lists, nprobe=1)


def neighbour_recall(found_MK: Ints, true_MK: Ints) -> float:
    """Share of the true nearest neighbours that an approximate search found.

    >>> neighbour_recall(np.array([[1, 2]]), np.array([[2, 3]]))
    0.5
    """
    both = (found_MK[:, :, None] == true_MK[:, None, :]) & (true_MK[:, None, :] >= 0)
    return float(both.any(axis=1).sum() / max((true_MK >= 0).sum(), 1))
