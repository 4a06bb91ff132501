"""Vectors quantized to one byte per element, and integer products of such codes; on a CPU.

M queries, B coded vectors, D dimensions, X groups of neighbouring vectors.

A vector is stored as its difference from the centre of its shard: seven bits per element, with a
step size shared by the vectors of a group. Before that, a random rotation spreads the few large
elements of an embedding over all dimensions, so that steps can be small. Seven bits are used
because processors without VNNI add pairs of products in 16 bits: 2 * 127 * 127 still fits, so sums
are exact everywhere. The quantization error is measured, not estimated: the distance between each
vector and its code bounds the error of every score.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from mmalign.kernels.int8 import PackedRows, quantize_rows

GROUP = 16
LEVELS, QUERY_LEVELS = 63, 127
ZERO = 64
AT_ONCE = 1 << 13
# Up to FEW_QUERIES, reading the codes takes longer than multiplying them. The kernel for few
# queries needs a multiple of FEW_QUERIES_DIMS dimensions: otherwise it reads past the end of rows.
FEW_QUERIES, FEW_QUERIES_DIMS = 2, 64


@dataclass(frozen=True)
class Rotation:
    """A random rotation, and how far it is from a true rotation in float32."""

    matrix_DD: Tensor
    tilt: float
    """Frobenius norm of R'R - I: the relative error bound of products of rotated vectors."""
    rounding: float
    """Relative error bound of a rotated vector, in any order of summation."""

    def __call__(self, vectors_BD: Tensor) -> Tensor:
        """Rotate float32 vectors."""
        return vectors_BD @ self.matrix_DD


@cache
def rotation(dim: int) -> Rotation:
    """Return the rotation for a width, always the same one."""
    generator = torch.Generator().manual_seed(dim)
    matrix_DD = torch.randn(dim, dim, generator=generator, dtype=torch.float64)
    matrix_DD = torch.linalg.qr(matrix_DD).Q.float()
    square_DD = matrix_DD.double().T @ matrix_DD.double()
    tilt = float(torch.linalg.matrix_norm(square_DD - torch.eye(dim, dtype=torch.float64)))
    # Each element is a sum of D products and a difference, off by (D + 2) u |row| |vector|.
    return Rotation(matrix_DD, tilt, 1.01 * (dim + 2) * 2.0**-24 * dim**0.5)


@dataclass(frozen=True)
class Codes:
    """The codes of one shard."""

    codes_BD: Tensor
    """uint8; `scale * (code - 64)` is the rotated difference from the centre, rounded."""
    centre_D: Tensor
    scale_X: Tensor
    vector_error_X: Tensor
    """Error of a group's scores from quantizing its vectors, for a query of norm 1."""
    code_norm_X: Tensor
    """The same from a quantization error of the query of norm 1: the largest code norm."""

    def __len__(self) -> int:
        return len(self.codes_BD)

    def __getitem__(self, rows: slice) -> "Codes":
        """Return a slice of the rows; it must start at the start of a group."""
        groups = slice(rows.start // GROUP, -(-rows.stop // GROUP))
        by_group = (t[groups] for t in (self.scale_X, self.vector_error_X, self.code_norm_X))
        return Codes(self.codes_BD[rows], self.centre_D, *by_group)

    def scores(self, queries: "Queries") -> tuple[Tensor, Tensor]:
        """Return products (B, M), to be multiplied by `scale_X`, and their errors (X, M)."""
        products_BM, rounding_M = queries.products(self.codes_BD)
        error_XM = self.vector_error_X[:, None] * queries.norm_M
        error_XM.addcmul_(self.code_norm_X[:, None], queries.query_error_M)
        error_XM.addcmul_(self.scale_X[:, None], rounding_M)
        return products_BM, error_XM


@dataclass(frozen=True)
class Queries(ABC):
    """Rotated and rounded queries, whose products with codes have a known error; abstract."""

    norm_M: Tensor
    query_error_M: Tensor
    """Distance of a rotated query from its rounded form."""
    scale_M: Tensor

    @abstractmethod
    def products(self, codes_BD: Tensor) -> tuple[Tensor, Tensor]:
        """Return products (B, M) in units of the code step, and the error of each query."""


@dataclass(frozen=True)
class ManyQueries(Queries):
    """Queries in eight bits: the products are sums of integers, without an error."""

    rows: PackedRows

    def products(self, codes_BD: Tensor) -> tuple[Tensor, Tensor]:
        """See `Queries.products`."""
        return self.rows.products(codes_BD, ZERO), torch.zeros_like(self.scale_M)


@dataclass(frozen=True)
class FewQueries(Queries):
    """Queries in bfloat16: faster than int8 for one or two, slower for many."""

    rows_MD: Tensor

    def products(self, codes_BD: Tensor) -> tuple[Tensor, Tensor]:
        """See `Queries.products`."""
        ones_B = torch.ones(len(codes_BD), dtype=torch.bfloat16)
        rounded_MB = torch._weight_int8pack_mm(self.rows_MD, codes_BD.view(torch.int8), ones_B)
        rounded_BM = rounded_MB.float().T.contiguous()
        # The sums are float32, of codes up to 127; each is then rounded to bfloat16.
        dim = codes_BD.shape[1]
        sums = sum_error(dim, 2.0**-24) * 127 * dim**0.5
        error_M = 2.0**-8 * rounded_BM.abs().amax(dim=0) + sums * self.scale_M
        # The products include the offset of 64 that is added to all codes.
        return rounded_BM - ZERO * self.rows_MD.double().sum(dim=1).float(), error_M


def quantize(shard_ND: Tensor, tick: Callable[[], None] = lambda: None) -> Codes:
    """Quantize the vectors of a shard; `tick` is called repeatedly and may raise to abort."""
    count, dim = shard_ND.shape
    rotate = rotation(dim)
    centre_D = torch.zeros(dim, dtype=torch.float64)
    for part in shard_ND.split(AT_ONCE):
        tick()
        centre_D += part.float().sum(dim=0)
    centre_D = (centre_D / count).float()
    codes_BD = torch.empty(count, dim, dtype=torch.uint8)
    groups = -(-count // GROUP)
    scale_X, vector_error_X, code_norm_X = (torch.zeros(groups) for _ in range(3))
    for start in range(0, count, AT_ONCE):
        tick()
        difference_BD = rotate(shard_ND[start : start + AT_ONCE].float() - centre_D)
        rows = slice(start, start + len(difference_BD))
        part_X = slice(start // GROUP, -(-rows.stop // GROUP))
        largest_X = _by_group(difference_BD.abs().amax(dim=1))
        scale_X[part_X] = (largest_X / LEVELS).clamp(min=torch.finfo(torch.float32).tiny)
        step_B1 = scale_X[part_X].repeat_interleave(GROUP)[: len(difference_BD), None]
        steps_BD = (difference_BD / step_B1).round_().clamp_(-LEVELS, LEVELS)
        codes_BD[rows] = (steps_BD + ZERO).to(torch.uint8)
        decoded_BD = steps_BD.mul_(step_B1)
        code_norm_X[part_X] = _by_group(torch.linalg.vector_norm(decoded_BD, dim=1))
        vector_error_X[part_X] = _by_group(
            torch.linalg.vector_norm(difference_BD.sub_(decoded_BD), dim=1)
        )
    norm_bound_X = 1.01 * (code_norm_X + vector_error_X)
    vector_error_X = (1 + rotate.tilt) * (
        vector_error_X + rotate.rounding * norm_bound_X
    ) + rotate.tilt * norm_bound_X
    # For a few roundings to float32, of the product and of the centre's score.
    vector_error_X += 2.0**-20 * (norm_bound_X + torch.linalg.vector_norm(centre_D))
    return Codes(codes_BD, centre_D, scale_X, 1.01 * vector_error_X, 1.01 * code_norm_X)


def quantize_queries(queries_MD: Tensor) -> Queries:
    """Rotate and quantize float32 queries."""
    rotate = rotation(queries_MD.shape[1])
    rotated_MD, norm_M = rotate(queries_MD), torch.linalg.vector_norm(queries_MD, dim=1)
    fits = queries_MD.shape[1] % FEW_QUERIES_DIMS == 0 and hasattr(torch, "_weight_int8pack_mm")
    few = len(queries_MD) <= FEW_QUERIES and fits
    if few:
        rows_MD, scale_M = rotated_MD.bfloat16(), 1.01 * norm_M
        rounded_MD = rows_MD.float()
    else:
        steps_MD, scale_M = quantize_rows(rotated_MD, QUERY_LEVELS)
        rows = PackedRows(steps_MD, scale_M)
        rounded_MD = steps_MD.mul_(scale_M[:, None])
    distance_M = torch.linalg.vector_norm(rotated_MD - rounded_MD, dim=1)
    query_error_M = 1.01 * (distance_M + rotate.rounding * norm_M)
    if few:
        return FewQueries(norm_M, query_error_M, scale_M, rows_MD)
    return ManyQueries(norm_M, query_error_M, scale_M, rows)


def sum_error(terms: int, roundoff: float) -> float:
    """Relative error of a sum of products in any order, plus two more roundings of it."""
    return (terms + 4) * roundoff / (1 - (terms + 4) * roundoff)


def _by_group(values_B: Tensor) -> Tensor:
    """Return the maximum of each group of neighbours."""
    short = -len(values_B) % GROUP
    return torch.nn.functional.pad(values_B, (0, short)).view(-1, GROUP).amax(dim=1)
