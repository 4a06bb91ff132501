"""The second step of exact search: candidates are scored in float64 and sorted.

Shapes: M queries, D dimensions, K neighbours, P (query, stored vector) pairs.
"""

from functools import reduce

import torch
from torch import Tensor

from mmalign.kernels.screens import Corpus

# Pairs whose vectors are gathered at once: some megabytes on a CPU, enough to fill a GPU.
CPU_PAIRS, GPU_PAIRS = 1 << 15, 1 << 17


def exact_scores(queries_MD: Tensor, corpus: Corpus, query_P: Tensor, rows_P: Tensor) -> Tensor:
    """Compute inner products with the queries in float64, rounded to float32."""
    scores_P = torch.empty(len(rows_P), device=rows_P.device)
    if not len(rows_P):
        return scores_P
    on_cpu = rows_P.device.type == "cpu"
    for chunk in query_P.argsort(stable=True).split(CPU_PAIRS if on_cpu else GPU_PAIRS):
        vectors_PD = _gather(corpus, rows_P[chunk])
        if on_cpu:
            # A CPU is fastest when all vectors of one query are handled together.
            query_numbers, counts = query_P[chunk].unique_consecutive(return_counts=True)
            parts = zip(query_numbers.tolist(), vectors_PD.split(counts.tolist()), strict=True)
            scores_P[chunk] = torch.cat(
                [_to_float64(v_PD) @ queries_MD[m] for m, v_PD in parts]
            ).float()
        else:
            scores_P[chunk] = (
                (_to_float64(vectors_PD) * queries_MD[query_P[chunk]]).sum(dim=1).float()
            )
    return scores_P


def _gather(corpus: Corpus, rows_P: Tensor) -> Tensor:
    """Gather the vectors of some rows, wherever their shards lie, shape (P, D)."""
    dtype = reduce(torch.promote_types, corpus.dtypes)
    vectors_PD = torch.empty(len(rows_P), corpus.dim, dtype=dtype, device=rows_P.device)
    for first, shard in corpus.with_first_rows():
        positions = ((rows_P >= first) & (rows_P < first + len(shard))).nonzero()[:, 0]
        if len(positions):
            selected = shard.index_select(0, (rows_P[positions] - first).to(shard.device))
            vectors_PD[positions] = selected.to(vectors_PD)
    return vectors_PD


def _to_float64(vectors_PD: Tensor) -> Tensor:
    """Convert to float64, via float32: torch is slow at the direct cast from float16."""
    return (vectors_PD if vectors_PD.dtype == torch.float64 else vectors_PD.float()).double()


def best_pairs(
    query_P: Tensor, rows_P: Tensor, scores_P: Tensor, shape: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """Return the k best pairs of each query: by score, then by row; padding comes last."""
    count, k = shape
    order = rows_P.argsort(stable=True)
    order = order[by_query(query_P[order], scores_P[order])]
    starts_M = torch.searchsorted(query_P[order], torch.arange(count, device=order.device))
    chosen_MK = order[starts_M[:, None] + torch.arange(k, device=order.device)]
    return scores_P[chosen_MK], rows_P[chosen_MK]


def by_query(query_P: Tensor, values_P: Tensor) -> Tensor:
    """Order pairs by query, largest float32 values first; ties keep their order.

    One integer sort, which is ten times as fast in torch as two sorts of floats.
    """
    bits_P = (values_P + 0.0).view(torch.int32)  # -0.0 equals 0.0
    ascending_P = torch.where(bits_P < 0, bits_P ^ 0x7FFFFFFF, bits_P)
    return ((query_P << 32) - ascending_P).argsort(stable=True)
