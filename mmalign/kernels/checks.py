"""Input validation: errors name the argument, before anything is computed.

Shapes: N rows, M queries, D dimensions.
"""

import importlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mmalign.errors import VectorError, nearest
from mmalign.kernels.pair_ids import PairIds


def check_impl(impl: str, known: Sequence[str]) -> None:
    """Reject an unknown implementation."""
    if impl not in known:
        raise VectorError(f"impl={impl!r} does not exist: {nearest(impl, known)}")


def triton_module(name: str) -> Any:
    """Import one of the two modules of Triton kernels, or return None if torch has no Triton."""
    try:
        return importlib.import_module(f"mmalign.kernels.{name}")
    except ImportError:
        return None


def check_triton(module: Any, problem: str | None) -> Any:
    """Return a module of Triton kernels, or raise with the reason it cannot take the input."""
    problem = problem if module else "Triton is not installed"
    if problem:
        raise VectorError(f"impl='triton' does not work here: {problem}")
    return module


def check_pairs(
    image_ND: Tensor, text_ND: Tensor, pair_ids: PairIds | None, scalars: dict[str, Tensor]
) -> None:
    """Reject inputs for which no loss is defined."""
    if image_ND.ndim != 2 or image_ND.shape != text_ND.shape or not image_ND.numel():
        raise VectorError(
            f"image_ND and text_ND must have the same shape (N, D), N and D at least 1; "
            f"got {tuple(image_ND.shape)} and {tuple(text_ND.shape)}"
        )
    if image_ND.device != text_ND.device:
        raise VectorError(
            f"image_ND is on {image_ND.device}, text_ND on {text_ND.device}: "
            "they must be on the same device"
        )
    for name, tensor in (("image_ND", image_ND), ("text_ND", text_ND)):
        if not tensor.is_floating_point():
            raise VectorError(f"{name} must have a floating-point type, got {tensor.dtype}")
    for name, tensor in scalars.items():
        if not isinstance(tensor, Tensor) or tensor.numel() != 1 or not tensor.is_floating_point():
            raise VectorError(
                f"{name} must be a floating-point tensor with one element, got {tensor!r}"
            )
    if pair_ids is not None:
        _check_pair_ids(pair_ids, len(image_ND))
    for name, tensor in (("image_ND", image_ND), ("text_ND", text_ND)):
        check_vectors(name, tensor)


def _check_pair_ids(pair_ids: PairIds, rows: int) -> None:
    both = isinstance(pair_ids, tuple)
    for ids in pair_ids if isinstance(pair_ids, tuple) else (pair_ids,):
        if ids.ndim != 1 + both or len(ids) != rows or ids.is_floating_point():
            wanted = f"two matrices of {rows} rows" if both else f"of shape ({rows},)"
            raise VectorError(
                f"pair_ids must be integers {wanted}, got {ids.dtype} {tuple(ids.shape)}"
            )


def check_vectors(name: str, matrix_ND: Tensor, first_row: int = 0) -> None:
    """Reject NaN, infinite and zero vectors, naming the first of them."""
    norms_N = torch.linalg.vector_norm(matrix_ND.detach().float(), dim=1)
    bad_N = ~((norms_N > 0) & torch.isfinite(norms_N))
    if bad_N.any():
        row = int(bad_N.nonzero()[0, 0])
        what = "a zero vector" if norms_N[row] == 0 else "NaN or infinite values"
        raise VectorError(f"{name} holds {what} in row {first_row + row}")


def check_queries(queries_MD: Tensor, dim: int) -> None:
    """Reject queries that cannot be compared with vectors of the given width."""
    if queries_MD.ndim != 2 or not len(queries_MD):
        raise VectorError(
            f"queries_MD must be a matrix (queries, dims), got {tuple(queries_MD.shape)}"
        )
    if not queries_MD.is_floating_point():
        raise VectorError(f"queries_MD must have a floating-point type, got {queries_MD.dtype}")
    if queries_MD.shape[1] != dim:
        raise VectorError(f"queries_MD has {queries_MD.shape[1]} dims, vectors_ND has {dim}")
    check_vectors("queries_MD", queries_MD)


def check_shards(shards: Sequence[Tensor]) -> None:
    """Reject shards that are not matrices of equal width."""
    if not shards or any(s.ndim != 2 or not s.is_floating_point() for s in shards):
        raise VectorError("vectors_ND must be one or more floating-point matrices (rows, dims)")
    widths = sorted({s.shape[1] for s in shards})
    if len(widths) > 1:
        raise VectorError(f"vectors_ND has shards with different numbers of dims: {widths}")
    if not sum(len(s) for s in shards):
        raise VectorError("vectors_ND has no rows")


def check_choice(k: int, allow: Tensor | None, rows: int) -> None:
    """Reject a k or a filter that does not fit the rows."""
    if not 1 <= k <= rows:
        raise VectorError(f"k={k} must lie between 1 and the number of rows, {rows}")
    if allow is not None and (allow.dtype != torch.bool or allow.shape != (rows,)):
        raise VectorError(
            f"allow must be boolean of shape ({rows},), got {allow.dtype} {tuple(allow.shape)}"
        )
