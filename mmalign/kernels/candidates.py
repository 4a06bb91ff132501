"""Exact scores of a few candidates: the second half of an approximate search.

M queries, R candidates of each, D dimensions, K neighbours.
"""

import torch
from torch import Tensor

from mmalign.errors import VectorError

# Candidates beyond k that are scored in float64, as float32 may put neighbours in another order.
SPARE = 6
# Numbers widened at once, so that they stay in the cache of a CPU.
AT_ONCE = 1 << 18


def best_candidates(
    queries_MD: Tensor, vectors_MRD: Tensor, rows_MR: Tensor, k: int
) -> tuple[Tensor, Tensor]:
    """Score the candidates of each query exactly and keep the k best.

    A score is that of `topk`: the float32 nearest to the inner product in float64.

    Args:
        queries_MD: Queries of unit norm, shape (M, D).
        vectors_MRD: Their candidates, shape (M, R, D), any floating type.
        rows_MR: The row number of each candidate, shape (M, R); -1 is none.
        k: Neighbours per query.

    Returns:
        scores (M, K) float32, best first, and rows (M, K) int64. Equal scores come in row order;
        fewer than k candidates leave a score of -inf and row -1 at the end.

    Raises:
        VectorError: The shapes do not fit.
    """
    count, candidates = rows_MR.shape
    if vectors_MRD.shape != (count, candidates, queries_MD.shape[-1]) or len(queries_MD) != count:
        shapes = [tuple(x.shape) for x in (queries_MD, vectors_MRD, rows_MR)]
        raise VectorError(f"queries, candidates and rows do not fit: {shapes}")
    scores_MK = torch.full((count, k), -torch.inf)
    found_MK = torch.full((count, k), -1, dtype=torch.int64)
    width = min(k, candidates)
    if not width:
        return scores_MK, found_MK
    at_once = max(1, AT_ONCE // ((width + SPARE) * queries_MD.shape[-1]))
    for first in range(0, count, at_once):
        part = slice(first, first + at_once)
        best, rows = _best(queries_MD[part].float(), vectors_MRD[part], rows_MR[part], width)
        scores_MK[part, :width], found_MK[part, :width] = best, rows
    return scores_MK, found_MK


def _best(
    queries_MD: Tensor, vectors_MRD: Tensor, rows_MR: Tensor, k: int
) -> tuple[Tensor, Tensor]:
    """The k best of a few queries: found in float32, scored and put in order in float64."""
    count, candidates = rows_MR.shape
    # One after the other: torch is slow at products of many small matrices.
    rough_MR, wide_RD = torch.empty(count, candidates), torch.empty(vectors_MRD.shape[1:])
    for rough_R, vectors_RD, query_D in zip(rough_MR, vectors_MRD, queries_MD, strict=True):
        torch.mv(wide_RD.copy_(vectors_RD), query_D, out=rough_R)
    rough_MR.masked_fill_(rows_MR < 0, -torch.inf)
    hopeful_MH = rough_MR.topk(min(k + SPARE, candidates), dim=1, sorted=False).indices
    rows_MH = rows_MR.gather(1, hopeful_MH)
    flat = (hopeful_MH + candidates * torch.arange(count)[:, None]).flatten()
    exact_PD = vectors_MRD.flatten(0, 1).index_select(0, flat).float().double()
    exact_MHD = exact_PD.view(*hopeful_MH.shape, -1).mul_(queries_MD.double()[:, None])
    scores_MH = exact_MHD.sum(dim=2).float().masked_fill_(rows_MH < 0, -torch.inf)
    # By score, and what is equal by row: two sorts, of which the last counts most.
    rows_MH, order_MH = rows_MH.sort(dim=1)
    scores_MH, by_score_MH = scores_MH.gather(1, order_MH).sort(dim=1, descending=True, stable=True)
    return scores_MH[:, :k], rows_MH.gather(1, by_score_MH)[:, :k]
