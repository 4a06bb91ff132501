"""The contrastive losses as differentiable torch functions, on one process or many.

Shapes: B pairs of this process, W processes (ranks), N = W * B pairs in total, D dimensions.

Each rank compares its B images with all N texts. So only texts are communicated: gathered in the
forward pass, their gradients reduce-scattered in the backward pass, plus N column sums. Averaging
the gradients over the ranks, as data-parallel training does, gives exactly the gradient of the
joined batch, for the towers and for the scale alike.
"""

from types import ModuleType
from typing import Any, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from mmalign.errors import VectorError
from mmalign.kernels.blocked import Problem, accumulation_dtype
from mmalign.kernels.pair_ids import PairIds, image_and_text_ids, masking_ids

# Quoted, as some builds of torch have no process groups.
Ranks: TypeAlias = "dist.ProcessGroup | None"
# Renamed in torch 2.13 or so; the old names warn.
_ALL_GATHER = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_REDUCE_SCATTER = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def contrastive_loss(
    image_BD: Tensor,
    text_BD: Tensor,
    logit_scale: Tensor,
    *,
    pair_ids: PairIds | None,
    passes: ModuleType,
    ranks: Ranks = None,
) -> Tensor:
    """Symmetric InfoNCE, computed by the passes of `blocked` or `triton_loss`."""
    loss: Tensor = _InfoNCE.apply(image_BD, text_BD, logit_scale, pair_ids, passes, ranks)
    return loss


def sigmoid_loss(
    image_BD: Tensor,
    text_BD: Tensor,
    logit_scale: Tensor,
    logit_bias: Tensor,
    *,
    pair_ids: PairIds | None,
    passes: ModuleType,
    ranks: Ranks = None,
) -> Tensor:
    """Pairwise sigmoid loss, computed by the passes of `blocked` or `triton_loss`."""
    loss: Tensor = _Sigmoid.apply(
        image_BD, text_BD, logit_scale, logit_bias, pair_ids, passes, ranks
    )
    return loss


class _InfoNCE(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        image_BD: Tensor,
        text_BD: Tensor,
        logit_scale: Tensor,
        pair_ids: PairIds | None,
        passes: ModuleType,
        ranks: Ranks,
    ) -> Tensor:
        problem = _gather_problem(image_BD, text_BD, logit_scale, pair_ids, ranks)
        with torch.autocast(image_BD.device.type, enabled=False):
            row_lse_B, column_lse_N, positive_B = passes.log_sum_exps(problem)
            column_lse_N = _all_reduce_log_sum_exp(column_lse_N, ranks)
            terms_B = (row_lse_B + column_lse_N[problem.local_columns]) / 2 - positive_B
        ctx.problem, ctx.passes, ctx.ranks = problem, passes, ranks
        ctx.save_for_backward(image_BD, text_BD, logit_scale, row_lse_B, column_lse_N)
        return (_all_reduce_sum(terms_B.sum(), ranks) / len(problem.text_ND)).to(
            accumulation_dtype(image_BD)
        )

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        image_BD, _, _, row_lse_B, column_lse_N = ctx.saved_tensors
        wants_image, wants_text, wants_scale = ctx.needs_input_grad[:3]
        with torch.autocast(image_BD.device.type, enabled=False):
            grad_image_BD, grad_text_ND = ctx.passes.infonce_gradients(
                ctx.problem,
                row_lse_B,
                column_lse_N,
                # The scale's gradient is the inner product of either matrix with its own gradient.
                wants_image=wants_image or (wants_scale and not wants_text),
                wants_text=wants_text,
            )
            gradients = _gradients(ctx, grad_loss, grad_image_BD, grad_text_ND)
        return (*gradients, None, None, None)


class _Sigmoid(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        image_BD: Tensor,
        text_BD: Tensor,
        logit_scale: Tensor,
        logit_bias: Tensor,
        pair_ids: PairIds | None,
        passes: ModuleType,
        ranks: Ranks,
    ) -> Tensor:
        problem = _gather_problem(image_BD, text_BD, logit_scale, pair_ids, ranks)
        wants_image, wants_text, wants_scale = ctx.needs_input_grad[:3]
        with torch.autocast(image_BD.device.type, enabled=False):
            bias = logit_bias.detach().to(accumulation_dtype(image_BD)).reshape(())
            loss, grad_bias, grad_image_BD, grad_text_ND = passes.sigmoid_pass(
                problem,
                bias,
                wants_image=wants_image or (wants_scale and not wants_text),
                wants_text=wants_text,
            )
        ctx.problem, ctx.ranks = problem, ranks
        ctx.saved_gradients = (grad_image_BD, grad_text_ND)
        ctx.save_for_backward(image_BD, text_BD, logit_scale, logit_bias, grad_bias)
        return (_all_reduce_sum(loss, ranks) / len(problem.text_ND)).to(
            accumulation_dtype(image_BD)
        )

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        logit_bias, grad_bias = ctx.saved_tensors[3:]
        gradients = _gradients(ctx, grad_loss, *ctx.saved_gradients)
        if ctx.needs_input_grad[3]:
            grad_bias = (
                _all_reduce_sum(grad_bias.clone(), ctx.ranks) * grad_loss / len(ctx.problem.text_ND)
            )
            grad_bias = grad_bias.to(logit_bias.dtype).reshape(logit_bias.shape)
            return (*gradients, grad_bias, None, None, None)
        return (*gradients, None, None, None, None)


def _gather_problem(
    image_BD: Tensor,
    text_BD: Tensor,
    logit_scale: Tensor,
    pair_ids: PairIds | None,
    ranks: Ranks,
) -> Problem:
    """Gather the texts of all ranks, and drop ids that mask no pair."""
    dtype = torch.promote_types(image_BD.dtype, text_BD.dtype)
    image_BD, text_BD = (m.detach().to(dtype).contiguous() for m in (image_BD, text_BD))
    scale = logit_scale.detach().to(accumulation_dtype(image_BD)).reshape(())
    first = dist.get_rank(ranks) * len(image_BD) if ranks else 0
    text_ND = _all_gather(text_BD, ranks)
    if pair_ids is None:
        return Problem(image_BD, text_ND, scale, first)
    if ranks is not None and not isinstance(pair_ids, tuple):
        pair_ids = (pair_ids[:, None], pair_ids[:, None])  # ids renumbered per rank would not match
        lowest = _all_reduce_min(pair_ids[0], ranks)
        pair_ids = (pair_ids[0] - lowest, pair_ids[1] - lowest)
    image_ids_BL, text_ids_BM = image_and_text_ids(pair_ids)
    ids = masking_ids(image_ids_BL, _all_gather_ids(text_ids_BM, ranks), first)
    return Problem(image_BD, text_ND, scale, first, *(ids or (None, None)))


def _all_reduce_min(ids: Tensor, ranks: Ranks) -> Tensor:
    lowest = ids.min()
    dist.all_reduce(lowest, dist.ReduceOp.MIN, ranks)
    return lowest


def _all_gather_ids(ids_BM: Tensor, ranks: Ranks) -> Tensor:
    """Join the ids of all ranks; the number of ids per pair may differ between ranks."""
    if ranks is None:
        return ids_BM
    width = torch.tensor(ids_BM.shape[1], device=ids_BM.device)
    dist.all_reduce(width, dist.ReduceOp.MAX, ranks)
    padding = (0, int(width) - ids_BM.shape[1])
    return _all_gather(torch.nn.functional.pad(ids_BM, padding, value=-1), ranks)


def _gradients(
    ctx: Any, grad_loss: Tensor, grad_image_BD: Tensor | None, grad_text_ND: Tensor | None
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Compute the gradients of images, texts and scale from their unscaled sums over pairs."""
    problem, ranks = ctx.problem, ctx.ranks
    image_BD, text_BD, logit_scale = ctx.saved_tensors[:3]
    wants_image, wants_text, wants_scale = ctx.needs_input_grad[:3]
    factor = grad_loss / len(problem.text_ND)
    # Averaging over ranks divides by their number, but the sum over ranks is needed.
    grad_scale = factor * problem.scale * (dist.get_world_size(ranks) if ranks else 1)
    image = text = scale = None
    if wants_scale:
        product = (
            (problem.image_BD * grad_image_BD).sum(dtype=torch.float64)
            if grad_text_ND is None
            else (problem.text_ND * grad_text_ND).sum(dtype=torch.float64)
        )
        scale = (
            (_all_reduce_sum(product, ranks) * factor)
            .to(logit_scale.dtype)
            .reshape(logit_scale.shape)
        )
    if wants_image and grad_image_BD is not None:
        image = (grad_image_BD * grad_scale).to(image_BD.dtype)
    if wants_text and grad_text_ND is not None:
        text = (_reduce_scatter(grad_text_ND, ranks) * grad_scale).to(text_BD.dtype)
    return image, text, scale


def _all_gather(matrix: Tensor, ranks: Ranks) -> Tensor:
    """Concatenate equally sized parts of all ranks along the first dimension."""
    if ranks is None:
        return matrix
    count = torch.tensor([len(matrix), -len(matrix)], device=matrix.device)
    dist.all_reduce(count, dist.ReduceOp.MAX, ranks)
    if int(count.sum()):
        raise VectorError(
            f"image_ND has {len(matrix)} rows on this rank and up to {int(count[0])} on others: "
            f"every rank must have the same number"
        )
    joined = matrix.new_empty((dist.get_world_size(ranks) * len(matrix), *matrix.shape[1:]))
    _ALL_GATHER(joined, matrix.contiguous(), group=ranks)
    return joined


def _reduce_scatter(matrix_ND: Tensor, ranks: Ranks) -> Tensor:
    """Sum over ranks; each keeps its own rows."""
    if ranks is None:
        return matrix_ND
    local = matrix_ND.new_empty((len(matrix_ND) // dist.get_world_size(ranks), matrix_ND.shape[1]))
    _REDUCE_SCATTER(local, matrix_ND, group=ranks)
    return local


def _all_reduce_sum(value: Tensor, ranks: Ranks) -> Tensor:
    if ranks is not None:
        dist.all_reduce(value, group=ranks)
    return value


def _all_reduce_log_sum_exp(column_lse_N: Tensor, ranks: Ranks) -> Tensor:
    """Combine log-sum-exp values over ranks."""
    if ranks is None:
        return column_lse_N
    max_N = column_lse_N.clone()
    dist.all_reduce(max_N, dist.ReduceOp.MAX, ranks)
    return _all_reduce_sum((column_lse_N - max_N).exp(), ranks).log() + max_N
