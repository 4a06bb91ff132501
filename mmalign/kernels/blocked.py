"""Contrastive losses tile by tile: the N x N logits are never materialized, on any device.

Shapes: B images of this process (rows), N texts of all processes (columns), D dimensions, R rows
and C columns of a tile of logits, L ids per image, M ids per text.

InfoNCE costs 8 N^2 D FLOPs. The forward pass takes 2 of the 8: it computes each tile of logits once
and sums the exponentials along both rows and columns. The backward pass recomputes the tile (2) and
multiplies it into both gradients (4). The sigmoid loss has no normalizer, so its gradients are
computed in the forward pass and no tile is recomputed: 6 N^2 D.

`triton_loss.py` has the same three functions, fused for a GPU.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from mmalign.kernels.pair_ids import share_an_id

# A tile that fits into the cache of a CPU, and one that fills a GPU.
CPU_TILE = (512, 1024)
GPU_TILE = (4096, 8192)
# float32 holds exp(logit - shift) at full precision for logits from MAX_BELOW_SHIFT below the shift
# to MAX_ABOVE_SHIFT above it; see `_shift`.
MAX_ABOVE_SHIFT, MAX_BELOW_SHIFT = 70.0, 60.0


@dataclass(frozen=True)
class Problem:
    """Images of this process against all texts: row i matches column `first_column + i`."""

    image_BD: Tensor
    text_ND: Tensor
    scale: Tensor
    """The multiplier of the inner products, a scalar."""
    first_column: int = 0
    image_ids_BL: Tensor | None = None
    text_ids_NM: Tensor | None = None
    """Pairs that share an id are masked, except positive pairs; see `pair_ids.py`."""

    @property
    def local_columns(self) -> slice:
        """Return the columns that match the rows of this process."""
        return self.matching_columns(slice(0, len(self.image_BD)))

    def rows_with_positive(self, rows: slice, columns: slice) -> slice:
        """Return the part of `rows` whose matching columns lie in `columns`."""
        start = max(rows.start, columns.start - self.first_column)
        return slice(start, max(start, min(rows.stop, columns.stop - self.first_column)))

    def matching_columns(self, rows: slice) -> slice:
        """Return the columns that match `rows`."""
        return slice(rows.start + self.first_column, rows.stop + self.first_column)


def accumulation_dtype(matrix: Tensor) -> torch.dtype:
    """Return the dtype that a matrix's products are summed in: float32, or float64 for float64."""
    return torch.promote_types(matrix.dtype, torch.float32)


def log_sum_exps(problem: Problem) -> tuple[Tensor, Tensor, Tensor]:
    """Return the log-sum-exp of each row (B) and column (N), and the logits of positive pairs (B).

    The first two are float64. If one shift serves all logits (see `_shift`), the exponentials of
    positive pairs are added in float64: if a pair is nearly learned, its logit dominates its row,
    and its gradient is the small rest of the sum, which float32 would round away.
    """
    shift = _shift(problem)
    empty_sum, dtype = (-torch.inf, problem.scale.dtype) if shift is None else (0.0, torch.float64)
    row_sums_B = problem.scale.new_full((len(problem.image_BD),), empty_sum, dtype=dtype)
    column_sums_N = problem.scale.new_full((len(problem.text_ND),), empty_sum, dtype=dtype)
    positive_B = problem.scale.new_empty(len(row_sums_B))
    for rows, columns, logits_RC in _logits(problem):
        positive_rows = problem.rows_with_positive(rows, columns)
        positive_B[positive_rows] = _positives(problem, logits_RC, rows, columns)
        if shift is None:
            for sums, dim in ((row_sums_B[rows], 1), (column_sums_N[columns], 0)):
                torch.logaddexp(sums, torch.logsumexp(logits_RC, dim), out=sums)
        else:
            exp_RC = _subtract(logits_RC, shift).exp_()
            positives = _positives(problem, exp_RC, rows, columns)
            positive_exp = positives.to(torch.float64, copy=True)
            positives.zero_()
            row_sums_B[rows] += exp_RC.sum(1)
            column_sums_N[columns] += exp_RC.sum(0)
            row_sums_B[positive_rows] += positive_exp
            column_sums_N[problem.matching_columns(positive_rows)] += positive_exp
    if shift is None:  # another rank may have a shift, and all must send the same dtype
        return row_sums_B.double(), column_sums_N.double(), positive_B
    return row_sums_B.log_().add_(shift), column_sums_N.log_().add_(shift), positive_B


def infonce_gradients(
    problem: Problem,
    row_lse_B: Tensor,
    column_lse_N: Tensor,
    *,
    wants_image: bool,
    wants_text: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """Compute the gradients of InfoNCE for images and texts, up to a factor.

    They are those of the sum over all pairs, not the mean. The caller must multiply them by the
    scale and divide them by N.

    Args:
        problem: As in `log_sum_exps`.
        row_lse_B: The log-sum-exp of each row.
        column_lse_N: The log-sum-exp of each column, over the rows of all processes.
        wants_image: Whether to compute the gradient for images.
        wants_text: Whether to compute the gradient for texts.
    """
    shift = _shift(problem)
    gradients = _Gradients(problem, wants_image, wants_text)
    # Subtracted from the logits or, with a shift, multiplied by their exponentials.
    row_term_B, column_term_N = row_lse_B, column_lse_N
    if shift is not None:
        row_term_B, column_term_N = (shift - row_lse_B).exp(), (shift - column_lse_N).exp()
    # In the dtype of the logits; positive pairs need float64.
    rounded_B, rounded_N = (x.to(problem.scale.dtype) for x in (row_term_B, column_term_N))
    for rows, columns, logits_RC in _logits(problem):
        if shift is None:
            weights_RC = (logits_RC - rounded_B[rows, None]).exp_()
            weights_RC += logits_RC.sub_(rounded_N[columns]).exp_()
            _positives(problem, weights_RC, rows, columns).sub_(2)
        else:
            # One exponential serves both directions.
            weights_RC = _subtract(logits_RC, shift).exp_()
            positives = _positives(problem, weights_RC, rows, columns)
            positive_rows = problem.rows_with_positive(rows, columns)
            positive_weights = (
                positives
                * (
                    row_term_B[positive_rows]
                    + column_term_N[problem.matching_columns(positive_rows)]
                )
                - 2
            )
            weights_RC *= rounded_B[rows, None] + rounded_N[columns]
            positives.copy_(positive_weights)
        gradients.add(rows, columns, weights_RC.mul_(0.5))
    return gradients.grad_image_BD, gradients.grad_text_ND


def sigmoid_pass(
    problem: Problem, bias: Tensor, *, wants_image: bool, wants_text: bool
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Compute the sigmoid loss, summed over all pairs, and its gradients in the same pass.

    Returns:
        The loss (float64), and its gradients for the bias (float64), the images and the texts. The
        caller must divide all by N, and multiply the last two by the scale.
    """
    gradients = _Gradients(problem, wants_image, wants_text)
    loss, grad_bias = (
        torch.zeros((), dtype=torch.float64, device=problem.image_BD.device) for _ in range(2)
    )
    for rows, columns, logits_RC in _logits(problem, bias):
        _positives(problem, logits_RC, rows, columns).neg_()
        loss -= F.logsigmoid(-logits_RC).sum(dtype=torch.float64)
        # Each entry becomes the error of its pair; the logits of positive pairs were negated above.
        weights_RC = logits_RC.sigmoid_()
        _positives(problem, weights_RC, rows, columns).neg_()
        grad_bias += weights_RC.sum(dtype=torch.float64)
        gradients.add(rows, columns, weights_RC)
    return loss, grad_bias, gradients.grad_image_BD, gradients.grad_text_ND


class _Gradients:
    """Gradients of images, weights @ texts (B, D), and of texts, weights.T @ images (N, D)."""

    def __init__(self, problem: Problem, wants_image: bool, wants_text: bool) -> None:
        dtype = accumulation_dtype(problem.image_BD)
        self.images, self.texts = problem.image_BD.to(dtype), problem.text_ND.to(dtype)
        self.grad_image_BD = torch.zeros_like(self.images) if wants_image else None
        self.grad_text_ND = torch.zeros_like(self.texts) if wants_text else None

    def add(self, rows: slice, columns: slice, weights_RC: Tensor) -> None:
        if self.grad_image_BD is not None:
            self.grad_image_BD[rows].addmm_(weights_RC, self.texts[columns])
        if self.grad_text_ND is not None:
            self.grad_text_ND[columns].addmm_(weights_RC.T, self.images[rows])


def _logits(problem: Problem, bias: Tensor | None = None) -> Iterator[tuple[slice, slice, Tensor]]:
    """Yield tiles of logits, all in the same memory; pairs that share an id hold -inf."""
    dtype = accumulation_dtype(problem.image_BD)
    texts_ND = problem.text_ND.to(dtype)
    high, wide = CPU_TILE if texts_ND.device.type == "cpu" else GPU_TILE
    memory = texts_ND.new_empty(high * min(wide, len(texts_ND)))
    for rows in _slices(len(problem.image_BD), high):
        scaled_RD = problem.image_BD[rows].to(dtype) * problem.scale.to(dtype)
        for columns in _slices(len(texts_ND), wide):
            shape = (rows.stop - rows.start, columns.stop - columns.start)
            logits_RC = memory[: shape[0] * shape[1]].view(shape)
            torch.mm(scaled_RD, texts_ND[columns].T, out=logits_RC)
            if bias is not None:
                logits_RC += bias
            if problem.image_ids_BL is not None and problem.text_ids_NM is not None:
                same_RC = share_an_id(problem.image_ids_BL[rows], problem.text_ids_NM[columns])
                _positives(problem, same_RC, rows, columns).fill_(False)
                logits_RC.masked_fill_(same_RC, -torch.inf)
            yield rows, columns, logits_RC


def _positives(problem: Problem, tile_RC: Tensor, rows: slice, columns: slice) -> Tensor:
    """Return a view of the positive pairs (a diagonal) in a tile; often empty."""
    return tile_RC.diagonal(problem.first_column + rows.start - columns.start)


def _shift(problem: Problem) -> float | None:
    """Return a number to subtract from every logit before exp, or None if none is safe.

    No shift is safe if the maxima of rows and columns differ so much that the largest exponential
    of some row or column underflows. Each maximum is at least the logit of the positive pair, and
    no logit exceeds scale * |image| * |text|. If these two bounds are close enough, one shift
    serves all. On a GPU the result is always None: the host would have to wait for the bounds.
    """
    if problem.image_BD.device.type != "cpu":
        return None
    dtype = accumulation_dtype(problem.image_BD)
    max_norms = [m.to(dtype).norm(dim=1).max() for m in (problem.image_BD, problem.text_ND)]
    highest = float(problem.scale.abs() * max_norms[0] * max_norms[1])
    # If columns match rows of other processes, the logits of those pairs are unknown here, and only
    # the bound on their size remains.
    lowest = -highest
    if len(problem.image_BD) == len(problem.text_ND):
        positive_B = (problem.image_BD.to(dtype) * problem.text_ND.to(dtype)).sum(dim=1)
        lowest = float((problem.scale * positive_B).min())
    shift = max(0.0, highest - MAX_ABOVE_SHIFT)
    return shift if lowest >= shift - MAX_BELOW_SHIFT else None


def _subtract(tile_RC: Tensor, shift: float) -> Tensor:
    return tile_RC.sub_(shift) if shift else tile_RC


def _slices(count: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, count)) for start in range(0, count, size)]
