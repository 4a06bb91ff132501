"""Exact scores of a few candidates: the second half of an approximate search.

Shapes: M queries, R candidates per query, D dimensions, K neighbours.
"""

import torch
from torch import Tensor

from mmalign.errors import VectorError

# Candidates beyond k that are scored in float64, as float32 may order neighbours differently.
SPARE = 6
# Elements widened at once, so that they stay in the CPU cache.
AT_ONCE = 1 << 18
# Up to this many elements, float64 for all is faster than preselecting candidates.
FEW = 1 << 15


def best_candidates(
    queries_MD: Tensor, vectors_MRD: Tensor, rows_MR: Tensor, k: int
) -> tuple[Tensor, Tensor]:
    """Score the candidates of each query exactly and keep the k best.

    A score is that of `topk`: the float32 nearest to the inner product in float64.

    Args:
        queries_MD: Queries of unit norm, shape (M, D).
        vectors_MRD: Their candidates, shape (M, R, D), any floating type.
        rows_MR: The row number of each candidate, shape (M, R); -1 means no candidate.
        k: Neighbours per query.

    Returns:
        scores (M, K) float32, best first, and rows (M, K) int64. Ties are sorted by row; with fewer
        than k candidates, the remaining places have a score of -inf and row -1.

    Raises:
        VectorError: The shapes do not fit.
    """
    count, candidates = rows_MR.shape
    if vectors_MRD.shape != (count, candidates, queries_MD.shape[-1]) or len(queries_MD) != count:
        shapes = [tuple(x.shape) for x in (queries_MD, vectors_MRD, rows_MR)]
        raise VectorError(f"shapes of queries, candidates and rows do not match: {shapes}")
    width = min(k, candidates)
    if vectors_MRD.numel() <= FEW and width == k:
        return _best(queries_MD.float(), vectors_MRD, rows_MR, k)
    scores_MK = torch.full((count, k), -torch.inf)
    found_MK = torch.full((count, k), -1, dtype=torch.int64)
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
    """Return the k best of a few queries, scored and sorted in float64."""
    if rows_MR.shape[1] > k + SPARE and vectors_MRD.numel() > FEW:
        vectors_MRD, rows_MR = _candidates(queries_MD, vectors_MRD, rows_MR, k + SPARE)
    exact_MRD = vectors_MRD.float().double().mul_(queries_MD.double()[:, None])
    scores_MR = exact_MRD.sum(dim=2).float().masked_fill_(rows_MR < 0, -torch.inf)
    # By score, ties by row: two stable sorts, with the primary key last.
    rows_MR, order_MR = rows_MR.sort(dim=1)
    scores_MR, by_score_MR = scores_MR.gather(1, order_MR).sort(dim=1, descending=True, stable=True)
    return scores_MR[:, :k], rows_MR.gather(1, by_score_MR)[:, :k]


def _candidates(
    queries_MD: Tensor, vectors_MRD: Tensor, rows_MR: Tensor, count_kept: int
) -> tuple[Tensor, Tensor]:
    """Return vectors and rows of each query's best candidates by float32 score."""
    count, candidates = rows_MR.shape
    # In a loop: torch is slow at batched products of many small matrices.
    rough_MR, wide_RD = torch.empty(count, candidates), torch.empty(vectors_MRD.shape[1:])
    for rough_R, vectors_RD, query_D in zip(rough_MR, vectors_MRD, queries_MD, strict=True):
        torch.mv(wide_RD.copy_(vectors_RD), query_D, out=rough_R)
    rough_MR.masked_fill_(rows_MR < 0, -torch.inf)
    candidates_MH = rough_MR.topk(count_kept, dim=1, sorted=False).indices
    flat = (candidates_MH + candidates * torch.arange(count)[:, None]).flatten()
    vectors_PD = vectors_MRD.flatten(0, 1).index_select(0, flat)
    return vectors_PD.view(*candidates_MH.shape, -1), rows_MR.gather(1, candidates_MH)
