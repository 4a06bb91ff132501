"""The second step of exact search: the pairs that may win, scored in float64 and put in order.

M queries, D dimensions, K neighbours, P pairs of a query and a stored vector.
"""

import torch
from torch import Tensor

from mmalign.kernels.screens import Corpus

# Pairs scored at once, so that their vectors stay in the cache of a CPU, or fill a GPU.
CPU_PAIRS, GPU_PAIRS = 1 << 9, 1 << 17
LINED_UP = 32


def exact_scores(queries_MD: Tensor, corpus: Corpus, query_P: Tensor, rows_P: Tensor) -> Tensor:
    """Inner products with float64 queries, rounded to float32."""
    scores_P = torch.empty(len(rows_P), device=rows_P.device)
    on_cpu = rows_P.device.type == "cpu"
    for first, shard in corpus.numbered():
        inside = ((rows_P >= first) & (rows_P < first + len(shard))).nonzero()[:, 0]
        # A CPU multiplies many vectors of one query at a time, if there are many; a GPU any.
        lined_up = on_cpu and len(inside) > LINED_UP * len(queries_MD)
        at_once = CPU_PAIRS if on_cpu else GPU_PAIRS
        lots = _by_query(query_P, inside) if lined_up else inside.split(at_once)
        for lot in lots:
            vectors_PD = shard[(rows_P[lot] - first).to(shard.device)].to(rows_P.device).double()
            if lined_up:
                scores_P[lot] = (vectors_PD @ queries_MD[query_P[lot[0]]]).float()
            else:
                scores_P[lot] = (vectors_PD * queries_MD[query_P[lot]]).sum(dim=1).float()
    return scores_P


def _by_query(query_P: Tensor, chosen: Tensor) -> list[Tensor]:
    """Split pairs into lots of one query."""
    order = query_P[chosen].argsort(stable=True)
    _, counts = query_P[chosen].unique(return_counts=True)
    lots: list[Tensor] = []
    for lot in chosen[order].split(counts.tolist()):
        lots.extend(lot.split(CPU_PAIRS))
    return lots


def best_pairs(
    query_P: Tensor, rows_P: Tensor, scores_P: Tensor, shape: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """The k best pairs of each query: by score, then by row; the filling of empty places last."""
    count, k = shape
    order = rows_P.argsort(stable=True)
    order = order[scores_P[order].argsort(descending=True, stable=True)]
    order = order[query_P[order].argsort(stable=True)]
    starts_M = torch.searchsorted(query_P[order], torch.arange(count, device=order.device))
    chosen_MK = order[starts_M[:, None] + torch.arange(k, device=order.device)]
    return scores_P[chosen_MK], rows_P[chosen_MK]
