"""The similarity core: contrastive losses and exact top-k over embedding matrices.

Shapes: N rows (pairs or stored vectors), M queries, D dimensions, K neighbours.

Both uses of a dual encoder are one product of two matrices: training compares every image of a
batch with every text, search compares every query with every stored vector. This package works on
matrices only. `reference.py` defines what each function computes, in plain torch; every other
implementation gives the same result without materializing the product.
"""

from typing import Any, Literal

import torch.distributed as dist
from torch import Tensor

from mmalign.errors import VectorError
from mmalign.kernels import blocked, checks, losses, reference
from mmalign.kernels.cached import backward_in_parts
from mmalign.kernels.candidates import best_candidates
from mmalign.kernels.exact import TopkImpl, add_codes, choose_topk, codes_are_faster, prepare, topk
from mmalign.kernels.pair_ids import PairIds
from mmalign.kernels.processor import has_int8
from mmalign.kernels.screens import Corpus

__all__ = [
    "Corpus",
    "LossImpl",
    "TopkImpl",
    "add_codes",
    "backward_in_parts",
    "best_candidates",
    "choose_loss",
    "choose_topk",
    "codes_are_faster",
    "contrastive_loss",
    "has_int8",
    "prepare",
    "sigmoid_loss",
    "topk",
]

LossImpl = Literal["auto", "reference", "blocked", "triton"]
_IMPLS = ("auto", "reference", "blocked", "triton")
# Up to this many rows, dense logits are small and fast.
_DENSE_ROWS = 512


def contrastive_loss(
    image_ND: Tensor,
    text_ND: Tensor,
    logit_scale: Tensor,
    *,
    pair_ids: PairIds | None = None,
    impl: LossImpl = "auto",
    ranks: "dist.ProcessGroup | None" = None,
) -> Tensor:
    """Compute symmetric InfoNCE: each image must identify its text among N, and vice versa.

    Args:
        image_ND: Image embeddings of unit norm, shape (N, D), any floating type.
        text_ND: Text embeddings of unit norm, shape (N, D); row i belongs to image i.
        logit_scale: The multiplier of the cosines (not its logarithm), a scalar tensor.
        pair_ids: Integer ids, shape (N,). Rows with an equal id are not negatives of each other:
            their off-diagonal logits are left out of both denominators. Or a pair of matrices, ids
            of the images (N, L) and of the texts (N, M): an image and a text that share an id are
            not negatives of each other; negative ids mean no id.
        impl: "reference" is dense, "blocked" needs O(N D) memory on any device, "triton" is the
            same, fused for a GPU, "auto" uses `choose_loss`.
        ranks: Processes with N rows each; the loss is then over the joined batch and equal on all
            ranks. Averaging the gradients over the ranks, as data-parallel training does, gives
            the gradients of that loss.

    Returns:
        A scalar in float32 (float64 for float64 inputs), differentiable once in all three tensors.

    Raises:
        VectorError: A shape, type or value (NaN, a zero vector) is wrong.

    Source: Radford et al. 2021, "Learning Transferable Visual Models From Natural Language
    Supervision".
    """
    checks.check_impl(impl, _IMPLS)
    checks.check_pairs(image_ND, text_ND, pair_ids, {"logit_scale": logit_scale})
    chosen = choose_loss(image_ND, text_ND, ranks) if impl == "auto" else impl
    if chosen == "reference":
        _refuse_ranks(ranks)
        return reference.contrastive_loss(image_ND, text_ND, logit_scale, pair_ids=pair_ids)
    passes = _passes(chosen, image_ND)
    return losses.contrastive_loss(
        image_ND, text_ND, logit_scale, pair_ids=pair_ids, passes=passes, ranks=ranks
    )


def sigmoid_loss(
    image_ND: Tensor,
    text_ND: Tensor,
    logit_scale: Tensor,
    logit_bias: Tensor,
    *,
    pair_ids: PairIds | None = None,
    impl: LossImpl = "auto",
    ranks: "dist.ProcessGroup | None" = None,
) -> Tensor:
    """Compute the pairwise sigmoid loss: a binary classification of every image-text pair.

    Arguments, result and errors are those of `contrastive_loss`; `logit_bias` is a scalar tensor
    added to every logit. The sum over all pairs is divided by N. Gradients are computed together
    with the loss.

    Source: Zhai et al. 2023, "Sigmoid Loss for Language Image Pre-Training".
    """
    checks.check_impl(impl, _IMPLS)
    scalars = {"logit_scale": logit_scale, "logit_bias": logit_bias}
    checks.check_pairs(image_ND, text_ND, pair_ids, scalars)
    chosen = choose_loss(image_ND, text_ND, ranks) if impl == "auto" else impl
    if chosen == "reference":
        _refuse_ranks(ranks)
        return reference.sigmoid_loss(image_ND, text_ND, logit_scale, logit_bias, pair_ids=pair_ids)
    passes = _passes(chosen, image_ND)
    return losses.sigmoid_loss(
        image_ND, text_ND, logit_scale, logit_bias, pair_ids=pair_ids, passes=passes, ranks=ranks
    )


def choose_loss(
    image_ND: Tensor, text_ND: Tensor, ranks: "dist.ProcessGroup | None" = None
) -> LossImpl:
    """Return the implementation that `impl="auto"` selects for these inputs."""
    if image_ND.is_cuda and text_ND.is_cuda:
        kernels = checks.triton_module("triton_loss")
        if kernels and not kernels.unsupported_reason(image_ND):
            return "triton"
    if len(image_ND) <= _DENSE_ROWS and ranks is None:
        return "reference"
    return "blocked"


def _refuse_ranks(ranks: "dist.ProcessGroup | None") -> None:
    if ranks is not None:
        raise VectorError(
            "impl='reference' supports one process only: use 'blocked' or 'triton' with ranks"
        )


def _passes(chosen: str, image_ND: Tensor) -> Any:
    if chosen == "blocked":
        return blocked
    kernels = checks.triton_module("triton_loss")
    return checks.check_triton(kernels, kernels and kernels.unsupported_reason(image_ND))
