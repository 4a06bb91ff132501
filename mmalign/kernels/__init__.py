"""The similarity core: contrastive losses and exact top-k over embedding matrices.

N rows (pairs or stored vectors), M queries, D dimensions, K neighbours.

Both jobs of a dual encoder are one product of two matrices: training compares every image of a
batch with every text, search compares every query with every stored vector. This room knows no
images and no words. `reference.py` says what each function means, in plain torch.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from mmalign.errors import VectorError, nearest
from mmalign.kernels import reference

Impl = Literal["auto", "reference"]
_IMPLS = ("auto", "reference")


def contrastive_loss(
    image_ND: Tensor,
    text_ND: Tensor,
    logit_scale: Tensor,
    *,
    groups: Tensor | None = None,
    impl: Impl = "auto",
) -> Tensor:
    """Symmetric InfoNCE: each image must find its own text among N, and each text its image.

    Args:
        image_ND: Image embeddings of unit norm, shape (N, D), any floating type.
        text_ND: Text embeddings of unit norm, row i belonging to image i, shape (N, D).
        logit_scale: The multiplier of the cosines (not its logarithm), a scalar tensor.
        groups: Integer ids, shape (N,). Rows with an equal id are no negatives of each other:
            their off-diagonal logits leave both denominators.
        impl: Which implementation; "auto" picks one.

    Returns:
        A scalar in float32 (float64 for float64 inputs), differentiable in all three tensors.

    Raises:
        VectorError: A shape or type is wrong.

    Source: Radford et al. 2021, "Learning Transferable Visual Models From Natural Language
    Supervision".
    """
    _check_pairs(image_ND, text_ND, groups, impl)
    return reference.contrastive_loss(image_ND, text_ND, logit_scale, groups=groups)


def sigmoid_loss(
    image_ND: Tensor,
    text_ND: Tensor,
    logit_scale: Tensor,
    logit_bias: Tensor,
    *,
    groups: Tensor | None = None,
    impl: Impl = "auto",
) -> Tensor:
    """Pairwise sigmoid loss: every image-text pair is its own yes-or-no question.

    Arguments, result and errors are those of `contrastive_loss`; `logit_bias` is a scalar tensor
    added to every logit. The sum over all pairs is divided by N.

    Source: Zhai et al. 2023, "Sigmoid Loss for Language Image Pre-Training".
    """
    _check_pairs(image_ND, text_ND, groups, impl)
    return reference.sigmoid_loss(image_ND, text_ND, logit_scale, logit_bias, groups=groups)


def topk(
    queries_MD: Tensor,
    vectors_ND: Tensor | Sequence[Tensor],
    k: int,
    *,
    allow: Tensor | None = None,
    impl: Impl = "auto",
) -> tuple[Tensor, Tensor]:
    """Find the k rows with the largest inner product for every query, exactly.

    Args:
        queries_MD: Queries of unit norm, shape (M, D).
        vectors_ND: Vectors of unit norm, shape (N, D), or a sequence of such matrices (shards)
            whose rows are numbered on from one to the next. Scores are made block by block; the
            (M, N) matrix never exists.
        k: Neighbours per query, between 1 and N.
        allow: Boolean (N,); rows that are False cannot be found. Fewer than k allowed rows leave
            a score of -inf and row -1 at the end.
        impl: Which implementation; "auto" picks one.

    Returns:
        scores (M, K) float32, best first, and rows (M, K) int64. Equal scores come in row order.

    Raises:
        VectorError: A shape, type or value (NaN) is wrong, or k does not fit.
    """
    shards = [vectors_ND] if isinstance(vectors_ND, Tensor) else list(vectors_ND)
    _check_search(queries_MD, shards, k, allow, impl)
    return reference.topk(queries_MD, shards, k, allow=allow)


def _check_impl(impl: str) -> None:
    if impl not in _IMPLS:
        raise VectorError(f"impl={impl!r} does not exist: {nearest(impl, _IMPLS)}")


def _check_pairs(image_ND: Tensor, text_ND: Tensor, groups: Tensor | None, impl: str) -> None:
    _check_impl(impl)
    if image_ND.ndim != 2 or image_ND.shape != text_ND.shape or not image_ND.numel():
        raise VectorError(
            f"image_ND and text_ND must have one shape (N, D), N and D at least 1; "
            f"got {tuple(image_ND.shape)} and {tuple(text_ND.shape)}"
        )
    for name, tensor in (("image_ND", image_ND), ("text_ND", text_ND)):
        if not tensor.is_floating_point():
            raise VectorError(f"{name} must be of a floating type, got {tensor.dtype}")
    if groups is not None and (groups.shape != image_ND.shape[:1] or groups.is_floating_point()):
        raise VectorError(
            f"groups must be integers of shape ({image_ND.shape[0]},), "
            f"got {groups.dtype} {tuple(groups.shape)}"
        )


def _check_search(
    queries_MD: Tensor, shards: list[Tensor], k: int, allow: Tensor | None, impl: str
) -> None:
    _check_impl(impl)
    if queries_MD.ndim != 2 or any(s.ndim != 2 for s in shards) or not shards:
        raise VectorError("queries_MD and vectors_ND must be matrices (rows, dims)")
    widths = {s.shape[1] for s in shards} | {queries_MD.shape[1]}
    if len(widths) > 1:
        raise VectorError(
            f"queries_MD has {queries_MD.shape[1]} dims, vectors_ND has {shards[0].shape[1]}"
        )
    rows = sum(s.shape[0] for s in shards)
    if not 1 <= k <= rows:
        raise VectorError(f"k={k} must lie between 1 and the number of rows, {rows}")
    if allow is not None and (allow.dtype != torch.bool or allow.shape != (rows,)):
        raise VectorError(f"allow must be boolean of shape ({rows},)")
    if not torch.isfinite(queries_MD).all():
        raise VectorError("queries_MD holds NaN or infinite values")
