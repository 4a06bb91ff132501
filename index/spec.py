"""What an index is, and the index specs to choose from.

Shapes: N vectors, M queries, D dimensions, K rows.
"""

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from mmalign.arrays import Bools, Floats, Halves, Ints

Shards = Sequence[Halves]

TUNED_KS = (10, 100)
"""Numbers of neighbours that search parameters are tuned for."""
JSON_NAMES = {"nprobe_or_ef": "breadth", "spec_name": "design", "query_modality": "asked"}
"""Fields that have another name in index.json."""


class Index(ABC):
    """Finds rows by vector; abstract."""

    rows: int

    @abstractmethod
    def search(
        self,
        queries_MD: Floats,
        k: int,
        allow_N: Bools | None = None,
        *,
        query_modality: str = "text",
    ) -> tuple[Floats, Ints]:
        """Return scores (M, K), best first, and vector numbers (M, K); -1 if there are fewer.

        Each is the best vector of another row. Where every row has one vector, their numbers are
        those of the rows.

        Args:
            queries_MD: Queries of unit norm.
            k: Rows per query.
            allow_N: Vectors that are False are excluded; of a row, all or none.
            query_modality: Modality of the queries, as each has search parameters of its own.
        """


@dataclass(frozen=True)
class OperatingPoint:
    """Search parameters for k rows."""

    k: int
    nprobe_or_ef: int
    """nprobe of an IVF, efSearch of a graph: how much of the index is searched."""
    candidates: int
    """Vectors that FAISS returns, to be scored exactly."""

    def scaled_to(self, k: int) -> "OperatingPoint":
        """Return parameters for more neighbours than these were tuned for."""
        factor = max(1.0, k / self.k)
        return OperatingPoint(
            k, round(self.nprobe_or_ef * factor**0.5), round(self.candidates * factor)
        )


@dataclass(frozen=True)
class IndexSpec:
    """A kind of index, independent of the number of rows."""

    kind: Literal["exact", "ivf", "hnsw"]
    code: str = ""
    """How FAISS encodes a vector, as in its factory string."""
    lists_factor: int = 0
    """Lists of an IVF, as a multiple of the square root of the number of rows."""
    metric: Literal["vectors", "queries"] = "vectors"
    """The distance to centroids: Euclidean, or by the covariance of queries, see `quantizer.py`."""
    links: int = 0
    """Neighbours of a node in an HNSW graph (M)."""

    def lists(self, rows: int) -> int:
        """Return the number of inverted lists, a power of two."""
        return 1 << max(2, round(float(np.log2(max(1.0, self.lists_factor * np.sqrt(rows))))))

    def fits_dim(self, dim: int) -> bool:
        """Return whether `dim` fits the code: some codes combine two or four dimensions."""
        group_size = re.search(r"PQ/(\d)", self.code)
        return group_size is None or dim % int(group_size[1]) == 0

    def factory(self, rows: int, dim: int) -> str:
        """Return the FAISS factory string."""
        code = self.code.replace("/2", str(dim // 2)).replace("/4", str(dim // 4))
        if self.kind == "hnsw":
            return f"HNSW{self.links},{code}"
        return f"RR{dim},IVF{self.lists(rows)},{code}"

    def name(self, rows: int, dim: int) -> str:
        """Return a name for reports: the factory string, and the metric of the lists."""
        if self.kind == "exact":
            return "exact"
        return self.factory(rows, dim) + (" by queries" if self.metric == "queries" else "")

    def bytes_per_vector(self, rows: int, dim: int) -> float:
        """Return the approximate memory of the index per row."""
        code_bytes: float = CODES[self.code](dim) + ID_BYTES
        if self.kind == "hnsw":
            return code_bytes + 4 * 2 * self.links * 1.04 + 8
        return code_bytes + 4 * dim * (self.lists(rows) + dim) / rows


ID_BYTES = 8
# Bytes of a code. PQ/2x4 has four bits for every two dimensions, and rows are packed by 32.
CODES: dict[str, Callable[[int], float]] = {
    "SQ8": lambda dim: dim,
    "SQfp16": lambda dim: 2 * dim,
    "RaBitQfs1": lambda dim: dim / 8 + 8,
    "RaBitQfs2": lambda dim: dim / 4 + 24,
    "RaBitQfs4": lambda dim: dim / 2 + 24,
    "PQ/2x4fsr": lambda dim: dim / 4,
    "PQ/4x4fsr": lambda dim: dim / 8,
}
